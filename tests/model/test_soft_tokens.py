"""Prompts with pictures and sounds: logits against transformers', however they are cut; what may not be cut."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from pictured import encoded
from plain_state import small_model, some_tokens
from recorded import HERE, kl

from mlx_gemma4 import load
from mlx_gemma4.errors import InputError
from mlx_gemma4.execution import execution
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.drafting import Drafts, Lookup
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.prefix import PrefixCache
from mlx_gemma4.generation.prompt import chunk_ahead, read_chunk
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.generation.scheduler import Scheduler
from mlx_gemma4.generation.scoring import score
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.model.forward import head, run_layers
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.soft import Encoded

GREEDY = Sampling(temperature=0)
ABOUT = json.loads((HERE / "media" / "soft.json").read_text())
CASES = list(ABOUT["prompts"])


@functools.cache
def text_model(kind: str) -> Model:
    return load(HERE / f"{kind}-f32.gguf").model


def made(model: Model, case: str) -> tuple[list[int], list[Encoded]]:
    """A recorded prompt's ids, and what its soft tokens stand for."""
    ids: list[int] = []
    held = []
    with np.load(HERE / "media" / "soft.npz") as arrays:
        for i, piece in enumerate(ABOUT["prompts"][case]):
            if isinstance(piece, str):
                held.append(Encoded(piece, f"{case}/{i}".encode(), mx.array(arrays[f"{case}/{i}"])))  # type: ignore[arg-type]
                model.soft.add(held[-1])
            ids += held[-1].ids if isinstance(piece, str) else piece
    return ids, held


def logits_in_chunks(model: Model, ids: list[int], most: int, state: KVState | None = None) -> np.ndarray:
    """Logits of all tokens, read in chunks of so many."""
    state, rows = state or model.new_state(), []
    while state.length < len(ids):
        some = ids[state.length : state.length + chunk_ahead(model, state, ids, most)]
        with execution():
            hidden = run_layers(model.loaded, mx.array(some), [state], len(some), model.soft.rows(some))
            rows.append(np.array(head(model.loaded, hidden)))
    return np.concatenate(rows)


def picture(model: Model, content: str, rows: int, kind: Any = "image") -> Encoded:
    rng = np.random.default_rng(list(content.encode()))
    made = rng.standard_normal((rows, model.config.hidden)).astype(np.float32)
    encoded = Encoded(kind, content.encode(), mx.array(0.7 * made))
    model.soft.add(encoded)
    return encoded


@pytest.mark.parametrize("most", [1024, 16])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers(case: str, most: int) -> None:
    """Two pictures, a sound beside one, frames of a video, a picture of many windows; in one chunk, and in several."""
    model = text_model(case.split("/")[0])
    ids, held = made(model, case)
    with np.load(HERE / "media" / "soft.npz") as arrays:
        wanted = arrays[case]
    got = logits_in_chunks(model, ids, most)[ABOUT["places"][case.split("/")[1]]]
    assert held and np.abs(got - wanted).max() <= 1e-3 and kl(wanted, got) <= 1e-6


@pytest.mark.parametrize("kind", ["12b", "e2b"])
def test_where_chunks_end_before_within_and_after_a_picture(kind: str) -> None:
    model = text_model(kind)
    seen, heard = picture(model, "seen", 20), picture(model, "heard", 20, "audio")

    def ends(ids: list[int]) -> list[int]:
        found, state = [], model.new_state()
        while state.length < len(ids):
            read_chunk(model, state, ids, [], 16)
            found.append(state.length)
        return found

    text = some_tokens(60)
    assert ends(text) == ends(text[:10] + heard.ids + text[:30]) == [16, 32, 48, 60]
    whole = kind == "12b"
    assert ends(text[:10] + seen.ids + text[:30]) == ([10, 30, 32, 48, 60] if whole else [16, 32, 48, 60])
    assert ends(text[:16] + seen.ids + text[:4]) == ([16, 36, 40] if whole else [16, 32, 40])
    assert ends(seen.ids + text[:1] + seen.ids + text[:4]) == ([20, 21, 41, 45] if whole else [16, 32, 45])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["12b", "e2b"])
def test_a_prompt_whose_beginning_is_held_is_read_as_a_fresh_one(kind: str) -> None:
    """To the bit: by a prefix cache, from wherever another prompt left it."""
    model = copy.copy(small_model(kind, 9, SegmentLayout(4, 2, 2)))
    model.chunk = 16
    cat, dog, purr = picture(model, "cat", 21), picture(model, "dog", 13), picture(model, "purr", 11, "audio")
    text = some_tokens(40)
    talks = [
        text[:7] + cat.ids + text[:5] + dog.ids + text[:9],
        text[:7] + cat.ids + text[:5] + purr.ids + text[:12],
        text[:7] + dog.ids + text[:9],
        text[:7] + cat.ids + text[:5] + dog.ids + text[:9] + purr.ids + text[:20],
    ]
    store = PrefixCache(model)
    for talk in [*talks, *reversed(talks)]:
        alone = [token.id for token in generate_tokens(model, model.new_state(), talk, GREEDY, 5)]
        with store.lease(talk, 5) as (state, held):
            assert model.config.uncut(talk, held) == held
            assert [token.id for token in generate_tokens(model, state, talk[held:], GREEDY, 5)] == alone
            fresh = logits_in_chunks(model, talk, 16)
            if state.reach(len(talk) - 4) == len(talk) - 4:
                state.rewind(len(talk) - 4)
                np.testing.assert_allclose(logits_in_chunks(model, talk, 16, state), fresh[-4:], atol=2e-4)


def test_no_state_ends_within_a_picture() -> None:
    model = small_model("12b", 9, SegmentLayout(4, 2, 2))
    cat = picture(model, "cat", 21)
    ids = some_tokens(6) + cat.ids + some_tokens(3)
    state = model.new_state()
    read_chunk(model, state, ids, [], 64)
    assert [state.reach(n) for n in (28, 27, 26, 7, 6)] == [28, 27, 6, 6, 6]
    for position in (7, 26):
        for refused in (state.rewind, state.mark):
            with pytest.raises(InputError, match=f"position {position}: a picture begins at 6"):
                refused(position)
    state.rewind(27)
    assert state.tokens == ids[:27]
    sound = small_model("e2b", 9, SegmentLayout(4, 2, 2))
    state = sound.new_state()
    small_cat = picture(sound, "cat", 21)  # of a model that looks at no picture both ways
    read_chunk(sound, state, some_tokens(6) + small_cat.ids + some_tokens(3), [], 64)
    state.rewind(state.reach(20))
    assert state.length == 20


def test_steps_and_drafts_do_not_look_up_soft_tokens() -> None:
    """A chunk of one soft token, penalties, and drafts that have come to a place before a sound."""
    model = text_model("e2b")
    purr, text = picture(model, "purr", 5, "audio"), some_tokens(12)
    ids, state = text + purr.ids + text, model.new_state()
    once = logits_in_chunks(model, ids, 64)
    for at in range(len(ids)):
        with execution():
            logits = model.forward(mx.array(ids[at : at + 1]), state, soft=model.soft.rows(ids[at : at + 1]))
        np.testing.assert_allclose(np.array(logits), once[at], atol=2e-4)
    assert Lookup().draft(ids, 6) == []
    sampling = Sampling(temperature=0, repetition_penalty=1.3, presence_penalty=0.5)
    plain = [t.id for t in generate_tokens(model, model.new_state(), ids, sampling, 8)]
    drafts = Drafts(depth=3)
    assert [t.id for t in generate_tokens(model, model.new_state(), ids, sampling, 8, drafts=drafts)] == plain
    assert len([*generate_tokens(model, model.new_state(), [*purr.ids, 5], sampling, 2)]) == 2


def test_a_scheduler_reads_pictures_longer_than_its_chunks() -> None:
    model = copy.copy(small_model("12b", 9, SegmentLayout()))
    cat = picture(model, "cat", 300)
    ids = some_tokens(6) + cat.ids + some_tokens(3)
    alone = [token.id for token in generate_tokens(model, model.new_state(), ids, GREEDY, 6)]
    model.chunk, statistics = 64, Statistics()
    with Scheduler(model) as scheduler:
        made = scheduler.generate_tokens(model.new_state(), ids, GREEDY, 6, statistics=statistics)
        assert [token.id for token in made] == alone and statistics.prompt_tokens == len(ids)


def test_what_soft_tokens_have_not() -> None:
    small = text_model("e2b")
    purr = picture(small, "purr", 5, "audio")
    with pytest.raises(InputError, match="there is no token"):
        list(score(small, [5, *purr.ids, 6], small.new_state()))
    with pytest.raises(InputError, match="ends with a picture or sound"):
        list(generate_tokens(small, small.new_state(), [5, *purr.ids], GREEDY, 2))
    gone = purr.ids
    del purr
    with pytest.raises(InputError, match="give that again"):
        list(generate_tokens(small, small.new_state(), [*gone, 5], GREEDY, 2))


def test_room_is_planned_for_the_longest_picture() -> None:
    model = small_model("12b", 9, SegmentLayout())
    cat = picture(model, "cat", 2000)
    ids = [5, *cat.ids, 5]
    assert model.config.longest_picture(ids) == 2000 and model.config.longest_picture(ids[:1]) == 0
    store = PrefixCache(model)
    assert store.most_bytes(4000, 2000) > store.most_bytes(4000)
    assert text_model("e2b").config.longest_picture(ids) == 0


def test_content_that_is_encoded_twice_is_known_while_either_is_held() -> None:
    soft, ids = text_model("e2b").soft, [5, *encoded(b"twice", 3, 36).ids, 5]
    first, second = (soft.add(encoded(b"twice", 3, 36)) for _ in range(2))
    del first
    assert soft.held(ids) == [second]
    del second
    with pytest.raises(InputError, match="give that again"):
        soft.held(ids)
