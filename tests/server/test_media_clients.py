"""Pictures and sounds through clients that people use, against small pairs of a model and its projector.

Their weights are random: what is looked at is that a reply comes, what it counts, and what is read again.
"""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import av
import httpx
import numpy as np
import ollama
import openai
import pytest
from PIL import Image
from serving import Serving, serving

from mlx_gemma4.conversation.language_model import load
from mlx_gemma4.files.folder import find_models
from mlx_gemma4.server.cards import cards
from mlx_gemma4.server.settings import Settings

PAIRS = Path(__file__).parents[1] / "fixtures" / "media"
ASK = "What is it?"


def picture(color: str, size: tuple[int, int] = (96, 48)) -> str:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def sound(seconds: float = 1.0) -> str:
    file = io.BytesIO()
    with wave.open(file, "wb") as made:
        made.setparams((1, 2, 16_000, 0, "NONE", ""))
        made.writeframes((np.sin(np.arange(int(16_000 * seconds)) / 6) * 9000).astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()


@contextmanager
def pair(name: str, **settings: Any) -> Iterator[Serving]:
    with serving(load(PAIRS / name / "model.gguf"), Settings(max_tokens=4, **settings)) as running:
        yield running


@pytest.fixture(scope="module")
def seeing() -> Iterator[Serving]:
    with pair("uv") as running:
        yield running


@pytest.fixture(scope="module")
def hearing() -> Iterator[Serving]:
    with pair("ua") as running:
        yield running


def shown(color: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": ASK},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture(color)}", **more}},
    ]


def test_openai_chats_with_pictures(seeing: Serving) -> None:
    client: Any = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="x", max_retries=0)

    def asked(*parts: Any, **more: Any) -> Any:
        return client.chat.completions.create(model="m", messages=[{"role": "user", "content": list(parts)}], **more)

    plain = asked({"type": "text", "text": ASK}).usage.prompt_tokens
    low = asked(*shown("red", detail="low"))
    assert low.choices[0].message.content is not None
    high = asked(*shown("red", tokens=140)).usage.prompt_tokens
    # 96 x 48 fills 70 squares with 11 x 5 of them, 140 with 16 x 8; a token before and one behind.
    assert (low.usage.prompt_tokens - plain, high - plain) == (57, 130)
    again = asked(*shown("red", detail="low"), stream=True, stream_options={"include_usage": True})
    usage = next(chunk.usage for chunk in again if chunk.usage)
    assert usage.prompt_tokens == low.usage.prompt_tokens and usage.prompt_tokens_details.cached_tokens > 57
    other = asked(*shown("blue", detail="low")).usage
    assert other.prompt_tokens_details.cached_tokens < low.usage.prompt_tokens - 57  # another picture is no prefix


def test_ten_questions_about_a_picture_encode_it_once(seeing: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    media, encoded = seeing.engine.lm.media, []
    inner = media._encoded
    monkeypatch.setattr(media, "_encoded", lambda *given: encoded.append(1) or inner(*given))
    for i in range(10):
        body = {
            "messages": [{"role": "user", "content": [shown("green", tokens=70)[1], {"type": "text", "text": f"{i}?"}]}]
        }
        reply = httpx.post(f"{seeing.url}/v1/chat/completions", json=body, timeout=60).json()
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= 55 if i else cached < 55
    assert encoded == [1]


def test_openai_responses_go_on_from_a_picture(seeing: Serving) -> None:
    client: Any = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="x", max_retries=0)
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{picture('red')}", "detail": "low"}
    parts = [{"type": "input_text", "text": ASK}, image]
    first = client.responses.create(model="m", input=[{"role": "user", "content": parts}])
    then = client.responses.create(model="m", input="And now?", previous_response_id=first.id)
    assert then.usage.input_tokens > first.usage.input_tokens > 57
    assert then.usage.input_tokens_details.cached_tokens > 57


def test_anthropic_messages_with_pictures_also_of_tools(seeing: Serving) -> None:
    client: Any = anthropic.Anthropic(base_url=seeing.url, api_key="x", max_retries=0)
    source = {"type": "base64", "media_type": "image/png", "data": picture("red")}
    image = {"type": "image", "source": source}
    user = {"role": "user", "content": [image, {"type": "text", "text": ASK}]}
    whole = client.messages.create(model="m", max_tokens=4, messages=[user])
    counted = client.messages.count_tokens(model="m", messages=[user])
    assert whole.usage.input_tokens + whole.usage.cache_read_input_tokens == counted.input_tokens > 240
    calls = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "look", "input": {}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [image]}]}
    talk = [{"role": "user", "content": ASK}, calls, result]
    seen = client.messages.count_tokens(model="m", messages=talk).input_tokens
    result["content"] = [{"type": "tool_result", "tool_use_id": "t", "content": []}]
    assert seen - client.messages.count_tokens(model="m", messages=talk).input_tokens > 240


def test_ollama_with_pictures(seeing: Serving) -> None:
    client = ollama.Client(host=seeing.url)
    (name,) = (model.model for model in client.list().models)
    assert "vision" in (client.show(str(name)).capabilities or [])
    image = base64.b64decode(picture("red"))
    plain = client.chat(str(name), [{"role": "user", "content": ASK}]).prompt_eval_count or 0
    chat = client.chat(str(name), [{"role": "user", "content": ASK, "images": [image]}])
    made = client.generate(str(name), ASK, images=[image])
    assert chat.prompt_eval_count == made.prompt_eval_count and (chat.prompt_eval_count or 0) > plain + 240
    assert made.context is None
    with pytest.raises(ollama.ResponseError, match="no picture that can be read"):
        client.generate(str(name), ASK, images=[b"no picture"])


def test_sounds(hearing: Serving) -> None:
    client: Any = openai.OpenAI(base_url=f"{hearing.url}/v1", api_key="x", max_retries=0)
    heard = {"type": "input_audio", "input_audio": {"data": sound(), "format": "wav"}}
    messages = [{"role": "user", "content": [heard, {"type": "text", "text": ASK}]}]
    plain = client.chat.completions.create(model="m", messages=[{"role": "user", "content": ASK}]).usage.prompt_tokens
    assert (
        client.chat.completions.create(model="m", messages=messages).usage.prompt_tokens - plain == 25 + 2
    )  # 40 ms each
    (card,) = httpx.get(f"{hearing.url}/v1/models").json()["data"]
    assert card["architecture"]["input_modalities"] == ["text", "audio"]
    assert httpx.get(f"{hearing.url}/props").json()["modalities"] == {"vision": False, "audio": True, "video": False}
    with pytest.raises(openai.BadRequestError, match="takes sounds, no pictures"):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": shown("red")}])


BAD = {
    "an archive": (b"PK\x03\x04" + bytes(100), "no picture that can be read"),
    "a truncated picture": (base64.b64decode(picture("red", (500, 500)))[:200], "can't be decoded"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_picture_is_refused_in_one_line(seeing: Serving, what: str) -> None:
    data, says = BAD[what]
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    reply = httpx.post(f"{seeing.url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 400 and says in reply.json()["error"]["message"]
    assert "\n" not in reply.json()["error"]["message"]


def test_nothing_is_refused_where_media_are_skipped() -> None:
    with pair("ua", skip_media=True) as running:
        body = {"messages": [{"role": "user", "content": shown("red")}]}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).is_success


def test_videos() -> None:
    file = io.BytesIO()
    with av.open(file, "w", "mp4") as made:
        stream: Any = made.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        for shade in (0, 120, 240):
            frame = av.VideoFrame.from_ndarray(np.full((48, 96, 3), shade, np.uint8), format="rgb24")
            made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    url = f"data:video/mp4;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "text", "text": ASK}, {"type": "video_url", "video_url": {"url": url}}]
    with pair("v") as running:
        body = {"messages": [{"role": "user", "content": parts}]}
        reply = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).json()
        parts.pop()
        plain = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).json()
        # Three frames of up to 70 tokens and a token on each side, with their times.
        assert 3 * 57 < reply["usage"]["prompt_tokens"] - plain["usage"]["prompt_tokens"] < 3 * (57 + 12)


def test_a_folder_of_models_says_what_each_takes(tmp_path: Path) -> None:
    for name in ("uv", "ua"):
        (tmp_path / name).mkdir()
        for file in ("model.gguf", "mmproj.gguf"):
            (tmp_path / name / file).symlink_to(PAIRS / name / file)
    found = cards(find_models(tmp_path))
    assert {card.name: card.media for card in found} == {"uv/model": ("image", "video"), "ua/model": ("audio",)}
    assert [card.lm_studio(False)["type"] for card in found] == ["llm", "vlm"]
