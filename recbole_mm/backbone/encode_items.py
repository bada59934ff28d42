"""Vectors of all items: equal content once, long texts first, kept on disk batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from recbole_mm.backbone.encode import Encoder
from recbole_mm.backbone.vision import FeatureLog
from recbole_mm.data.images import DIGEST

_READERS = 4  # threads that decode pictures
_T = TypeVar("_T")
_MOST_STRETCHED = 200  # long side to short; more is no picture of a product


@dataclass(frozen=True)
class ItemVectors:
    """What came of encoding.

    Attributes:
        rows: places, among what was asked for, of that which has a vector. Length: N.
        matrix: their vectors. Shape: (N, D), float32.
        encoded: how many vectors were made now.
        recalled: how many an earlier, unfinished run had made.
    """

    rows: list[int]
    matrix: NDArray[np.float32]
    encoded: int
    recalled: int


def open_log(folder: Path, encoder: Encoder, field: str) -> FeatureLog:
    """The log of an encoder's vectors of ``text`` or ``image``, in a folder of their own below.

    The folder's name follows from all that vectors depend on besides their text or picture.
    """
    source, width = encoder.source, encoder.width(field)
    most = encoder.tokens.most
    parts = [source.id, source.revision, field, encoder.pooling, str(encoder.model.dtype), most]
    key = hashlib.sha256(json.dumps([*parts, width]).encode()).hexdigest()[:16]
    return FeatureLog(folder / key, width, torch.float32)


def encode_texts(
    encoder: Encoder,
    texts: Sequence[str | None],
    log: FeatureLog,
    batch: int,
    show_progress: bool = False,
) -> ItemVectors:
    """A vector of each text that is one; those in the log are not made again.

    Args:
        encoder: what makes them.
        texts: of the items; None and the empty string have no vector.
        log: of `open_log`.
        batch: texts at once.
        show_progress: whether there is a bar.
    """
    keys = [_digest(text) if text else None for text in texts]
    distinct = {key: text for key, text in zip(keys, texts, strict=True) if key and text}
    todo = [key for key in distinct if log.read(key) is None]
    todo.sort(key=lambda key: (-len(distinct[key]), distinct[key]))  # the longest: memory's most
    for part in _parts(todo, batch, "Texts", show_progress):
        _store(log, part, encoder.texts([distinct[key] for key in part]))
    return _gather(keys, log, len(todo))


def encode_images(
    encoder: Encoder,
    items: Sequence[int],
    load: Callable[[int], Image.Image | None],
    log: FeatureLog,
    batch: int,
    show_progress: bool = False,
) -> ItemVectors:
    """A vector of each item's picture; those in the log are not made again.

    Args:
        encoder: what makes them.
        items: item ids.
        load: the first usable picture of an item with its digest, as `ImageStore.get` gives it.
        log: of `open_log`.
        batch: pictures at once.
        show_progress: whether there is a bar.
    """
    keys: list[str | None] = []
    encoded = 0
    with ThreadPoolExecutor(_READERS) as readers:
        for part in _parts(items, batch, "Pictures", show_progress):
            found = [_usable(image) for image in readers.map(load, part)]
            keys += [None if image is None else image.info[DIGEST] for image in found]
            new = {image.info[DIGEST]: image for image in found if image is not None}
            new = {key: image for key, image in new.items() if log.read(key) is None}
            if new:
                _store(log, list(new), encoder.images(list(new.values())))
            encoded += len(new)
    return _gather(keys, log, encoded)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _usable(image: Image.Image | None) -> Image.Image | None:
    """A picture that resizing its short side cannot make huge."""
    if image is None or max(image.size) >= _MOST_STRETCHED * min(image.size):
        return None
    return image


def _parts(all_: Sequence[_T], size: int, what: str, show: bool) -> Iterator[Sequence[_T]]:
    with tqdm(total=len(all_), ncols=100, desc=what, disable=not show) as bar:
        for start in range(0, len(all_), size):
            yield (part := all_[start : start + size])
            bar.update(len(part))


def _store(log: FeatureLog, keys: Sequence[str], rows: Tensor) -> None:
    for key, row in zip(keys, rows.cpu(), strict=True):
        log.append(key, (1, 1, 1), row[None])


def _gather(keys: Sequence[str | None], log: FeatureLog, encoded: int) -> ItemVectors:
    places = [place for place, key in enumerate(keys) if key]
    order = {key: i for i, key in enumerate(dict.fromkeys(key for key in keys if key))}
    distinct = np.empty((len(order), log.width), dtype=np.float32)  # (distinct, D)
    for key, i in order.items():
        row = log.read(key)
        assert row is not None
        distinct[i] = row[0].numpy()
    matrix = distinct[[order[key] for key in keys if key]]  # (N, D)
    return ItemVectors(places, matrix, encoded, len(order) - encoded)
