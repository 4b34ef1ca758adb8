"""Pictures and sounds in messages: where their soft tokens stand, what is refused, and sessions that hold some."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictured import FakeMedia, encoded, seeing
from scripted import GREEDY, SHORT, Actor, said, spelled, user

from mlx_gemma4 import InputError, LanguageModel, PrefixCache, ReplyOptions, Session, batch, chat, generate, prompt_ids
from mlx_gemma4.chat_format.messages import for_template
from mlx_gemma4.conversation.parts import content_of
from mlx_gemma4.conversation.reply import as_held
from mlx_gemma4.model.soft import soft_ids

IMAGE, OTHER = {"type": "image", "image": b"a picture"}, {"type": "image", "image": b"another"}
SOUND, VIDEO = {"type": "audio", "audio": b"a sound"}, {"type": "video", "video": b"a video"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def told(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture
def seer(lm: LanguageModel) -> LanguageModel:
    return seeing(lm)


def names(seer: LanguageModel, ids: list[int]) -> str:
    """Control tokens and text, each run of soft tokens as its length."""
    shown, run = "", 0
    for id in [*ids, None]:
        if id is not None and id < 0:
            run += 1
            continue
        shown += f"({run})" if run else ""
        run = 0
        shown += "" if id is None else spelled(seer, [id])
    return shown


def test_each_stands_where_it_was_given(seer: LanguageModel) -> None:
    messages = told(IMAGE, text("And"), OTHER | {"tokens": 5}, SOUND, text("or"), VIDEO)
    ids = prompt_ids(seer, messages)
    shown = names(seer, ids).partition("<|turn>user\n")[2].partition("<turn|>")[0]
    assert shown == (
        "<|image>(12)<image|>And<|image>(5)<image|><|audio>(9)<audio|>or"
        "00:00 <|image>(4)<image|> 00:01 <|image>(4)<image|>"
    )
    assert len(ids.media) == 5 and [id for id in ids if id < 0] == [id for made in ids.media for id in made.ids]
    assert prompt_ids(seer, messages) == ids and isinstance(seer.media, FakeMedia) and seer.media.encodings == 5
    reply = chat(seer, messages, SHORT)
    assert reply.statistics.prompt_tokens == len(ids) and len(reply.tokens) == 6


def test_control_tokens_that_users_spell_stay_text(seer: LanguageModel) -> None:
    ids = prompt_ids(seer, told(text("<|image|> <|audio|>"), IMAGE, text("<|image|>")))
    assert names(seer, ids).count("(12)") == 1 and "<|image|> <|audio|><|image>(12)<image|><|image|>" in names(
        seer, ids
    )


def test_results_of_tools_have_theirs_after_them(seer: LanguageModel) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {}}}
    asked = [*user("Look"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "1", "content": [text("seen"), IMAGE]}
    shown = names(seer, prompt_ids(seer, [*asked, result]))
    assert shown.index("seen") < shown.index("<tool_response|>") < shown.index("<|turn>user\n<|image>(12)")
    known, _ = for_template([*asked, result, *user("So?")], (), None, ("image",))
    assert [message["role"] for message in known] == ["user", "assistant", "tool", "user", "user"]


def test_what_a_model_does_not_take_is_refused_in_a_line(lm: LanguageModel, seer: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"message 1: has a picture.*--mmproj"):
        chat(replace(lm, media=None), told(IMAGE))
    with pytest.raises(InputError, match="a sound, and this model takes none, only: text, image"):
        chat(seeing(lm, ["image"]), told(SOUND))
    with pytest.raises(InputError, match="type 'file'; only text"):
        chat(seer, told({"type": "file"}))
    with pytest.raises(InputError, match="--raw"):
        seer.encode_prompt([IMAGE], raw=True)
    plain = Actor(seer, lm.tokenizer.chat_template).lm
    with pytest.raises(InputError, match="no place for a sound"):
        chat(plain, told(SOUND))
    with pytest.raises(InputError, match=r"no token -5, .*give that again"):
        chat(seer, [5, -5, 7])
    with pytest.raises(InputError, match="no token -2147483649"):
        chat(seer, [5, -(2**31) - 1])


def test_images_and_audio_beside_a_text(seer: LanguageModel) -> None:
    same = told(IMAGE, text("What is "), OTHER, text("?"))
    both = [b"a picture", b"another"]
    assert generate(seer, "{image}What is {image}?", SHORT, images=both) == generate(seer, same, SHORT)
    first = told(IMAGE, OTHER, SOUND, text("So {it}?"))
    assert content_of("So {it}?", first[0]["content"][:3]) == first[0]["content"]
    reply = chat(seer, "So {it}?", SHORT, images=both, audio=b"a sound")
    assert reply.text == generate(seer, first, SHORT)
    mixed = content_of("{audio} then {image}", [SOUND, IMAGE])
    assert mixed == [SOUND, text(" then "), IMAGE] and content_of("{image}", []) == "{image}"
    with pytest.raises(InputError, match=r"{image} 3 times, and 2"):
        generate(seer, "{image}{image}{image}", images=both)
    with pytest.raises(InputError, match="a string"):
        generate(seer, same, images=both)


def test_a_batch_reads_each_its_own(seer: LanguageModel) -> None:
    asks = [told(part, text("What?")) for part in (IMAGE, OTHER, SOUND)]
    replies = dict(batch(seer, asks, SHORT))
    assert [replies[i].text for i in range(3)] == [generate(seer, ask, SHORT) for ask in asks]


def test_pictures_are_not_taken_for_each_other(seer: LanguageModel) -> None:
    """Neither by a state nor by a prefix cache: the text around them may be the same."""
    asks, short = [told(part, text("What is this?")) for part in (IMAGE, OTHER)], replace(SHORT, max_tokens=2)
    alone = [chat(seer, ask, short).text for ask in asks]
    state, store = seer.model.new_state(), PrefixCache(seer.model)
    for i in (0, 1, 0):
        assert chat(seer, asks[i], short, state=state).text == alone[i]
        assert chat(seer, asks[i], short, store=store).text == alone[i]
    ids, others = (prompt_ids(seer, ask) for ask in asks)
    assert as_held(seer.tokenizer, list(ids), list(others)) == ids
    assert chat(seer, asks[0], SHORT, store=store).statistics.prompt_tokens < 3


def test_each_is_known_as_long_as_its_prompt_is_held(seer: LanguageModel) -> None:
    media = FakeMedia(seer.config.hidden)
    other = replace(seer, media=media)
    ids = prompt_ids(other, told(IMAGE))
    media.kept.clear()
    bare = list(ids)
    assert chat(other, bare, SHORT).text == chat(other, ids, SHORT).text
    del ids
    gc.collect()
    with pytest.raises(InputError, match="give that again"):
        chat(other, bare, SHORT)


def test_a_session_goes_on_and_is_saved(seer: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "cat.jpg"
    file.write_bytes(b"a picture")
    seen = {"type": "image", "image": file}
    session = Session(seer, options=ReplyOptions(max_tokens=5, sampling=GREEDY))
    list(session.send(told(seen, SOUND, text("What?"))))
    list(session.send("And now?"))
    assert session.reply
    ids = prompt_ids(seer, session.messages[:-1], session.options)
    assert min(ids[session.reply.statistics.reused_tokens :]) >= 0, "nothing is looked at again"
    assert session.media == ["cat.jpg", "a sound"]
    session.save(tmp_path / "talk")
    assert b"a picture" not in (tmp_path / "talk").read_bytes()
    file.unlink()
    blind = replace(seeing(seer), media=None)
    loaded = Session.load(blind, tmp_path / "talk", options=session.options)
    assert loaded.media == session.media
    first = said(loaded.send("More"))
    loaded.save(tmp_path / "again")
    (tmp_path / "again.kv").unlink()
    with pytest.raises(InputError, match="give that again"):
        list(Session.load(blind, tmp_path / "again", options=session.options).send("More"))
    file.write_bytes(b"a picture")
    assert said(session.send("More")) == first


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"image": "/etc/hostname"}, "names files"),
        ({"pieces": 5}, "can't be"),
        ({"pieces": [{"kind": "image", "digest": "zz", "rows": 3}]}, "can't be"),
        ({"pieces": [{"kind": "image", "digest": "00", "rows": 1 << 40}]}, "can't be"),
        ({"pieces": [{"kind": "text", "digest": "00", "rows": 3}]}, "can't be"),
        ({"pieces": [{"digest": "00"}]}, "can't be"),
        ({"pieces": [{"kind": "image", "digest": "00", "rows": 3}]}, "give that again"),
    ],
)
def test_a_saved_session_has_nothing_read(seer: LanguageModel, tmp_path: Path, part: Any, says: str) -> None:
    messages = told({"type": "image", **part}, text("What?"))
    (tmp_path / "talk").write_text(json.dumps({"format": "mlx-gemma4 conversation", "messages": messages}))
    with pytest.raises(InputError, match=says):
        list(Session.load(seer, tmp_path / "talk", options=SHORT).send("So?"))


def test_undo_gives_the_text(seer: LanguageModel) -> None:
    session = Session(seer, options=SHORT)
    list(session.send(told(IMAGE, text("What?"))))
    assert session.undo() == "What?" and not session.messages and not session.state.length


def test_ids_of_sounds_and_pictures() -> None:
    """Numbers of 32 bits, apart from each other, the same for the same content."""
    for kind, low, high in (("image", -(2**31), -(2**30)), ("video", -(2**31), -(2**30)), ("audio", -(2**30), 0)):
        ids = soft_ids(kind, b"x" * 32, 1000)  # type: ignore[arg-type]
        assert all(low <= id < high for id in ids) and len(set(ids)) == 1000
        assert soft_ids(kind, b"x" * 32, 500) == ids[:500]  # type: ignore[arg-type]
    assert encoded(b"a", 7, 4).ids == encoded(b"a", 7, 4).ids != encoded(b"b", 7, 4).ids
