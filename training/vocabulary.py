"""The built-in model's vocabulary: Gemma 4's low ids, then a BPE of our own.

In: clean text. Out: `Vocabulary` (token strings, GGUF token types, merges in order of rank), and a
`tokenizers.Tokenizer` over it that encodes as llama.cpp's `gemma4` tokenizer does: space becomes U+2581, runs of
newlines are split off, the rest is merged by rank with no word boundaries, unknown characters become bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # GGUF token types
PAD, EOS, BOS, UNK, TURN, END_TURN, NEWLINE, PARAGRAPH = 0, 1, 2, 3, 105, 106, 107, 108
SPACE = "\u2581"
# Gemma 4's named tokens below 107, by id; what is not named here is kept as <unusedN>.
NAMED = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
    49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>", 100: "<|channel>",
    101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
PICTURE = {53: "<|image>", 54: "<|image|>", 55: "<image|>"}  # by id: unused ones until the model got its eyes
SPOKEN = {48, 49, 50, 51, 52, 100, 101}  # part of the reply's text: user-defined rather than control
RUNS = 31  # newlines 107..137 (1 to 31 of them), spaces 138..167 (2 to 31)
FIRST_BYTE, FIRST_OWN = 238, 494


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]  # by id
    types: list[int]  # GGUF token types
    merges: list[str]  # "left right", first is strongest

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), ensure_ascii=False))

    @staticmethod
    def load(path: Path) -> Vocabulary:
        return Vocabulary(**json.loads(path.read_text()))


def low_ids() -> tuple[list[str], list[int]]:
    """Tokens 0..493 and their types, laid out as in Gemma 4's own files (HTML tags left as unused)."""
    tokens, types, unused = [], [], 0
    for i in range(FIRST_OWN):
        if i in NAMED:
            tokens.append(NAMED[i])
            types.append(USER_DEFINED if i in SPOKEN else CONTROL)
        elif NEWLINE <= i < NEWLINE + RUNS:
            tokens.append("\n" * (i - NEWLINE + 1))
            types.append(NORMAL)
        elif NEWLINE + RUNS <= i < NEWLINE + 2 * RUNS - 1:
            tokens.append(SPACE * (i - NEWLINE - RUNS + 2))
            types.append(NORMAL)
        elif i >= FIRST_BYTE:
            tokens.append(f"<0x{i - FIRST_BYTE:02X}>")
            types.append(BYTE)
        else:
            tokens.append(PICTURE.get(i, f"<unused{unused}>"))
            types.append(CONTROL if i in PICTURE else NORMAL)
            unused += 1
    return tokens, types


def run_merges() -> list[str]:
    """Merges that put runs of newlines and of spaces together, the longest first."""
    return [f"{c * (n - 1)} {c}" for n in range(RUNS, 1, -1) for c in ("\n", SPACE)]


def learn(texts: Iterable[str], size: int) -> Vocabulary:
    """Learn a vocabulary of `size` tokens, the low ids included, from lines of text."""
    trainer_side = Tokenizer(models.BPE())
    trainer_side.normalizer = normalizers.Replace(" ", SPACE)
    # Words with the space before them, digits singly, punctuation in runs: merges never cross a word boundary.
    pattern = Regex(rf"{SPACE}?[A-Za-z]+|{SPACE}?[0-9]|{SPACE}?[^A-Za-z0-9{SPACE}]+|{SPACE}")
    trainer_side.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    alphabet = [chr(c) for c in range(33, 127)] + ["—", SPACE]
    low, types = low_ids()
    trainer = trainers.BpeTrainer(vocab_size=size - len(low), limit_alphabet=len(alphabet), initial_alphabet=alphabet,
                                  show_progress=False, max_token_length=16)  # fmt: skip
    trainer_side.train_from_iterator(texts, trainer)
    model = json.loads(trainer_side.to_str())["model"]
    own = [t for t, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return Vocabulary(low + own, types + [NORMAL] * len(own), run_merges() + merges)


def build(vocabulary: Vocabulary) -> Tokenizer:
    """A tokenizer over the vocabulary. It adds no BOS, and turns named tokens in the text into their ids."""
    ids = {t: i for i, t in enumerate(vocabulary.tokens)}
    merges = [(m[: m.index(" ", 1)], m[m.index(" ", 1) + 1 :]) for m in vocabulary.merges]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (NAMED | PICTURE).values()])
    return tokenizer
