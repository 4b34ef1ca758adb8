"""Measure a GGUF of the built-in model: held-out perplexity, and how much of its free writing is verbatim corpus.

    python training/evaluate.py WORKDIR MODEL.gguf [MODEL.gguf ...]

In: WORKDIR/heldout.bin, heldout.txt, documents.jsonl, vocab.json. Quantized weights are dequantized exactly and run in
fp32 by our PyTorch model, so the figures differ by the weights alone.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from model import Gemma4, Shape
from torch import Tensor
from train import LENGTH, fetch_rows
from vocabulary import BOS, PAD, Vocabulary, build

OPENINGS = [
    "The old man looked out at the sea", "It was a cold night, and", "My sister had always", "In the morning the king",
    "She opened the letter and", '"Where have you been?"', "The ship left the harbour", "Mr. Bennet was",
    "There was a great noise in the", "The little bird", "Nobody in the village knew", "After dinner they",
]  # fmt: skip


def load(path: str) -> Gemma4:
    model = Gemma4(Shape()).eval()
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name != "rope_freqs.weight":
            parameter = model.w[tensor.name.removesuffix(".weight").replace(".", "/")]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            parameter.data = torch.from_numpy(values.reshape(tuple(parameter.shape)).copy())
    return model


@torch.no_grad()
def perplexity(model: Gemma4, rows: Tensor, characters: int) -> str:
    nats, count = 0.0, 0
    for part in rows.split(4):
        logits, targets = model(part[:, :-1]), part[:, 1:]
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum").item()
        count += int((targets != PAD).sum())
    return (f"{count:,} predictions  {nats / count:.4f} nats  perplexity {math.exp(nats / count):.3f}  "
            f"{nats / math.log(2) / characters:.4f} bits a character")  # fmt: skip


@torch.no_grad()
def sample(model: Gemma4, prompt: list[int], count: int, temperature: float, copies: int, seed: int) -> Tensor:
    """`copies` continuations at once, top-k 40 and top-p 0.95: (copies, len(prompt) + count)."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt] * copies)
    for _ in range(count):
        hidden = model.hidden(ids)[:, -1]
        logits = F.linear(hidden, model.get("token_embd"))
        values, tokens = (30 * torch.tanh(logits / 30) / temperature).topk(40)
        shares = values.softmax(-1)
        shares[shares.cumsum(-1) - shares > 0.95] = 0
        ids = torch.cat([ids, tokens.gather(1, torch.multinomial(shares, 1, generator=chance))], dim=1)
    return ids


def verbatim(text: str, grams: set[int], size: int) -> float:
    """Share of the text's `size`-word sequences that the training text contains word for word."""
    words = text.split()
    runs = [hash(tuple(words[i : i + size])) in grams for i in range(len(words) - size + 1)]
    return sum(runs) / max(1, len(runs))


def main(work: Path, paths: list[str]) -> None:
    rows = fetch_rows(work / "heldout.bin", LENGTH)
    rows = rows[rows.any(1)]
    characters = len((work / "heldout.txt").read_text().replace("\n", ""))
    for path in paths:
        print(path, perplexity(load(path), rows, characters), flush=True)
    model, tokenizer = load(paths[-1]), build(Vocabulary.load(work / "vocab.json"))
    corpus = " ".join(p for line in (work / "documents.jsonl").open() for p in json.loads(line)["paragraphs"]).split()
    grams = {n: {hash(tuple(corpus[i : i + n])) for i in range(len(corpus))} for n in (5, 8)}
    texts = []
    for opening in OPENINGS:
        ids = sample(model, [BOS, *tokenizer.encode(opening, add_special_tokens=False).ids], 120, 0.7, 2, 0)
        texts += [tokenizer.decode(row.tolist()[1:]) for row in ids]
    print("\n".join(random.Random(0).sample(texts, 6)))
    for n, known in grams.items():
        print(f"{n}-word runs found in the corpus: {100 * sum(verbatim(t, known, n) for t in texts) / len(texts):.1f}%")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
