"""The page to chat in a browser: one file on the wire, and headers that let it do nothing else.

In: index.html and the scripts that it names, those of others in vendor/ (versions and licences are in a file there).
Out: the page's bytes, and the headers to send with them.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page in UTF-8, and its headers: only its own scripts and styles run, and it talks to this server alone."""
    html = (files(__name__) / "index.html").read_bytes()
    styles = [_hash(text) for text in re.findall(rb"<style>(.*?)</style>", html, re.DOTALL)]
    scripts: list[str] = []

    def inlined(found: re.Match[bytes]) -> bytes:
        text = b"\n" + (files(__name__) / found[1].decode()).read_bytes()
        scripts.append(_hash(text))
        return b"<script>" + text + b"</script>"

    body = re.sub(rb'<script src="([\w./-]+\.js)"></script>', inlined, html)
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
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
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return body, headers


def _hash(text: bytes) -> str:
    """An inline element's text, as a Content-Security-Policy names it (CSP level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
