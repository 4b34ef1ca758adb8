"""A hub that lies: no name of its becomes a path, no more is read than was promised, and what came is checked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from mlx_gemma4.errors import InputError
from mlx_gemma4.files import hub

DATA = bytes(range(256)) * 1200  # 300 kB
SHA, GIT = hashlib.sha256(DATA).hexdigest(), hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()
COMMIT, FILE = "c" * 40, "m-Q4_K_M.gguf"


class Liar(BaseHTTPRequestHandler):
    """Serves one repository; `lie` says what is wrong about it."""

    protocol_version = "HTTP/1.1"
    lie: dict[str, Any] = {}  # noqa: RUF012 - set by each test
    sent = 0
    ranges: list[str] = []  # noqa: RUF012

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with suppress(OSError):  # the client left, as it should
            self.respond()

    def respond(self) -> None:
        lie = self.lie
        if self.path.startswith("/api/"):
            file = {"rfilename": lie.get("name", FILE), "size": lie.get("size", len(DATA))}
            about = json.dumps({"id": "a/b", "sha": lie.get("sha", COMMIT), "siblings": [file]}).encode()
            return self.send(200, lie.get("api", about), {})
        etag, size = lie.get("etag", SHA), lie.get("promised", len(DATA))
        about = {"X-Repo-Commit": lie.get("sha", COMMIT), "ETag": f'"{etag}"'} if etag is not None else {}
        if self.command == "HEAD":
            return self.send(200, b"", {**about, "X-Linked-Size": str(size)}, int(size) if str(size).isdigit() else 0)
        asked = self.headers.get("Range", "")
        self.ranges.append(asked)
        first = int(asked[6:-1]) if asked else 0
        status, body, said = lie.get("get", honest)(first, len(self.ranges))
        self.send(status, body, {"Content-Range": said} if said else {}, lie.get("length"))

    def send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        chunked = length == -1
        framing = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(length or len(body))}
        for name, value in {**framing, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for at in range(0, len(body) if self.command != "HEAD" else 0, 1 << 20):
            piece = body[at : at + (1 << 20)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            Liar.sent += len(piece)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = len(body) < (length or 0)


def honest(first: int, _: int) -> tuple[int, bytes, str]:
    return (206 if first else 200), DATA[first:], f"bytes {first}-{len(DATA) - 1}/{len(DATA)}" if first else ""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    cache = tmp_path / "deep/er/hf"
    template = "{endpoint}/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace("{endpoint}", url))
    monkeypatch.setattr(
        file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace("{endpoint}", url), raising=False
    )
    monkeypatch.setattr(hub, "WAIT", 0.001)
    monkeypatch.setattr(hub, "TRIES", 3)
    monkeypatch.setattr(Liar, "ranges", [])
    monkeypatch.setattr(Liar, "sent", 0)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield cache / "models--a--b"
    server.shutdown()
    server.server_close()


def pull(lie: dict[str, Any]) -> Path:
    Liar.lie = lie
    return hub.resolve("a/b:Q4_K_M", update=True)


@pytest.mark.parametrize(
    "lie",
    [
        {"etag": "../../../../../OWNED"},
        {"etag": "/tmp/OWNED"},
        {"etag": ""},
        {"etag": None},
        {"etag": "..\\OWNED"},
        {"etag": SHA + "/../../../OWNED"},
        {"etag": SHA.upper()},
        {"sha": "../../../../OWNED"},
        {"sha": "main"},
        {"sha": 7},
        {"name": "../../../../OWNED-Q4_K_M.gguf"},
        {"name": "/tmp/OWNED-Q4_K_M.gguf"},
        {"name": "x/../../OWNED-Q4_K_M.gguf"},
        {"name": "C:\\OWNED-Q4_K_M.gguf"},
        {"name": "a//OWNED-Q4_K_M.gguf"},
        {"name": "\x1b]0;OWNED-Q4_K_M.gguf"},
        {"name": 5},
        {"size": "x"},
        {"size": -5},
        {"size": 1.5},
        {"promised": -3},
        {"promised": "x"},
        {"api": b"[]"},
        {"api": b"{}"},
        {"api": b"null"},
        {"api": b"not JSON"},
        {"api": b"[" * 100_000},
        {"api": b'{"sha":"%s","siblings":7}' % COMMIT.encode()},
        {"api": b'{"sha":"%s","siblings":[7]}' % COMMIT.encode()},
        {"etag": "0" * 64},
        {"etag": "0" * 40},
    ],
)
def test_lies_are_refused(lie: dict[str, Any], home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        pull(lie)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600
    outside = [p for p in tmp_path.rglob("*") if home not in p.parents and not p.is_dir()]
    assert not outside
    assert not list(tmp_path.rglob("*OWNED*"))
    assert not list(home.rglob("*.part"))


@pytest.mark.parametrize("etag", [SHA, GIT, hashlib.sha1(DATA).hexdigest()])
def test_a_file_goes_by_the_hash_that_it_has(etag: str, home: Path) -> None:
    path = pull({"etag": etag})
    assert path == home / "snapshots" / COMMIT / FILE
    assert path.read_bytes() == DATA
    assert path.resolve() == (home / "blobs" / etag).resolve()
    assert path.is_symlink()
    (home / "blobs" / etag).unlink()  # its link leads nowhere then
    assert pull({"etag": etag}).read_bytes() == DATA


@pytest.mark.parametrize("length", [None, -1])
def test_no_more_is_read_than_was_promised(length: int | None, home: Path) -> None:
    more = b"A" * 100_000_000
    with pytest.raises(InputError, match="sends more than"):
        pull({"length": length, "get": lambda first, _: (200, more, "")})
    assert Liar.sent < 20_000_000
    with pytest.raises(InputError, match="tells too much"):
        pull({"api": more})


LAST = len(DATA) - 1
AFTER_206 = {  # what comes when the rest from 100,000 on is asked for
    "right": lambda first: (206, DATA[first:], f"bytes {first}-{LAST}/{len(DATA)}"),
    "shorter": lambda first: (206, DATA[first : first + 50_000], f"bytes {first}-{first + 49_999}/{len(DATA)}"),
    "size unknown": lambda first: (206, DATA[first:], f"bytes {first}-{LAST}/*"),
    "other offset": lambda first: (206, DATA[first + 7 :], f"bytes {first + 7}-{LAST}/{len(DATA)}"),
    "from the start": lambda first: (206, DATA, f"bytes 0-{LAST}/{len(DATA)}"),
    "no range": lambda first: (206, DATA[first:], ""),
    "no numbers": lambda first: (206, DATA[first:], "bytes x-y/z"),
    "another size": lambda first: (206, DATA[first:], f"bytes {first}-{LAST}/{len(DATA) + 5}"),
    "whole": lambda first: (200, DATA, ""),
    "unsatisfiable": lambda first: (416, b"", f"bytes */{len(DATA)}"),
}


@pytest.mark.parametrize("answer", AFTER_206)
def test_a_download_goes_on_right_whatever_comes(answer: str, home: Path) -> None:
    part = home / "blobs" / f"{SHA}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:100_000])
    assert pull({"get": lambda first, _: (AFTER_206[answer] if first else honest)(*(first, 0)[: 1 if first else 2])})
    assert (home / "blobs" / SHA).read_bytes() == DATA
    assert Liar.ranges[0] == "bytes=100000-"
    assert not part.exists()


def test_a_206_that_is_too_long_or_wrong_ends_with_an_error(home: Path) -> None:
    part = home / "blobs" / f"{SHA}.part"
    for wrong, says in ((DATA[100_000:] + b"!", "sends more"), (bytes(len(DATA) - 100_000), "damaged")):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(DATA[:100_000])
        body = wrong
        with pytest.raises(InputError, match=says):
            pull({"get": lambda first, _, body=body: (206, body, f"bytes {first}-{LAST}/{len(DATA)}")})
        assert not part.exists()


def test_a_server_that_never_sends_what_was_asked_for(home: Path) -> None:
    part = home / "blobs" / f"{SHA}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:100_000])
    with pytest.raises(InputError, match="another part"):
        pull({"get": lambda first, _: (206, DATA[5:], f"bytes 5-{LAST}/{len(DATA)}")})
    assert len(Liar.ranges) == 2


def test_every_byte_that_came_is_kept(home: Path) -> None:
    """A connection that breaks costs nothing that was read from it."""

    def cut(first: int, n: int) -> tuple[int, bytes, str]:
        status, body, said = honest(first, n)
        return status, body[:1000] if n < 4 else body, said

    assert pull({"get": cut, "length": len(DATA)}).read_bytes() == DATA
    assert Liar.ranges == ["", "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_a_longer_part_than_the_file_is_begun_anew(home: Path) -> None:
    part = home / "blobs" / f"{SHA}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA + b"more")
    assert pull({}).read_bytes() == DATA
