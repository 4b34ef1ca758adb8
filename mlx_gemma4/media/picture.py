"""Pictures: from a file's bytes to the pixels that a tower reads.

In: a `Content`. Out: uint8 [height, width, 3], sides multiples of 48, as many pixels as the budget of soft tokens
allows: small pictures are enlarged. Size (`get_aspect_ratio_preserving_size`) and filter are those of transformers'
processor for Gemma 4: bicubic with antialiasing, along rows, then along columns, rounded to 8 bits after each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, one_line
from .content import Content
from .kind import BUDGETS

if TYPE_CHECKING:
    from PIL import Image

USUAL = 280
SIDE = 48  # pixels of a soft token
MOST_PIXELS = 89_000_000  # of a picture; Pillow warns above
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "HEIF", "AVIF")


def inputs(content: Content, part: Mapping[str, Any]) -> list[np.ndarray]:
    """Return a picture's pixels, as the one input of a tower.

    Args:
        part: its "tokens" is one of BUDGETS.

    Raises:
        InputError: it can't be decoded, or is too large.
    """
    return [resized(decoded(content), budget(part))]


def budget(part: Mapping[str, Any]) -> int:
    """Return the soft tokens that a part may become. Raises InputError."""
    tokens = part.get("tokens")
    if tokens not in (None, *BUDGETS):
        raise InputError(f"image tokens: {str(tokens)[:20]}; take one of {', '.join(map(str, BUDGETS))}")
    return tokens or USUAL


def decoded(content: Content) -> Image.Image:
    """Return a picture in RGB: its first frame, upright, on white where it is transparent."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not isinstance(content.source, bytes | Path):
        return _rgb(ImageOps.exif_transpose(content.source))
    with content.open() as file:
        head = file.read(1024).lstrip()
        file.seek(0)
        if head[4:8] == b"ftyp":  # HEIF, or a video
            with suppress(ImportError):
                from pillow_heif import register_heif_opener

                register_heif_opener()
        Image.init()
        try:
            image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
        except Image.DecompressionBombError:
            raise InputError(
                f"{content.name}: has more than {MOST_PIXELS // 10**6} megapixels; make it smaller"
            ) from None
        except UnidentifiedImageError:
            what = "an SVG, which is drawn, not read" if b"<svg" in head else "no picture that can be read"
            raise InputError(f"{content.name}: is {what}; give a JPEG, PNG, WebP or GIF") from None
        except Exception as error:  # each format's decoder has its own
            raise InputError(f"{content.name}: can't be decoded ({one_line(str(error))[:80]}); give another") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode in RGB, on white where it is transparent."""
    from PIL import Image

    if not image.width * image.height:
        raise InputError("image: has no pixels; give another")
    if image.mode.startswith("I"):  # greys in 16 bits; Pillow's own conversion clips them
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((grey >> 8 * (grey.max() > 255)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def fitted(height: int, width: int, tokens: int) -> tuple[int, int]:
    """Return the height and width that a picture is resized to: at most `tokens` squares of SIDE."""
    factor = math.sqrt(tokens * SIDE**2 / (height * width))
    rows, columns = int(factor * height / SIDE), int(factor * width / SIDE)
    if not rows:
        rows, columns = 1, min(width // height, tokens)
    elif not columns:
        rows, columns = min(height // width, tokens), 1
    return rows * SIDE, columns * SIDE


def resized(image: Image.Image, tokens: int) -> np.ndarray:
    """Return the pixels, uint8 [height, width, 3], of an RGB image resized to so many soft tokens at most."""
    from PIL import Image

    height, width = fitted(image.height, image.width, tokens)
    # Two calls: newer versions of Pillow choose the order of the passes by their cost.
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
