"""The demo dataset `mm-demo`: purchases that follow what only the pictures show.

Products stand on shelves along aisles. A user walks down an aisle and takes one product from each
shelf, which is what item ids tell. What is taken is decided by the *look*, which is drawn in a
product's picture and written nowhere else: one look appeals to everybody, and each user has a
favourite besides. The last two shelves of an aisle hold *novelties*: everybody comes to them with
the last two purchases, those that validate and test. Before that, some users have begun with the
end of the aisle and taken novelties on trial, each equally often whatever its look. So ids know
where the novelties stand, and not which of them appeal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recbole_mm.data.atomic import new_folder, write_images, write_table, write_text
from recbole_mm.data.demo_pictures import LOOKS, OUTLINES, draw_product

APPEALING = 0  # index into LOOKS

_NOUNS = ("bowl", "box", "bottle", "tent", "cup", "kite")  # by outline
_ADJECTIVES = ("calm", "brisk", "plain", "fine", "early", "late", "quiet", "grand", "small", "tall")
_BRANDS = ("Aro", "Bexley", "Corvin", "Dunmore", "Elva", "Fenwick", "Gora", "Halden")
_NEW = 2  # shelves of novelties at the end of an aisle, for a user's last two purchases


@dataclass(frozen=True)
class Sizes:
    """How much there is, and how strongly looks decide."""

    users: int = 900
    purchases: tuple[int, int] = (10, 11)  # fewest and most of a user
    aisles: int = 16
    shelves: int = 9  # of an aisle, before those of the novelties
    staples: int = 2  # of each look on a shelf
    novelties: int = 4  # of each look on a shelf of novelties
    trials: int = 2  # sales of each novelty before its season
    staples_before: int = 2  # most purchases of a tester before the trials
    appeal: float = 30.0  # how many times more a product of the appealing look is bought
    taste: float = 1.5  # the same, for the user's favourite look


@dataclass(frozen=True)
class Catalogue:
    """What the generator knows of its products. Shape of each: (items,)."""

    shelf: NDArray[np.int64]
    look: NDArray[np.int64]
    novel: NDArray[np.bool_]

    @property
    def appealing(self) -> NDArray[np.bool_]:
        """Whether the product has the look that appeals to everybody."""
        return self.look == APPEALING


def make_catalogue(sizes: Sizes, rng: np.random.Generator) -> Catalogue:
    """Shelves of a kind have the same looks; ids are in random order."""
    place = np.tile(np.arange(sizes.shelves + _NEW), sizes.aisles)  # (shelves of all aisles,)
    of_each = np.where(place < sizes.shelves, sizes.staples, sizes.novelties)
    look = np.concatenate([np.tile(np.arange(len(LOOKS)), n) for n in of_each])
    shelf = np.repeat(np.arange(len(place)), of_each * len(LOOKS))
    order = rng.permutation(len(shelf))
    shelf = shelf[order]
    return Catalogue(shelf, look[order], place[shelf] >= sizes.shelves)


def make_purchases(catalogue: Catalogue, sizes: Sizes, rng: np.random.Generator) -> list[list[int]]:
    """Every user's products, oldest first, none twice."""
    trials = [_trials(catalogue, aisle, sizes, rng) for aisle in range(sizes.aisles)]
    purchases = []
    for user in range(sizes.users):
        aisle = user % sizes.aisles
        tried = trials[aisle].pop() if trials[aisle] else []
        walk, before = _walk(bool(tried), sizes, rng)
        shelves = [aisle * (sizes.shelves + _NEW) + place for place in walk]
        given = dict(enumerate(tried, start=before))
        purchases.append(_one_user(catalogue, shelves, given, sizes, rng))
    return purchases


def _trials(
    catalogue: Catalogue, aisle: int, sizes: Sizes, rng: np.random.Generator
) -> list[list[int]]:
    """What each tester of an aisle takes from its shelves of novelties: all equally often."""
    first_new = aisle * (sizes.shelves + _NEW) + sizes.shelves
    decks = [
        rng.permutation(np.tile(np.flatnonzero(catalogue.shelf == first_new + place), sizes.trials))
        for place in range(_NEW)
    ]
    return [list(map(int, taken)) for taken in zip(*decks, strict=True)]


def _walk(tester: bool, sizes: Sizes, rng: np.random.Generator) -> tuple[list[int], int]:
    """The places of an aisle that a user takes from, in order, and the purchases before trials.

    Everybody walks to the end; testers have been there before.
    """
    end = sizes.shelves + _NEW
    before = int(rng.integers(1, sizes.staples_before + 1)) if tester else 0
    opening = [*range(sizes.shelves - before, end)] if tester else []
    length = int(rng.integers(sizes.purchases[0], sizes.purchases[1] + 1))
    return [*opening, *range(end - length + len(opening), end)], before


def _one_user(
    catalogue: Catalogue,
    shelves: list[int],
    given: dict[int, int],
    sizes: Sizes,
    rng: np.random.Generator,
) -> list[int]:
    """What a user takes from each shelf by its charm, but for what is given at some places."""
    favourite = rng.integers(len(LOOKS))
    charm = np.where(catalogue.appealing, sizes.appeal, 1.0)
    charm *= np.where(catalogue.look == favourite, sizes.taste, 1.0)
    bought: list[int] = []
    for place, shelf in enumerate(shelves):
        wanted = np.where(catalogue.shelf == shelf, charm, 0.0)
        wanted[bought] = 0.0
        drawn = int(rng.choice(len(wanted), p=wanted / wanted.sum()))
        bought.append(given.get(place, drawn))
    return bought


def make_demo(
    folder: Path, permuted: bool = False, seed: int = 2020, sizes: Sizes | None = None
) -> None:
    """Writes the dataset to `folder`, whole or not at all; its name is the folder's.

    Args:
        folder: e.g. `dataset/mm-demo`.
        permuted: give each product the picture of another: the control, in which they say nothing.
        seed: the same seed gives the same files.
        sizes: how much there is; the default is what `mm-demo` has.
    """
    sizes = sizes or Sizes()
    rng = np.random.default_rng(seed)
    catalogue = make_catalogue(sizes, rng)
    purchases = make_purchases(catalogue, sizes, rng)
    outlines = rng.integers(OUTLINES, size=len(catalogue.look))
    shown = np.arange(len(catalogue.look))
    if permuted:
        shown = np.random.default_rng(seed + 1).permutation(shown)
    with new_folder(folder) as draft:
        _write_purchases(draft / f"{folder.name}.inter", purchases)
        _write_texts(draft, folder.name, outlines, rng)
        _write_pictures(draft, folder.name, catalogue.look, outlines, shown, rng)


def _token(item: int) -> str:
    return f"p{item + 1:04d}"


def _write_purchases(path: Path, purchases: list[list[int]]) -> None:
    rows = (
        (f"u{user + 1:04d}", _token(item), str(float(place)))
        for user, items in enumerate(purchases)
        for place, item in enumerate(items)
    )
    write_table(path, ("user_id:token", "item_id:token", "timestamp:float"), rows)


def _write_texts(
    folder: Path, name: str, outlines: NDArray[np.int64], rng: np.random.Generator
) -> None:
    """Titles, brands and prices at random; the category is the outline's, which says nothing."""
    texts, items = [], []
    for item, outline in enumerate(outlines):
        noun, brand = _NOUNS[outline], str(rng.choice(_BRANDS))
        title = (
            f"{rng.choice(_ADJECTIVES)} {rng.choice(_ADJECTIVES)} {noun} {rng.integers(100, 1000)}"
        )
        price = f"{rng.uniform(3, 60):.2f}"
        texts.append((_token(item), (title, brand, price, noun)))
        items.append((_token(item), noun, brand, price))
    write_text(folder / f"{name}.text", ("title", "brand", "price", "categories"), texts)
    header = ("item_id:token", "categories:token_seq", "brand:token", "price:float")
    write_table(folder / f"{name}.item", header, items)


def _write_pictures(
    folder: Path,
    name: str,
    looks: NDArray[np.int64],
    outlines: NDArray[np.int64],
    shown: NDArray[np.int64],
    rng: np.random.Generator,
) -> None:
    """File names are numbers in the order of the items that show them."""
    (folder / "images").mkdir()
    pictures = [
        draw_product(int(look), int(outline), rng)
        for look, outline in zip(looks, outlines, strict=True)
    ]
    rows = []
    for item, source in enumerate(shown):
        file = f"{item + 1:04d}.jpg"
        (folder / "images" / file).write_bytes(pictures[source])
        rows.append((_token(item), file))
    write_images(folder / f"{name}.image", rows)
