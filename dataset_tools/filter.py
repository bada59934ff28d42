"""Makes a dataset of another one by the papers' filters: of the items whose pictures came, say.

Interactions, attributes, texts, pictures and addresses are carried over, and what became of each
address; features are not. Interactions are sorted by user and time.

  python -m dataset_tools filter amazon2018-sports --name amazon2018-sports-pictured \\
      --require image,description --min_inter 5
"""

from __future__ import annotations

import argparse
import glob
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dataset_tools.filters import USER, Filters, add_filters, filter_words
from dataset_tools.images import MANIFEST
from dataset_tools.lines import records
from dataset_tools.raw import check_name
from dataset_tools.write import Content, Interactions, Item, write_dataset
from recbole_mm.data.atomic import (
    IMAGE,
    ITEM,
    check_free,
    read_images,
    read_table,
    read_text,
    read_urls,
)
from recbole_mm.errors import UserError

_LEAST = "0"
_TIME = "timestamp"
_COLUMNS = (USER, ITEM, _TIME, "rating")  # of `.inter`; the last may be missing
_CARRIED = ("inter", "item", "user", "text", IMAGE, "urls")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools filter`."""
    parser.add_argument("source", help="name of the dataset that is there")
    parser.add_argument("--data_path", default="dataset", help="where it lies (dataset)")
    parser.add_argument("--name", required=True, help="of the new dataset")
    add_filters(parser, _LEAST, "attributes, or image")


def run(arguments: argparse.Namespace) -> str:
    """Makes the dataset and returns its name.

    Raises:
        UserError: a mistake in the flags, a file is missing or broken, or nothing is left.
    """
    name: str = arguments.name
    check_name(name)
    folder = Path(arguments.out) / name
    check_free(folder, arguments.force)
    filters, source = Filters.of(arguments), Source(Path(arguments.data_path) / arguments.source)
    filters.check_required(source.attributes)
    content = source.content(name, filters)
    write_dataset(folder, content, _command(arguments), arguments.force)
    return name


def _command(arguments: argparse.Namespace) -> str:
    """The command for the card, without paths of this machine."""
    words = ["python", "-m", "dataset_tools", "filter", arguments.source, "--name", arguments.name]
    return " ".join([shlex.join(words), *filter_words(arguments, _LEAST)])


@dataclass(frozen=True)
class _Known:
    """What is known of the items: by token, in the order of the files."""

    texts: Mapping[str, Sequence[str | None]]
    images: Mapping[str, Sequence[Path]]
    urls: Mapping[str, Sequence[str]]


class Source:
    """A dataset's files.

    Args:
        folder: of the dataset.

    Raises:
        UserError: one is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        frame = _interactions(self._path("inter"))
        self.rows = frame[[column for column in _COLUMNS if column in frame]]
        self._extra = [str(name) for name in frame if name not in _COLUMNS]
        self.attributes: list[str] = []
        texts: dict[str, list[str | None]] = {}
        if (path := self._path("text")).is_file():
            self.attributes, lines = read_text(path)
            texts = dict(lines)
        images: dict[str, list[Path]] = {}
        for item, file in self._pairs(IMAGE):
            images.setdefault(item, []).append(folder / "images" / file)
        urls: dict[str, list[str]] = {}
        for item, url in self._pairs("urls"):
            urls.setdefault(item, []).append(url)
        self.known = _Known(texts, images, urls)

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.folder.name}.{suffix}"

    def _pairs(self, suffix: str) -> Iterator[tuple[str, str]]:
        path = self._path(suffix)
        if path.is_file():
            yield from (read_images if suffix == IMAGE else read_urls)(path)

    def content(self, name: str, filters: Filters) -> Content:
        """What the filters leave of it, for a dataset of another name.

        Raises:
            UserError: nothing.
        """
        codes, items = pd.factorize(self.rows[ITEM])
        rows, notes = filters.narrow(self.rows, self._misfits(items, filters)[codes])
        left = set(rows[ITEM])
        notes += [f"made of {self.folder.name}", *self._left_behind()]
        tables = self._tables(name, {USER: set(rows[USER]), ITEM: left})
        return Content(
            Interactions.of(rows),
            self.attributes,
            self._items(left),
            self._images(left),
            notes,
            root=self.folder / "images",
            files={**dict(tables), **dict(self._manifest(left))},
        )

    def _items(self, left: set[str]) -> Iterator[Item]:
        known, nothing = self.known, [None] * len(self.attributes)
        for item in dict.fromkeys((*known.texts, *known.urls)):
            if item in left:
                yield Item(item, known.texts.get(item, nothing), known.urls.get(item, ()))

    def _images(self, left: set[str]) -> list[tuple[str, Path]]:
        shown = self.known.images.items()
        return [(item, path) for item, paths in shown if item in left for path in paths]

    def _tables(
        self, name: str, left: Mapping[str, set[str]]
    ) -> Iterator[tuple[str, Iterator[str]]]:
        """`.item` and `.user`, as they are, of what is left."""
        for suffix, key in (("item", ITEM), ("user", USER)):
            if (path := self._path(suffix)).is_file():
                yield f"{name}.{suffix}", _lines_of(path, key, left[key])

    def _manifest(self, left: set[str]) -> Iterator[tuple[str, list[str]]]:
        """What became of the addresses of what is left, so that none is asked for again."""
        path = self.folder / "images" / MANIFEST
        if path.is_file():
            wanted = {url for item, urls in self.known.urls.items() if item in left for url in urls}
            told = ((record.get("url"), record) for record in records(path, Counter()))
            lines = [json.dumps(r) for url, r in told if isinstance(url, str) and url in wanted]
            yield f"images/{MANIFEST}", lines

    def _left_behind(self) -> list[str]:
        """What is not carried over, in words."""
        own = {self._path(suffix) for suffix in _CARRIED}
        others = sorted(set(self.folder.glob(f"{glob.escape(self.folder.name)}.*")) - own)
        lists = (("columns of .inter", self._extra), ("files", [path.name for path in others]))
        return [f"not carried over, {what}: {', '.join(names)}" for what, names in lists if names]

    def _misfits(self, items: pd.Index[str], filters: Filters) -> NDArray[np.uint8]:
        """See `Filters.misfits`."""
        known = self.known

        def has(name: str) -> NDArray[np.bool_]:
            if name == IMAGE:
                shown = known.images
                return np.array([any(p.is_file() for p in shown.get(item, ())) for item in items])
            at = self.attributes.index(name)
            return np.array([bool((known.texts.get(item) or {at: None})[at]) for item in items])

        at = self.attributes.index("title") if "title" in self.attributes else None
        titles = [
            known.texts[item][at] if at is not None and item in known.texts else None
            for item in items
        ]
        return filters.misfits(has, np.array([len(t or "") for t in titles], dtype=np.int32))


def _interactions(path: Path) -> pd.DataFrame:
    """All columns as text, sorted by user, in order of appearance, and time; equal times keep
    their order.

    Raises:
        UserError: the file is missing, or a column, or a time is no number.
    """
    if not path.is_file():
        raise UserError(f"There is no {path}: name a dataset that is there.")
    header, lines = read_table(path)
    names = [name for name, _ in header]
    for column in _COLUMNS[:3]:
        if column not in names:
            raise UserError(f"{path} has no column '{column}'; it has {', '.join(names)}.")
    frame = pd.DataFrame([cells for _, cells in lines], columns=names, dtype=object)
    order = np.lexsort((_times(path, frame[_TIME]), pd.factorize(frame[USER])[0]))
    return frame.iloc[order].reset_index(drop=True)


def _times(path: Path, cells: pd.Series[Any]) -> NDArray[Any]:
    """As numbers. Shape: (N,)."""
    numbers = pd.to_numeric(cells, errors="coerce").to_numpy()
    bad = ~np.isfinite(numbers.astype(np.float64))
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"{path}, row {row + 2}, column {_TIME}: '{cells.iloc[row]}' is no number, so that it "
            "cannot be put in order; give it one."
        )
    return numbers


def _lines_of(path: Path, key: str, left: set[str]) -> Iterator[str]:
    """Header and rows of an atomic file, those of the ids that are left.

    Raises:
        UserError: it is broken, or has no such column.
    """
    header, rows = read_table(path)
    names = [name for name, _ in header]
    if key not in names:
        raise UserError(f"{path} has no column '{key}:token'.")
    yield "\t".join(f"{name}:{kind}" for name, kind in header)
    at = names.index(key)
    yield from ("\t".join(cells) for _, cells in rows if cells[at] in left)
