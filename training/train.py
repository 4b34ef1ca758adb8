"""Train the built-in model on one GPU, stopping by the clock.

    python training/train.py DATA OUT [--seconds 480] [--dropout 0.15] ...

In: DATA/train.bin and DATA/heldout.bin (dataset.py). Out: OUT/NAME.0.pt and NAME.1.pt (the averaged weights in fp16 of
the best held-out measure, with the shape) and OUT/NAME.log. Muon for the matrices, AdamW for embeddings and vectors, a
learning rate that falls to zero at the time limit, an exponential average of the weights, bf16 autocast.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import Gemma4, Shape, state
from torch import Tensor

LENGTH = 1024
EVALUATED = 32  # rows at a time


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each matrix in a batch (N, R, C) toward 1 (Newton-Schulz, quintic)."""
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized; matrices of one shape are treated together."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        shapes = sorted({p.shape for p in parameters})
        groups = [{"params": [p for p in parameters if p.shape == s]} for s in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            gradients = torch.stack([p.grad for p in group["params"]])
            held = self.state[group["params"][0]].setdefault("momentum", torch.zeros_like(gradients))
            held.lerp_(gradients, 1 - group["momentum"])
            update = orthogonalize(gradients.lerp(held, group["momentum"]))
            scale = max(1.0, update.size(-2) / update.size(-1)) ** 0.5
            for p, u in zip(group["params"], update, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u.type_as(p), alpha=-group["lr"] * scale)


def losses(model: torch.nn.Module, batch: Tensor) -> Tensor:
    """Negative log-likelihood summed over the predictions that are not padding, and their number: (2,)."""
    logits, targets = model(batch[:, :-1]), batch[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum")
    return torch.stack([each, (targets != 0).sum()])


@torch.no_grad()
def held_out(model: torch.nn.Module, rows: Tensor, device: str) -> float:
    """Mean negative log-likelihood in nats a token, without dropout."""
    model.eval()
    total = torch.zeros(2, device=device)
    for part in rows.split(EVALUATED):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            total += losses(model, part.to(device))
    model.train()
    return (total[0] / total[1]).item()


def fetch_rows(path: Path, length: int) -> Tensor:
    rows = np.fromfile(path, np.uint16).reshape(-1, LENGTH + 1)[:, : length + 1].astype(np.int64)
    padded = np.pad(rows, ((0, -len(rows) % EVALUATED), (0, 0)))  # rows of padding count for nothing
    return torch.from_numpy(padded if path.stem == "heldout" else rows)


def optimizers(model: Gemma4, args: argparse.Namespace, fused: bool) -> list[torch.optim.Optimizer]:
    embeddings = [p for n, p in model.w.items() if n.endswith("token_embd")]
    matrices = [p for n, p in model.w.items() if p.ndim == 2 and not n.endswith("token_embd")]
    vectors = [p for p in model.w.values() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [
            {"params": embeddings, "lr": args.lr_embedding, "weight_decay": args.decay_embedding},
            {"params": vectors, "lr": args.lr_vector, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=fused,
    )
    made: list[torch.optim.Optimizer] = [adam, Muon(matrices, args.lr, 0.95, args.decay)]
    for group in (g for o in made for g in o.param_groups):
        group["initial"] = group["lr"]
    return made


def save(path: Path, shape: Shape, weights: dict[str, Tensor]) -> None:
    """Two files, NAME.0.pt and NAME.1.pt, each with the shape and half of the weights."""
    names = list(weights)
    for part in (0, 1):
        chosen = {n: weights[n] for n in names if (n == "per_layer_token_embd.weight") == (part == 0)}
        torch.save({"shape": dataclasses.asdict(shape), "weights": chosen}, f"{path}.{part}.pt")


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = fetch_rows(args.data / "train.bin", args.length)
    evaluation = fetch_rows(args.data / "heldout.bin", LENGTH)
    rows = rows.to(device)
    shape = Shape()
    model = Gemma4(shape, args.dropout).to(device)
    average = Gemma4(shape).to(device).eval()
    average.load_state_dict(model.state_dict())
    steps = optimizers(model, args, device == "cuda")
    quick = torch.compile(model) if device == "cuda" else model
    log = (args.out / f"{args.name}.log").open("w")
    order, best, seen, step = torch.randperm(len(rows)), math.inf, 0, 0
    begun, last = time.time(), 0.0
    first = begun  # moved on when the first steps have been compiled, so that compiling takes nothing off the schedule
    while True:
        if step == 3:
            first = time.time()
        done = (time.time() - first) / (args.seconds - (first - begun)) if step >= 3 else 0.0
        warm = min(1.0, (step + 1) / args.warmup)
        for group in (g for o in steps for g in o.param_groups):
            group["lr"] = group["initial"] * warm * min(1.0, max(0.0, 1 - done) / args.cooldown)
        at = seen % len(rows)
        if at + args.batch > len(rows):
            seen, at, order = seen + len(rows) - at, 0, torch.randperm(len(rows))
        batch = rows[order[at : at + args.batch].to(device)]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            total = losses(quick, batch)
            loss = total[0] / total[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen, step = seen + args.batch, step + 1
        with torch.no_grad():
            keep = min(args.average, 1 - 1 / (step / 4 + 1))
            torch._foreach_lerp_(list(average.w.values()), list(model.w.values()), 1 - keep)
        ends = done >= 1 or step == args.steps
        if ends or time.time() - last > args.every:
            last, nats = time.time(), held_out(average, evaluation, device)
            line = f"{last - begun:6.1f} s  step {step:6,}  passes {seen / len(rows):6.2f}  train {loss.item():.4f}  "
            line += f"held-out {nats:.4f}  ppl {math.exp(nats):.3f}  {seen * args.length / 1e6:.1f} M tokens"
            print(f"{args.name}  {line}", flush=True)
            log.write(line + "\n")
            log.flush()
            if nats < best:
                best = nats
                weights = {n: t.half().cpu() for n, t in state(average).items()}
                save(args.out / args.name, shape, weights)
        if ends:
            return


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser()
    p.add_argument("data", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--name", default="demo")
    p.add_argument("--seconds", type=float, default=480)
    p.add_argument("--steps", type=int, default=0, help="stop earlier, after so many (for trying it out)")
    p.add_argument("--batch", type=int, default=64, help="rows of --length tokens")
    p.add_argument("--length", type=int, default=LENGTH)
    p.add_argument("--every", type=float, default=20, help="seconds between held-out measures")
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--lr-embedding", type=float, default=0.004)
    p.add_argument("--lr-vector", type=float, default=0.004)
    p.add_argument("--decay", type=float, default=0.1)
    p.add_argument("--decay-embedding", type=float, default=0.1)
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--cooldown", type=float, default=0.7, help="last part of the time in which the rate falls to zero")
    p.add_argument("--average", type=float, default=0.997)
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


if __name__ == "__main__":
    train(arguments())
