"""Vectors of all items: equal content once, long texts first, kept on disk batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from recbole_mm.data.images import DIGEST, digest_of

_READERS = 4  # threads that decode and resize pictures
_T = TypeVar("_T")
_MOST_STRETCHED = 200  # long side to short; more is no picture of a product
STRETCHED = f"{_MOST_STRETCHED} times as long as wide"


@dataclass(frozen=True)
class ItemVectors:
    """What came of encoding.

    Attributes:
        rows: places, among what was asked for, of that which has a vector. Length: N.
        matrix: their vectors. Shape: (N, D), float32.
        encoded: how many vectors were made now.
        recalled: how many an earlier, unfinished run had made.
        stretched: how many pictures were passed over for their shape.
    """

    rows: list[int]
    matrix: NDArray[np.float32]
    encoded: int
    recalled: int
    stretched: int = 0


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
    todo = [key for key in distinct if log.grid(key) is None]
    lengths = dict(zip(todo, encoder.tokens.lengths([distinct[key] for key in todo]), strict=True))
    todo.sort(key=lambda key: (-lengths[key], distinct[key]))  # the first takes most memory
    for part in _parts(todo, batch, "Texts", show_progress):
        _store(log, part, encoder.texts([distinct[key] for key in part]))
    return _gather(keys, log, len(todo))


def encode_images(
    encoder: Encoder,
    items: Sequence[int],
    load: Callable[[int], Image.Image | None],
    source: Callable[[int], Path | None],
    log: FeatureLog,
    batch: int,
    show_progress: bool = False,
) -> ItemVectors:
    """A vector of each item's picture; those in the log are not made again.

    Args:
        encoder: what makes them.
        items: item ids.
        load: the first usable picture of an item with its digest, as `ImageStore.get` gives it.
        source: an item's first image file or None; where it has a vector it is not opened.
        log: of `open_log`.
        batch: pictures at once.
        show_progress: whether there is a bar.
    """
    take = _Taker(encoder, load, source, log)
    keys: list[str | None] = []
    encoded = 0
    with ThreadPoolExecutor(_READERS) as readers:
        for part in _parts(items, batch, "Pictures", show_progress):
            found = list(readers.map(take, part))
            keys += [key for key, _ in found]
            if new := {key: pixels for key, pixels in found if key and pixels}:
                _store(log, list(new), encoder.look(list(new.values())))
            encoded += len(new)
    return replace(_gather(keys, log, encoded), stretched=len(take.stretched))


class _Taker:
    """Takes an item's picture: the key of its vector, and its pixels where there is none yet."""

    def __init__(
        self,
        encoder: Encoder,
        load: Callable[[int], Image.Image | None],
        source: Callable[[int], Path | None],
        log: FeatureLog,
    ) -> None:
        self.stretched: set[int] = set()
        self._pixels, self._load, self._source, self._log = encoder.pixels, load, source, log

    def __call__(self, item: int) -> tuple[str | None, dict[str, Tensor] | None]:
        path = self._source(item)
        key = None if path is None else digest_of(path)
        if key is not None and self._log.grid(key):
            return key, None
        image = self._load(item)
        if image is None:
            return None, None
        if max(image.size) >= _MOST_STRETCHED * min(image.size):  # the short side is resized
            self.stretched.add(item)
            return None, None
        key = str(image.info[DIGEST])
        return key, None if self._log.grid(key) else self._pixels(image)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
