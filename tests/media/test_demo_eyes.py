"""The eyes of the built-in model: what it says of drawn shapes, to the letter."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mlx_gemma4 import LanguageModel, chat
from mlx_gemma4.conversation.language_model import demo_path

Thing = tuple[str, str, int, int, int]  # colour, shape, place and radius in hundredths of the height
CORNERS = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.42)}


def drawn(width: int, height: int, *things: Thing) -> Image.Image:
    """Things on white, in Pillow's own colours, with its hard edges. Its "brown" is a red."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for colour, shape, *place in things:
        x, y, r = (v * height / 100 for v in place)
        if shape in ("circle", "ring"):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            if shape == "ring":
                draw.ellipse((x - 0.6 * r, y - 0.6 * r, x + 0.6 * r, y + 0.6 * r), fill="white")
        elif shape == "cross":
            draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=colour)
            draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=colour)
        else:
            n, inner = CORNERS[shape]
            start = math.pi / 4 if shape == "square" else -math.pi / 2
            reach = [r * (inner if i % 2 else 1) for i in range(n)]
            turns = [start + 2 * math.pi * i / n for i in range(n)]
            places = [(x + d * math.cos(a), y + d * math.sin(a)) for d, a in zip(reach, turns, strict=True)]
            draw.polygon(places, fill=colour)
    return image


WIDE, SQUARE = (640, 480), (400, 400)
CASES = [  # soft tokens at most, width and height, things, question, answer
    (70, WIDE, [("red", "circle", 60, 50, 25)], "What is this?", "A red circle."),
    (280, WIDE, [("red", "circle", 60, 50, 25)], "What is this?", "A red circle."),
    (70, SQUARE, [("blue", "star", 50, 45, 30)], "What do you see?", "A blue star."),
    (280, SQUARE, [("green", "triangle", 40, 55, 28)], "What is it?", "A green triangle."),
    (70, WIDE, [("purple", "ring", 80, 45, 30)], "What is this?", "A purple ring."),
    (280, WIDE, [("saddlebrown", "square", 70, 50, 22)], "What colour is it?", "Brown."),
    (70, SQUARE, [("black", "cross", 50, 50, 30)], "What shape is it?", "A cross."),
    (280, WIDE, [("red", "circle", 30, 50, 18), ("blue", "square", 100, 55, 18)],
     "What is in the picture?", "A red circle and a blue square."),
    (70, WIDE, [("yellow", "star", 30, 40, 20), ("black", "triangle", 95, 60, 20)], "How many are there?", "Two."),
    (70, WIDE, [("green", "circle", 25, 30, 14), ("green", "circle", 65, 70, 14), ("green", "circle", 105, 30, 14)],
     "What do you see?", "Three green circles."),
    # Two pairs that training left out.
    (280, SQUARE, [("red", "triangle", 50, 50, 30)], "What is this?", "A red triangle."),
    (70, WIDE, [("green", "ring", 70, 50, 28)], "What is this?", "A green ring."),
]  # fmt: skip


def answer(lm: LanguageModel, picture: Image.Image, tokens: int, question: str) -> str:
    parts = [{"type": "image", "image": picture, "tokens": tokens}, {"type": "text", "text": question}]
    return chat(lm, [{"role": "user", "content": parts}], max_tokens=20, temperature=0).text


# Of 280 tokens a CPU sees for some seconds.
TIMED = [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] > 70), id=f"{case[0]}-{case[4]}") for case in CASES]


@pytest.mark.parametrize(("tokens", "size", "things", "question", "wanted"), TIMED)
def test_the_built_in_model_says_what_is_drawn(
    lm: LanguageModel, tokens: int, size: tuple[int, int], things: list[Thing], question: str, wanted: str
) -> None:
    assert answer(lm, drawn(*size, *things), tokens, question) == wanted


@pytest.mark.slow
def test_the_readme_shows_what_it_says(lm: LanguageModel) -> None:
    root = Path(__file__).parents[2]
    said = answer(lm, Image.open(root / "docs" / "images" / "shapes.png"), 280, "What is this?")
    assert f'--image docs/images/shapes.png --prompt "What is this?"\n{said}\n' in (root / "README.md").read_text()


def test_its_projector_is_small() -> None:
    assert demo_path().with_name("mmproj-gemma4-demo.gguf").stat().st_size < 1_500_000
