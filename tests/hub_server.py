"""A server on this machine that speaks as much of the Hugging Face hub's protocol as a download takes.

In: repositories, as files in memory, and faults to make. Out: its address, and what it was asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the server has. Faults may be set at any time."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)  # repositories that want the token "hf_good"
    status: int = 0  # answer everything with it
    cuts: list[int] = field(default_factory=list)  # of the next downloads: close the connection after so many bytes
    ranges: bool = True
    damage: bool = False  # send other bytes than were promised
    log: list[str] = field(default_factory=list)  # "GET file bytes=5-"
    url: str = ""

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def downloads(self) -> list[str]:
        return [line for line in self.log if line.startswith("GET /blob")]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.hub.log.append(" ".join(filter(None, (self.command, path, self.headers.get("Range")))))
        if self.hub.status:
            return self.answer(self.hub.status, b"out of order")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self.model_info(match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/blob/(\w+)", path):
            return self.blob(match[1])
        return self.answer(404, b"no such page")

    def known(self, repo: str) -> bool:
        """Whether it may be seen; else answers as the hub does, which tells no difference from a private one."""
        if repo in self.hub.repos:
            return True
        self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return False

    def model_info(self, repo: str) -> None:
        if self.known(repo):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.hub.repos[repo].items()]
            body = {"id": repo, "sha": self.hub.commit(repo), "siblings": siblings, "gated": repo in self.hub.gated}
            self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def resolve(self, repo: str, revision: str, file: str) -> None:
        """Where a file is: a large one elsewhere, named by its hash."""
        if not self.known(repo):
            return
        if repo in self.hub.gated and self.headers.get("Authorization") != "Bearer hf_good":
            self.answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return
        data = self.hub.repos[repo].get(file)
        commit = self.hub.commit(repo)
        if data is None or revision not in ("main", commit):
            code = "EntryNotFound" if data is None else "RevisionNotFound"
            self.answer(404, b"", {"X-Error-Code": code, "X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit}
        if file.endswith(".json"):
            self.answer(200, data, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
            return
        digest = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "Location": f"/blob/{digest}"}
        self.answer(
            302, b"", {**headers, "Location": f"http://localhost:{self.server.server_address[1]}/blob/{digest}"}
        )

    def blob(self, digest: str) -> None:
        """The bytes, on another host as far as a client can tell, which must not be shown the token."""
        if self.headers.get("Authorization"):
            self.answer(400, b"a token where none belongs")
            return
        everything = (data for files in self.hub.repos.values() for data in files.values())
        data = next(d for d in everything if hashlib.sha256(d).hexdigest() == digest)
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start, status, headers = 0, 200, {"ETag": f'"{digest}"'}
        if first and self.hub.ranges:
            start, status = int(first[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if self.hub.damage:
            body = bytes(len(body))
        self.answer(status, body, headers, self.hub.cuts.pop(0) if self.hub.cuts else None)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            self.wfile.flush()
        if cut is not None:
            self.close_connection = True
