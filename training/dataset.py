"""Documents -> rows of token ids for training and for the held-out measure.

    python training/dataset.py WORKDIR [ROWS]

In: WORKDIR/documents.jsonl (corpus.py). Out: vocab.json, train.bin (ROWS x 1025 uint16: half raw text, half chat),
heldout.bin (N x 1025 uint16: raw text of documents that training never sees, each row from <bos>, padded with 0), and
heldout.txt (the same text, for llama-perplexity).
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
import zlib
from pathlib import Path

import numpy as np
from dialogue import Document, conversation, story_opening
from tales import tale
from tokenizers import Tokenizer
from vocabulary import BOS, EOS, Vocabulary, build, learn

LENGTH = 1024
VOCABULARY = 4096
HELD_OUT = 30  # one document in so many
CHAT_CHARACTERS = 5200  # always more than LENGTH tokens


def load(path: Path) -> tuple[list[Document], list[float], list[Document]]:
    """Training documents, their weights (by length and source), held-out documents."""
    train, weights, held = [], [], []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        document = Document(record["source"], record["paragraphs"])
        if zlib.crc32(document.paragraphs[0].encode()) % HELD_OUT == 0:
            held.append(document)
        else:
            train.append(document)
            weights.append(record["weight"] * sum(map(len, document.paragraphs)))
    return train, weights, held


def raw_row(documents: list[Document], weights: list[float], rng: random.Random) -> str:
    """Running text from a random sentence or a document's beginning; the next document follows where one ends."""
    text = ""
    while len(text) < CHAT_CHARACTERS:
        if rng.random() < 0.1:
            text += f"<bos>{tale(rng)[0]}<eos>"
            continue
        document = rng.choices(documents, cum_weights=weights)[0]
        whole = "\n\n".join(document.paragraphs)
        starts = [m.end() for m in re.finditer(r"[.!?]\"?\s+(?=[A-Z\"])", whole)]
        if rng.random() < 0.3 or not starts:
            whole = story_opening(whole, rng) if document.is_tale else whole
        else:
            whole = whole[rng.choice(starts) :]
        text += f"<bos>{whole}<eos>"
    return text[: CHAT_CHARACTERS + 200]


def rows(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.stack([np.array(e.ids[: LENGTH + 1], np.uint16) for e in encoded if len(e.ids) > LENGTH])


def held_out_rows(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """Each document from <bos>, in rows of at most LENGTH predictions, zero-padded; a new row starts with <bos> too."""
    made = []
    for document in documents:
        ids = [*tokenizer.encode("\n\n".join(document.paragraphs), add_special_tokens=False).ids, EOS]
        for at in range(0, len(ids), LENGTH):
            row = np.zeros(LENGTH + 1, np.uint16)
            part = [BOS, *ids[at : at + LENGTH]]
            row[: len(part)] = part
            made.append(row)
    return np.stack(made)


def main(work: Path, count: int) -> None:
    documents, weights, held = load(work / "documents.jsonl")
    lines = (p for d in documents for p in d.paragraphs * (2 if d.is_tale else 1))
    vocabulary = learn(lines, VOCABULARY)
    vocabulary.save(work / "vocab.json")
    tokenizer = build(Vocabulary.load(work / "vocab.json"))
    total = list(itertools.accumulate(weights))

    def block(seed: int) -> np.ndarray:
        rng = random.Random(seed)
        texts = [raw_row(documents, total, rng) for _ in range(250)]
        texts += [conversation(documents, total, CHAT_CHARACTERS, rng) for _ in range(250)]
        return rows(tokenizer, texts)

    train = np.concatenate([block(seed) for seed in range(count // 500)])
    np.random.default_rng(7).shuffle(train)
    train.tofile(work / "train.bin")
    held_rows = held_out_rows(tokenizer, held)
    held_rows.tofile(work / "heldout.bin")
    (work / "heldout.txt").write_text("\n\n".join("\n\n".join(d.paragraphs) for d in held))
    unique = sum(len(p) for d in documents for p in d.paragraphs)
    print(f"{len(train):,} training rows of {LENGTH}; {unique:,} unique characters in {len(documents):,} documents")
    print(f"{len(held_rows):,} held-out rows, {np.count_nonzero(held_rows) - len(held_rows):,} predictions, "
          f"{sum(len(p) for d in held for p in d.paragraphs):,} characters in {len(held)} documents")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
