"""Drawing the product pictures of the demo dataset.

A *look* is a hue with a pattern. Everything else of a picture is drawn at random and tells nothing:
outline (the category's), position, size, shade, background and its gradient, a badge, noise.
"""

from __future__ import annotations

import colorsys
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIZE = 56  # pixels a side: the smallest picture Qwen2-VL takes as it is
_SCALE = 2  # drawn at twice the size, then shrunk
LOOKS = (
    (0.00, "stripes"),
    (1 / 6, "dots"),
    (2 / 6, "plain"),
    (3 / 6, "checks"),
    (4 / 6, "bands"),
    (5 / 6, "rings"),
)
OUTLINES = 6


def draw_product(look: int, outline: int, rng: np.random.Generator) -> bytes:
    """One product picture as JPEG bytes.

    Args:
        look: index into `LOOKS`.
        outline: index of the shape, below `OUTLINES`.
        rng: decides all the rest.
    """
    side = SIZE * _SCALE
    hue, pattern = LOOKS[look]
    hue += rng.normal(0, 0.02)
    light = _colour(hue, rng.uniform(0.6, 0.75), rng.uniform(0.8, 0.95))
    dark = _colour(hue, rng.uniform(0.75, 0.9), rng.uniform(0.45, 0.55))
    canvas = Image.fromarray(_background(side, rng))
    surface = _surface(side, pattern, light, dark, rng)
    canvas.paste(surface, mask=_outline(side, outline, rng))
    _badge(canvas, rng)
    return _finish(canvas, rng)


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def _background(side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A pale or dim gradient of two unsaturated colours of any hue. Shape: (side, side, 3)."""
    value = rng.uniform(0.6, 0.95)
    ends = np.array(
        [
            _colour(rng.uniform(), rng.uniform(0, 0.1), np.clip(value + shift, 0, 1))
            for shift in rng.uniform(-0.1, 0.1, 2)
        ]
    )
    ramp = np.linspace(0, 1, side)
    steps = ramp[:, None] if rng.uniform() < 0.5 else ramp[None, :]
    blend = np.broadcast_to(steps, (side, side))[..., None]  # (side, side, 1)
    return (ends[0] * (1 - blend) + ends[1] * blend).astype(np.uint8)


def _surface(
    side: int,
    pattern: str,
    light: tuple[int, int, int],
    dark: tuple[int, int, int],
    rng: np.random.Generator,
) -> Image.Image:
    """The two tones of a look in its pattern, over the whole canvas, at a random phase."""
    period, (x0, y0) = rng.uniform(16, 24), rng.uniform(0, 24, 2)
    y, x = np.mgrid[:side, :side]
    u, v = (x + x0) / period % 1 - 0.5, (y + y0) / period % 1 - 0.5
    on = {
        "stripes": abs(u) < 0.22,
        "dots": u**2 + v**2 < 0.07,
        "plain": np.zeros_like(u, dtype=bool),
        "checks": (u < 0) ^ (v < 0),
        "bands": abs(v) < 0.22,
        "rings": np.hypot(x - side / 2 + x0 - 12, y - side / 2 + y0 - 12) / period % 1 < 0.45,
    }[pattern]
    tones = np.where(on[..., None], np.array(dark), np.array(light))  # (side, side, 3)
    return Image.fromarray(tones.astype(np.uint8))


def _outline(side: int, outline: int, rng: np.random.Generator) -> Image.Image:
    """The mask of the product: one of six shapes at a random place and size."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    width, height = rng.uniform(0.75, 0.95, 2) * side
    left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
    right, bottom, middle = left + width, top + height, left + width / 2
    box = (left, top, right, bottom)
    if outline == 0:
        draw.ellipse(box, fill=255)
    elif outline == 1:
        draw.rounded_rectangle(box, radius=side / 10, fill=255)
    elif outline == 2:  # a bottle
        draw.rounded_rectangle((left, top + height / 3, right, bottom), radius=8, fill=255)
        draw.rectangle((middle - width / 6, top, middle + width / 6, bottom), fill=255)
    elif outline == 3:
        draw.polygon([(middle, top), (right, bottom), (left, bottom)], fill=255)
    elif outline == 4:  # a cup
        inset = width / 5
        corners = [(left, top), (right, top), (right - inset, bottom), (left + inset, bottom)]
        draw.polygon(corners, fill=255)
    else:  # a diamond
        level = top + height / 2
        draw.polygon([(middle, top), (right, level), (middle, bottom), (left, level)], fill=255)
    return mask.filter(ImageFilter.GaussianBlur(1))


def _badge(canvas: Image.Image, rng: np.random.Generator) -> None:
    """A small disc of any colour in every other picture."""
    if rng.uniform() < 0.25:
        radius = rng.uniform(0.05, 0.1) * canvas.width
        x, y = rng.uniform(radius, canvas.width - radius, 2)
        fill = _colour(rng.uniform(), rng.uniform(0.5, 1), rng.uniform(0.5, 1))
        ImageDraw.Draw(canvas).ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _finish(canvas: Image.Image, rng: np.random.Generator) -> bytes:
    """Shrinks, adds noise of the camera, and encodes."""
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
    noisy = pixels * rng.uniform(0.95, 1.05) + rng.normal(0, 4, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
