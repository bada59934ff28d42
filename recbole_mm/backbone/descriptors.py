"""Descriptors of items that need no weights: of pixels and of words, both deterministic.

They are no trained encoders and know nothing of what a picture shows or a word means; they are
there so that models of features run, and can be tested, without a network.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from recbole_mm.backbone.encode import Encoder
from recbole_mm.backbone.encode_items import encode_images
from recbole_mm.backbone.prompt import clean_text
from recbole_mm.backbone.vision import FeatureLog
from recbole_mm.data.content import ItemContent
from recbole_mm.data.images import ImageStore

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
PIXELS, WORDS = "pixels", "words"  # as features are named
_SIDE, _CELLS, _HUES, _TURNS = 64, 4, 12, 8
_VERSION = 1  # of what `describe_pixels` computes
_BATCH = 256
_WORD = re.compile(r"\w+")


def describe_pixels(image: Image.Image) -> Floats:
    """A picture as numbers of its pixels: colours of a coarse grid, hues, and edges by direction.

    Args:
        image: RGB.

    Returns:
        Means and deviations of red, green and blue in 4 x 4 cells, 12 hues weighted by saturation,
        and edges in 8 directions at two scales. Shape: (124,).
    """
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float32) / 255  # (64, 64, 3)
    size = _SIDE // _CELLS
    cells = rgb.reshape(_CELLS, size, _CELLS, size, 3).transpose(0, 2, 1, 3, 4)
    cells = cells.reshape(_CELLS**2, -1, 3)  # (16, pixels, 3)
    parts = [cells.mean(1).ravel(), cells.std(1).ravel(), _hues(small)]
    grey = rgb.mean(2)  # (64, 64)
    parts += [_edges(grey), _edges(grey.reshape(32, 2, 32, 2).mean((1, 3)))]
    return np.concatenate(parts).astype(np.float32)


def _hues(image: Image.Image) -> Floats:
    """How much colour there is of each hue. Shape: (12,)."""
    hsv = np.asarray(image.convert("HSV"), dtype=np.float32).reshape(-1, 3) / 255
    hue = np.minimum((hsv[:, 0] * _HUES).astype(np.int64), _HUES - 1)
    weight = hsv[:, 1] * hsv[:, 2]
    return (np.bincount(hue, weight, _HUES) / len(hsv)).astype(np.float32)


def _edges(grey: Floats) -> Floats:
    """How much brightness changes in each direction. (n, n) -> (8,)."""
    dy, dx = np.gradient(grey)
    turn = np.arctan2(dy, dx) % np.pi / np.pi  # a dark edge is a bright one
    direction = np.minimum((turn * _TURNS).astype(np.int64), _TURNS - 1).ravel()
    strength = np.hypot(dx, dy).ravel()
    return (np.bincount(direction, strength, _TURNS) / grey.size).astype(np.float32)


class _PixelReader(Encoder):
    """`describe_pixels` where an encoder of pictures is expected."""

    pooling = PIXELS

    def __init__(self) -> None:
        """Nothing is loaded."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        raise ValueError("pixels describe pictures alone")

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        return {PIXELS: torch.from_numpy(describe_pixels(image))[None]}

    def look(self, pixels: Sequence[dict[str, Tensor]]) -> Tensor:
        return torch.cat([one[PIXELS] for one in pixels])


def pixel_features(
    content: ItemContent, cache: Path, show_progress: bool = False
) -> tuple[Floats, Bools]:
    """`describe_pixels` of every item's first usable picture, kept below `cache`.

    Returns:
        Zeros where an item has none, shape (V, 124); and which items have any, shape (V,).
    """
    width = len(describe_pixels(Image.new("RGB", (_SIDE, _SIDE))))
    log = FeatureLog(cache / f"{PIXELS}-{_VERSION}", width, torch.float32)
    items = range(1, len(content.item_tokens))
    first = {item: next(iter(content.image_paths(item)), None) for item in items}
    shown = [item for item in items if first[item] is not None]
    load, source = ImageStore(content).get, first.get
    found = encode_images(_PixelReader(), shown, load, source, log, _BATCH, show_progress)
    matrix = np.zeros((len(content.item_tokens), width), dtype=np.float32)  # (V, 124)
    known = np.zeros(len(matrix), dtype=np.bool_)
    rows = [shown[place] for place in found.rows]
    if rows:
        matrix[rows], known[rows] = found.matrix, True
    return matrix, known


def word_features(texts: Sequence[str | None], width: int) -> tuple[Floats, Bools]:
    """Words hashed with a sign into `width` sums, rows of length 1.

    Args:
        texts: of the items by id. Length: V.
        width: numbers of a row.

    Returns:
        Zeros where there is no word, shape (V, width); and where there is any, shape (V,).
    """
    matrix = np.zeros((len(texts), width), dtype=np.float32)
    for row, text in enumerate(texts):
        for word in _WORD.findall(clean_text(text or "").lower()):
            number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            matrix[row, (number >> 1) % width] += 1 - 2 * (number & 1)
    length = np.linalg.norm(matrix, axis=1, keepdims=True)  # (V, 1)
    return matrix / np.maximum(length, 1e-9), length[:, 0] > 0
