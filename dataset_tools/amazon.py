"""Amazon's reviews with their products: the releases of 2014, 2018 and 2023.

The files are looked for in --raw_dir under the names they have at the source, as they are (.json.gz
or .jsonl.gz) or unpacked, and downloaded where they are not there. Interactions are all reviews of
a user in order of time; equal times, which are days in 2014 and 2018, keep the order of the file.
Addresses of pictures go to NAME.urls.

  python -m dataset_tools amazon2014 --category Beauty --raw_dir raw --min_inter 5
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset_tools.amazon_releases import TEXTS, Release, category_of, dataset_name
from dataset_tools.download import Remote
from dataset_tools.events import Events
from dataset_tools.lines import END_OF_TIME, LARGEST, records
from dataset_tools.raw import Plan, add_flags, raw_file
from dataset_tools.shelf import Shelf
from recbole_mm.data.atomic import is_address
from recbole_mm.errors import UserError


class Converter:
    """`python -m dataset_tools amazon2014` and its sisters.

    Args:
        release: whose files it reads.
    """

    def __init__(self, release: Release) -> None:
        self.release = release
        year = release.name.removeprefix("amazon")
        self.__doc__ = (
            (__doc__ or "")
            .replace("the releases of 2014, 2018 and 2023", f"the release of {year}")
            .replace("amazon2014", release.name)
        )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The flags."""
        about = "as the source writes it: Beauty, Video_Games, …; or short: games, clothing, …"
        parser.add_argument("--category", required=True, help=about)
        about = "take all reviews, even where the source has a 5-core of them"
        parser.add_argument("--all_reviews", action="store_true", help=about)
        add_flags(parser, "from release and category: amazon-beauty", "reviews", TEXTS)

    def run(self, arguments: argparse.Namespace) -> str:
        """Makes the dataset and returns its name.

        Raises:
            UserError: a mistake in the flags, or files that are missing or cannot be read.
        """
        release = self.release
        category = category_of(release, arguments.category)
        words = [release.name, f"--category {category}"]
        words += ["--all_reviews"] if arguments.all_reviews else []
        plan = Plan.of(arguments, dataset_name(release, category), TEXTS, *words)
        first, of_products, of_all = release.folders
        names, place = release.reviews, first
        if arguments.all_reviews:
            names, place = release.reviews[-1:], of_all
        reviews = self._file(arguments, category, names, place)
        products = self._file(arguments, category, release.products, of_products)
        events = read_reviews(reviews, release, plan.bad, arguments.limit)
        with plan.shelf(events) as shelf:
            read_products(products, release, events.items, shelf, plan.bad, arguments.images)
            plan.write(events, shelf, [reviews, products])
        return plan.folder.name

    def _file(
        self, arguments: argparse.Namespace, category: str, patterns: Sequence[str], folder: str
    ) -> Path:
        """The file of a category, packed or not; the first pattern's is what is downloaded."""
        names = [pattern.format(category) for pattern in patterns]
        remote = Remote(f"{folder}/{names[0]}.gz", self.release.source)
        return raw_file(arguments, [form for n in names for form in (f"{n}.gz", n)], remote)


# ---------------------------------------------------------------- reviews


def read_reviews(path: Path, release: Release, bad: Counter[str], limit: int = 0) -> Events:
    """All reviews that have a user, an item and a time.

    Raises:
        UserError: see `records`, or there is not one.
    """
    events, (user, item, time, rating) = Events(), release.fields
    for record in records(path, bad):
        who, what, when = _id(record.get(user)), _id(record.get(item)), _time(record.get(time))
        if who is None or what is None or when is None:
            bad["reviews without user, item or time"] += 1
            continue
        events.add(who, what, when // release.units, _rating(record.get(rating)))
        if len(events) == limit:
            break
    if not len(events):
        raise UserError(f"{path} has no review with {user}, {item} and {time}: is it the file?")
    return events


def _id(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _time(value: Any) -> int | None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and 0 <= value < END_OF_TIME else None


def _rating(value: Any) -> float:
    is_number = isinstance(value, int | float) and abs(value) <= LARGEST
    return float(value) if is_number else math.nan


# ---------------------------------------------------------------- products


def read_products(
    path: Path,
    release: Release,
    wanted: Mapping[str, int],
    shelf: Shelf,
    bad: Counter[str],
    with_urls: bool = True,
) -> None:
    """Puts the `TEXTS` of each wanted product on the shelf, and the addresses of its pictures.

    Args:
        path: the file.
        release: whose file it is.
        wanted: number of each product.
        shelf: where they are put; of two records of one product the first counts.
        bad: counts what is left out.
        with_urls: whether addresses are kept, or only noted.
    """
    key = release.fields[1]
    for record in records(path, bad):
        item = wanted.get(_id(record.get(key)) or "")
        if item is None:
            continue
        values = [_text(name, record.get(release.texts[name])) for name in TEXTS]
        unusable: Counter[str] = Counter()
        urls = _addresses(release.pictures(record), unusable)
        if not shelf.put(item, values, urls if with_urls else ()):
            bad["products that have a record already"] += 1
            continue
        bad.update(unusable)
        if urls:
            shelf.show(item)


def _addresses(pictures: Iterable[Sequence[Any]], bad: Counter[str]) -> list[str]:
    """One address of each picture, the first that can be one; each once."""
    found: dict[str, None] = {}
    for addresses in pictures:
        for url in filter(None, addresses):
            if isinstance(url, str) and is_address(url):
                found[url] = None
                break
            bad["addresses of pictures that cannot be ones"] += 1
    return list(found)


def _text(name: str, value: Any) -> str | None:
    """A field as the text we keep; None where it says nothing."""
    if name == "categories":
        return " > ".join(_first_path(value)) or None
    if name == "description" and isinstance(value, list):
        value = "\n".join(str(part) for part in value if isinstance(part, str))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value:.10g}" if abs(value) <= LARGEST else None  # False for NaN
    return value if isinstance(value, str) and value.strip() else None


def _first_path(value: Any) -> list[str]:
    """The first path of categories: 2014 has a list of paths, later releases have one path."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    return [part for part in value if isinstance(part, str)] if isinstance(value, list) else []
