"""MovieLens 100k, 1M and latest-small, with posters from a folder.

The files are looked for in --raw_dir, or in the folder of the archive's name below it. Interactions
are all ratings of a user in order of time; equal times keep the order of the file.

  python -m dataset_tools movielens --variant latest-small --raw_dir raw --posters posters
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dataset_tools.events import Events
from dataset_tools.raw import add_flags, command, kept_items, left_out, pictures_by_id
from dataset_tools.table import core, parse_least
from dataset_tools.write import Content, write_dataset
from recbole_mm.data.atomic import ITEM, check_free, safe_token
from recbole_mm.errors import UserError

SOURCE = "https://grouplens.org/datasets/movielens/"
_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
Cells = Sequence[str]


@dataclass(frozen=True)
class Variant:
    """What one release calls its files, and how they are written.

    Attributes:
        archive: name of the archive, of the folder in it and of the dataset.
        ratings: file of user, item, rating, time.
        movies: file of item, title and genres.
        cells: a file's lines as cells.
        genres: of a line of `movies`.
    """

    archive: str
    ratings: str
    movies: str
    cells: Callable[[Path, str], Iterator[Cells]]
    genres: Callable[[Cells], Sequence[str]]


def _split(mark: str) -> Callable[[Path, str], Iterator[Cells]]:
    def cells(path: Path, encoding: str) -> Iterator[Cells]:
        with path.open(encoding=encoding, newline="\n") as file:
            for line in file:
                if text := line.rstrip("\r\n"):
                    yield text.split(mark)

    return cells


def _csv(path: Path, encoding: str) -> Iterator[Cells]:
    with path.open(encoding=encoding, newline="") as file:
        rows = csv.reader(file)
        next(rows, None)  # the header
        yield from rows


def _flags(cells: Cells) -> list[str]:
    """The genres of 100k: nineteen columns of 0 and 1."""
    return [name for name, flag in zip(_GENRES, cells[5:24], strict=False) if flag == "1"]


def _listed(cells: Cells) -> list[str]:
    """`Comedy|Drama`; latest-small writes "(no genres listed)" where there are none."""
    return [word for word in cells[2].split("|") if word and not word.startswith("(")]


def _of_100k(path: Path, encoding: str) -> Iterator[Cells]:
    return _split("\t" if path.name == "u.data" else "|")(path, encoding)


VARIANTS = {
    "100k": Variant("ml-100k", "u.data", "u.item", _of_100k, _flags),
    "1m": Variant("ml-1m", "ratings.dat", "movies.dat", _split("::"), _listed),
    "latest-small": Variant("ml-latest-small", "ratings.csv", "movies.csv", _csv, _listed),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools movielens`."""
    add = parser.add_argument
    add("--variant", required=True, choices=VARIANTS, help="of MovieLens")
    add("--posters", metavar="DIR", help="pictures named by the movie's id: 1.jpg, 2.png, …")
    add_flags(parser, "the archive's: ml-latest-small", "ratings")


def run(arguments: argparse.Namespace) -> str:
    """Makes the dataset and returns its name.

    Raises:
        UserError: a mistake in the flags, or files that are missing or cannot be read.
    """
    variant = VARIANTS[arguments.variant]
    folder = Path(arguments.out) / (arguments.name or variant.archive)
    check_free(folder, arguments.force)
    least, posters = parse_least(arguments.min_inter), arguments.posters
    if posters and not Path(posters).is_dir():
        raise UserError(f"--posters: there is no folder {posters}.")
    ratings, movies = (_find(Path(arguments.raw_dir), variant, name)
                       for name in (variant.ratings, variant.movies))  # fmt: skip
    bad: Counter[str] = Counter()
    events = read_ratings(ratings, variant, bad, arguments.limit)
    rows = core(events.coded(), *least)
    kept = kept_items(events, rows)
    items = read_movies(movies, variant, set(kept), bad)
    images = pictures_by_id(Path(posters), kept) if posters else []
    content = Content(events.decoded(rows), items, images, left_out(bad))
    shown = ["--posters posters"] if posters else []
    how = command("movielens", arguments, f"--variant {arguments.variant}", *shown)
    write_dataset(folder, content, how, arguments.force)
    return folder.name


def _find(raw: Path, variant: Variant, name: str) -> Path:
    for path in (raw / name, raw / variant.archive / name):
        if path.is_file():
            return path
    raise UserError(
        f"--raw_dir: {raw} has no {name}: download {variant.archive}.zip from {SOURCE} and unpack "
        "it there."
    )


def _lines(path: Path, variant: Variant) -> Iterator[Cells]:
    """Cells of a file in UTF-8 or, as the older releases have it, Latin-1."""
    try:
        path.read_bytes().decode("utf-8")
        encoding = "utf-8-sig"
    except UnicodeDecodeError:
        encoding = "latin-1"
    try:
        yield from variant.cells(path, encoding)
    except csv.Error as error:
        raise UserError(f"{path}: {error}.") from None


def read_ratings(path: Path, variant: Variant, bad: Counter[str], limit: int = 0) -> Events:
    """All ratings that can be read.

    Raises:
        UserError: there is not one.
    """
    events = Events()
    for cells in _lines(path, variant):
        try:
            user, item, rating, time = cells[:4]
            stars, when = float(rating), int(time)
        except ValueError:
            bad["ratings that cannot be read"] += 1
            continue
        if not user or not item or not math.isfinite(stars) or when < 0:
            bad["ratings that cannot be read"] += 1
            continue
        events.add(user, item, when, stars)
        if len(events) == limit:
            break
    if not len(events):
        raise UserError(f"{path} has no rating of user, movie, rating and time: is it the file?")
    return events


def read_movies(path: Path, variant: Variant, wanted: set[str], bad: Counter[str]) -> pd.DataFrame:
    """Title and genres of the wanted movies; columns item_id, title, categories."""
    found: dict[str, tuple[str, str | None, str | None]] = {}
    for cells in _lines(path, variant):
        if len(cells) < 3:
            bad["movies that cannot be read"] += 1
        elif cells[0] in wanted and cells[0] not in found:
            genres = " > ".join(variant.genres(cells))
            found[cells[0]] = (safe_token(cells[0]), cells[1].strip() or None, genres or None)
    return pd.DataFrame(found.values(), columns=[ITEM, "title", "categories"], dtype=object)
