"""Train eyes for the built-in model: a tower of kind gemma4v that names drawn shapes, their colours and how many.

    python training/eyes.py train mlx_gemma4/demo/gemma4-demo.gguf OUT.pt [--minutes 55] [--batch 96] [--workers 12]
    python training/eyes.py test mlx_gemma4/demo/gemma4-demo.gguf OUT.pt
    python training/eyes.py export OUT.pt mmproj-gemma4-demo.gguf

In: the GGUF of the built-in model, whose weights stay as they are, and nothing else: pictures are drawn here. The tower
learns through the model: that its answers become likely. Every eighth pair of colour and shape is left out of training;
`test` asks about those alone. Forward pass as in mlx_gemma4/media/vision.py. Out: the tower's weights, and as a GGUF
(F16, positions and norms F32) of about 1 MB. Made for a GPU; a CPU takes it too, for a trial of a few steps.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from evaluate import load
from model import Gemma4, rms
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from vocabulary import BOS, PAD, Vocabulary, build

WIDTH, FFN, HEADS, LAYERS, PLACES = 96, 192, 4, 4, 128
PATCH, POOL, THETA, EPS = 16, 3, 100.0, 1e-6
BEFORE, AFTER = "<unused40>", "<unused41>"  # stand where <|image> and <image|> will, once the vocabulary has them
COLOURS = {
    "red": (205, 45, 45), "blue": (45, 85, 200), "green": (50, 150, 70), "yellow": (240, 205, 50),
    "black": (25, 25, 25), "brown": (125, 80, 45), "grey": (140, 140, 140), "purple": (130, 60, 160),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
NUMBERS = ("no", "one", "two", "three", "four")
WHOLE = ["What is this?", "What do you see?", "What is in the picture?", "Describe the picture.", "What is it?"]
HOW_MANY = ["How many are there?", "How many do you see?", "How many shapes are there?"]
COLOUR = ["What colour is it?", "What color is it?", "Which colour do you see?"]
SIZES = [(7, 10), (10, 7), (8, 8), (6, 11), (14, 19), (19, 14), (16, 16), (14, 20)]  # soft tokens: budgets 70 and 280
HELD_OUT = {(c, s) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES) if (i + 3 * j) % 8 == 0}


# ---- pictures --------------------------------------------------------------------------------------------------------


def outline(shape: str, x: float, y: float, r: float, turn: float) -> list[tuple[float, float]]:
    """The corners of a shape around a place."""
    if shape == "cross":
        w = r / 3
        corners = [
            (-w, -r),
            (w, -r),
            (w, -w),
            (r, -w),
            (r, w),
            (w, w),
            (w, r),
            (-w, r),
            (-w, w),
            (-r, w),
            (-r, -w),
            (-w, -w),
        ]
        return [(x + a, y + b) for a, b in corners]
    n = {"square": 4, "triangle": 3, "star": 10}[shape]
    reach = [r * (0.42 if shape == "star" and i % 2 else 1) for i in range(n)]
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    return [
        (x + d * math.cos(start + turn + 2 * math.pi * i / n), y + d * math.sin(start + turn + 2 * math.pi * i / n))
        for i, d in enumerate(reach)
    ]


def drawn(things: list[tuple[str, str]], rows: int, columns: int, rng: random.Random) -> np.ndarray:
    """Things (colour, shape), none over another, on a pale ground: uint8 [48 * rows, 48 * columns, 3]."""
    height, width = 48 * rows, 48 * columns
    pale = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (2 * width, 2 * height), pale)
    draw, least = ImageDraw.Draw(image), 0.1 * min(width, height)
    taken: list[Any] = []
    for colour, shape in things:
        r = rng.uniform(1.2, 3.6 if len(things) < 2 else 2.2) * least
        for _ in range(200):
            x, y = rng.uniform(r, width - r), rng.uniform(r, height - r)
            if all(math.dist((x, y), (a, b)) > r + s + 4 for a, b, s in taken):
                break
            r = max(0.97 * r, 0.6 * least)
        taken.append((x, y, r))
        fill = tuple(min(255, max(0, c + rng.randint(-18, 18))) for c in COLOURS[colour])
        x, y, r = 2 * x, 2 * y, 2 * r
        if shape in ("circle", "ring"):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            if shape == "ring":
                draw.ellipse((x - 0.6 * r, y - 0.6 * r, x + 0.6 * r, y + 0.6 * r), fill=pale)
        else:
            draw.polygon(outline(shape, x, y, r, rng.uniform(-0.25, 0.25)), fill=fill)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def asked(held_out: bool, rng: random.Random) -> tuple[list[tuple[str, str]], str, str]:
    """Things to draw, a question about them, and the answer."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == held_out]
    (colour, shape), draw = rng.choice(pairs), rng.random()
    if draw < 0.25:
        other = rng.choice([p for p in pairs if p != (colour, shape)])
        return [(colour, shape), other], rng.choice(WHOLE), f"A {colour} {shape} and a {other[0]} {other[1]}."
    n = 1 if draw < 0.5 else rng.randint(2, 4)
    things, draw = [(colour, shape)] * n, rng.random()
    if draw < 0.15:
        return things, rng.choice(HOW_MANY), f"{NUMBERS[n].capitalize()}."
    if draw < 0.3:
        return things, rng.choice(COLOUR), f"{colour.capitalize()}."
    many = f"{NUMBERS[n].capitalize()} {colour} {shape}{'es' if shape == 'cross' else 's'}."
    return things, rng.choice(WHOLE), many if n > 1 else f"A {colour} {shape}."


class Drawings(IterableDataset):  # type: ignore[type-arg]
    """Batches without end: pixels [B, height, width, 3], ids of question and answer, labels (-100: not asked for)."""

    def __init__(self, model: Path, batch: int, held_out: bool, seed: int) -> None:
        self.model, self.batch, self.held_out, self.seed = model, batch, held_out, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        rng, tokenizer = random.Random(self.seed * 1000 + (info.id if info else 0)), tokenizer_of(self.model)

        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        while True:
            (rows, columns), pixels, texts = rng.choice(SIZES), [], []
            for _ in range(self.batch):
                things, question, answer = asked(self.held_out, rng)
                pixels.append(drawn(things, rows, columns, rng))
                texts.append((ids(f"{AFTER}{question}<turn|>\n<|turn>model\n"), ids(f"{answer}<turn|>")))
            longest = max(len(q) + len(a) for q, a in texts)
            given = torch.full((self.batch, longest), PAD)
            labels = torch.full((self.batch, longest), -100)
            for i, (q, a) in enumerate(texts):
                given[i, : len(q) + len(a)] = torch.tensor(q + a)
                labels[i, len(q) - 1 : len(q) + len(a) - 1] = torch.tensor(a)
            yield torch.from_numpy(np.stack(pixels)), given, labels


def tokenizer_of(model: Path) -> Any:
    fields = gguf.GGUFReader(model).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    return build(Vocabulary(tokens, types, merges))


# ---- the tower, and the model behind it ------------------------------------------------------------------------------


class Tower(nn.Module):
    """Weights under their GGUF names without ".weight", dots as slashes."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        d, late = WIDTH // HEADS, (2 * LAYERS) ** -0.5
        made = {
            "v/patch_embd": torch.randn(WIDTH, 3 * PATCH**2) / PATCH,
            "v/position_embd": torch.zeros(2, PLACES, WIDTH),
        }
        for i in range(LAYERS):
            shapes = {f"attn_{x}": (WIDTH, WIDTH) for x in ("q", "k", "v", "out")}
            shapes |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
            made |= {f"v/blk/{i}/{name}": torch.randn(n, k) * k**-0.5 for name, (n, k) in shapes.items()}
            made |= {f"v/blk/{i}/{name}": torch.ones(WIDTH) for name in ("ln1", "ln2")}
            made |= {f"v/blk/{i}/{name}": torch.full((WIDTH,), late) for name in ("attn_post_norm", "ffn_post_norm")}
            made |= {f"v/blk/{i}/attn_{x}_norm": torch.full((d,), d**-0.25) for x in "qk"}
        made["mm/input_projection"] = torch.randn(hidden, WIDTH) * WIDTH**-0.5
        self.w = nn.ParameterDict(made)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, height, width, 3] -> soft tokens [B, n, hidden]."""
        b, down, across = pixels.shape[0], pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
        x = pixels.view(b, down, PATCH, across, PATCH, 3).permute(0, 1, 3, 5, 2, 4).reshape(b, down * across, -1)
        table = self.w["v/position_embd"]
        x = F.linear(2 * (x.float() / 255) - 1, self.w["v/patch_embd"])
        x = x + (table[0, None, :across] + table[1, :down, None]).reshape(down * across, -1)
        steps = WIDTH // HEADS // 4
        places = torch.stack([torch.arange(across).repeat(down), torch.arange(down).repeat_interleave(across)], 1)
        turns = (places[:, :, None] * THETA ** -(torch.arange(steps) / steps)).to(x.device)
        cos, sin = turns.cos(), turns.sin()

        def rotate(y: Tensor) -> Tensor:
            a, c = y.reshape(*y.shape[:-1], 2, 2, steps).unbind(-2)
            return torch.stack([a * cos - c * sin, c * cos + a * sin], -2).reshape(y.shape).type_as(y)

        for i in range(LAYERS):
            w = lambda name: self.w[f"v/blk/{i}/{name}"]  # noqa: E731, B023
            u = rms(x, w("ln1"), EPS)
            q, k, v = (F.linear(u, w(f"attn_{y}")).view(b, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for y in "qkv")
            q, k = (rotate(rms(y, w(f"attn_{name}_norm"), EPS)) for y, name in ((q, "q"), (k, "k")))
            a = F.scaled_dot_product_attention(q, k, rms(v, None, EPS), scale=1.0).transpose(1, 2).reshape(b, -1, WIDTH)
            x = x + rms(F.linear(a, w("attn_out")), w("attn_post_norm"), EPS)
            u = rms(x, w("ln2"), EPS)
            u = F.gelu(F.linear(u, w("ffn_gate")), approximate="tanh") * F.linear(u, w("ffn_up"))
            x = x + rms(F.linear(u, w("ffn_down")), w("ffn_post_norm"), EPS)
        x = x.view(b, down // POOL, POOL, across // POOL, POOL, WIDTH).mean((2, 4)).view(b, -1, WIDTH)
        return F.linear(rms(x.float() * math.sqrt(WIDTH), None, EPS), self.w["mm/input_projection"])


def logits(model: Gemma4, before: Tensor, soft: Tensor, after: Tensor) -> Tensor:
    """What the model says at each of `after`, behind ids, soft tokens and `after`: [B, T, vocab]."""
    s, b = model.shape, len(soft)
    before = before.expand(b, -1)
    x = torch.cat(
        [F.embedding(before, model.get("token_embd")) * math.sqrt(s.hidden), soft,
         F.embedding(after, model.get("token_embd")) * math.sqrt(s.hidden)], 1
    )  # fmt: skip
    if torch.is_autocast_enabled():
        x = x.to(torch.bfloat16)
    ids = torch.cat([before, torch.full(soft.shape[:2], PAD, device=soft.device), after], 1)
    t = ids.shape[1]
    ple = F.linear(x, model.get("per_layer_model_proj")).view(b, t, s.layers, s.ple) * s.hidden**-0.5
    own = F.embedding(ids, model.get("per_layer_token_embd")).view(b, t, s.layers, s.ple) * math.sqrt(s.ple)
    ple = (rms(ple, model.get("per_layer_proj_norm"), s.eps) + own.type_as(ple)) / math.sqrt(2)
    back = torch.arange(t, device=x.device)[:, None] - torch.arange(t, device=x.device)
    mask = (back >= 0) & (back < s.window)
    kv: dict[int, Any] = {}
    for i in range(s.layers):
        x = model.block(i, x, ple[:, :, i], mask, kv)
    x = rms(x[:, -after.shape[1] :], model.get("output_norm"), s.eps)
    return s.softcap * torch.tanh(F.linear(x, model.get("token_embd")).float() / s.softcap)


def frozen(path: Path, device: str) -> tuple[Gemma4, Tensor]:
    """The built-in model, and the ids before a picture."""
    model = load(str(path)).to(device).requires_grad_(False)
    ids = tokenizer_of(path).encode(f"<|turn>user\n{BEFORE}", add_special_tokens=False).ids
    return model, torch.tensor([[BOS, *ids]], device=device)


@torch.no_grad()
def right(tower: Tower, model: Gemma4, before: Tensor, batches: Iterator[tuple[Tensor, ...]], count: int) -> float:
    """The share of answers of which every token is the model's likeliest."""
    found = []
    for _ in range(count):
        pixels, after, labels = (each.to(before.device) for each in next(batches))
        said = logits(model, before, tower(pixels), after).argmax(-1)
        found.append(((said == labels) | (labels == -100)).all(1).float().mean().item())
    return sum(found) / len(found)


def train(given: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, before = frozen(given.model, device)
    tower = Tower(model.shape.hidden).to(device)
    print(f"{sum(p.numel() for p in tower.parameters()):,} parameters on {device}", flush=True)
    drawings = DataLoader(Drawings(given.model, given.batch, False, 1), None, num_workers=given.workers)
    batches, unseen = iter(drawings), iter(Drawings(given.model, given.batch, True, 2))
    optimizer = torch.optim.AdamW(tower.parameters(), lr=given.lr, betas=(0.9, 0.98), weight_decay=0.01)
    start, step, done = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * given.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = given.lr * min(1, (step + 1) / 100) * max(0.01, min(1, 1.4 * (1 - done)))
        pixels, after, labels = (each.to(device) for each in next(batches))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            said = logits(model, before, tower(pixels), after)
        loss = F.cross_entropy(said.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % given.every == 0:
            share = right(tower, model, before, unseen, 1)
            print(
                f"{step} {time.monotonic() - start:.0f} s: loss {loss.item():.3f}, unseen right {share:.2f}", flush=True
            )
    torch.save({name: p.detach().half().cpu() for name, p in tower.w.items()}, given.out)
    print(f"{step} steps; of unseen pairs {right(tower, model, before, unseen, 4):.3f} right")


def trained(path: Path, hidden: int) -> Tower:
    tower = Tower(hidden)
    for name, value in torch.load(path).items():
        tower.w[name].data = value.float()
    return tower


def export(weights: dict[str, Tensor], path: Path) -> None:
    """Write an mmproj file as llama.cpp's converter does."""
    out = gguf.GGUFWriter(path, "clip")
    out.add_type("mmproj")
    out.add_name("Gemma4 Demo's eyes")
    out.add_license("mit")
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    out.add_clip_has_vision_encoder(True)
    out.add_clip_vision_projector_type("gemma4v")
    out.add_vision_projection_dim(len(weights["mm/input_projection"]))
    out.add_vision_image_size(224)
    out.add_vision_patch_size(PATCH)
    out.add_vision_embedding_length(WIDTH)
    out.add_vision_feed_forward_length(FFN)
    out.add_vision_block_count(LAYERS)
    out.add_vision_head_count(HEADS)
    out.add_vision_image_mean([0.0, 0.0, 0.0])
    out.add_vision_image_std([1.0, 1.0, 1.0])
    out.add_vision_attention_layernorm_eps(EPS)
    for name, value in weights.items():
        array = value.reshape(WIDTH, 3, PATCH, PATCH).numpy() if "patch_embd" in name else value.numpy()
        wide = array.ndim == 1 or "position" in name
        out.add_tensor(name.replace("/", ".") + ".weight", array.astype(np.float32 if wide else np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["train", "test", "export"])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=200)
    given = parser.parse_args()
    if given.what == "train":
        train(given)
    elif given.what == "export":
        export(torch.load(given.model), given.out)
    else:
        model, before = frozen(given.model, "cpu")
        unseen = iter(Drawings(given.model, 16, True, 3))
        print(f"of unseen pairs {right(trained(given.out, model.shape.hidden), model, before, unseen, 6):.3f} right")


if __name__ == "__main__":
    main()
