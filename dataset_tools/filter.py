"""Makes a dataset of another one by the papers' filters: of the items whose pictures came, say.

Interactions, texts, pictures and addresses are carried over; features are not.

  python -m dataset_tools filter amazon2018-sports --name amazon2018-sports-pictured \\
      --require image,description --min_inter 5
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dataset_tools.filters import Filters, add_filters, filter_words
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
_COLUMNS = ("user_id", ITEM, "timestamp", "rating")  # of `.inter`; the last may be missing


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
    content = source.content(filters)
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
        self.rows = _interactions(self._path("inter"))
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

    def content(self, filters: Filters) -> Content:
        """What the filters leave of it.

        Raises:
            UserError: nothing.
        """
        codes, items = pd.factorize(self.rows[ITEM])
        rows, notes = filters.narrow(self.rows, self._misfits(items, filters)[codes])
        left = set(rows[ITEM])
        known = self.known
        described = [item for item in dict.fromkeys((*known.texts, *known.urls)) if item in left]
        nothing = [None] * len(self.attributes)
        found = (
            Item(item, known.texts.get(item, nothing), known.urls.get(item, ()))
            for item in described
        )
        images = [
            (item, path) for item, paths in known.images.items() if item in left for path in paths
        ]
        notes.append(f"made of {self.folder.name}")
        return Content(Interactions.of(rows), self.attributes, found, images, notes)

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
    """Users, items, times and ratings as text.

    Raises:
        UserError: the file is missing, or a column.
    """
    if not path.is_file():
        raise UserError(f"There is no {path}: name a dataset that is there.")
    header, lines = read_table(path)
    names = [name for name, _ in header]
    for column in _COLUMNS[:3]:
        if column not in names:
            raise UserError(f"{path} has no column '{column}'; it has {', '.join(names)}.")
    frame = pd.DataFrame([cells for _, cells in lines], columns=names, dtype=object)
    return frame[[column for column in _COLUMNS if column in names]]
