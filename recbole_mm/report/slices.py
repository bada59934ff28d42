"""The result on parts of the users: those whose target training has seen and those whose target it
has not; those with a target of some popularity; those with histories of some length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm.report.places import WITH_PLACES, Floats, values

DIGITS = 6
Ints = NDArray[np.int64]
Slice = dict[str, float]


def warm_and_cold(
    train: Any, test: Any, found: tuple[Tensor, Tensor] | None, metrics: Sequence[str]
) -> dict[str, Slice]:
    """The metrics over users with a warm target (an item of training) and with a cold one.

    Args:
        train: the training part, with its `train_sequences`.
        test: the test part.
        found: user ids and their targets' places, as `EvaluationMixin.places`.
        metrics: names such as ``ndcg@10``; those that a place does not give are left out.

    Returns:
        By slice: how many users, and the metrics where there are any; empty where users have
        several targets.
    """
    known, targets = train.train_sequences, _targets(test, found)
    if found is None or known is None or targets is None:
        return {}
    places = found[1].double().numpy()
    warm = np.isin(targets, np.unique(known.items))
    return {
        "warm": _slice(places[warm], metrics),
        "cold": _slice(places[~warm], metrics),
    }


def by_popularity(
    train: Any, test: Any, found: tuple[Tensor, Tensor] | None, metrics: Sequence[str], groups: int
) -> dict[str, Slice]:
    """The metrics over users by how often training has their target.

    Source: Kim et al., "Image is All You Need", 2025, figure 7.

    Args:
        train: the training part, with its `train_sequences`.
        test: the test part.
        found: user ids and their targets' places, as `EvaluationMixin.places`.
        metrics: names such as ``ndcg@10``; those that a place does not give are left out.
        groups: all items in ascending order of their count are cut into so many groups of equal
            size; items of equal count stand in the order of their ids. 0: there are none.

    Returns:
        By slice, the rarest first: how many users, and the metrics where there are any; empty
        where users have several targets.
    """
    known, targets = train.train_sequences, _targets(test, found)
    if found is None or known is None or targets is None or not groups:
        return {}
    counts = np.bincount(known.items, minlength=test.item_num)[1:]
    group = np.empty(len(counts), dtype=np.int64)  # of each item but the pad
    group[counts.argsort(kind="stable")] = np.arange(len(counts)) * groups // len(counts)
    places, part = found[1].double().numpy(), group[targets - 1]
    return {f"popularity {n + 1}": _slice(places[part == n], metrics) for n in range(groups)}


def _targets(test: Any, found: tuple[Tensor, Tensor] | None) -> Ints | None:
    """The target of each user of `found`; None where users have several. Shape: (users,)."""
    if found is None:
        return None
    rows = test.inter_feat
    of = dict(zip(rows[test.uid_field].tolist(), rows[test.iid_field].tolist(), strict=True))
    users = found[0].tolist()
    if len(of) != len(users):
        return None
    return np.array([of[user] for user in users], dtype=np.int64)


def by_history(
    test: Any, found: tuple[Tensor, Tensor] | None, metrics: Sequence[str], edges: Sequence[int]
) -> dict[str, Slice]:
    """The metrics over users by how many items they had before their target, read or not.

    Args:
        test: the test part, with the whole `sequences` of all users.
        found: user ids and their targets' places, as `EvaluationMixin.places`.
        metrics: names such as ``ndcg@10``; those that a place does not give are left out.
        edges: where one slice ends and the next begins, ascending: of [30, 40] there are three.

    Returns:
        By slice: how many users, and the metrics where there are any; empty without edges, or where
        users have several targets.
    """
    whole = test.sequences
    if found is None or whole is None or not edges:
        return {}
    users, places = found[0].numpy(force=True), found[1].double().numpy(force=True)
    rows = np.searchsorted(whole.users, users)
    if len(np.unique(users)) < len(users):
        return {}
    part = np.searchsorted(edges, whole.lengths()[rows] - 1, side="right")
    return {name: _slice(places[part == n], metrics) for n, name in enumerate(_names(edges))}


def _names(edges: Sequence[int]) -> list[str]:
    return [
        f"history below {edges[0]}",
        *(f"history {low} to {high - 1}" for low, high in pairwise(edges)),
        f"history from {edges[-1]}",
    ]


def _slice(places: Floats, metrics: Sequence[str]) -> Slice:
    able = [name for name in metrics if name.partition("@")[0] in WITH_PLACES and len(places)]
    found = {name: round(float(values(places, name).mean()), DIGITS) for name in able}
    return {"users": len(places), **found}
