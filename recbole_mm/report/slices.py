"""The result on parts of the users: those whose target training has seen, and those whose target
it has not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from recbole_mm.report.places import WITH_PLACES, values

DIGITS = 6


def warm_and_cold(
    train: Any, test: Any, found: tuple[Tensor, Tensor] | None, metrics: Sequence[str]
) -> dict[str, dict[str, float]]:
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
    able = [name for name in metrics if name.partition("@")[0] in WITH_PLACES]
    slices: dict[str, dict[str, float]] = {}
    for name, part in (("warm", places[warm]), ("cold", places[~warm])):
        slices[name] = {"users": len(part)}
        if len(part):
            slices[name] |= {m: round(float(values(part, m).mean()), DIGITS) for m in able}
    return slices
