"""The server's settings, and which of its addresses others can reach."""

import ipaddress
import math
import re
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Settings:
    """The server's settings, as `serve` has them from the command line."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    allow_origin: tuple[str, ...] = ()  # of pages and extensions elsewhere that may use this server; "*": all
    allow_host: tuple[str, ...] = ()  # names beside those of this machine that requests may call it by
    connections: int = 512  # requests at a time; /health is answered beside them
    model_name: str = "gemma"  # in replies and /v1/models
    parallel: int = 4  # replies made at a time
    exact: bool = False  # they take turns, each to the bit as it would be alone
    queue: int = 32  # requests that may wait beside them
    max_kv_bytes: int | None = None  # of all KV states; None: no limit
    kv: str = "full"  # how KV states hold keys and values
    max_body_bytes: int = 80_000_000
    allow_remote_images: bool = False  # requests may name pictures on the web
    skip_media: bool = False  # what the model can't take is left out, never refused
    image_tokens: int | None = None  # of a picture whose request doesn't say; None: as its reference has it
    max_tokens: int | None = None  # of a reply whose request doesn't say; None: what the context holds
    think_budget: int | None = None  # tokens of thinking, likewise; None: no bound

    def __post_init__(self) -> None:
        if self.api_key is None and not is_loopback(self.host):
            raise InputError(f"--host {self.host}: others can reach this address; give an --api-key, or use 127.0.0.1")
        for origin in self.allow_origin:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\sA-Z]+", origin):
                raise InputError(f"--allow-origin {origin}: write it as https://example.com, in lower case, no path")
        for name in self.allow_host:
            if not host_name(name):
                raise InputError(f"--allow-host {name}: write it as host.docker.internal, a name alone")


def host_name(host: str) -> str | None:
    """Return the name in a header Host, in lower case and without the port, or None if the header is none."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(:\d{0,5})?", host.lower(), re.ASCII)
    return found[1] if found else None


def is_loopback(host: str) -> bool:
    """Returns True if only programs on this machine can reach an address or name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def seconds(value: float | str) -> float:
    """Return the seconds of "10m", "1h30m" or a number of them; negative is endless. Raises ValueError."""
    if isinstance(value, str) and not re.fullmatch(r"-?[\d.]+", value, re.ASCII):
        parts = re.findall(r"([\d.]+)(ms|h|m|s)", value, re.ASCII)
        if not parts or "".join(map("".join, parts)) != value.removeprefix("-"):
            raise ValueError("be a length of time such as 10m, 1h30m or 0, or -1 for ever")
        units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
        value = sum(float(n) * units[unit] for n, unit in parts) * (-1 if value[0] == "-" else 1)
    return math.inf if float(value) < 0 else float(value)
