"""Train eyes for the built-in model: a tower of kind gemma4v that names drawn shapes, their colours and how many.

    python training/eyes.py train mlx_gemma4/demo/gemma4-demo.gguf OUT.pt [--minutes 9] [--start OUT.pt]
    python training/eyes.py test mlx_gemma4/demo/gemma4-demo.gguf OUT.pt
    python training/eyes.py export OUT.pt mmproj-gemma4-demo.gguf

In: the GGUF of the built-in model, whose weights stay as they are, and nothing else: pictures are drawn as they are
needed (scenes.py). The tower learns through the model, that its answers become likely, and at first also by itself:
what lies at each soft token and how many things there are must follow from its rows by one product. Forward pass as in
mlx_gemma4/media/vision.py. Out: the tower's weights, the best so far each minute, and as a GGUF (F16, positions and
norms F32) of 1.1 MB. Made for a GPU; a CPU takes it for a trial.
"""

from __future__ import annotations

import argparse
import itertools
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
from scenes import COLOURS, KINDS, LARGE, MOST, SHAPES, SMALL, asked, drawn, packed, rendered, scene, seen_at
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from train import Muon
from vocabulary import BOS, PAD, Vocabulary, build

START = time.monotonic()
WIDTH, FFN, HEADS, LAYERS, PLACES = 96, 192, 4, 4, 192
PATCH, POOL, THETA, EPS = 16, 3, 100.0, 1e-6
TURN = "<turn|>\n<|turn>model\n"


# ---- conversations ---------------------------------------------------------------------------------------------------


class Drawings(IterableDataset):  # type: ignore[type-arg]
    """Batches without end of scenes and what is said about them, none of it drawn yet.

    Things and grounds as `packed` has them, rows and columns, ids before and after the picture, labels (-100: not asked
    for). Half of the conversations have a second question. `kind`: ask that alone, and once.
    """

    def __init__(self, model: Path, batch: int, sizes: list[tuple[int, int]], held_out: bool, kind: str | None = None):
        self.model, self.batch, self.sizes, self.held_out, self.kind = model, batch, sizes, held_out, kind

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        info = torch.utils.data.get_worker_info()
        own = f"{info.id if info else ''} {self.sizes} {self.held_out} {self.kind}"
        rng, tokenizer = random.Random(own), tokenizer_of(self.model)
        known: dict[str, list[int]] = {}

        def ids(text: str) -> list[int]:
            if text not in known:
                known[text] = tokenizer.encode(text, add_special_tokens=False).ids
            return known[text]

        while True:
            (rows, columns), scenes, texts = rng.choice(self.sizes), [], []
            # The picture stands before the question as a rule, and is in or behind it in some batches.
            form = 0 if self.kind else rng.choices((0, 1, 2), (0.75, 0.18, 0.07))[0]
            opening = "" if form == 0 else rng.choice(asked(False, rng, "one")[1]["one"][0]) if form == 1 else "What is"
            for _ in range(self.batch):
                pairs, found = asked(self.held_out, rng, self.kind)
                scenes.append(scene(pairs, rows, columns, rng))
                whole = next(iter(found))
                kinds = [self.kind] if self.kind else rng.sample(list(found), rng.choice((1, 2)))
                kinds = [whole, *(k for k in kinds[1:] if k != whole)] if form else kinds
                turns = []
                for i, kind in enumerate(kinds):
                    questions, answer = found[kind]
                    question = rng.choice(questions) if i or not form else "?" if form == 2 else ""
                    start = "\n<|turn>user\n" if i else "<image|>"
                    turns += [(False, ids(f"{start}{question}{TURN}")), (True, ids(f"{answer}<turn|>"))]
                texts.append(turns)
            longest = max(sum(len(part) for _, part in turns) for turns in texts)
            given = torch.full((self.batch, longest), PAD)
            labels = torch.full((self.batch, longest), -100)
            for i, turns in enumerate(texts):
                end = 0
                for said, part in turns:
                    given[i, end : end + len(part)] = torch.tensor(part)
                    if said:
                        labels[i, end - 1 : end + len(part) - 1] = torch.tensor(part)
                    end += len(part)
            yield *packed(scenes), rows, columns, torch.tensor([[BOS, *ids(before(opening))]]), given, labels


def before(opening: str = "") -> str:
    return f"<|turn>user\n{opening}<|image>"


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
        made["mm/input_projection"] = 2 * torch.randn(hidden, WIDTH) * WIDTH**-0.5  # the size of the model's embeddings
        self.w = nn.ParameterDict(made)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, height, width, 3] -> soft tokens [B, n, hidden], and the rows that they are a product of."""
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
        x = rms(x.float() * math.sqrt(WIDTH), None, EPS)
        return F.linear(x, self.w["mm/input_projection"]), x


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


def frozen(path: Path, device: str, narrow: bool = False) -> Gemma4:
    """The built-in model, its matrices in bf16 if `narrow`."""
    model = load(str(path)).to(device).requires_grad_(False)
    for p in model.w.values():
        p.data = p.data.bfloat16() if narrow and p.ndim == 2 else p.data
    return model


def pixels_of(batch: tuple[Any, ...], device: str) -> Tensor:
    things, grounds, rows, columns, *_ = batch
    return rendered(things, grounds, rows, columns, device)


@torch.no_grad()
def right(tower: Tower, model: Gemma4, batch: tuple[Any, ...], pixels: Tensor, device: str) -> Tensor:
    """Whether all tokens of a picture's answers are the model's likeliest, [B]."""
    opening, after, labels = (each.to(device) for each in batch[4:])
    narrow = model.get("token_embd").dtype == torch.bfloat16
    with torch.autocast(device, torch.bfloat16, enabled=narrow):
        said = logits(model, opening, tower(pixels)[0], after).argmax(-1)
    return ((said == labels) | (labels == -100)).all(1)


def optimizers(tower: Tower, heads: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for all else."""
    matrices = [p for name, p in tower.w.items() if "/blk/" in name and p.ndim == 2]
    others = [p for name, p in tower.w.items() if name.startswith("v/") and ("/blk/" not in name or p.ndim != 2)]
    groups = [
        {"params": [*others, *heads.parameters()], "lr": lr},
        {"params": [tower.w["mm/input_projection"]], "lr": 2.5 * lr},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    made: list[torch.optim.Optimizer] = [adam, Muon(matrices, 10 * lr, 0.95, 0.01)]
    for group in (g for o in made for g in o.param_groups):
        group["initial"] = group["lr"]
    return made


def rows_loss(heads: nn.Module, rows: Tensor, things: Tensor, down: int, across: int) -> Tensor:
    """How badly a product tells from each row what lies there, and how many things there are in all."""
    colours, shapes, counts = seen_at(things, down, across)
    told = heads(rows).split([len(COLOURS) + 1, len(SHAPES) + 1, MOST + 1], -1)
    wanted = (colours, shapes, counts[:, None].expand_as(colours))
    losses = [F.cross_entropy(t.flatten(0, 1), w.flatten()) for t, w in zip(told, wanted, strict=True)]
    return losses[0] + losses[1] + losses[2]


def train(given: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device, end = "cuda" if torch.cuda.is_available() else "cpu", 60 * given.minutes
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for each length
    model = frozen(given.model, device, device == "cuda")
    tower = (trained(given.start, 256) if given.start else Tower(256)).to(device)
    heads = nn.Linear(WIDTH, len(COLOURS) + len(SHAPES) + MOST + 3).to(device)
    print(f"{sum(p.numel() for p in tower.parameters()):,} parameters on {device}", flush=True)

    def batches(sizes: list[tuple[int, int]], batch: int, workers: int) -> Iterator[tuple[Any, ...]]:
        return iter(DataLoader(Drawings(given.model, batch, sizes, False), None, num_workers=workers))

    fewer = max(given.batch // 4, 1)
    sources = batches(SMALL, given.batch, (given.workers + 1) // 2), batches(LARGE, fewer, given.workers // 2)
    # Of each: seen and unseen pairs in small pictures, then in large ones.
    trials = [
        next(iter(Drawings(given.model, n, sizes[:1], held)))
        for sizes, n in ((SMALL, given.batch), (LARGE, fewer))
        for held in (False, True)
    ]
    trial_pixels = [pixels_of(batch, device) for batch in trials]

    def tried() -> list[float]:
        pairs = zip(trials, trial_pixels, strict=True)
        return [right(tower, model, batch, pixels, device).float().mean().item() for batch, pixels in pairs]

    made = optimizers(tower, heads, given.lr)
    first, step, best, told, kept, chance = time.monotonic(), 0, -1.0, START, START, random.Random(0)
    if given.start:
        best = keep(tower, sum(tried()), best, given.out)
    while True:
        done = (time.monotonic() - first) / max(1.0, end - (first - START) - given.reserve)
        if done >= 1:
            break
        for group in (g for o in made for g in o.param_groups):
            group["lr"] = group["initial"] * min(1, (step + 1) / 100) * max(0.01, min(1, 1.6 * (1 - done)))
        batch = next(sources[int(done > 0.12 and chance.random() < 0.4)])
        opening, after, labels = (each.to(device, non_blocking=True) for each in batch[4:])
        pixels = pixels_of(batch, device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            soft, rows = tower(pixels)
            said = logits(model, opening, soft, after)
            seen = rows_loss(heads, rows, batch[0].to(device), batch[2], batch[3])
        loss = F.cross_entropy(said.flatten(0, 1), labels.flatten(), ignore_index=-100)
        (loss + (0.1 if given.start else max(0.1, 1 - 2 * done)) * seen).backward()
        nn.utils.clip_grad_norm_([*tower.parameters(), *heads.parameters()], 1.0)
        for each in made:
            each.step()
            each.zero_grad()
        step, now = step + 1, time.monotonic()
        if now - told < given.every and step > 1:
            continue
        told = now
        shares = tried()
        print(
            f"{step} steps, {now - START:.0f} s: loss {loss.item():.3f}, of rows {seen.item():.3f}; right: small "
            f"{shares[0]:.2f}, unseen pairs {shares[1]:.2f}; large {shares[2]:.2f}, unseen pairs {shares[3]:.2f}",
            flush=True,
        )
        if not math.isfinite(loss.item()):
            raise SystemExit("the loss is no number any more; what was kept last is the best")
        if now - kept > given.keep or done > 0.9:
            kept, best = now, keep(tower, sum(shares), best, given.out)
    shares = tried()
    keep(tower, sum(shares), best, given.out)
    print(f"{step} steps in {time.monotonic() - START:.0f} s; right: {', '.join(f'{share:.3f}' for share in shares)}")


def keep(tower: Tower, share: float, best: float, path: Path) -> float:
    """Write the weights unless better ones are there; return the best share."""
    if share >= best:
        torch.save({name: p.detach().half().cpu() for name, p in tower.w.items()}, path)
    return max(share, best)


def test(path: Path, weights: Path) -> None:
    """Print the share of exact answers by kind of question, for pairs that were learned and others, and some more."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tower, count = frozen(path, device), trained(weights, 256).to(device), 128 if device == "cuda" else 2
    print(f"exact answers of {count} each, pictures of up to 70 and 280 soft tokens")
    for kind, held in itertools.product(KINDS, (False, True)):
        shares = []
        for sizes in (SMALL, LARGE):
            batch = next(iter(Drawings(path, count, sizes[:1] if device == "cpu" else sizes, held, kind)))
            shares.append(right(tower, model, batch, pixels_of(batch, device), device).float().mean().item())
        print(f"{kind:8} {'unseen' if held else 'seen':6} {shares[0]:.3f} {shares[1]:.3f}", flush=True)
    tokenizer, rng = tokenizer_of(path), random.Random(4)
    for i in range(20):
        kind = KINDS[i % len(KINDS)]
        pairs, found = asked(i % 2 == 1, rng, kind)
        picture = torch.from_numpy(drawn(scene(pairs, *(SMALL if i % 3 else LARGE)[0], rng)).copy())[None].to(device)
        question = rng.choice(found[kind][0])
        said = answer(model, tower, tokenizer, picture, question)
        print(f"{question} {said!r}{'' if said == found[kind][1] else f', not {found[kind][1]!r}'}", flush=True)


@torch.no_grad()
def answer(model: Gemma4, tower: Tower, tokenizer: Any, picture: Tensor, question: str) -> str:
    """The likeliest answer about a picture, uint8 [1, height, width, 3]."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    opening, asked = torch.tensor([[BOS, *ids(before())]]), ids(f"<image|>{question}{TURN}")
    soft = tower(picture)[0]
    said: list[int] = []
    while len(said) < 24 and ids("<turn|>")[0] not in said:
        after = torch.tensor([asked + said], device=picture.device)
        said.append(int(logits(model, opening.to(picture.device), soft, after)[0, -1].argmax()))
    return str(tokenizer.decode(said))


def trained(path: Path, hidden: int) -> Tower:
    tower = Tower(hidden)
    for name, value in torch.load(path, weights_only=True).items():
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
    parser.add_argument("--minutes", type=float, default=9, help="from the start of this program to its end")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--batch", type=int, default=256, help="small pictures; of large ones a quarter")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every", type=float, default=20, help="seconds between lines")
    parser.add_argument("--keep", type=float, default=55, help="seconds between files")
    parser.add_argument("--reserve", type=float, default=5, help="seconds for the last trial")
    given = parser.parse_args()
    if given.what == "train":
        train(given)
    elif given.what == "export":
        export(torch.load(given.model, weights_only=True), given.out)
    else:
        test(given.model, given.out)


if __name__ == "__main__":
    main()
