"""The demo dataset `mm-demo`: purchases that follow what only the pictures show.

Products stand on shelves, and shelves form rings: a user's next purchase is mostly from the next
shelf of the ring, which is what item ids tell. What a user takes from a shelf is decided by the
*look*, which is drawn in a product's picture and written nowhere else: one look appeals to
everybody, and each user has a favourite besides. Of each shelf, the *staples* sell all the time.
The *novelties* have had a few sales on trial, whatever their looks, and their season comes with
everybody's last two purchases, those that validate and test: ids know that they are on the shelf,
and not which of them appeal.
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
_EARLY = 4  # trials are among the first purchases
_SEASON = 2  # a user's last purchases, when novelties sell


@dataclass(frozen=True)
class Sizes:
    """How much there is, and how strongly looks decide."""

    users: int = 1000
    purchases: tuple[int, int] = (6, 8)  # fewest and most of a user
    rings: int = 5
    shelves: int = 8  # of a ring
    staples: int = 1  # of each look on a shelf, and one more of the appealing look
    novelties: int = 2  # of each look on a shelf
    trials: int = 2  # sales of each novelty before its season
    appeal: float = 40.0  # how many times more a product of the appealing look is bought
    taste: float = 2.0  # the same, for the user's favourite look
    stray: float = 0.1  # chance that the next purchase is from any shelf
    old_hat: float = 0.4  # how many times more a staple is bought in the novelties' season


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
    """Every shelf has the same products, but for their ids, which are in random order."""
    looks = np.arange(len(LOOKS))
    staples = np.append(np.tile(looks, sizes.staples), APPEALING)
    look = np.append(staples, np.tile(looks, sizes.novelties))
    n_shelves = sizes.rings * sizes.shelves
    order = rng.permutation(n_shelves * len(look))
    shelf = np.repeat(np.arange(n_shelves), len(look))
    novel = np.tile(np.arange(len(look)) >= len(staples), n_shelves)
    return Catalogue(shelf[order], np.tile(look, n_shelves)[order], novel[order])


def make_purchases(catalogue: Catalogue, sizes: Sizes, rng: np.random.Generator) -> list[list[int]]:
    """Every user's products, oldest first, none twice."""
    walks = [_walk(sizes, rng) for _ in range(sizes.users)]
    trials = _trials(catalogue, walks, sizes, rng)
    return [
        _one_user(catalogue, walk, trials.get(user, {}), sizes, rng)
        for user, walk in enumerate(walks)
    ]


def _walk(sizes: Sizes, rng: np.random.Generator) -> list[int]:
    """The shelves that a user takes from, in order."""
    n_shelves = sizes.rings * sizes.shelves
    walk = [int(rng.integers(n_shelves))]
    length = int(rng.integers(sizes.purchases[0], sizes.purchases[1] + 1))
    while len(walk) < length:
        ring, place = divmod(walk[-1], sizes.shelves)
        on = ring * sizes.shelves + (place + 1) % sizes.shelves
        walk.append(int(rng.integers(n_shelves)) if rng.uniform() < sizes.stray else on)
    return walk


def _trials(
    catalogue: Catalogue, walks: list[list[int]], sizes: Sizes, rng: np.random.Generator
) -> dict[int, dict[int, int]]:
    """Which novelty is sold on trial, by user and place: each equally often, whatever its look.

    Neither a user's first purchase nor the last before the season, which a ranker learns from.
    """
    visits: list[list[tuple[int, int]]] = [[] for _ in range(sizes.rings * sizes.shelves)]
    for user, walk in enumerate(walks):
        for place in range(1, min(len(walk) - _SEASON - 1, _EARLY)):
            visits[walk[place]].append((user, place))
    trials: dict[int, dict[int, int]] = {}
    for shelf, places in enumerate(visits):
        novelties = np.flatnonzero((catalogue.shelf == shelf) & catalogue.novel)
        wanted = np.tile(novelties, sizes.trials)
        for item, at in zip(wanted, rng.permutation(len(places)), strict=False):
            user, place = places[at]
            trials.setdefault(user, {})[place] = int(item)
    return trials


def _one_user(
    catalogue: Catalogue,
    walk: list[int],
    trials: dict[int, int],
    sizes: Sizes,
    rng: np.random.Generator,
) -> list[int]:
    favourite = rng.integers(len(LOOKS))
    charm = np.where(catalogue.appealing, sizes.appeal, 1.0)
    charm *= np.where(catalogue.look == favourite, sizes.taste, 1.0)
    before = charm * ~catalogue.novel
    season = charm * np.where(catalogue.novel, 1.0, sizes.old_hat)
    bought: list[int] = []
    for place, shelf in enumerate(walk):
        weights = season if place >= len(walk) - _SEASON else before
        wanted = np.where(catalogue.shelf == shelf, weights, 0.0)
        wanted[bought] = 0.0
        drawn = int(rng.choice(len(wanted), p=wanted / wanted.sum()))
        on_trial = trials.get(place, drawn)
        bought.append(drawn if on_trial in bought else on_trial)
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
