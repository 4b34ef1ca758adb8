"""Sessions: no token is read twice, any sequence of operations equals a fresh reading, and sessions on disk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import vocabs
from pictured import seeing
from scripted import ADD, GREEDY, SHORT, TALE, Actor, ids_of, said, spelled, user

import mlx_gemma4
from mlx_gemma4 import InputError, LanguageModel, ReplyOptions, Session, ToolCall, chat, prompt_ids, tool_result
from mlx_gemma4.conversation.reply import as_held


def reads(session: Session, events: Iterator[mlx_gemma4.Event]) -> int:
    """Tokens of the prompt that a reply had to read."""
    list(events)
    assert session.reply is not None
    return session.reply.statistics.prompt_tokens


def test_each_turn_is_read_once(lm: LanguageModel) -> None:
    """With a template that keeps replies as they are, like the demo's."""
    actor = Actor(lm, None)
    session = Session(actor.lm, "Be brief.")
    for turn in range(4):
        before = session.state.length
        n = reads(session, actor.say(f"Reply {turn}.") and session.send(f"Turn {turn}. {TALE}"))
        assert session.reply and session.reply.statistics.reused_tokens == before
        assert n == len(prompt_ids(lm, session.messages[:-1])) - before < len(prompt_ids(lm, user(TALE))) + 25


def test_retry_undo_and_edit_rewind(lm: LanguageModel) -> None:
    """However far the windows have moved: the demo's is 256 tokens, a turn here has 200."""
    actor = Actor(lm, None)
    session = Session(actor.lm)
    lengths = [0]
    for turn in range(3):
        list(actor.say(f"Reply {turn}.") and session.send(f"Turn {turn}. {TALE}"))
        lengths.append(session.state.length)
    assert reads(session, actor.say("Another.") and session.retry()) == 1
    assert len(session.messages) == 6 and session.messages[-1]["content"] == "Another."
    changed = reads(session, actor.say("Third.") and session.edit(f"Turn 2, changed. {TALE}"))
    assert changed <= len(prompt_ids(lm, user(f"Turn 2, changed. {TALE}"))) + 2
    assert session.undo() == f"Turn 2, changed. {TALE}"
    assert 0 <= session.state.length - lengths[2] <= 2  # the template's newline after the turn may stay
    assert reads(session, actor.say("Second.") and session.retry()) == 1
    assert session.undo() == f"Turn 1. {TALE}" and session.undo() == f"Turn 0. {TALE}"
    assert session.messages == [] and session.state.length == 0
    assert session.undo() is None
    for nothing in (session.retry, lambda: session.edit("x")):
        with pytest.raises(InputError, match="nothing"):
            nothing()


def test_thinking_is_dropped_and_its_reply_read_again(actor: Actor) -> None:
    """Google's templates leave old thinking out: what stood before it is kept, the answer after it read again."""
    session = Session(actor.lm, options=ReplyOptions(think=True))
    actor.say(f"<|channel>thought\n{TALE[:80]}<channel|>Well then.")
    list(session.send(TALE))
    assert session.messages[-1]["content"] == "Well then." and session.reply and session.reply.thinking == TALE[:80]
    asked = len(prompt_ids(actor.lm, session.messages[:1], session.options))
    n = reads(session, actor.say("Fine.") and session.send("And?"))
    assert session.reply.statistics.reused_tokens == asked
    assert n < 30
    text = spelled(actor.lm, session.state.tokens)
    assert "thought" not in text and "<|turn>model\nWell then.<turn|>\n<|turn>user\nAnd?" in text


@pytest.mark.parametrize("name", [*sorted(vocabs.templates()), "demo"])
def test_a_loop_of_tools(lm: LanguageModel, name: str) -> None:
    """Calls, results, answer: the state holds them in one turn, and reads the results only."""
    actor = Actor(lm, vocabs.templates().get(name))
    session = Session(actor.lm, options=ReplyOptions(tools=[ADD]))
    actor.say("<|tool_call>call:add{a:1,b:2}<tool_call|>", "<|tool_response>")
    (call,) = [event for event in session.send("1+2?") if isinstance(event, ToolCall)]
    held = session.state.length
    n = reads(session, actor.say("It is 3.") and session.send(tool_result(call.id, call.name, {"sum": 3})))
    assert session.reply and session.reply.text == "It is 3."
    assert n < 60
    if name in ("google-gemma-4-31B-it", "demo"):  # the others part at the channel they had no thinking in
        prompt = prompt_ids(actor.lm, session.messages[:1], session.options)
        assert session.reply.statistics.reused_tokens == (held if name == "demo" else prompt.index(100))
    assert [message["role"] for message in session.messages] == ["user", "assistant", "tool", "assistant"]
    text = spelled(actor.lm, session.state.tokens)
    assert "call:add{a:1,b:2}<tool_call|><|tool_response>response:add{" in text
    actor.say("It is three.")
    assert reads(session, session.retry()) == 1 and len(session.messages) == 4


def test_other_tokens_for_the_same_text_are_kept(lm: LanguageModel) -> None:
    """A reply in single bytes is not read again in the tokenizer's own tokens."""
    actor = Actor(lm, None)
    session = Session(actor.lm)
    zero = lm.tokenizer.encode("\x00", add_bos=False)[0]
    actor.tell([*(zero + byte for byte in "A strange way to say é.".encode()), 106])
    assert said(session.send("Go")) == "A strange way to say é."
    before = session.state.length
    list(actor.say("Yes.") and session.send("Again"))
    assert session.reply and session.reply.statistics.reused_tokens == before
    tokenizer = lm.tokenizer
    mine, its = tokenizer.encode("<|turn>user\nhe"), tokenizer.encode("<|turn>user\nshe")
    assert as_held(tokenizer, mine, its) == mine


def test_an_unfinished_reply_is_kept_as_far_as_it_came(actor: Actor) -> None:
    session = Session(actor.say("one two three four").lm)
    events = session.send("Go")
    text = next(events).text  # type: ignore[union-attr]
    events.close()
    assert session.messages == [*user("Go"), {"role": "assistant", "content": text}]
    assert session.reply and session.reply.finish_reason == "cancelled"
    assert reads(session, actor.say("x") and session.retry()) == 1


def test_a_reply_that_never_began_leaves_no_trace(lm: LanguageModel) -> None:
    session = Session(lm, options=SHORT)
    list(session.send("Hello"))
    before = list(session.messages)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(session.send((TALE + " ") * 4, on_prompt=interrupt))
    with pytest.raises(InputError):
        list(session.send((TALE + " ") * 40))
    assert session.messages == before
    list(session.send("Go on"))
    assert ids_of(session.reply) == fresh(lm, session)  # type: ignore[arg-type]


def fresh(lm: LanguageModel, session: Session) -> list[int]:
    return ids_of(chat(lm, session.messages[:-1], session.options))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_is_done_the_reply_is_that_of_a_fresh_state(lm: LanguageModel, seed: int) -> None:
    lm, rng = seeing(lm), random.Random(seed)
    penalised = ReplyOptions(max_tokens=3, sampling=replace(GREEDY, repetition_penalty=1.3))
    session = Session(lm, "You tell tales.", options=penalised)
    others: list[Session] = []
    for step in range(12):
        words = f"{step} " + "goose " * rng.choice([1, 5, 120])
        action = rng.choice(["send", "send", "undo", "retry", "edit", "fork"])
        if action == "undo":
            session.undo()
        elif action == "fork":
            others.append(session)
            session = session.fork()
        elif action == "send" or session.undo is None or len(session.messages) < 2:
            seen = {"type": "image", "image": bytes([rng.choice([1, 2])]), "tokens": rng.choice([3, 70])}
            shown = {"role": "user", "content": [seen, {"type": "text", "text": words}]}
            list(session.send(shown if rng.random() < 0.5 else words))
            assert ids_of(session.reply) == fresh(lm, session)  # type: ignore[arg-type]
        else:
            list(session.retry() if action == "retry" else session.edit(words))
            assert ids_of(session.reply) == fresh(lm, session)  # type: ignore[arg-type]
    for other in others:
        list(other.send("And?"))
        assert ids_of(other.reply) == fresh(lm, other)  # type: ignore[arg-type]


def test_forks_go_their_own_ways(actor: Actor) -> None:
    session = Session(actor.say("One.").lm)
    list(session.send(TALE))
    other = session.fork()
    n = reads(other, actor.say("Two.") and other.send("And?"))
    assert n < 30 and len(session.messages) == 2 and len(other.messages) == 4
    other.messages[0]["content"] = "changed"
    assert session.messages[0]["content"] == TALE
    other.messages[0]["content"] = TALE
    session.close()
    assert reads(other, actor.say("Three.") and other.retry()) == 1


def test_marks_stay_few(lm: LanguageModel) -> None:
    actor = Actor(lm, None)
    session = Session(actor.lm)
    for turn in range(12):
        list(actor.say("Yes.") and session.send(f"{turn} " * 10))
    assert len(session.state.marks) <= 8


def test_a_saved_session_goes_on(lm: LanguageModel, tmp_path: Path) -> None:
    session = Session(lm, "You tell tales.", options=SHORT)
    list(session.send(TALE))
    session.save(tmp_path / "talk.json")
    loaded = Session.load(lm, tmp_path / "talk.json", options=SHORT)
    assert loaded.messages == session.messages and loaded.state.tokens == session.state.tokens
    assert reads(loaded, loaded.send("And?")) < 30
    list(session.send("And?"))
    assert ids_of(loaded.reply) == ids_of(session.reply)  # type: ignore[arg-type]
    session.save(tmp_path / "talk.json", state=False)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    assert Session.load(lm, tmp_path / "talk.json").state.length == 0


def test_a_spoilt_state_is_read_again(lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = Session(lm, options=SHORT)
    list(session.send("Hello"))
    session.save(tmp_path / "talk")
    beside = tmp_path / "talk.kv"
    contents = bytearray(beside.read_bytes())
    contents[len(contents) // 2] ^= 1
    beside.write_bytes(contents)
    loaded = Session.load(lm, tmp_path / "talk")
    assert loaded.messages == session.messages and loaded.state.length == 0
    assert "read again" in caplog.text


@pytest.mark.parametrize("contents", [None, "", "{", "[]", '{"messages": []}', '{"format": "x", "messages": []}'])
def test_files_that_are_no_session(lm: LanguageModel, tmp_path: Path, contents: str | None) -> None:
    path = tmp_path / "talk"
    if contents is not None:
        path.write_text(contents)
    with pytest.raises(InputError, match="talk"):
        Session.load(lm, path)
    with pytest.raises(InputError, match="saved"):
        Session(lm).save(tmp_path / "nowhere" / "talk")
    assert contents is None or path.read_text() == contents
