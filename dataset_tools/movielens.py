"""MovieLens 100k, 1M and latest-small, with posters from a folder.

The files are looked for in --raw_dir, in the folder of the archive's name below it, and in the
archive, which is downloaded where it is not there. Interactions are all ratings of a user in order
of time; equal times keep the order of the file.

  python -m dataset_tools movielens --variant latest-small --raw_dir raw --posters posters
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset_tools.download import Remote
from dataset_tools.events import Events
from dataset_tools.lines import END_OF_TIME, LARGEST, csv_cells, text_lines
from dataset_tools.raw import Plan, add_flags, pictures_by_id, raw_file
from dataset_tools.shelf import Shelf
from recbole_mm.errors import UserError

TEXTS = ("title", "categories")
SOURCE = "https://grouplens.org/datasets/movielens/"
_FILES = "https://files.grouplens.org/datasets/movielens"
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
        name: of the dataset.
        archive: name of the archive and of the folder in it.
        ratings: file of user, item, rating, time.
        movies: file of item, title and genres.
        cells: a file's lines as cells.
        genres: of a line of `movies`.
    """

    name: str
    archive: str
    ratings: str
    movies: str
    cells: Callable[[Path], Iterator[Cells]]
    genres: Callable[[Cells], Sequence[str]]


def _split(mark: str) -> Callable[[Path], Iterator[Cells]]:
    def cells(path: Path) -> Iterator[Cells]:
        for line in text_lines(path):
            if text := line.rstrip("\r\n"):
                yield text.split(mark)

    return cells


def _csv(path: Path) -> Iterator[Cells]:
    for number, line in enumerate(text_lines(path)):
        if number and line.strip():  # the first is the header
            yield csv_cells(line) or line.rstrip("\n").split(",")


def _flags(cells: Cells) -> list[str]:
    """The genres of 100k: nineteen columns of 0 and 1."""
    return [name for name, flag in zip(_GENRES, cells[5:24], strict=False) if flag == "1"]


def _listed(cells: Cells) -> list[str]:
    """`Comedy|Drama`; latest-small writes "(no genres listed)" where there are none."""
    return [word for word in cells[2].split("|") if word and not word.startswith("(")]


def _of_100k(path: Path) -> Iterator[Cells]:
    return _split("\t" if path.name == "u.data" else "|")(path)


_1M = ("ratings.dat", "movies.dat")
_LATEST = ("ratings.csv", "movies.csv")
VARIANTS = {  # RecBole takes the name ml-100k for the copy in its own package
    "100k": Variant("movielens-100k", "ml-100k", "u.data", "u.item", _of_100k, _flags),
    "1m": Variant("ml-1m", "ml-1m", *_1M, _split("::"), _listed),
    "latest-small": Variant("ml-latest-small", "ml-latest-small", *_LATEST, _csv, _listed),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools movielens`."""
    add = parser.add_argument
    add("--variant", required=True, choices=VARIANTS, help="of MovieLens")
    add("--posters", metavar="DIR", help="pictures named by the movie's id: 1.jpg, 2.png, …")
    add_flags(parser, "ml-latest-small and the like", "ratings", TEXTS)


def run(arguments: argparse.Namespace) -> str:
    """Makes the dataset and returns its name.

    Raises:
        UserError: a mistake in the flags, or files that are missing or cannot be read.
    """
    variant, posters = VARIANTS[arguments.variant], arguments.posters
    words = ["movielens", f"--variant {arguments.variant}"]
    words += ["--posters posters"] if posters else []
    plan = Plan.of(arguments, variant.name, TEXTS, *words)
    if posters and not Path(posters).is_dir():
        raise UserError(f"--posters: there is no folder {posters}.")
    archive = f"{_FILES}/{variant.archive}.zip"
    remote = Remote(archive, SOURCE, f"{archive}.md5")
    ratings, movies = (
        raw_file(arguments, [name], remote, variant.archive)
        for name in (variant.ratings, variant.movies)
    )
    events = read_ratings(ratings, variant, plan.bad, arguments.limit)
    with plan.shelf(events) as shelf:
        read_movies(movies, variant, events.items, shelf, plan.bad)
        pictures = pictures_by_id(Path(posters), events, shelf) if posters else {}
        plan.write(events, shelf, [ratings, movies], pictures if arguments.images else {})
    return plan.folder.name


def read_ratings(path: Path, variant: Variant, bad: Counter[str], limit: int = 0) -> Events:
    """All ratings that can be read.

    Raises:
        UserError: there is not one.
    """
    events = Events()
    for cells in variant.cells(path):
        try:
            user, item, rating, time = cells[:4]
            stars, when = float(rating), int(time)
        except ValueError:
            bad["ratings that cannot be read"] += 1
            continue
        is_known = abs(stars) <= LARGEST and 0 <= when < END_OF_TIME
        if not user or not item or not is_known:
            bad["ratings that cannot be read"] += 1
            continue
        events.add(user, item, when, stars)
        if len(events) == limit:
            break
    if not len(events):
        raise UserError(f"{path} has no rating of user, movie, rating and time: is it the file?")
    return events


def read_movies(
    path: Path, variant: Variant, wanted: Mapping[str, int], shelf: Shelf, bad: Counter[str]
) -> None:
    """Puts title and genres of the wanted movies on the shelf."""
    for cells in variant.cells(path):
        if len(cells) < 3:
            bad["movies that cannot be read"] += 1
        elif cells[0] in wanted:
            genres = " > ".join(variant.genres(cells))
            shelf.put(wanted[cells[0]], (cells[1].strip() or None, genres or None))
