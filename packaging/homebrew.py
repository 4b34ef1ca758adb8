"""Fill in the Homebrew formula beside this file: the wheel of this version, and the wheels of all that it depends on.

    python packaging/homebrew.py dist/mlx_gemma4-0.2.0-py3-none-any.whl > mlx-gemma4.rb

In: the wheel that a release publishes. Out: the formula on standard output, its resources what `uv pip compile` finds
for a Mac with Apple silicon, macOS 14 and Python 3.13. Needs uv, and Python 3.11 or newer.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
FORMULA = HERE / "mlx-gemma4.rb"
START, END = "  # resources: packaging/homebrew.py writes them\n", "  # end of resources\n"
TARGET = ("--python-platform", "aarch64-apple-darwin", "--python-version", "3.13", "--only-binary", ":all:")


def resolved() -> list[tuple[str, str, str]]:
    """Return name, address and SHA-256 of the wheel of each package that pyproject.toml calls for on a Mac."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "pylock.toml"
        command = ["uv", "pip", "compile", "-q", *TARGET, "--format", "pylock.toml", "-o", str(lock)]
        environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
        subprocess.run(
            [*command, str(HERE.parent / "pyproject.toml")], env=environment, check=True, stdout=subprocess.DEVNULL
        )
        packages = tomllib.loads(lock.read_text())["packages"]
    wheels = [(package["name"], package["wheels"][0]) for package in packages]
    return [(name, wheel["url"], wheel["hashes"]["sha256"]) for name, wheel in wheels]


def filled(formula: str, wheel: Path, resources: list[tuple[str, str, str]]) -> str:
    """Return the formula of a wheel, with resources in place of those that it has."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    # PyPI serves each project's files under this address too, which needs no hash to be known.
    url = f"https://files.pythonhosted.org/packages/py3/m/mlx-gemma4/{wheel.name}"
    formula = re.sub(r'^  url ".*"', f'  url "{url}"', formula, count=1, flags=re.MULTILINE)
    formula = re.sub(r'^  sha256 ".*"', f'  sha256 "{digest}"', formula, count=1, flags=re.MULTILINE)
    written = [
        f'  resource "{n}" do\n    url "{u}", using: :nounzip\n    sha256 "{h}"\n  end\n' for n, u, h in resources
    ]
    return formula[: formula.index(START)] + START + "\n".join(written) + formula[formula.index(END) :]


if __name__ == "__main__":
    sys.stdout.write(filled(FORMULA.read_text(), Path(sys.argv[1]), resolved()))
