"""MicroLens 50k, 100k and 1M: videos with titles and covers.

The files are looked for in --raw_dir under the names of the release, and downloaded where they are
not there. Pairs with times (.csv) are
taken where they are there, else each user's items in order (.tsv), whose position is the time.

  python -m dataset_tools microlens --variant 50k --raw_dir raw --min_inter 6,5
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dataset_tools.download import GoneError, Remote, alone, obtain, unpack
from dataset_tools.events import Events
from dataset_tools.lines import END_OF_TIME, csv_cells, text_lines
from dataset_tools.raw import Plan, add_flags, pictures_by_id, raw_file
from dataset_tools.shelf import Shelf
from recbole_mm.data.atomic import IMAGE
from recbole_mm.data.images import MAX_BYTES
from recbole_mm.errors import UserError

TEXTS = ("title",)
_MOST_DIGITS = 100  # of a time; more are not even read
SOURCE = "https://github.com/westlake-repl/MicroLens"
_FILES = "https://recsys.westlake.edu.cn/MicroLens-{}-Dataset"
VARIANTS = ("50k", "100k", "1M")
_PAIRS = ("MicroLens-{}_pairs.csv", "MicroLens-{}_pairs.tsv")
_TITLES = ("MicroLens-{}_titles.csv", "MicroLens-{}_title_en.csv", "MicroLens-{}_title.csv")
_COVERS = "MicroLens-{}_covers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools microlens`."""
    parser.add_argument("--variant", required=True, choices=VARIANTS, help="of MicroLens")
    add_flags(parser, "microlens-50k and the like", "interactions", TEXTS)


def run(arguments: argparse.Namespace) -> str:
    """Makes the dataset and returns its name.

    Raises:
        UserError: a mistake in the flags, or files that are missing or cannot be read.
    """
    variant = arguments.variant
    words = ["microlens", f"--variant {variant}"]
    plan = Plan.of(arguments, f"microlens-{variant.lower()}", TEXTS, *words)
    pairs, titles = (_file(arguments, names) for names in (_PAIRS, _TITLES))
    events = read_pairs(pairs, plan.bad, arguments.limit)
    with plan.shelf(events) as shelf:
        read_titles(titles, events.items, shelf, plan.bad)
        asked = arguments.images or IMAGE in plan.filters.require
        covers = pictures_by_id(_covers(arguments), events, shelf) if asked else {}
        plan.write(events, shelf, [pairs, titles], covers if arguments.images else {})
    return plan.folder.name


def _file(arguments: argparse.Namespace, patterns: Sequence[str]) -> Path:
    """The first of these files that is there, else the first that the source has."""
    names = [pattern.format(arguments.variant) for pattern in patterns]
    for name in names[:-1]:
        with suppress(GoneError):
            return raw_file(arguments, names, _remote(arguments, name))
    return raw_file(arguments, names, _remote(arguments, names[-1]))


def _remote(arguments: argparse.Namespace, name: str) -> Remote:
    return Remote(f"{_FILES.format(arguments.variant)}/{name}", SOURCE)


def _covers(arguments: argparse.Namespace) -> Path:
    """The folder of covers, which may be missing where nothing is to be downloaded.

    Raises:
        UserError: they could not be had.
    """
    folder = Path(arguments.raw_dir) / _COVERS.format(arguments.variant)
    if folder.is_dir():
        return folder
    archive = folder.with_name(f"{folder.name}.zip")
    if not archive.is_file() and arguments.download:
        _fetch_covers(arguments, archive)
    if archive.is_file():
        with alone(folder, "unpacking"):
            if not folder.is_dir():  # else another command was faster
                _unpack_covers(archive, folder)
    return folder


def _fetch_covers(arguments: argparse.Namespace, archive: Path) -> None:
    try:
        obtain(archive.parent, _remote(arguments, archive.name), arguments.mirror)
    except UserError as error:
        raise UserError(
            f"{error} To go on without covers, give --no-images, or --no-download, which takes "
            "what is there."
        ) from None


def _unpack_covers(archive: Path, folder: Path) -> None:
    """The folder takes its name once all are in it."""
    fresh = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
    fresh.mkdir()
    try:
        unpack(archive, fresh, lambda name: name.endswith(".jpg"), MAX_BYTES)
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_pairs(path: Path, bad: Counter[str], limit: int = 0) -> Events:
    """All interactions that can be read.

    Raises:
        UserError: there is not one.
    """
    events = Events()
    for user, item, time in _with_times(path, bad) if path.suffix == ".csv" else _in_order(path):
        events.add(user, item, time, math.nan)
        if len(events) == limit:
            break
    if not len(events):
        raise UserError(f"{path} has no user with items: is it the file?")
    return events


def _with_times(path: Path, bad: Counter[str]) -> Iterator[tuple[str, str, int]]:
    """`user,item,timestamp`, with a header."""
    for number, line in enumerate(text_lines(path)):
        cells = csv_cells(line) or []
        if len(cells) >= 3 and cells[0] and cells[1] and _is_time(cells[2]):
            yield cells[0], cells[1], int(cells[2])
        elif number and line.strip():  # the first is the header
            bad["pairs that cannot be read"] += 1


def _is_time(cell: str) -> bool:
    return cell.isdecimal() and len(cell) < _MOST_DIGITS and int(cell) < END_OF_TIME


def _in_order(path: Path) -> Iterator[tuple[str, str, int]]:
    """A user, a tab, and its items with spaces between, oldest first."""
    for line in text_lines(path):
        user, _, items = line.strip().partition("\t")
        for place, item in enumerate(items.split(), 1):
            yield user, item, place


def read_titles(path: Path, wanted: Mapping[str, int], shelf: Shelf, bad: Counter[str]) -> None:
    """`item,title` of the wanted items goes on the shelf.

    A title with commas that nobody quoted is put together again; where quotes do not close on
    their line, they are part of the title.
    """
    odd = 0
    for line in filter(str.strip, text_lines(path)):
        cells = csv_cells(line)
        if cells is None:
            odd += 1
            cells = line.split(",", 1)
        if len(cells) < 2:
            bad["titles that cannot be read"] += 1
        elif cells[0] in wanted:
            shelf.put(wanted[cells[0]], [",".join(cells[1:]).strip() or None])
    if odd:
        print(f"{path.name}: lines whose quotes do not close, taken as they are: {odd:,}")
