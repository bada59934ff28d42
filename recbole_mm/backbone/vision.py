"""Feature rows of item pictures: of a frozen tower once for ever, of a trained one as it is now."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from recbole_mm.backbone.families import Family, Grid, Pixels
from recbole_mm.backbone.prompt import Prompt
from recbole_mm.data.images import DIGEST, digest_of

_ENCODE_AT_ONCE = 64  # pictures in one pass of the tower, so that memory does not grow with items
_READERS = 4  # threads that decode pictures while there are many to encode


class FeatureLog:
    """Append-only rows on disk by content: a killed job loses at most the record in flight.

    Each process appends to a pair of files of its own (rows in ``.bin``, their index in
    ``.jsonl``), and reads those of all, memory-mapped. A half-written index line is passed over.

    Args:
        folder: made when the first rows are written.
        width: numbers in a row.
        dtype: of the rows; any torch type of 2 or 4 bytes.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype) -> None:
        self.folder, self.width, self.dtype = folder, width, dtype
        # numpy has no bfloat16: the bits go to disk as integers of the same size.
        self._bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        self._bytes = width * dtype.itemsize  # of a row
        self._found: dict[str, tuple[Path, int, int, Grid]] = {}
        self._maps: dict[Path, np.memmap[Any, np.dtype[np.uint8]]] = {}
        self._own = folder / uuid.uuid4().hex
        for index in sorted(folder.glob("*.jsonl")):
            self._found.update(self._read_index(index))

    def _read_index(self, index: Path) -> Iterator[tuple[str, tuple[Path, int, int, Grid]]]:
        rows_file = index.with_suffix(".bin")
        size = rows_file.stat().st_size if rows_file.exists() else 0
        for line in index.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                offset, rows = int(record["offset"]), int(record["rows"])
                if offset + rows * self._bytes <= size:
                    time, height, width = record["grid"]
                    yield record["key"], (rows_file, offset, rows, (time, height, width))

    def grid(self, key: str) -> Grid | None:
        """The patch grid of what is stored under `key`."""
        return self._found[key][3] if key in self._found else None

    def read(self, key: str) -> Tensor | None:
        """The rows stored under `key`. Shape: (n, width)."""
        if key not in self._found:
            return None
        path, offset, rows, _ = self._found[key]
        end = offset + rows * self._bytes
        if path not in self._maps or len(self._maps[path]) < end:  # or the file has grown since
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="c")  # never written back
        flat = torch.from_numpy(self._maps[path][offset:end])
        return flat.view(self.dtype).view(rows, self.width)

    def append(self, key: str, grid: Grid, rows: Tensor) -> None:
        """Stores rows (n, width) under `key`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = rows.detach().to("cpu", self.dtype).contiguous()
        path, index = self._own.with_suffix(".bin"), self._own.with_suffix(".jsonl")
        with path.open("ab") as file:
            offset = file.seek(0, os.SEEK_END)
            file.write(whole.view(self._bits).numpy().tobytes())
        record = {"key": key, "offset": offset, "rows": len(whole), "grid": list(grid)}
        with index.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._found[key] = (path, offset, len(whole), grid)


class ItemImages:
    """The pictures of items, as prompt pieces and as feature rows.

    Args:
        family: of the backbone.
        load: an item's picture (PIL, RGB) or None; where it was not read from `source`, its
            `info[DIGEST]` names the bytes it was read from, as `ImageStore.get` does.
        source: an item's first image file or None. Rows are stored under the digest of the bytes
            that were decoded, so a picture whose file has rows need not be opened.
        frozen: whether the vision tower never changes; then rows are kept, and written to `log`.
        log: where a frozen tower's rows are kept between runs; None: memory only.
    """

    def __init__(
        self,
        family: Family,
        load: Callable[[int], Any],
        source: Callable[[int], Path | None],
        frozen: bool,
        log: FeatureLog | None = None,
    ) -> None:
        self.family, self.frozen, self.log = family, frozen, log if frozen else None
        self._load, self._source = load, source
        self._pixels: dict[int, Pixels | None] = {}
        self._pieces: dict[int, Prompt | None] = {}
        self._keys: dict[int, str | None] = {}
        self._rows: dict[int, Tensor] = {}

    def piece(self, item: int) -> Prompt | None:
        """The prompt piece of the item's picture; None where it has none that can be read."""
        if item not in self._pieces:
            grid = self._grid(item)
            self._pieces[item] = None if grid is None else self.family.image_piece(item, grid)
        return self._pieces[item]

    def rows(self, model: nn.Module, items: Sequence[int]) -> list[Tensor]:
        """Feature rows of each item, which must have a picture. Shapes: (n, D).

        Where gradients are on and the tower is trained, the items are encoded now and with their
        graph; otherwise each item once, until `forget`.
        """
        if torch.is_grad_enabled() and not self.frozen:
            return self.family.encode(model, [self._ready(item) for item in items])
        missing = [item for item in items if self._row(item) is None]
        for start in range(0, len(missing), _ENCODE_AT_ONCE):
            self._remember(model, missing[start : start + _ENCODE_AT_ONCE])
        return [self._kept(item) for item in items]

    def encode_all(self, model: nn.Module, items: Iterable[int], show_progress: bool) -> None:
        """Encodes, with a frozen tower, all those pictures that have no rows yet.

        Args:
            model: whose tower it is.
            items: item ids; those without a picture are passed over.
            show_progress: whether there is a bar.
        """
        everyone = list(items)
        bar = tqdm(total=len(everyone), ncols=100, desc="Pictures", disable=not show_progress)
        with bar, ThreadPoolExecutor(_READERS) as readers:
            for start in range(0, len(everyone), _ENCODE_AT_ONCE):
                part = everyone[start : start + _ENCODE_AT_ONCE]
                rows = zip(part, readers.map(self._row, part), strict=True)
                missing = [item for item, kept in rows if kept is None]
                read = zip(missing, readers.map(self._read, missing), strict=True)
                self._remember(model, [item for item, pixels in read if pixels is not None])
                bar.update(len(part))

    def forget(self) -> None:
        """Drops kept rows of a trained tower, whose weights have changed."""
        if not self.frozen:
            self._rows.clear()

    def _grid(self, item: int) -> Grid | None:
        key = self._key(item)
        known = self.log.grid(key) if self.log is not None and key is not None else None
        if known is not None:
            return known
        pixels = self._read(item)
        return None if pixels is None else pixels.grid

    def _row(self, item: int) -> Tensor | None:
        """Rows that are at hand without reading a picture."""
        key = self._key(item)
        return self._rows.get(item) if self.log is None or key is None else self.log.read(key)

    def _kept(self, item: int) -> Tensor:
        rows = self._row(item)
        if rows is None:
            raise ValueError(f"item {item} has no picture")
        return rows

    def _stored(self, item: int) -> Tensor | None:
        """Rows of the item's picture from the disk; opens it where its first file has none."""
        for look in (self._key, self._key_once_read):
            key = look(item)
            stored = self.log.read(key) if self.log is not None and key is not None else None
            if stored is not None:
                self._pixels.pop(item, None)
                return stored
        return None

    def _key_once_read(self, item: int) -> str | None:
        self._read(item)
        return self._key(item)

    def _read(self, item: int) -> Pixels | None:
        if item not in self._pixels:
            image = self._load(item)
            if image is not None and DIGEST in image.info:  # the first file may not be usable
                self._keys[item] = image.info[DIGEST]
            self._pixels[item] = None if image is None else self.family.pixels(image)
        return self._pixels[item]

    def _ready(self, item: int) -> Pixels:
        pixels = self._read(item)
        if pixels is None:
            raise ValueError(f"item {item} has no picture")
        return pixels

    def _key(self, item: int) -> str | None:
        """Under which the item's rows are stored; of its first file until its picture is read."""
        if self.log is None:
            return None
        if item not in self._keys:
            path = self._source(item)
            self._keys[item] = None if path is None else digest_of(path)
        return self._keys[item]

    @torch.no_grad()
    def _remember(self, model: nn.Module, items: Sequence[int]) -> None:
        new = [item for item in items if self.log is None or self._stored(item) is None]
        if not new:
            return
        found = self.family.encode(model, [self._ready(item) for item in new])
        for item, rows in zip(new, found, strict=True):
            key = self._key(item)
            if self.log is None or key is None:
                self._rows[item] = rows
            else:
                self.log.append(key, self._ready(item).grid, rows)
                self._pixels.pop(item)


class PictureReader(nn.Module):
    """A backbone that reads prompts with item pictures in them.

    Args:
        backbone: a `Backbone`.
        images: feature rows of item pictures.
    """

    def __init__(self, backbone: Any, images: ItemImages) -> None:
        super().__init__()
        self.backbone, self.images = backbone, images

    def encode_pictures(self, items: Iterable[int], show_progress: bool = False) -> None:
        """With a frozen vision tower, encodes the pictures of all these items that are not yet
        kept; a trained one encodes them anew in every step."""
        if self.images.frozen:
            self.images.encode_all(self.backbone.model, items, show_progress)

    def forget(self) -> None:
        """To be called when weights have changed: drops what was computed with the old ones."""
        self.images.forget()
