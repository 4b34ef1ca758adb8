"""The page to chat in a browser: one file on the wire, and headers that let it do nothing else.

In: index.html, the styles and scripts that it names, those of others in vendor/ (versions and licences: a file there).
Out: the page's bytes, and the headers to send with them.
"""

import base64
import gzip
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

_PLACE = re.compile(rb'<script src="([\w./-]+\.js)"></script>|<link rel="stylesheet" href="([\w./-]+\.css)">')
_FONT = re.compile(rb"@font-face\{[^}]*?url\(fonts/([\w-]+\.woff2)\)[^}]*\}")


def page(asked: Mapping[str, str] = MappingProxyType({})) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers for a request with these headers: packed where that is accepted, 304 for what it has.

    Only the page's own scripts and styles run, and it talks to this server alone.
    """
    body, headers = _made()
    if headers["ETag"] in asked.get("if-none-match", ""):
        return 304, b"", headers
    if "gzip" in asked.get("accept-encoding", ""):
        return 200, _packed(), headers | {"Content-Encoding": "gzip"}
    return 200, body, headers


@cache
def _made() -> tuple[bytes, dict[str, str]]:
    scripts: list[str] = []
    styles: list[str] = []

    def inlined(found: re.Match[bytes]) -> bytes:
        script, style = found.groups()
        text = b"\n" + (files(__name__) / (script or style).decode()).read_bytes()
        if script:
            scripts.append(_hash(text))
            return b"<script>" + text + b"</script>"
        text = _FONT.sub(_with_font, text)
        styles.append(_hash(text))
        return b"<style>" + text + b"</style>"

    body = _PLACE.sub(inlined, (files(__name__) / "index.html").read_bytes())
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        "media-src data:",
        "font-src data:",
        f"script-src {' '.join(scripts)}",
        f"style-src {' '.join(styles)}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Vary": "Accept-Encoding",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return body, headers


@cache
def _packed() -> bytes:
    return gzip.compress(_made()[0], mtime=0)


def _with_font(face: re.Match[bytes]) -> bytes:
    """A font's rule with the font in it; nothing for a font that vendor/fonts doesn't have."""
    font = files(__name__) / "vendor" / "fonts" / face[1].decode()
    if not font.is_file():
        return b""
    data = b"url(data:font/woff2;base64," + base64.b64encode(font.read_bytes()) + b') format("woff2")'
    return re.sub(rb"src:[^}]*", b"src:" + data, face[0])


def _hash(text: bytes) -> str:
    """An inline element's text, as a Content-Security-Policy names it (CSP level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
