"""A shop of a few items and a tiny backbone that reads them, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recbole_mm.backbone.load import Backbone, BackboneSpec, load_backbone
from recbole_mm.backbone.prompt import PromptStyle, PromptWriter
from recbole_mm.backbone.ranker import LetterRanker
from recbole_mm.backbone.verbalizer import Verbalizer
from recbole_mm.backbone.vision import FeatureLog, ItemImages

ATTRIBUTES = ("image", "title", "price", "brand")
STYLE = PromptStyle("Which candidate comes next?", ATTRIBUTES, 16)
TEXT_STYLE = PromptStyle(STYLE.instruction, ATTRIBUTES[1:], 16)  # for those that see nothing
TEXTS: dict[int, dict[str, str]] = {
    1: {"title": "Red bowl", "price": "12.50", "brand": "Aro"},
    2: {"title": "Blue cup", "brand": "Bexley"},
    3: {"title": 'Tasse "Été" \\ 日本 😀', "price": "3"},
    4: {},
    5: {"title": "Green kite", "price": "8.99", "brand": "Corvin"},
    6: {"title": "Small tent", "price": "59.00", "brand": "Aro"},
    7: {"title": "Old box", "price": "1.00", "brand": "Elva"},
    8: {"title": "Grand bottle", "price": "7.25", "brand": "Gora"},
}
# Width and height; item 2 has no picture. Within 56 x 56 to 168 x 168 they make 4 to 36 tokens.
PICTURES = {1: (56, 56), 3: (60, 130), 4: (300, 200), 5: (168, 168), 6: (20, 20), 7: (90, 60)}


def picture(item: int) -> Image.Image | None:
    """The item's picture: noise of its own, the same in every process."""
    if item not in PICTURES:
        return None
    width, height = PICTURES[item]
    pixels = np.random.default_rng(item).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def text_of(item: int, attribute: str) -> str | None:
    return TEXTS.get(item, {}).get(attribute)


def spec_of(**changes: Any) -> BackboneSpec:
    """The real model's pixel budget, the tiny form's sizes."""
    plain = {
        "name": "tiny",
        "family": "qwen2_vl",
        "model": "Qwen/Qwen2-VL-2B-Instruct",
        "min_pixels": 56 * 56,
        "max_pixels": 168 * 168,
        "is_tiny": True,
    }
    return BackboneSpec.from_mapping({**plain, **changes})


def backbone_of(seed: int = 0, **changes: Any) -> Backbone:
    texts = [value for fields in TEXTS.values() for value in fields.values()]
    return load_backbone(spec_of(**changes), texts, STYLE.fixed_text(), seed)


def images_of(
    backbone: Backbone,
    load: Callable[[int], Any] = picture,
    source: Callable[[int], Path | None] = lambda item: None,
    frozen: bool = False,
    log: FeatureLog | None = None,
) -> ItemImages:
    return ItemImages(backbone.family, load, source, frozen, log)


def writer_of(
    backbone: Backbone,
    images: ItemImages | None = None,
    style: PromptStyle | None = None,
    texts: Mapping[int, Mapping[str, str]] = TEXTS,
    letters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
) -> PromptWriter:
    images = images or images_of(backbone)
    return PromptWriter(
        backbone.encoder,
        backbone.family,
        style or (STYLE if backbone.family.sees else TEXT_STYLE),
        lambda item, name: texts.get(item, {}).get(name),
        images.piece,
        letters,
    )


def ranker_of(
    backbone: Backbone, n_candidates: int = 4, supervise: str = "letter", max_tokens: int = 16_384
) -> LetterRanker:
    """A ranker with live pictures where the tower is trained, kept ones where it is not."""
    images = images_of(backbone, frozen=not backbone.trains_vision)
    verbalizer = Verbalizer(backbone.encoder, n_candidates, backbone.family.answer_end)
    writer = writer_of(backbone, images, letters=verbalizer.letters)
    return LetterRanker(backbone, images, writer, verbalizer, supervise, max_tokens)


HISTORIES = [np.array([1, 2]), np.array([3]), np.array([5, 6, 7]), np.array([4, 1, 2, 3])]
CANDIDATES = np.array([[3, 4, 5, 8], [1, 2, 6, 7], [1, 2, 3, 8], [5, 6, 7, 8]])
PLACES = np.array([0, 2, 3, 1])
