"""Pictures of coloured shapes, questions about them and answers, for the eyes of the built-in model (eyes.py).

In: a generator of random numbers. Out: scenes (what is drawn, and where), their pixels, drawn by Pillow one by one or
by PyTorch many at once, and what may be asked. Every eighth pair of colour and shape is left out of training.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIDE = 48  # pixels of a soft token
MOST = 4  # things in a picture
# What may pass for a colour: any mixture of two of its row.
COLOURS = {
    "red": [(205, 45, 45), (255, 0, 0), (220, 20, 60), (178, 24, 24)],
    "blue": [(45, 85, 200), (0, 0, 255), (30, 110, 240), (20, 40, 140)],
    "green": [(50, 150, 70), (0, 128, 0), (0, 230, 40), (60, 180, 75)],
    "yellow": [(240, 205, 50), (255, 255, 0), (255, 225, 25)],
    "black": [(25, 25, 25), (0, 0, 0), (40, 40, 45)],
    "brown": [(125, 80, 45), (139, 69, 19), (150, 90, 40), (101, 67, 33)],
    "grey": [(140, 140, 140), (128, 128, 128), (165, 165, 165), (110, 112, 115)],
    "purple": [(130, 60, 160), (128, 0, 128), (150, 40, 200), (145, 30, 180)],
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
NUMBERS = ("no", "one", "two", "three", "four")
WHOLE = (
    "What is this?", "What do you see?", "What is in the picture?", "Describe the picture.", "What is it?",
    "Describe this image.", "What is in this image?", "What does the picture show?", "What can you see?",
)  # fmt: skip
HOW_MANY = ("How many are there?", "How many do you see?", "How many shapes are there?", "How many things are there?")
COLOUR = ("What colour is it?", "What color is it?", "Which colour do you see?", "What colour is this?")
SHAPE = ("What shape is it?", "Which shape is it?", "What shape do you see?")
OF_ONE = ("What colour is the {}?", "What color is the {}?", "Which colour is the {}?")
KINDS = ("one", "same", "two", "number", "colour", "shape", "of one")  # of questions
# Rows and columns of soft tokens: what pictures of usual forms become at budgets of 70 and 280.
SMALL = [(7, 9), (9, 7), (8, 8), (6, 10), (10, 6), (6, 11), (11, 6), (5, 11), (7, 10)]
LARGE = [(14, 19), (19, 14), (16, 16), (13, 20), (20, 13), (12, 22), (22, 12), (11, 23), (14, 20)]
HELD_OUT = {(c, s) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES) if (i + 3 * j) % 8 == 6}


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    x: float  # pixels
    y: float
    r: float
    turn: float  # radians
    fill: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """Things from left to right on a pale ground of 48 * rows x 48 * columns pixels."""

    rows: int
    columns: int
    ground: tuple[float, float, float]
    things: list[Thing]


def scene(pairs: list[tuple[str, str]], rows: int, columns: int, rng: random.Random) -> Scene:
    """Pairs of colour and shape, from left to right, none over another."""
    height, width = SIDE * rows, SIDE * columns
    least, n = 0.1 * min(width, height), len(pairs)
    ground = (255.0,) * 3 if rng.random() < 0.4 else tuple(float(rng.randint(225, 255)) for _ in range(3))
    biggest = (0, 4.2, 2.6, 2.2, 2.0)[n]
    while True:
        radii = [rng.uniform(1.2, biggest) * least for _ in pairs]
        places: list[tuple[float, float]] = []
        for i, r in enumerate(radii):
            for _ in range(30):
                x, y = rng.uniform(1.06 * r, width - 1.06 * r), rng.uniform(1.06 * r, height - 1.06 * r)
                if all(math.dist((x, y), at) > 1.06 * (r + s) + 4 for at, s in zip(places, radii[:i], strict=True)):
                    places.append((x, y))
                    break
            else:
                break
        order = sorted(places)
        apart = all(b[0] - a[0] > 0.6 * least for a, b in itertools.pairwise(order))
        # Which one is left of the other must be plain where that decides about the answer.
        if len(places) == n and (apart or len(set(pairs)) == 1):
            break
    things = []
    for (colour, shape), (x, y), r in zip(pairs, order, [radii[places.index(at)] for at in order], strict=True):
        (a, b), t = rng.sample(COLOURS[colour], 2), rng.random()
        fill = tuple(min(255.0, max(0.0, p + t * (q - p) + rng.uniform(-8, 8))) for p, q in zip(a, b, strict=True))
        things.append(Thing(colour, shape, x, y, r, rng.uniform(-0.3, 0.3), fill))  # type: ignore[arg-type]
    return Scene(rows, columns, ground, things)  # type: ignore[arg-type]


# ---- pixels ----------------------------------------------------------------------------------------------------------


def outline(thing: Thing, scale: float) -> list[tuple[float, float]]:
    """The corners of a square, triangle, star or cross."""
    if thing.shape == "cross":
        w, signs = 1 / 3, ((1, 1), (-1, 1), (-1, -1), (1, -1))
        each = [[(a, w * b), (w * a, w * b), (w * a, b)] for a, b in signs]
        corners = each[0] + each[1][::-1] + each[2] + each[3][::-1]
    else:
        n = {"square": 4, "triangle": 3, "star": 10}[thing.shape]
        start = math.pi / 4 if thing.shape == "square" else -math.pi / 2
        reach = [0.42 if thing.shape == "star" and i % 2 else 1.0 for i in range(n)]
        turns = [start + 2 * math.pi * i / n for i in range(n)]
        corners = [(d * math.cos(a), d * math.sin(a)) for d, a in zip(reach, turns, strict=True)]
    cos, sin = math.cos(thing.turn), math.sin(thing.turn)
    place = [(thing.x + thing.r * (a * cos - b * sin), thing.y + thing.r * (a * sin + b * cos)) for a, b in corners]
    return [(scale * x, scale * y) for x, y in place]


def drawn(of: Scene) -> np.ndarray:
    """A scene's pixels by Pillow, uint8 [48 * rows, 48 * columns, 3]."""

    def whole(colour: tuple[float, float, float]) -> tuple[int, ...]:
        return tuple(round(c) for c in colour)

    size = (SIDE * of.columns, SIDE * of.rows)
    image = Image.new("RGB", (2 * size[0], 2 * size[1]), whole(of.ground))
    draw = ImageDraw.Draw(image)
    for thing in of.things:
        x, y, r, fill = 2 * thing.x, 2 * thing.y, 2 * thing.r, whole(thing.fill)
        if thing.shape in ("circle", "ring"):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            if thing.shape == "ring":
                draw.ellipse((x - 0.6 * r, y - 0.6 * r, x + 0.6 * r, y + 0.6 * r), fill=whole(of.ground))
        else:
            draw.polygon(outline(thing, 2), fill=fill)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def packed(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Scenes as numbers: things [B, MOST, 9] (colour, shape, x, y, r, turn, fill; colour -1: none), grounds [B, 3]."""
    things = torch.full((len(scenes), MOST, 9), -1.0)
    for i, each in enumerate(scenes):
        for j, t in enumerate(each.things):
            row = [list(COLOURS).index(t.colour), SHAPES.index(t.shape), t.x, t.y, t.r, t.turn, *t.fill]
            things[i, j] = torch.tensor(row)
    return things, torch.tensor([each.ground for each in scenes])


def distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """How far places are outside of a shape of radius 1 that isn't turned; below 0 inside."""
    if shape in ("circle", "ring"):
        far = torch.hypot(x, y)
        return far - 1 if shape == "circle" else (far - 0.8).abs() - 0.2
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.5**0.5
    if shape == "triangle":
        return torch.maximum(y, 0.75**0.5 * x.abs() - 0.5 * y) - 0.5
    if shape == "cross":
        low, high = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
        return torch.maximum(low - 1 / 3, high - 1)
    step = 2 * math.pi / 5
    turn = (torch.remainder(torch.atan2(x, -y) + step / 2, step) - step / 2).abs()  # from the nearest tip
    ex, ey = 0.42 * math.cos(step / 2) - 1, 0.42 * math.sin(step / 2)  # from a tip to the corner beside it
    far, norm = torch.hypot(x, y), math.hypot(ex, ey)
    return ((far * turn.cos() - 1) * ey - far * turn.sin() * ex) / norm


def rendered(things: Tensor, grounds: Tensor, rows: int, columns: int, device: str) -> Tensor:
    """Pixels of `packed` scenes, uint8 [B, height, width, 3], with soft or hard edges, and noise on some."""
    height, width, b = SIDE * rows, SIDE * columns, len(things)
    kinds, things = things[:, :, 1].int(), things.to(device)
    image = grounds.to(device)[:, :, None, None].expand(b, 3, height, width).contiguous()
    y, x = torch.arange(height, device=device)[:, None] + 0.5, torch.arange(width, device=device) + 0.5
    soft = 0.7 + 2.3 * torch.rand(b, 1, 1, device=device)  # pixels from outside to inside
    for j in range(MOST):
        for k, shape in enumerate(SHAPES):
            some = (kinds[:, j] == k).nonzero()[:, 0].to(device)
            if not len(some):
                continue
            at = things[some, j][:, :, None, None]
            u, v = (x - at[:, 2]) / at[:, 4], (y - at[:, 3]) / at[:, 4]
            cos, sin = (at[:, 5].cos(), at[:, 5].sin()) if shape not in ("circle", "ring") else (1.0, 0.0)
            out = distance(shape, u * cos + v * sin, v * cos - u * sin) * at[:, 4]
            cover = (0.5 - out / soft[some]).clamp_(0, 1)[:, None]
            image[some] = torch.lerp(image[some], at[:, 6:], cover)
    noise = 4 * (torch.rand(b, 1, 1, 1, device=device) - 0.6).clamp_(0) / 0.4
    image = image + noise * torch.randn(image.shape, device=device)
    return image.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def seen_at(things: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """What lies at each soft token, of `packed` things: colours and shapes (their number: none) [B, n], counts [B]."""
    x = (torch.arange(columns, device=things.device) + 0.5) * SIDE
    y = (torch.arange(rows, device=things.device) + 0.5) * SIDE
    places = torch.stack([x.repeat(rows), y.repeat_interleave(columns)], 1)
    there = things[:, :, 0] >= 0
    far = (places[None, :, None] - things[:, None, :, 2:4]).norm(dim=-1) - things[:, None, :, 4]  # [B, n, MOST]
    nearest, which = far.masked_fill(~there[:, None], math.inf).min(-1)
    colours, shapes = (things[:, :, i].gather(1, which).long() for i in (0, 1))
    none = nearest > 0
    return colours.masked_fill(none, len(COLOURS)), shapes.masked_fill(none, len(SHAPES)), there.sum(1)


# ---- questions -------------------------------------------------------------------------------------------------------


def asked(held_out: bool, rng: random.Random, only: str | None = None) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Pairs to draw, and what may be asked about them: kind -> (questions, answer). `only`: a kind that must be."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == held_out]
    colour, shape = first = rng.choice(pairs)
    if only == "colour":
        return asked(held_out, rng, rng.choice(["one", "same"]))
    draw = {"one": 0.0, "shape": 0.0, "same": 0.5, "two": 0.9, "of one": 0.9}.get(only or "", rng.random())
    if draw < 0.65:
        n = 1 if draw < 0.35 else rng.randint(2, 4)
        whole = f"A {colour} {shape}." if n == 1 else f"{NUMBERS[n].capitalize()} {colour} {plural(shape)}."
        found = {"one" if n == 1 else "same": (WHOLE, whole), "colour": (COLOUR, f"{colour.capitalize()}.")}
        found["number"] = (HOW_MANY, f"{NUMBERS[n].capitalize()}.")
        return [first] * n, found | ({"shape": (SHAPE, f"A {shape}.")} if n == 1 else {})
    other = rng.choice([p for p in pairs if p != first and (only != "of one" or p[1] != shape)])
    found = {"two": (WHOLE, f"A {colour} {shape} and a {other[0]} {other[1]}."), "number": (HOW_MANY, "Two.")}
    if other[1] != shape:
        c, s = rng.choice([first, other])
        found["of one"] = (tuple(q.format(s) for q in OF_ONE), f"{c.capitalize()}.")
    return [first, other], found


def plural(shape: str) -> str:
    return f"{shape}{'es' if shape == 'cross' else 's'}"
