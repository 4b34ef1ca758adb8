"""Pictures, sounds and videos in requests of every API: they become content parts with their bytes, or are refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import mlx.core as mx
import pytest
from pictured import FakeMedia, seeing
from PIL import Image
from recorded import HERE
from serving import Serving, serving, until

from mlx_gemma4.conversation.language_model import LanguageModel, load
from mlx_gemma4.media.kind import kind_of
from mlx_gemma4.media.layers import by_layers
from mlx_gemma4.model.soft import Encoded
from mlx_gemma4.server import anthropic, completions, fields, media, ollama, remote, responses, stored
from mlx_gemma4.server.settings import Settings
from mlx_gemma4.server.wire import ApiError

PNG, WAV, MP4 = b"\x89PNG\r\n\x1a\nrest", b"RIFF1234WAVErest", b"\0\0\0\x20ftypisomrest"
B64 = {data: base64.b64encode(data).decode() for data in (PNG, WAV, MP4)}
URL = f"data:image/png;base64,{B64[PNG]}"
TEXT = {"type": "text", "text": "What is it?"}
CHAT = "/v1/chat/completions"


def taken(messages: list[dict[str, Any]], kinds: tuple[str, ...] = ("image", "audio", "video"), **settings: Any) -> Any:
    """The messages as a model that takes these kinds gets them."""
    lm = (
        SimpleNamespace(media=SimpleNamespace(kinds=kinds), path=None)
        if kinds
        else SimpleNamespace(media=None, path=None)
    )
    engine: Any = SimpleNamespace(lm=lm, settings=Settings(**settings))
    return asyncio.run(media.received(messages, engine))


def chat(*parts: dict[str, Any], **more: Any) -> list[Any]:
    """The parts of a chat's one message."""
    body = fields.parse(completions.ChatRequest, {"messages": [{"role": "user", "content": [*parts, TEXT]}]})
    (message,) = taken(completions._messages(body), **more)
    assert isinstance(message["content"], list)
    assert message["content"][-1] == TEXT
    return message["content"][:-1]


@pytest.mark.parametrize(
    ("part", "kind", "data"),
    [
        ({"type": "image_url", "image_url": {"url": URL}}, "image", PNG),
        ({"type": "image_url", "image_url": URL}, "image", PNG),
        ({"type": "input_image", "image_url": URL}, "image", PNG),
        ({"type": "input_audio", "input_audio": {"data": B64[WAV], "format": "wav"}}, "audio", WAV),
        ({"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{B64[WAV]}"}}, "audio", WAV),
        ({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{B64[MP4]}"}}, "video", MP4),
        ({"type": "file", "file": {"filename": "a.bin", "file_data": URL}}, "image", PNG),
        ({"type": "file", "file": {"filename": "a.wav", "file_data": B64[WAV]}}, "audio", WAV),
        ({"type": "file", "file": {"file_data": "data:video/mp4;codecs=avc1;base64,AAAA"}}, "video", b"\0\0\0"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64," + "\n".join(B64[PNG])}}, "image", PNG),
    ],
)
def test_a_part_becomes_its_bytes(part: dict[str, Any], kind: str, data: bytes) -> None:
    assert chat(part) == [{"type": kind, kind: data}]


def test_detail_and_tokens_say_how_much_is_seen() -> None:
    def asked(**more: Any) -> Any:
        return chat({"type": "image_url", "image_url": {"url": URL, **more}}, image_tokens=140)[0]["tokens"]

    assert [asked(detail=detail) for detail in ("low", "auto", "high")] == [70, 140, 1120]
    assert asked(tokens=560, detail="low") == 560 and asked() == 140
    assert chat({"type": "image_url", "image_url": {"url": URL}, "tokens": 280})[0]["tokens"] == 280
    assert "tokens" not in chat({"type": "image_url", "image_url": {"url": URL}})[0]
    with pytest.raises(
        ApiError, match=r"messages\[0\].content\[0\].tokens must be one of 70, 140, 280, 560, 1120, not 3"
    ):
        asked(tokens=3)


def test_order_is_kept_and_texts_stay_parts() -> None:
    made = chat(
        {"type": "text", "text": "First"}, {"type": "image_url", "image_url": URL}, {"type": "text", "text": "then"}
    )
    assert [part["type"] for part in made] == ["text", "image", "text"]


def test_images_of_anthropic_also_in_results() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": B64[PNG]}}
    use = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    results = {"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": [TEXT, image]}
    talk = [
        {"role": "user", "content": [image, TEXT]},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [results, image]},
    ]
    body = fields.parse(anthropic.CountRequest, {"model": "m", "messages": talk})
    first, _, result, last = taken(anthropic.read_messages(body))
    assert first["content"] == [{"type": "image", "image": PNG}, TEXT]
    assert result["role"] == "tool" and result["name"] == "look"
    assert result["content"] == [{"type": "text", "text": "Error:"}, TEXT, {"type": "image", "image": PNG}]
    assert last["content"] == [{"type": "image", "image": PNG}]


def test_images_of_responses_and_of_their_results() -> None:
    image = {"type": "input_image", "image_url": URL, "detail": "low"}
    items = [
        {"role": "user", "content": [image, {"type": "input_text", "text": "Hm?"}]},
        {"type": "function_call", "name": "look", "call_id": "c", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [image]},
    ]
    body = fields.parse(responses.ResponsesRequest, {"input": items})
    asked, _, result = taken(responses._messages(body, []))
    assert asked["content"] == [{"type": "image", "image": PNG, "tokens": 70}, {"type": "text", "text": "Hm?"}]
    assert result["role"] == "tool" and result["content"] == [{"type": "image", "image": PNG, "tokens": 70}]
    again = fields.parse(responses.ResponsesRequest, {"input": "And now?"})
    kept = taken(responses._messages(again, [asked]))
    assert kept[0] == asked  # what a stored response keeps is taken as it is


def test_images_of_ollama_are_known_by_their_bytes() -> None:
    message = ollama.Message(role="user", content="Hm?", images=[B64[PNG], B64[WAV], URL])
    (made,) = taken([ollama._message(message, "messages[0].")])
    assert [part["type"] for part in made["content"]] == ["image", "audio", "image", "text"]


def test_stored_responses_count_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MOST_BYTES", 5000)
    kept = stored.Stored()
    for i in range(4):
        kept.put({"id": str(i)}, [{"role": "user", "content": [{"type": "image", "image": bytes(2000)}]}])
    assert [kept.get(str(i)) is not None for i in range(4)] == [False, False, True, True]


# What is refused


def wrong(part: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ApiError) as caught:
        chat(part, **more)
    assert caught.value.status == 400 and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert str(caught.value.param).startswith("messages[0].content[0]")
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///etc/passwd", "files of this machine are not read"),
        ("/etc/passwd", "files of this machine are not read"),
        ("", "is missing"),
        ("data:image/png,abc", "without base64"),
        ("data:image/png;base64,%%%", "is not base64"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/svg+xml;base64,AAAA", "is an SVG"),
        ("http://example.com/a.png", "--allow-remote-images"),
        ("ftp://example.com/a.png", "files of this machine are not read"),
        ("data:image/png;base64," + "A" * 50_000_000, "over 32 MB"),
        (None, "is missing"),
        (5, "is missing"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(url: Any, says: str) -> None:
    assert says in wrong({"type": "image_url", "image_url": {"url": url}})


def test_sounds_and_videos_are_never_fetched() -> None:
    part = {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}}
    assert "reads nothing: send a data: URL" in wrong(part, allow_remote_images=True)
    assert "is missing" in wrong({"type": "input_audio", "input_audio": {}})
    assert "is missing" in wrong({"type": "image"}) and "is missing" in wrong({"type": "input_image", "file_id": "f"})


def test_a_model_says_what_it_takes() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": B64[WAV], "format": "wav"}}
    assert "this model takes pictures and videos, no sounds" in wrong(sound, kinds=("image", "video"))
    assert "--mmproj FILE" in wrong(sound, kinds=())


def test_only_what_is_asked_about_is_refused() -> None:
    asked = {"role": "user", "content": [{"type": "image_url", "image_url": URL}, TEXT]}
    talk = [asked, {"role": "assistant", "content": "A fox."}, {"role": "user", "content": "Sure?"}]
    body = fields.parse(completions.ChatRequest, {"messages": talk})
    first, *_ = taken(completions._messages(body), ())
    assert first["content"] == "(image)\nWhat is it?"
    body = fields.parse(completions.ChatRequest, {"messages": [asked]})
    (skipped,) = taken(completions._messages(body), (), skip_media=True)
    assert skipped["content"] == "(image)\nWhat is it?"


@pytest.mark.parametrize(
    ("head", "kind"), [(PNG, "image"), (WAV, "audio"), (MP4, "video"), (b"\xff\xd8\xff\xe0", "image")]
)
def test_kinds_by_their_first_bytes(head: bytes, kind: str) -> None:
    assert kind_of(head) == kind and kind_of(b"PK\x03\x04") is None and kind_of(b"") is None
    assert kind_of(b"\0\0\0\x1cftypM4A ") == "audio" and kind_of(b"\0\0\0\x1cftypheic") == "image"
    assert kind_of(b"RIFF1234WEBP") == "image" and kind_of(b"<svg") is None


# From the web


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "ff02::1",
        "255.255.255.255",
        "nowhere",
    ],
)
def test_private_addresses_are_none(address: str) -> None:
    assert not remote.is_public(address)
    assert remote.is_public("93.184.216.34") and remote.is_public("2606:2800:220:1:248:1893:25c8:1946")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/a", "http://localhost:1/a", "http://[::1]:1/a", "http://0x7f000001/a", "http://2130706433/"],
)
def test_nothing_is_asked_of_this_machine(url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    assert re.search("own network|not found", wrong(part, allow_remote_images=True))


class Web(BaseHTTPRequestHandler):
    """A server on this machine that a made-up name leads to."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["host"]))
        if self.path == "/there":
            self.send_response(302)
            self.send_header("location", "http://127.0.0.1/inside")
            self.end_headers()
            return
        if self.path == "/drip":
            with suppress(OSError):
                self.wfile.write(b"HTTP/1.0 200 OK\r\nx: ")
                for _ in range(600):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            return
        if self.path.startswith("/round"):
            self.send_response(302)
            self.send_header("location", "/round")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        self.wfile.write(bytes(5000) if self.path == "/large" else PNG)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of pictures at a name that is looked up as this machine, which is taken for public."""
    server = HTTPServer(("127.0.0.1", 0), Web)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    look_up: Callable[..., Any] = socket.getaddrinfo
    names = {"pictures.example": "127.0.0.1"}
    monkeypatch.setattr(
        remote.socket, "getaddrinfo", lambda host, *rest, **more: look_up(names.get(host, host), *rest, **more)
    )
    monkeypatch.setattr(remote, "_public_address", _as_if_public(remote._public_address))
    Web.asked.clear()
    yield f"http://pictures.example:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def _as_if_public(check: Callable[[str, int], str]) -> Callable[[str, int], str]:
    return lambda host, port: "127.0.0.1" if host == "pictures.example" else check(host, port)


def test_a_picture_from_the_web(web: str) -> None:
    url = f"{web}/a.png"
    assert chat({"type": "image_url", "image_url": {"url": url}}, allow_remote_images=True) == [
        {"type": "image", "image": PNG}
    ]
    assert Web.asked == [("/a.png", web.removeprefix("http://"))]  # the name, though the connection went to the address
    image = {"type": "image", "source": {"type": "url", "url": url}}
    body = fields.parse(anthropic.CountRequest, {"model": "m", "messages": [{"role": "user", "content": [image]}]})
    (made,) = taken(anthropic.read_messages(body), allow_remote_images=True)
    assert made["content"] == [{"type": "image", "image": PNG}]


@pytest.mark.parametrize(
    ("path", "says"),
    [("/there", "own network"), ("/round", "redirects over 3 times"), ("/none", "status 404"), ("/large", "over 0 MB")],
)
def test_the_web_is_kept_within_bounds(web: str, path: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MOST", 1000)
    assert says in wrong({"type": "image_url", "image_url": {"url": web + path}}, allow_remote_images=True)
    monkeypatch.setattr(media, "MOST_REMOTE", (1000, -1.0))
    assert "takes too long" in wrong({"type": "image_url", "image_url": {"url": web + "/a"}}, allow_remote_images=True)


def test_a_head_that_drips_ends(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MOST_REMOTE", (1000, 0.5))
    start = time.monotonic()
    assert "takes too long" in wrong(
        {"type": "image_url", "image_url": {"url": f"{web}/drip"}}, allow_remote_images=True
    )
    assert time.monotonic() - start < 30


def test_pictures_from_the_web_share_their_bounds(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MOST_REMOTE", (2 * len(PNG), 60.0))
    part = {"type": "image_url", "image_url": {"url": f"{web}/a.png"}}
    assert len(chat(part, part, allow_remote_images=True)) == 2
    with pytest.raises(ApiError, match=r"content\[2\].*holds over 0 MB"):
        chat(part, part, part, allow_remote_images=True)


# Over HTTP, with the built-in model, and without its projector


@pytest.fixture(scope="module")
def server(lm: LanguageModel) -> Iterator[Serving]:
    with serving(lm, Settings(max_tokens=8, image_tokens=70)) as running:
        yield running


@pytest.fixture(scope="module")
def blind() -> Iterator[Serving]:
    with serving(load(mmproj=None), Settings(max_tokens=8)) as running:
        yield running


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": B64[PNG]}}
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": URL}]}]},
    "/v1/responses": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]},
    "/v1/messages": {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": [IMAGE]}]},
    "/v1/messages/count_tokens": {"model": "m", "messages": [{"role": "user", "content": [IMAGE]}]},
    "/api/chat": {"model": "m", "messages": [{"role": "user", "content": "Hm?", "images": [B64[PNG]]}]},
    "/api/generate": {"model": "m", "prompt": "Hm?", "images": [B64[PNG]]},
}


@pytest.mark.parametrize("path", ASKED)
def test_the_built_in_model_sees(server: Serving, blind: Serving, path: str) -> None:
    Image.new("RGB", (64, 64), "red").save(file := io.BytesIO(), "PNG")
    real = json.dumps(ASKED[path]).replace(B64[PNG], base64.b64encode(file.getvalue()).decode())
    seen = httpx.post(server.url + path, content=real, headers={"content-type": "application/json"}, timeout=60)
    assert seen.status_code == 200, seen.text
    reply = httpx.post(blind.url + path, json=ASKED[path], timeout=60)
    assert reply.status_code == 400 and "is served without an mmproj file, so it takes no pictures" in reply.text


def test_lists_say_what_a_model_takes(server: Serving, blind: Serving) -> None:
    for url, sees in ((server.url, True), (blind.url, False)):
        (card,) = httpx.get(f"{url}/v1/models").json()["data"]
        takes = ["text", "image"] if sees else ["text"]
        assert card["architecture"] == {"input_modalities": takes, "output_modalities": ["text"]}
        (tag,) = httpx.get(f"{url}/api/tags").json()["models"]
        assert tag["capabilities"][0] == "completion" and ("vision" in tag["capabilities"]) == sees
        modalities = httpx.get(f"{url}/props").json()["modalities"]
        assert modalities == {"vision": sees, "audio": False, "video": False}


@pytest.mark.slow
def test_few_large_bodies_are_held_at_a_time(blind: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gemma4.server.models.MOST_LARGE", 1)
    body = {"messages": [{"role": "user", "content": "x" * 9_000_000}]}
    reply = httpx.post(blind.url + CHAT, json=body, timeout=60)  # which has no use for them
    assert reply.status_code == 413 and "is over 8000000 bytes" in reply.text
    with serving(load(HERE / "media" / "uv" / "model.gguf"), Settings()) as running:
        models = running.app.state.models
        with models.large_body():
            reply = httpx.post(running.url + CHAT, json=body, timeout=60)
            assert reply.status_code == 429 and reply.headers["retry-after"] == "5"
            assert httpx.post(
                running.url + CHAT, json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
            ).is_success
        assert httpx.post(running.url + CHAT, json=body, timeout=60).status_code == 400  # over the context
        assert until(lambda: models.large == 0, 60)


def test_who_goes_away_ends_the_tower_under_way(lm: LanguageModel) -> None:
    seer = seeing(lm)

    class Slow(FakeMedia):
        def encode(self, part: Any, picture: Any = None) -> list[Encoded | str]:
            self.encodings += 1
            by_layers(mx.zeros(1) for _ in range(10**9))
            return []

    slow = Slow(lm.config.hidden)
    with serving(replace(seer, media=slow), Settings(parallel=1)) as running:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(running.url + CHAT, json=ASKED[CHAT], timeout=0.5)
        assert slow.encodings == 1
        assert until(lambda: running.engine.load == (0, 0))
