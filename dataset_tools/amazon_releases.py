"""What each release of Amazon's reviews calls its files and fields, and where its pictures are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from recbole_mm.errors import UserError

TEXTS = ("title", "price", "brand", "categories", "description")
SHORT = {  # short names of categories, by which papers call their datasets
    "clothing": "Clothing_Shoes_and_Jewelry",
    "sports": "Sports_and_Outdoors",
    "toys": "Toys_and_Games",
    "grocery": "Grocery_and_Gourmet_Food",
    "arts": "Arts_Crafts_and_Sewing",
    "phones": "Cell_Phones_and_Accessories",
    "games": "Video_Games",
    "baby": "Baby_Products",
    "fashion": "Amazon_Fashion",
}
_BEAUTY = {"All_Beauty": "beauty"}  # in names of datasets only: Beauty is itself a category of 2014
_NO_PICTURE = re.compile(r"[a-z]+://[^/?#]*/[^?#]*no-img", re.IGNORECASE)  # in the path
Pictures = Callable[[Mapping[str, Any]], Iterator[Sequence[Any]]]


@dataclass(frozen=True)
class Release:
    """What one release calls its files and fields.

    Attributes:
        name: of the command, and how names of its datasets begin.
        source: address of its description.
        reviews: files of reviews, ``{}`` is the category; the first that is there is taken, the
            last has all.
        products: files of products.
        folders: addresses of the folders of the first of `reviews`, of products, of all reviews.
        fields: user, item, time and rating of a review.
        units: of its times in a second.
        texts: field of a product for each of `TEXTS`.
        pictures: of a product's record, each picture's addresses, the best first.
        own: categories of `SHORT` that it calls otherwise.
    """

    name: str
    source: str
    reviews: Sequence[str]
    products: Sequence[str]
    folders: tuple[str, str, str]
    fields: tuple[str, str, str, str]
    units: int
    texts: Mapping[str, str]
    pictures: Pictures
    own: Mapping[str, str] = field(default_factory=dict)

    @property
    def short(self) -> dict[str, str]:
        """Its categories that have a short name, by that."""
        return {**SHORT, **self.own}


def category_of(release: Release, given: str) -> str:
    """The source's category of a short name, in any case; any other name as it was given."""
    short = release.short
    return {**{name.lower(): name for name in short.values()}, **short}.get(given.lower(), given)


def dataset_name(release: Release, category: str) -> str:
    """`amazon-beauty` for the release of 2014, which the papers mean; `amazon2018-beauty`.

    Categories without a short name have their whole one in it, so that no two make the same.

    Raises:
        UserError: the category is no name.
    """
    if not category.replace("_", "").isalnum() or not category.isascii():
        raise UserError(
            f"--category '{category}': write it as the source does, as Video_Games, or "
            "short, as games."
        )
    short = _BEAUTY | {theirs: ours for ours, theirs in release.short.items()}
    name = short.get(category_of(release, category), category.lower().replace("_", "-"))
    return f"{release.name.removesuffix('2014')}-{name}"


def _of_2014(record: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """One address, which may be that of a sign that there is no picture."""
    url = record.get("imUrl")
    if not isinstance(url, str) or not _NO_PICTURE.match(url):
        yield [url]


def _of_2018(record: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """Two lists of the same pictures, large and small."""
    lists = (_list(record.get(name)) for name in ("imageURLHighRes", "imageURL"))
    yield from zip_longest(*lists)


def _of_2023(record: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """A list of pictures, each in several sizes; the main one first."""
    pictures = [one for one in _list(record.get("images")) if isinstance(one, dict)]
    for one in sorted(pictures, key=lambda one: one.get("variant") != "MAIN"):
        yield [one.get("hi_res"), one.get("large")]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


_SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_V2 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"
_V3 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw"
_OLD = ("reviewerID", "asin", "unixReviewTime", "overall")
_PLAIN = dict(zip(TEXTS, TEXTS, strict=True))
RELEASES = (
    Release(
        "amazon2014",
        "https://jmcauley.ucsd.edu/data/amazon/",
        ("reviews_{}_5.json", "reviews_{}.json"),
        ("meta_{}.json",),
        (_SNAP, _SNAP, _SNAP),
        _OLD,
        1,
        _PLAIN,
        _of_2014,
        {"beauty": "Beauty", "baby": "Baby"},
    ),
    Release(
        "amazon2018",
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
        ("{}_5.json", "{}.json"),
        ("meta_{}.json",),
        (f"{_V2}/categoryFilesSmall", f"{_V2}/metaFiles2", f"{_V2}/categoryFiles"),
        _OLD,
        1,
        {**_PLAIN, "categories": "category"},
        _of_2018,
        {"fashion": "AMAZON_FASHION"},
    ),
    Release(
        "amazon2023",
        "https://amazon-reviews-2023.github.io/",
        ("{}.jsonl",),
        ("meta_{}.jsonl",),
        (f"{_V3}/review_categories", f"{_V3}/meta_categories", f"{_V3}/review_categories"),
        ("user_id", "parent_asin", "timestamp", "rating"),
        1000,
        {**_PLAIN, "brand": "store"},
        _of_2023,
    ),
)
