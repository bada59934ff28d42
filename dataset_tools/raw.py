"""What the converters of public sources share: flags, the way from what was read to a dataset, and
the words of the card."""

from __future__ import annotations

import argparse
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from dataset_tools.download import Remote, obtain, unpack
from dataset_tools.events import Events
from dataset_tools.filters import Filters, add_filters, check_counts, filter_words
from dataset_tools.order import Order, add_order
from dataset_tools.shelf import Shelf
from dataset_tools.write import Content, write_dataset
from recbole_mm.data.atomic import ITEM, check_free, safe_token
from recbole_mm.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN = "ml-100k"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_LONGEST_ID = 50
_LEAST = "5"
_LARGEST = 1 << 32  # bytes of a file in an archive


def check_name(name: str) -> None:
    """Raises `UserError` where a dataset cannot be called so."""
    if not _NAME.fullmatch(name):
        raise UserError(f"--name '{name}': use letters, digits, '.', '_' and '-' only.")
    if name == _TAKEN:
        raise UserError(
            f"--name {name}: RecBole reads the copy in its own package under this name, wherever "
            "yours lies; give another, such as movielens-100k."
        )


def add_flags(parser: argparse.ArgumentParser, name: str, rows: str, texts: Sequence[str]) -> None:
    """The flags of every source.

    Args:
        parser: of the converter.
        name: what the dataset is called by itself.
        rows: what the source calls its interactions.
        texts: attributes of its items.
    """
    add = parser.add_argument
    add("--raw_dir", default="raw", metavar="DIR", help="where the source's files are (raw)")
    add(
        "--download",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="download files that are not there",
    )
    add("--mirror", metavar="ADDRESS", help="download them from this folder, not from the source")
    add("--name", help=f"of the dataset ({name})")
    add(
        "--images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take pictures, or their addresses, along",
    )
    add("--limit", type=int, default=0, metavar="N", help=f"read so many {rows} only (0: all)")
    add_filters(parser, _LEAST, ", ".join([*texts, "image"]))
    add_order(parser)


def raw_file(
    arguments: argparse.Namespace, names: Sequence[str], remote: Remote, below: str = "."
) -> Path:
    """A file of the source: the first of these that is there, or in its archive, or downloaded.

    Args:
        arguments: as they were parsed.
        names: it may have in ``--raw_dir``.
        remote: what is downloaded: the first of them, or an archive that has it.
        below: a folder of ``--raw_dir`` in which it may be as well.

    Raises:
        UserError: it is not there, and cannot or shall not be downloaded.
    """
    raw = Path(arguments.raw_dir)
    places = [folder / name for name in names for folder in (raw, raw / below)]
    for path in places:
        if path.is_file():
            return path
    archive = raw / remote.name
    if not archive.is_file() and not arguments.download:
        raise UserError(
            f"--raw_dir: {raw} has no {' or '.join(names)}: download {remote.name} from "
            f"{remote.page}, or leave --no-download out."
        )
    if not archive.is_file():
        obtain(raw, remote, arguments.mirror)
    if archive in places:
        return archive
    unpack(archive, raw / below, lambda name: name in names, _LARGEST)
    found = [path for path in places if path.is_file()]
    if not found:
        raise UserError(f"{archive} has no {' or '.join(names)}: is it the one of {remote.page}?")
    return found[0]


@dataclass(frozen=True)
class Plan:
    """What a converter was asked for, checked before it reads anything.

    Attributes:
        folder: of the new dataset.
        attributes: texts that the source has of its items.
        filters: what is left out.
        order: a published order, or None.
        command: for the card, without paths of this machine.
        force: whether an old dataset is replaced.
        bad: counts what cannot be read, by what is wrong.
    """

    folder: Path
    attributes: Sequence[str]
    filters: Filters
    order: Order | None
    command: str
    force: bool
    bad: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(
        cls, arguments: argparse.Namespace, name: str, attributes: Sequence[str], *words: str
    ) -> Plan:
        """Reads the flags of `add_flags`.

        Args:
            arguments: as they were parsed.
            name: of the dataset, where no other is given.
            attributes: of the items.
            words: of the command, its converter first, that are no flags of `add_flags`.

        Raises:
            UserError: a mistake in them, or the dataset is there already.
        """
        name = arguments.name or name
        check_name(name)
        folder = Path(arguments.out) / name
        check_free(folder, arguments.force)
        check_counts(arguments, "limit")
        filters = Filters.of(arguments)
        filters.check_required(attributes)
        said = _command(arguments, words)
        order = Order.of(arguments)
        return cls(folder, attributes, filters, order, said, arguments.force)

    def shelf(self, events: Events) -> Shelf:
        """Where what is known about the items of `events` is put, by their numbers."""
        return Shelf(self.folder.parent, self.attributes, len(events.items))

    def write(
        self,
        events: Events,
        shelf: Shelf,
        read: Sequence[Path],
        pictures: Mapping[int, Path] | None = None,
    ) -> None:
        """Filters what was read and writes the dataset.

        Args:
            events: interactions.
            shelf: what is known about their items.
            read: the files of interactions and of items.
            pictures: file of the picture of items that have one.

        Raises:
            UserError: the filters leave nothing, or the order fits nobody.
        """
        rows, notes = self._narrowed(events, shelf)
        codes = np.unique(rows[ITEM].to_numpy())
        ids = list(events.items)
        tokens = {code: safe_token(ids[code]) for code in codes.tolist()}
        notes += left_out(self.bad)
        if bare := int((~shelf.has()[codes]).sum()):
            notes.append(f"items without a record in {read[-1].name}: {bare:,}")
        notes.append(f"read from {' and '.join(path.name for path in read)}")
        images = [(tokens[c], path) for c, path in (pictures or {}).items() if c in tokens]
        content = Content(events.decoded(rows), self.attributes, shelf.items(tokens), images, notes)
        write_dataset(self.folder, content, self.command, self.force)

    def _narrowed(self, events: Events, shelf: Shelf) -> tuple[pd.DataFrame, list[str]]:
        rows = events.coded()
        why = self.filters.misfits(shelf.has, shelf.title_lengths)[rows[ITEM].to_numpy()]
        if self.order is None:
            return self.filters.narrow(rows, why)
        put = partial(self.order.apply, users=events.users, items=events.items)
        return self.filters.narrow(rows, why, put)


def _command(arguments: argparse.Namespace, words: Sequence[str]) -> str:
    """The command, without paths of this machine."""
    said = ["python -m dataset_tools", *words, "--raw_dir raw"]
    said += [f"--name {shlex.quote(arguments.name)}"] if arguments.name else []
    said += filter_words(arguments, _LEAST)
    said += [] if arguments.images else ["--no-images"]
    said += [f"--limit {arguments.limit}"] if arguments.limit else []
    files = [(flag, getattr(arguments, flag)) for flag in ("order_from", "order_ids")]
    said += [f"--{flag} {shlex.quote(Path(path).name)}" for flag, path in files if path]
    return " ".join(said)


def pictures_by_id(folder: Path, events: Events, shelf: Shelf) -> dict[int, Path]:
    """A file `ID.jpg` (or .png, …) of each item that has one, which the shelf is told.

    Ids are numbers, but who knows: what might be a path or too long a name has none.
    """
    found: dict[int, Path] = {}
    for item, code in events.items.items():
        is_name = item.isalnum() and len(item) <= _LONGEST_ID
        for file in (folder / f"{item}{suffix}" for suffix in _SUFFIXES):
            if is_name and file.is_file():
                found[code] = file
                shelf.show(code)
                break
    return found


def left_out(bad: Counter[str]) -> list[str]:
    """What was left out, a sentence a reason."""
    return [f"left out, {why}: {count:,}" for why, count in sorted(bad.items())]
