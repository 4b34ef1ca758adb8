"""Tables and a chart of `mlx-gemma4 bench --vs` runs.

    python benchmarks/tables.py [docs/benchmarks]

In: the JSON files of a folder, and those of `benchmarks/loading.py` in its folder `loading`. Out: `tables.md`,
`speed.svg` and, of replies at once, `batch.svg` beside them. Of files with the same cell on the same chip, one with
llama.cpp counts, then the later run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from mlx_gemma4.doctor.published import PUBLISHED

ORDER = tuple(PUBLISHED)
# Ours to llama.cpp's; "": any other model.
TARGETS = {"decode": {"31B": 1.35, "": 1.2}, "prefill": {"31B": 1.0, "": 0.9}, "batch": {"31B": 1.5, "": 1.5}}
OURS, THEIRS, INK, FAINT = "#c2410c", "#475569", "#0f172a", "#cbd5e1"
# The projection for Macs: shares and times that nobody has measured with this program.
# Peak memory bandwidths in GB/s, as Apple's announcements and technical specifications (support.apple.com) of the Macs
# with these chips give them. Where the GPU's size makes a difference, each has its row.
BANDWIDTHS = {
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max (30-core GPU)": 300,
    "M3 Max (40-core GPU)": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max (32-core GPU)": 410,
    "M4 Max (40-core GPU)": 546,
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max (32-core GPU)": 460,
    "M5 Max (40-core GPU)": 614,
}
REACHED, LAUNCH = 0.85, 2e-6  # of a chip's published bandwidth, by kernels; seconds between two of them
PROJECTED_AT = 512  # tokens of context
# Tokens a second on an M5 Max at 512 tokens that others have published: llama.cpp, mlx-lm.
OTHERS = {"E2B": (177, 210), "E4B": (114, 134), "26B-A4B": (103, 125), "31B": (25.3, 28.3)}
PANEL_W, PANEL_H, LEFT, TOP, COLUMNS = 300, 210, 46, 40, 3  # of the chart, in pixels


def read(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The runs of a folder by date, and their cells, each with its chip; of equal ones the one that counts."""
    runs = []
    for file in sorted([*folder.glob("*.json"), *folder.glob("loading/*.json")]):
        run = json.loads(file.read_text())
        if isinstance(run, dict) and any(isinstance(run.get(key), list) for key in ("cells", "loading")):
            runs.append({**run, "name": file.relative_to(folder).as_posix()})
    runs.sort(key=lambda run: str(run.get("date", "")))
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for cell in run.get("cells", ()):
            which = cell.get("parallel"), cell.get("what")
            key = (run.get("chip"), cell["model"], cell["kind"], cell["context"], cell["kv"], *which)
            if cell.get("llama_cpp") or not last.get(key, {}).get("llama_cpp"):
                last[key] = {**cell, "chip": run.get("chip", "?")}
    cells = sorted(
        last.values(),
        key=lambda c: (c["chip"], _place(c["model"]), c["kv"] != "full", c["kv"], c["context"], c.get("parallel", 1)),
    )
    return runs, cells


def _place(model: str) -> tuple[int, str]:
    return (ORDER.index(model) if model in ORDER else len(ORDER), model)


def target(cell: dict[str, Any]) -> float:
    """The ratio that a cell is to reach."""
    targets = TARGETS[cell["kind"]]
    return targets.get(cell["model"], targets[""])


def markdown(runs: list[dict[str, Any]], cells: list[dict[str, Any]]) -> Iterator[str]:
    """tables.md, line by line."""
    yield "# Tokens a second, ours and llama.cpp's"
    yield ""
    yield "Made by `python benchmarks/tables.py` from the files in this folder. Each figure is a median of warm runs;"
    yield "ratios are ours to llama.cpp's, both in the same run on the same file. A ratio in bold reaches its target:"
    listed = (f"{kind} {t['31B']} for 31B, {t['']} for the others" for kind, t in TARGETS.items())
    yield f"{'; '.join(listed)}."
    yield ""
    yield "![Tokens a second against context](speed.svg)"
    if any(c["kind"] == "batch" for c in cells):
        yield ""
        yield "![Tokens a second against replies at once](batch.svg)"
    for chip in dict.fromkeys(c["chip"] for c in cells):
        for kind, title in (("decode", "decode at a context of"), ("prefill", "prompts of")):
            some = [c for c in cells if c["chip"] == chip and c["kind"] == kind]
            if some:
                yield ""
                yield f"## {chip}: {title} so many tokens"
                yield ""
                yield from _matrix(some, "context")
        for context in sorted({c["context"] for c in cells if c["chip"] == chip and c["kind"] == "batch"}):
            yield ""
            yield f"## {chip}: so many replies at once, behind prompts of {context} tokens, all together"
            yield ""
            batch = [c for c in cells if (c["chip"], c["kind"], c["context"]) == (chip, "batch", context)]
            yield from _matrix(batch, "parallel")
        yield from _two_gpus(chip, [c for c in cells if (c["chip"], c["kind"]) == (chip, "two-gpus")])
    detailed = [c for c in cells if c.get("bytes_per_token")]
    if detailed:
        yield from ["", "## What a decoded token takes", ""]
        yield "The share is of what a large copy reads and writes a second on the same chip; host time is what building"
        yield "and scheduling a step takes, nothing waited for. KV MB: what our state holds at that depth, and what"
        yield "llama.cpp sets aside for as many tokens and the reply. Peak: our weights, state and all else at once."
        yield ""
        head = ["chip", "model", "KV", "context", "MB", "share", "launches", "host ms", "KV MB", "peak GB"]
        yield from _rows(head, map(_detail, detailed))
    yield from _loading([run for run in runs if "loading" in run])
    yield from _projection(detailed)
    yield from ["", "## Runs", ""]
    yield from _rows(["file", "date", "chip", "versions", "command"], map(_run, runs))


def _two_gpus(chip: str, cells: list[dict[str, Any]]) -> Iterator[str]:
    """Models down; prompts, then replies behind so many tokens, across: of two GPUs, and of one in the same run."""
    if not cells:
        return
    yield from ["", f"## {chip}: a model in two parts, over NCCL / on one of the GPUs", ""]
    columns = sorted({(c["what"], c["context"]) for c in cells}, key=lambda c: (c[0] != "prompt", c[1]))
    rows = []
    for model in dict.fromkeys(c["model"] for c in cells):
        by = {(c["what"], c["context"]): c for c in cells if c["model"] == model}
        rows.append([model, *(_beside(by.get(column)) for column in columns)])
    yield from _rows(["model", *(f"{what} of {n}" if what == "prompt" else f"at {n}" for what, n in columns)], rows)


def _beside(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    two, one = (f"{rate:.{0 if rate >= 1000 else 1}f}" if rate else "" for rate in (cell["ours"], cell["one"]))
    return f"{two} / {one} = {cell['ratio']:.2f}" if one else two


def _matrix(cells: list[dict[str, Any]], across: str) -> Iterator[str]:
    """Models down, contexts or numbers of replies across."""
    numbers = sorted({c[across] for c in cells})
    by = {(c["model"], c["kv"], c[across]): c for c in cells}
    lines = dict.fromkeys((c["model"], c["kv"]) for c in cells)
    rows = ([model, kv, *(_figure(by.get((model, kv, n))) for n in numbers)] for model, kv in lines)
    yield from _rows(["model", "KV", *map(str, numbers)], rows)


def _figure(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    ours = f"{cell['ours']:.{0 if cell['ours'] >= 1000 else 1}f}"
    if not cell.get("llama_cpp"):
        return ours
    ratio = f"{cell['ratio']:.2f}"
    if cell["ratio"] >= target(cell):
        ratio = f"**{ratio}**"
    return f"{ours} / {cell['llama_cpp']:.{0 if cell['ours'] >= 1000 else 1}f} = {ratio}"


def _detail(cell: dict[str, Any]) -> list[str]:
    launches, host = cell.get("launches"), cell.get("host_time")
    held = (cell.get(name) for name in ("kv_memory", "llama_cpp_kv_memory"))
    return [
        cell["chip"],
        cell["model"],
        cell["kv"],
        str(cell["context"]),
        f"{cell['bytes_per_token'] / 1e6:.0f}",
        f"{cell['share_of_copy']:.0%}",
        "" if launches is None else str(launches),
        "" if host is None else f"{host * 1e3:.2f}",
        " / ".join(f"{n / 1e6:.0f}" for n in held if n),
        f"{cell['peak_memory'] / 1e9:.2f}",
    ]


def _loading(runs: list[dict[str, Any]]) -> Iterator[str]:
    if not runs:
        return
    yield from ["", "## Loading", ""]
    yield "Seconds from the start of a process to its first token, ours / llama.cpp's, in turns, with the file's pages"
    yield "in the system's cache and not; of ours, loading alone in brackets."
    yield ""
    head = ["file", "chip", "GB", "not cached", "cached"]
    yield from _rows(head, map(_load, runs))


def _load(run: dict[str, Any]) -> list[str]:
    by = {}  # whether the file was cached -> what was seen, the first of equal ones
    for row in reversed(run["loading"]):
        by[row["cached"] > 0.5] = " / ".join(f"{s:.1f}" for s in row["seconds"].values()) + f" ({row['load_time']:.1f})"
    return [run["file"], run["chip"], f"{run['bytes'] / 1e9:.1f}", by.get(False, ""), by.get(True, "")]


def _projection(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the projection for Macs from the counted bytes and launches."""
    some = {c["model"]: c for c in cells if (c["kv"], c["context"]) == ("full", PROJECTED_AT) and c.get("launches")}
    if not some:
        return
    yield from ["", f"## Projection for Macs, decode at {PROJECTED_AT} tokens: nothing here is measured", ""]
    yield f"Tokens a second if kernels reach {REACHED:.0%} of a chip's published bandwidth and {LAUNCH * 1e6:g} us pass"
    yield "between one and the next, both assumed: 1 / (bytes / bandwidth + launches x time), of the bytes and launches"
    yield "in the table above. The last rows are what others have published for llama.cpp and mlx-lm. The truth comes"
    yield "from Mac owners: `mlx-gemma4 bench --model FILE.gguf --report report.json`, and send the file."
    yield ""

    def rate(cell: dict[str, Any], bandwidth: float) -> float:
        return 1 / float(cell["bytes_per_token"] / (REACHED * bandwidth) + cell["launches"] * LAUNCH)

    rows = [[chip, *(f"{rate(c, gbs * 1e9):.1f}" for c in some.values())] for chip, gbs in BANDWIDTHS.items()]
    for i, program in enumerate(("llama.cpp", "mlx-lm")):
        published = (f"{OTHERS[m][i]:g}" if m in OTHERS else "" for m in some)
        rows.append([f"M5 Max, {program}, published", *published])
    yield from _rows(["chip", *some], rows)


def _run(run: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {v}" for name, v in run.get("versions", {}).items() if v)
    name = run["name"]
    return [
        f"[{name}]({name})",
        str(run.get("date", ""))[:16],
        run.get("chip", ""),
        versions,
        f"`{run.get('command', '')}`",
    ]


def _rows(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"


def svg(cells: list[dict[str, Any]], kind: str = "decode") -> str:
    """A panel a model: decode against context, or replies at once, full KV, on the chip with the most cells."""
    some = [c for c in cells if c["kind"] == kind and c["kv"] == "full"]
    across, title = ("parallel", "of all replies at once") if kind == "batch" else ("context", "against context")
    chips = [c["chip"] for c in some]
    chip = max(chips, key=chips.count) if chips else ""
    some = [c for c in some if c["chip"] == chip]
    models = list(dict.fromkeys(c["model"] for c in some))
    width = COLUMNS * PANEL_W + 20
    height = TOP + -(-len(models) // COLUMNS) * PANEL_H + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 22, f"Decode, tokens a second {title}; {chip}", INK, size=14),
        _text(width - 190, 22, "mlx-gemma4", OURS, weight="bold"),
        _text(width - 100, 22, "llama.cpp", THEIRS, weight="bold"),
    ]
    for i, model in enumerate(models):
        x, y = 10 + i % COLUMNS * PANEL_W, TOP + i // COLUMNS * PANEL_H
        parts += _panel(model, [c for c in some if c["model"] == model], across, x, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(model: str, cells: list[dict[str, Any]], across: str, x: int, y: int) -> Iterator[str]:
    """One model: both lines over a logarithmic context or number of replies, from zero up."""
    w, h = PANEL_W - LEFT - 24, PANEL_H - 62
    left, bottom = x + LEFT, y + 24 + h
    numbers = [c[across] for c in cells]
    least = 1 if across == "parallel" else 256  # a context of 0 stands at the left edge
    logs = [math.log2(max(n, least)) for n in numbers]
    low, high = min(logs), max(max(logs), min(logs) + 1)
    top = _round_up(max(max(c["ours"], c.get("llama_cpp") or 0) for c in cells))

    def at(log: float, rate: float) -> tuple[float, float]:
        return left + w * (log - low) / (high - low), bottom - h * rate / top

    yield _text(left, y + 14, model, INK, size=13, weight="bold")
    for step in range(5):
        rate = top * step / 4
        _, line = at(low, rate)
        yield f'<line x1="{left}" y1="{line:.1f}" x2="{left + w}" y2="{line:.1f}" stroke="{FAINT}"/>'
        yield _text(left - 6, line + 4, f"{rate:g}", INK, anchor="end")
    for n, log in zip(numbers, logs, strict=True):
        yield _text(at(log, 0)[0], bottom + 15, f"{n // 1024}K" if n >= 1024 else str(n), INK, anchor="middle")
    for name, colour in (("llama_cpp", THEIRS), ("ours", OURS)):
        points = [at(log, c[name]) for c, log in zip(cells, logs, strict=True) if c.get(name)]
        if points:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for a, b in points:
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 8 times a power of ten, so that its quarters are short numbers."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * n for n in (1, 2, 4, 6, 8, 10) if unit * n >= value)


def _text(
    x: float, y: float, text: str, fill: str, *, size: int = 11, anchor: str = "start", weight: str = "normal"
) -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent.parent / "docs" / "benchmarks")
    folder = parser.parse_args().folder
    runs, cells = read(folder)
    if not cells:
        print(f"{folder}: no file with cells; write one with mlx-gemma4 bench --json", file=sys.stderr)
        return 2
    (folder / "tables.md").write_text("\n".join(markdown(runs, cells)) + "\n")
    (folder / "speed.svg").write_text(svg(cells))
    if any(c["kind"] == "batch" for c in cells):
        (folder / "batch.svg").write_text(svg(cells, "batch"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
