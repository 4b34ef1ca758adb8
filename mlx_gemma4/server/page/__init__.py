"""The page to chat in a browser: one file on the wire, and headers that let it do nothing else.

In: index.html, and beside it the scripts that it names. Out: the page's bytes, and the headers to send with them.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page in UTF-8, and its headers: only its own scripts and styles run, and it talks to this server alone."""

    def inlined(found: re.Match[bytes]) -> bytes:
        return b"<script>\n" + (files(__name__) / found[1].decode()).read_bytes() + b"</script>"

    body = re.sub(rb'<script src="(\w+\.js)"></script>', inlined, (files(__name__) / "index.html").read_bytes())
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        f"script-src {_hashes(body, b'script')}",
        f"style-src {_hashes(body, b'style')}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return body, headers


def _hashes(body: bytes, tag: bytes) -> str:
    """The inline elements of one kind, as a Content-Security-Policy names them (CSP level 3, section 2.3.1)."""
    found = re.findall(rb"<%b[^>]*>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)
