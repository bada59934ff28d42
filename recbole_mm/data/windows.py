"""One random stretch of each user's sequence an epoch: a history and the item that followed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recbole_mm.data.sequences import UserSequences

Ints = NDArray[np.int64]
WINDOWS = ("full", "official")


@dataclass(frozen=True)
class Windows:
    """Stretches of users' sequences; places are those of `UserSequences.items`.

    Attributes:
        owner: the row of the user. Shape: (N,).
        begin: of the history. Shape: (N,).
        target: the item after it. Shape: (N,).
    """

    owner: Ints
    begin: Ints
    target: Ints

    def __len__(self) -> int:
        return len(self.owner)

    def lengths(self) -> Ints:
        """Items of each history. Shape: (N,)."""
        return self.target - self.begin


def draw_windows(
    sequences: UserSequences, longest: int, how: str, seed: int, epoch: int
) -> Windows:
    """A window of each user with two items or more; a function of its arguments alone.

    Args:
        sequences: of all users.
        longest: items of a history, at most.
        how: ``full``: any position of the user is the target, after as many items as there are;
            ``official``: as I-LLMRec's code draws them, with even odds capped at half of
            `longest` or at `longest`: a user with no more items gives all of them, of others a
            stretch of 2 to cap - 1 items starts anywhere.
        seed: of the draw.
        epoch: likewise.
    """
    rng = np.random.default_rng([seed, epoch])
    lengths = sequences.lengths()
    owner = np.flatnonzero(lengths > 1)
    n, first = lengths[owner], sequences.offsets[owner]
    if how == "full":
        target = 1 + _below(rng, n - 1)
        return Windows(owner, first + np.maximum(target - longest, 0), first + target)
    cap = np.where(rng.random(len(owner)) < 0.5, max(longest // 2, 3), longest)
    size = np.minimum(2 + _below(rng, np.maximum(cap - 2, 1)), longest)
    whole = n <= size  # too short to cut
    size = np.where(whole, n - 1, size)
    begin = np.where(whole, 0, _below(rng, np.maximum(n - size, 1)))
    return Windows(owner, first + begin, first + begin + size)


def _below(rng: np.random.Generator, limits: Ints) -> Ints:
    """A number from 0 and below each limit."""
    return np.minimum((rng.random(len(limits)) * limits).astype(np.int64), limits - 1)
