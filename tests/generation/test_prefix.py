"""The prefix store: what is read again, what is kept, what is refused; and conversations that go on."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from plain_state import SmallModel, small_model
from recorded import HERE

from mlx_gemma4 import load
from mlx_gemma4.chat_format.template import encode_chat
from mlx_gemma4.cli.main import main
from mlx_gemma4.errors import InputError
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.prefix import MAX_MARKS, PrefixCache
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import kv_bytes, total_nbytes, window_bytes
from mlx_gemma4.model.costs import PREFILL_CHUNK

GREEDY = Sampling(temperature=0)
END = 106  # ends a turn
STOP = frozenset([END])


@pytest.fixture
def model() -> SmallModel:
    return small_model("e2b", 64, SegmentLayout())


def some_tokens(n: int, seed: int = 0) -> list[int]:
    tokens = np.random.default_rng(seed).integers(110, 317, n).tolist()
    return [2, *tokens[1:]] if seed == 0 else tokens


def ask(store: PrefixCache, prompt: list[int], n: int = 4) -> tuple[list[int], int]:
    """The reply, and how many tokens of the prompt had to be read for it."""
    statistics = Statistics()
    with store.lease(prompt, n) as (state, held):
        reply = generate_tokens(store.model, state, prompt[held:], GREEDY, n, STOP, statistics, turn_ends=STOP)
        tokens = [token.id for token in reply]
    assert statistics.prompt_tokens + held == len(prompt)
    return tokens, statistics.prompt_tokens


def cold(model: SmallModel, prompt: list[int], n: int = 4) -> list[int]:
    return [token.id for token in generate_tokens(model, model.new_state(), prompt, GREEDY, n, STOP)]


@pytest.mark.parametrize("changed", [1, 22, 64])
def test_only_the_changed_end_is_read_again(model: SmallModel, changed: int) -> None:
    """However far the window has moved on since."""
    store, prompt = PrefixCache(model), some_tokens(1500)
    ask(store, prompt, 150)
    other = prompt[:-changed] + some_tokens(changed, 1)
    got, tokens_read = ask(store, other)
    assert tokens_read == changed
    assert got == cold(model, other)


def test_a_conversation_reads_each_turn_once(model: SmallModel) -> None:
    """And an edited turn reads from the end of the one before it."""
    store, talk, ends, held = PrefixCache(model), some_tokens(300), [], 0
    for turn in range(1, 6):
        talk = [*talk, *some_tokens(150, turn), END, *some_tokens(3, 99)]
        ends.append(len(talk) - 3)
        got, tokens_read = ask(store, talk)
        assert tokens_read == len(talk) - held
        talk = talk + got if len(got) == 4 else [*talk, *got, END]
        held = len(talk)
    for turn in (3, 2):
        edited = talk[: ends[turn] + 40] + some_tokens(60, 50 + turn)
        got, tokens_read = ask(store, edited)
        assert 60 <= tokens_read <= 100
        assert got == cold(model, edited)


def test_sessions_share_a_beginning(model: SmallModel) -> None:
    """The second session to part from a prompt leaves a mark where it did; the third reads from there."""
    store, system = PrefixCache(model), some_tokens(1100)
    read = [ask(store, system + some_tokens(200, s))[1] for s in (1, 2, 3, 4)]
    assert read[0] == 1300
    assert read[2:] == [200, 200]
    states = [kept.state for kept in store._kept]
    assert store.nbytes == total_nbytes(states) < 0.6 * sum(s.nbytes for s in states)


def test_a_prompt_that_is_all_there_reads_its_last_token(model: SmallModel) -> None:
    store, prompt = PrefixCache(model), some_tokens(700)
    first = ask(store, prompt, 30)
    assert ask(store, prompt, 30) == (first[0], 1)


def test_marks_of_a_long_conversation_are_thinned(model: SmallModel) -> None:
    store, talk = PrefixCache(model), some_tokens(10)
    for turn in range(1, 21):
        talk += [*some_tokens(80, turn), END]
        got = ask(store, talk)[0]
        talk += got if len(got) == 4 else [*got, END]
    (kept,) = store._kept
    assert 3 <= len(kept.state.marks) <= MAX_MARKS
    growth = kept.state.nbytes - kv_bytes(model.config, mx.float32, len(talk), PREFILL_CHUNK)
    assert growth <= MAX_MARKS * window_bytes(model.config, mx.float32)


def worst(model: SmallModel, tokens: int) -> int:
    return PrefixCache(model).most_bytes(tokens)


def test_the_oldest_goes_first_and_the_budget_holds(model: SmallModel) -> None:
    budget = 3 * worst(model, 604)
    store = PrefixCache(model, budget)
    prompts = [some_tokens(600, seed) for seed in range(1, 9)]
    for prompt in prompts:
        ask(store, prompt)
        assert store.nbytes <= budget
    assert ask(store, prompts[-1])[1] == 1  # still there
    assert ask(store, prompts[0])[1] == 600  # long gone


def test_a_pinned_prefix_stays(model: SmallModel) -> None:
    store = PrefixCache(model, 3 * worst(model, 604))
    pinned = some_tokens(300, 77)
    state, _ = store.take(pinned, 1)
    list(generate_tokens(model, state, pinned, GREEDY, 1))
    store.put(state, pinned=True)
    state.close()
    for seed in range(1, 9):
        ask(store, some_tokens(600, seed))
    assert ask(store, [*pinned, 200])[1] == 1
    store.unpin()
    for seed in range(1, 9):
        ask(store, some_tokens(600, seed))
    assert ask(store, [*pinned, 200])[1] > 1


def test_a_request_that_can_not_fit_is_refused(model: SmallModel) -> None:
    """Before anything is read; what a state in use may grow to counts, and it is never dropped."""
    store = PrefixCache(model, worst(model, 1004) + worst(model, 304) + 1000)
    state, _ = store.take(some_tokens(1000), 4)
    with pytest.raises(InputError, match="max_kv_bytes") as caught:
        store.take(some_tokens(600, 1), 4)
    assert "\n" not in str(caught.value)
    other, _ = store.take(some_tokens(300, 1), 4)
    list(generate_tokens(model, state, some_tokens(1000), GREEDY, 4))
    assert state.tokens[:1000] == some_tokens(1000)
    with pytest.raises(InputError, match="made for 1004"):
        model.forward(mx.array([5]), state)
    del other
    gc.collect()  # a state that is merely dropped gives its share back
    state.close()
    store.take(some_tokens(600, 1), 4)


def test_the_worst_case_is_never_exceeded(model: SmallModel) -> None:
    for n in (1, 63, 64, 65, 500, 1200):
        store = PrefixCache(model)
        prompt = [END if i % 20 == 0 else t for i, t in enumerate(some_tokens(n))]
        state, _ = store.take(prompt, 5)
        list(generate_tokens(model, state, prompt, GREEDY, 5, turn_ends=STOP))
        assert state.nbytes <= worst(model, n + 5)


def test_threads_share_a_store(model: SmallModel) -> None:
    store, system = PrefixCache(model, 12 * worst(model, 420)), some_tokens(350)
    prompts = [system + some_tokens(40 + i, 1 + i) for i in range(8)]
    expected = [cold(model, p, 12) for p in prompts]
    got: dict[int, list[int]] = {}

    def run(i: int) -> None:
        for _ in range(2):
            got[i] = ask(store, prompts[i], 12)[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(8)] == expected


# Conversations that go on


@pytest.mark.parametrize("ended", [True, False])
def test_a_next_turn_reads_as_the_template_has_it(ended: bool) -> None:
    """Whether the last reply ended its turn or was cut off by --max-tokens."""
    lm = load(HERE / "12b-q4_k_m.gguf")
    said = lm.tokenizer.encode("and the", add_bos=False)
    (end,) = (i for i in lm.tokenizer.stop_ids if lm.tokenizer.decode([i], skip_special=False) == "<turn|>")
    talk = [*lm.encode_prompt("one"), *said, *([end] if ended else [])]
    whole = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "and the"}]
    whole += [{"role": "user", "content": "two"}]
    assert talk + lm.encode_prompt("two", after=talk) == encode_chat(lm.tokenizer, whole)
    assert lm.encode_prompt("two", raw=True, after=talk) == lm.tokenizer.encode("two", add_bos=False)


def test_the_command_line_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file, saved = HERE / "12b-q4_k_m.gguf", tmp_path / "talk"
    command = ["generate", "--model", str(file), "--temperature", "0", "-n", "5", "--state", str(saved)]
    lm, lengths = load(file), []
    for prompt in ("the", "and"):
        result = CliRunner().invoke(main, [*command, "--prompt", prompt])
        assert result.exit_code == 0, result.output
        lengths.append(lm.model.load_state(saved).length)
    first = len(lm.encode_prompt("the")) + 5
    assert lengths == [first, first + len(lm.encode_prompt("and", after=[0])) + 5]


def test_the_command_line_refuses_a_damaged_state(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"nothing of the kind")
    command = ["generate", "--model", str(HERE / "12b-q4_k_m.gguf"), "--prompt", "the", "--state", str(bad)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert bad.read_bytes() == b"nothing of the kind"
