"""Which training samples an alignment is tuned on: denoised by words, even over users and items.

Source: RA-Rec (Yu et al., 2024), section 3.4. A sample is one training position: a history and the
item that followed. It is kept if target and history share a word (denoising); then length of the
history and popularity of the target, each cut at its quantiles, span a grid of cells from which
samples are drawn as evenly as their sizes allow (diversity).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mm.data.sequences import UserSequences

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MODES = ("efficient", "random", "denoise", "diversity", "all")
_WORD = re.compile(r"[a-z0-9]+")
_STOP_WORDS = frozenset(
    (
        *("an", "and", "any", "are", "as", "at", "be", "by", "for", "from", "has", "in", "is"),
        *("it", "its", "not", "of", "on", "or", "our", "per", "that", "the", "this", "to"),
        *("was", "with", "you", "your", "oz", "pack", "set", "new", "size", "inch"),
    )
)


@dataclass(frozen=True)
class Samples:
    """Training positions of whole sequences.

    Attributes:
        owner: the row of the user. Shape: (N,).
        place: of the target in ``sequences.items``. Shape: (N,).
        length: items before it. Shape: (N,).
    """

    owner: Ints
    place: Ints
    length: Ints

    def __len__(self) -> int:
        return len(self.place)

    def take(self, rows: Ints | Bools) -> Samples:
        """These samples alone."""
        return Samples(self.owner[rows], self.place[rows], self.length[rows])


def all_samples(sequences: UserSequences) -> Samples:
    """Every position but each user's first."""
    lengths = sequences.lengths()
    owner = np.repeat(np.arange(len(sequences)), lengths)
    length = np.arange(len(sequences.items)) - sequences.offsets[owner]
    rows = np.flatnonzero(length > 0)
    return Samples(owner[rows], rows, length[rows])


def words(title: str | None) -> frozenset[str]:
    """The words that say something: no numbers, single letters or stop words."""
    found = _WORD.findall((title or "").lower())
    return frozenset(
        word for word in found if len(word) > 1 and not word.isdecimal() and word not in _STOP_WORDS
    )


def related(sequences: UserSequences, titles: Sequence[str | None]) -> tuple[Bools, Bools]:
    """Whether a position's item shares a word with an earlier one of its user, or is one of them.

    Args:
        sequences: of all users.
        titles: by item id. Length: V.

    Returns:
        Both of the length of ``sequences.items``; an item that came before always counts as
        related.
    """
    said = [words(title) for title in titles]
    shares = np.zeros(len(sequences.items), dtype=np.bool_)
    repeats = np.zeros_like(shares)
    for row in range(len(sequences)):
        seen: set[int] = set()
        heard: set[str] = set()
        for place in range(sequences.offsets[row], sequences.offsets[row + 1]):
            item = int(sequences.items[place])
            repeats[place] = item in seen
            shares[place] = repeats[place] or not heard.isdisjoint(said[item])
            seen.add(item)
            heard |= said[item]
    return shares, repeats


def grid(lengths: Ints, popularity: Ints, n_buckets: tuple[int, int]) -> tuple[Ints, list[Any]]:
    """The cell of each sample: its quantile of history length by that of popularity.

    Args:
        lengths: of the histories. Shape: (N,).
        popularity: of the targets. Shape: (N,).
        n_buckets: quantiles of each; equal edges are merged, so that there may be fewer.

    Returns:
        Cells from 0, shape (N,), and the edges of both.
    """
    edges = [
        np.unique(np.quantile(values, np.linspace(0, 1, n + 1)[1:-1]))
        for values, n in zip((lengths, popularity), n_buckets, strict=True)
    ]
    by_length, by_popularity = (
        np.searchsorted(edge, values, side="right")
        for edge, values in zip(edges, (lengths, popularity), strict=True)
    )
    cells: Ints = by_length * (len(edges[1]) + 1) + by_popularity
    return cells, [edge.tolist() for edge in edges]


def water_filling(sizes: Ints, budget: int, rng: np.random.Generator) -> Ints:
    """How many to take from each cell: as even as sizes allow, `budget` in all.

    A cell gives fewer than another by more than one only if it has no more.

    Args:
        sizes: of the cells. Shape: (C,).
        budget: in all; more than there are takes everything.
        rng: decides who gives one more where the budget does not divide.

    Returns:
        Shape: (C,).
    """
    if budget >= sizes.sum():
        return sizes.copy()
    low, high = 0, int(sizes.max())  # the largest level whose sum is within the budget
    while low < high:
        level = (low + high + 1) // 2
        if np.minimum(sizes, level).sum() <= budget:
            low = level
        else:
            high = level - 1
    taken = np.minimum(sizes, low)
    larger = rng.permutation(np.flatnonzero(sizes > low))
    taken[larger[: budget - taken.sum()]] += 1
    return taken


def _even(samples: Samples, cells: Ints, budget: int, seed: int) -> Samples:
    """Draws from each cell without replacement; what a cell gives depends on seed and cell."""
    known, sizes = np.unique(cells, return_counts=True)
    taken = water_filling(sizes, budget, np.random.default_rng(seed))
    order = np.argsort(cells, kind="stable")
    parts = np.split(order, np.cumsum(sizes)[:-1])
    drawn = [
        np.random.default_rng([seed, int(cell)]).permutation(part)[:count]
        for cell, part, count in zip(known, parts, taken, strict=True)
    ]
    return samples.take(np.sort(np.concatenate(drawn)))


def construct(
    sequences: UserSequences,
    titles: Sequence[str | None],
    mode: str,
    budget: int,
    seed: int,
    n_buckets: tuple[int, int] = (10, 10),
    allow_repeats: bool = True,
) -> tuple[Samples, dict[str, Any]]:
    """The samples to tune on.

    Args:
        sequences: of training.
        titles: by item id. Length: V.
        mode: ``all`` positions; `budget` of them by chance (``random``), of those with a word in
            common (``denoise``), evenly over the grid (``diversity``), or both (``efficient``).
        budget: samples, where the mode is not ``all``.
        seed: of everything drawn.
        n_buckets: see `grid`.
        allow_repeats: whether denoising keeps a target that is in its own history.

    Returns:
        The samples in the order of positions, and a manifest: how they were chosen, in plain
        values.
    """
    every = all_samples(sequences)
    manifest: dict[str, Any] = {"mode": mode, "seed": seed, "positions": len(every)}
    left = every
    if mode in ("denoise", "efficient"):
        shares, repeats = related(sequences, titles)
        kept = shares if allow_repeats else shares & ~repeats
        left = every.take(kept[every.place])
        manifest["with_a_word_in_common"] = len(left)
        manifest["bought_before"] = int(repeats[every.place].sum())
    if mode in ("diversity", "efficient") and len(left):
        counts = np.bincount(sequences.items, minlength=len(titles))
        popularity = counts[sequences.items[left.place]]
        cells, edges = grid(left.length, popularity, n_buckets)
        manifest["edges"] = {"length": edges[0], "popularity": edges[1]}
        manifest["cells"] = len(np.unique(cells))
        left = _even(left, cells, budget, seed)
    elif mode != "all":
        drawn = np.random.default_rng(seed).permutation(len(left))[:budget]
        left = left.take(np.sort(drawn))
    manifest["samples"] = len(left)
    return left, manifest
