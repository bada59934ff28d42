"""The result on parts of the users: those whose target training has seen and those whose target it
has not; those with histories of some length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from recbole_mm.report.places import WITH_PLACES, Floats, values

DIGITS = 6
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
    known = train.train_sequences
    if found is None or known is None:
        return {}
    rows = test.inter_feat
    targets = dict(zip(rows[test.uid_field].tolist(), rows[test.iid_field].tolist(), strict=True))
    users, places = found[0].tolist(), found[1].double().numpy()
    if len(targets) != len(users):
        return {}
    warm = np.isin([targets[user] for user in users], np.unique(known.items))
    return {
        "warm": _slice(places[warm], metrics),
        "cold": _slice(places[~warm], metrics),
    }


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
