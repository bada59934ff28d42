"""Splits that RecBole does not have, by users and at points in time, with one target a user; and
histories of what is taken most (MLLM-MSR's published code)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from recbole_mm.data.sequences import Bools, Ints, UserSequences

KINDS = ("US", "GT")
SEED = 2020  # not the run's: all models and seeds test the same users

Floats = NDArray[np.floating]


def user_parts(tokens: Sequence[str], shares: Sequence[float]) -> Ints:
    """The part of each user: 0 trains, 1 validates, 2 tests. Shape: (U,).

    A function of the users' raw tokens, whatever order a dataset numbers them in.

    Args:
        tokens: of U users.
        shares: of the three parts, in any unit.
    """
    order = np.argsort(np.array(tokens, dtype=np.str_))
    ends = np.rint(np.cumsum(shares) / np.sum(shares) * len(order)).astype(np.int64)
    drawn = np.random.default_rng(SEED).permutation(len(order))  # places among sorted tokens
    parts = np.empty(len(order), dtype=np.int64)
    parts[order] = np.searchsorted(ends, drawn, side="right")
    return parts


def split_by_users(users: Ints, able: Bools, parts: Ints) -> list[Ints]:
    """Rows of each part: all of those who train, the last of everybody else.

    Args:
        users: of each row, in order of time. Shape: (N,).
        able: whether the row may be a target. Shape: (N,).
        parts: of each user id, see `user_parts`. Shape: (users,).
    """
    rows = np.arange(len(users))
    found = [rows[parts[users] == 0]]
    for part in (1, 2):
        held = rows[(parts[users] == part) & able]
        found.append(np.sort(held[::-1][_first_of_each(users[held][::-1])]))
    return found


def split_by_time(
    users: Ints, able: Bools, times: Floats, every_time: Floats, shares: Sequence[float]
) -> list[Ints]:
    """Rows of each part: all before one time, each user's first between that and a later one, each
    user's first from there on.

    Args:
        users: of each row, in order of time. Shape: (N,).
        able: whether the row may be a target. Shape: (N,).
        times: of each row. Shape: (N,).
        every_time: of all interactions, whose shares decide where is cut. Shape: (M,).
        shares: of the three parts, in any unit.
    """
    ordered, ends = np.sort(every_time), np.cumsum(shares) / np.sum(shares)
    cuts = [ordered[min(int(end * len(ordered)), len(ordered) - 1)] for end in ends[:2]]
    period = np.searchsorted(cuts, times, side="right")  # (N,)
    rows = np.arange(len(users))
    found = [rows[period == 0]]
    for part in (1, 2):
        held = rows[(period == part) & able]
        found.append(held[_first_of_each(users[held])])
    return found


def _first_of_each(users: Ints) -> Ints:
    """Where each user stands for the first time, in order."""
    return np.sort(np.unique(users, return_index=True)[1])


def places_of(users: Ints) -> Ints:
    """How many rows of the same user stand before each. Shape: (N,)."""
    order = np.argsort(users, kind="stable")
    ranked = users[order]
    places = np.empty(len(users), dtype=np.int64)
    places[order] = np.arange(len(users)) - np.searchsorted(ranked, ranked)
    return places


def prefixes(sequences: UserSequences, users: Ints, lengths: Ints) -> UserSequences:
    """The first items of some users.

    Args:
        sequences: of all users.
        users: ids, each once.
        lengths: how many items of each.
    """
    order = np.argsort(users)
    rows, lengths = np.searchsorted(sequences.users, users[order]), lengths[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = np.arange(offsets[-1]) + np.repeat(sequences.offsets[rows] - offsets[:-1], lengths)
    return UserSequences(sequences.items[flat], sequences.users[rows], offsets)


def most_frequent(users: Ints, items: Ints, count: int) -> Bools:
    """Which rows are each user's `count` with the items that all users take most; of items taken
    equally often the earlier. Shape: (N,).

    MLLM-MSR's code makes histories and targets so. Frequencies are of the whole data, targets
    included: that is a leak, and is here to be compared with.

    Args:
        users: of each row, in order of time. Shape: (N,).
        items: likewise.
        count: of rows a user.
    """
    order = np.lexsort((np.arange(len(users)), -np.bincount(items)[items], users))
    rank = places_of(users[order])
    kept = np.zeros(len(users), dtype=bool)
    kept[order[rank < count]] = True
    return kept
