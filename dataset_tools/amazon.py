"""Amazon's reviews with their products: the releases of 2014, 2018 and 2023.

The files are looked for in --raw_dir under the names they have at the source, as they are (.json.gz
or .jsonl.gz) or unpacked. Interactions are all reviews of a user in order of time; equal times,
which are days in 2014 and 2018, keep the order of the file.

  python -m dataset_tools amazon2014 --category Beauty --raw_dir raw --min_inter 5
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dataset_tools.events import Events
from dataset_tools.lines import records
from dataset_tools.raw import add_flags, command, kept_items, left_out
from dataset_tools.table import core, parse_least
from dataset_tools.write import Content, write_dataset
from recbole_mm.data.atomic import ITEM, check_free, safe_token
from recbole_mm.errors import UserError

TEXTS = ("title", "price", "brand", "categories", "description")
SHORT = {  # names of datasets that papers use, where they are not the category's first word
    "Clothing_Shoes_and_Jewelry": "clothing",
    "Sports_and_Outdoors": "sports",
    "Toys_and_Games": "toys",
    "Grocery_and_Gourmet_Food": "grocery",
    "Arts_Crafts_and_Sewing": "arts",
    "Cell_Phones_and_Accessories": "phones",
    "Video_Games": "games",
    "Baby_Products": "baby",
}


@dataclass(frozen=True)
class Release:
    """What one release calls its files and fields.

    Attributes:
        name: of the command, and how names of its datasets begin.
        source: address of its description.
        reviews: files of reviews, ``{}`` is the category; the first that is there is taken.
        products: files of products.
        fields: user, item, time and rating of a review.
        units: of its times in a second.
        texts: field of a product for each of `TEXTS`.
    """

    name: str
    source: str
    reviews: Sequence[str]
    products: Sequence[str]
    fields: tuple[str, str, str, str]
    units: int
    texts: Mapping[str, str]


_OLD = ("reviewerID", "asin", "unixReviewTime", "overall")
_PLAIN = dict(zip(TEXTS, TEXTS, strict=True))
RELEASES = (
    Release(
        "amazon2014",
        "https://jmcauley.ucsd.edu/data/amazon/",
        ("reviews_{}_5.json", "reviews_{}.json"),
        ("meta_{}.json",),
        _OLD,
        1,
        _PLAIN,
    ),
    Release(
        "amazon2018",
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
        ("{}_5.json", "{}.json"),
        ("meta_{}.json",),
        _OLD,
        1,
        {**_PLAIN, "categories": "category"},
    ),
    Release(
        "amazon2023",
        "https://amazon-reviews-2023.github.io/",
        ("{}.jsonl",),
        ("meta_{}.jsonl",),
        ("user_id", "parent_asin", "timestamp", "rating"),
        1000,
        {**_PLAIN, "brand": "store"},
    ),
)


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
        add = parser.add_argument
        add("--category", required=True, help="as the source writes it: Beauty, Video_Games, …")
        add(
            "--require",
            default="",
            metavar="A,B",
            help=f"keep products that have these: {', '.join(TEXTS)}",
        )
        add("--max_title", type=int, default=0, help="drop products of longer titles (0: none)")
        add_flags(parser, "from release and category: amazon-beauty", "reviews")

    def run(self, arguments: argparse.Namespace) -> str:
        """Makes the dataset and returns its name.

        Raises:
            UserError: a mistake in the flags, or files that are missing or cannot be read.
        """
        name = arguments.name or dataset_name(self.release, arguments.category)
        folder = Path(arguments.out) / name
        check_free(folder, arguments.force)
        least, needed = parse_least(arguments.min_inter), _needed(arguments.require)
        raw = Path(arguments.raw_dir)
        reviews = find(raw, self.release.reviews, arguments.category, self.release)
        products = find(raw, self.release.products, arguments.category, self.release)
        bad: Counter[str] = Counter()
        events = read_reviews(reviews, self.release, bad, arguments.limit)
        texts = read_products(products, self.release, events.items, bad)
        fits = _fitting(texts, needed, arguments.max_title)
        rows = core(events.coded(fits), *least)
        content = _content(events, rows, texts, bad)
        write_dataset(folder, content, self._command(arguments), arguments.force)
        return name

    def _command(self, arguments: argparse.Namespace) -> str:
        words = [f"--category {arguments.category}"]
        words += [f"--require {arguments.require}"] if arguments.require else []
        words += [f"--max_title {arguments.max_title}"] if arguments.max_title else []
        return command(self.release.name, arguments, *words)


def dataset_name(release: Release, category: str) -> str:
    """`amazon-beauty` for the release of 2014, which the papers mean; `amazon2018-beauty`.

    Raises:
        UserError: the category is no name.
    """
    if not category.replace("_", "").isalnum() or not category.isascii():
        raise UserError(f"--category '{category}': write it as the source does, as Video_Games.")
    short = SHORT.get(category, category.split("_")[0]).lower()
    return f"{release.name.removesuffix('2014')}-{short}"


def find(raw: Path, patterns: Sequence[str], category: str, release: Release) -> Path:
    """The file of a category, packed or not.

    Raises:
        UserError: there is none; names them and the source.
    """
    names = [pattern.format(category) for pattern in patterns]
    for name in names:
        for path in (raw / f"{name}.gz", raw / name):
            if path.is_file():
                return path
    raise UserError(
        f"--raw_dir: {raw} has no {' or '.join(f'{name}.gz' for name in names)}: download it from "
        f"{release.source}."
    )


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
    return value if is_number and 0 <= value < 1 << 62 else None


def _rating(value: Any) -> float:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else math.nan


# ---------------------------------------------------------------- products


def read_products(
    path: Path, release: Release, wanted: Collection[str], bad: Counter[str]
) -> dict[str, list[str | None]]:
    """The `TEXTS` of each wanted product; of two records of one the first counts."""
    found: dict[str, list[str | None]] = {}
    key = release.fields[1]
    for record in records(path, bad):
        item = _id(record.get(key))
        if item is None or item not in wanted:
            continue
        if item in found:
            bad["products that have a record already"] += 1
            continue
        found[item] = [_text(name, record.get(release.texts[name])) for name in TEXTS]
    return found


def _text(name: str, value: Any) -> str | None:
    """A field as the text we keep; None where it says nothing."""
    if name == "categories":
        return " > ".join(_first_path(value)) or None
    if name == "description" and isinstance(value, list):
        value = "\n".join(str(part) for part in value if isinstance(part, str))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value:.10g}" if math.isfinite(value) else None
    return value if isinstance(value, str) and value.strip() else None


def _first_path(value: Any) -> list[str]:
    """The first path of categories: 2014 has a list of paths, later releases have one path."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    return [part for part in value if isinstance(part, str)] if isinstance(value, list) else []


def _needed(text: str) -> list[int]:
    """Columns that `--require` names."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    for name in names:
        if name not in TEXTS:
            raise UserError(f"--require: '{name}' is none of {', '.join(TEXTS)}.")
    return [TEXTS.index(name) for name in names]


def _fitting(
    texts: Mapping[str, Sequence[str | None]], needed: Sequence[int], max_title: int
) -> Callable[[str], bool]:
    def fits(item: str) -> bool:
        line = texts.get(item, (None,) * len(TEXTS))
        short = not max_title or len(line[0] or "") <= max_title
        return short and all(line[column] for column in needed)

    return fits


def _content(
    events: Events,
    rows: pd.DataFrame,
    texts: Mapping[str, Sequence[str | None]],
    bad: Counter[str],
) -> Content:
    items = kept_items(events, rows)
    lines = [(safe_token(item), *texts[item]) for item in items if item in texts]
    notes = left_out(bad)
    if bare := len(items) - len(lines):
        notes.append(f"items without a record among the products: {bare:,}")
    frame = pd.DataFrame(lines, columns=[ITEM, *TEXTS], dtype=object)
    return Content(events.decoded(rows), frame, [], notes)
