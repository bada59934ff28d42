"""MicroLens 50k, 100k and 1M: videos with titles and covers.

The files are looked for in --raw_dir under the names of the release. Pairs with times (.csv) are
taken where they are there, else each user's items in order (.tsv), whose position is the time.

  python -m dataset_tools microlens --variant 50k --raw_dir raw --min_inter 6,5
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from dataset_tools.events import Events
from dataset_tools.raw import add_flags, command, kept_items, left_out, pictures_by_id
from dataset_tools.table import core, parse_least
from dataset_tools.write import Content, write_dataset
from recbole_mm.data.atomic import ITEM, check_free, safe_token
from recbole_mm.errors import UserError

SOURCE = "https://github.com/westlake-repl/MicroLens"
VARIANTS = ("50k", "100k", "1M")
_PAIRS = ("MicroLens-{}_pairs.csv", "MicroLens-{}_pairs.tsv")
_TITLES = ("MicroLens-{}_titles.csv", "MicroLens-{}_title_en.csv", "MicroLens-{}_title.csv")
_COVERS = "MicroLens-{}_covers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools microlens`."""
    add = parser.add_argument
    add("--variant", required=True, choices=VARIANTS, help="of MicroLens")
    add("--no-images", action="store_true", help="leave the covers where they are")
    add_flags(parser, "microlens-50k", "interactions")


def run(arguments: argparse.Namespace) -> str:
    """Makes the dataset and returns its name.

    Raises:
        UserError: a mistake in the flags, or files that are missing or cannot be read.
    """
    folder = Path(arguments.out) / (arguments.name or f"microlens-{arguments.variant.lower()}")
    check_free(folder, arguments.force)
    least, raw = parse_least(arguments.min_inter), Path(arguments.raw_dir)
    pairs = _find(raw, arguments.variant, _PAIRS)
    titles = _find(raw, arguments.variant, _TITLES)
    bad: Counter[str] = Counter()
    events = read_pairs(pairs, bad, arguments.limit)
    rows = core(events.coded(), *least)
    kept = kept_items(events, rows)
    items = read_titles(titles, set(kept), bad)
    covers = raw / _COVERS.format(arguments.variant)
    shown = covers.is_dir() and not arguments.no_images
    images = pictures_by_id(covers, kept) if shown else []
    content = Content(events.decoded(rows), items, images, left_out(bad))
    hidden = ["--no-images"] if arguments.no_images else []
    how = command("microlens", arguments, f"--variant {arguments.variant}", *hidden)
    write_dataset(folder, content, how, arguments.force)
    return folder.name


def _find(raw: Path, variant: str, patterns: Sequence[str]) -> Path:
    names = [pattern.format(variant) for pattern in patterns]
    for name in names:
        if (raw / name).is_file():
            return raw / name
    raise UserError(f"--raw_dir: {raw} has no {' or '.join(names)}: download it from {SOURCE}.")


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
    for number, cells in enumerate(_rows(path)):
        if len(cells) >= 3 and cells[0] and cells[1] and cells[2].isdecimal():
            yield cells[0], cells[1], int(cells[2])
        elif number:  # the first is the header
            bad["pairs that cannot be read"] += 1


def _in_order(path: Path) -> Iterator[tuple[str, str, int]]:
    """A user, a tab, and its items with spaces between, oldest first."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            user, _, items = line.strip().partition("\t")
            for place, item in enumerate(items.split(), 1):
                yield user, item, place


def read_titles(path: Path, wanted: set[str], bad: Counter[str]) -> pd.DataFrame:
    """`item,title` of the wanted items; columns item_id and title.

    A title with commas that nobody quoted is put together again.
    """
    found: dict[str, tuple[str, str | None]] = {}
    for cells in _rows(path):
        if len(cells) < 2:
            bad["titles that cannot be read"] += 1
        elif cells[0] in wanted and cells[0] not in found:
            found[cells[0]] = (safe_token(cells[0]), ",".join(cells[1:]).strip() or None)
    return pd.DataFrame(found.values(), columns=[ITEM, "title"], dtype=object)


def _rows(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            yield from filter(None, csv.reader(file))
        except csv.Error as error:
            raise UserError(f"{path}: {error}.") from None
