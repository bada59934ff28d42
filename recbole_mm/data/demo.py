"""The demo dataset `mm-demo`: purchases that follow what only the pictures show.

Products stand on shelves, and a user mostly stays on a shelf or goes on to the next: that is what
item ids tell. At first users take almost anything; then they grow choosy and buy by the *look*,
which is drawn in a product's picture and written nowhere else: one look appeals to everybody, and
each user has a favourite besides. A product is bought a few times, mostly by chance, so that ids
hardly know which ones appeal.
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


@dataclass(frozen=True)
class Sizes:
    """How much there is, and how strongly looks decide."""

    users: int = 1000
    shelves: int = 80
    items_a_shelf: int = 24
    casual: tuple[int, int] = (3, 6)  # fewest and most of a user's first purchases
    choosy: int = 3  # purchases after those: the last two validate and test
    shy: float = 0.5  # how many times more a casual user buys a product of the appealing look
    appeal: float = 60.0  # how many times more a choosy user buys a product of the appealing look
    taste: float = 1.5  # the same, for the user's favourite look
    stay: float = 0.65  # chance that the next purchase is from the same shelf
    follow: float = 0.25  # chance that it is from the next shelf; else from any


@dataclass(frozen=True)
class Catalogue:
    """What the generator knows of its products. Shape of each: (items,)."""

    shelf: NDArray[np.int64]
    look: NDArray[np.int64]

    @property
    def appealing(self) -> NDArray[np.bool_]:
        """Whether the product has the look that appeals to everybody."""
        return self.look == APPEALING


def make_catalogue(sizes: Sizes, rng: np.random.Generator) -> Catalogue:
    """Every shelf has the same number of products of each look, as far as they go round."""
    n_items = sizes.shelves * sizes.items_a_shelf
    looks = np.arange(sizes.items_a_shelf) % len(LOOKS)
    look = np.concatenate([rng.permutation(looks) for _ in range(sizes.shelves)])
    shelf = np.repeat(np.arange(sizes.shelves), sizes.items_a_shelf)
    order = rng.permutation(n_items)  # neighbours in id have nothing in common
    return Catalogue(shelf[order], look[order])


def make_purchases(catalogue: Catalogue, sizes: Sizes, rng: np.random.Generator) -> list[list[int]]:
    """Every user's products, oldest first, none twice."""
    return [_one_user(catalogue, sizes, rng) for _ in range(sizes.users)]


def _one_user(catalogue: Catalogue, sizes: Sizes, rng: np.random.Generator) -> list[int]:
    favourite = rng.integers(len(LOOKS))
    choosy = np.where(catalogue.appealing, sizes.appeal, 1.0)
    choosy *= np.where(catalogue.look == favourite, sizes.taste, 1.0)
    casual = np.where(catalogue.appealing, sizes.shy, 1.0)
    shelf = int(rng.integers(sizes.shelves))
    bought: list[int] = []
    first = int(rng.integers(sizes.casual[0], sizes.casual[1] + 1))
    for place in range(first + sizes.choosy):
        move = rng.uniform()
        if move > sizes.stay + sizes.follow:
            shelf = int(rng.integers(sizes.shelves))
        elif move > sizes.stay:
            shelf = (shelf + 1) % sizes.shelves
        free = np.flatnonzero(catalogue.shelf == shelf)
        free = free[~np.isin(free, bought)]
        wanted = (choosy if place >= first else casual)[free]
        bought.append(int(rng.choice(free, p=wanted / wanted.sum())))
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
