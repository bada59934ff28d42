"""What the evaluation loaders need beside their rows: what each user had before, and fixed
candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from recbole_mm.data.candidates import candidates_of_part

CANDIDATE_SEED = 2020  # not the run's: the lists are the same for every model and seed


def attach_history(train: Any, valid: Any, test: Any) -> None:
    """Gives the evaluation loaders `seen`: booleans, sparse, of shape (users, V), untruncated.

    A ready-made split does not tell whole sequences; its loaders get none.
    """
    sequences = train._dataset.train_sequences
    if sequences is None:
        return
    pairs = [(np.repeat(sequences.users, sequences.lengths()), sequences.items)]
    for loader in (valid, test):
        part = loader._dataset
        own = part.histories
        if own is not None:  # of other users than those that train, say
            before = (np.repeat(own.users, own.lengths()), own.items)
            loader.seen = _matrix([before], (part.user_num, part.item_num))
            continue
        loader.seen = _matrix(pairs, (part.user_num, part.item_num))
        feat = part.inter_feat
        pairs.append((feat[part.uid_field].numpy(), feat[part.iid_field].numpy()))


def _matrix(
    pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]], shape: tuple[int, int]
) -> sp.csr_matrix:
    users, items = (np.concatenate(column) for column in zip(*pairs, strict=True))
    matrix = sp.csr_matrix((np.ones(len(users), dtype=bool), (users, items)), shape=shape)
    matrix.sum_duplicates()
    return matrix


def attach_candidates(name: str, valid: Any, test: Any) -> None:
    """Gives the evaluation loaders `candidates`: the negatives of each user id. Shape: (users,
    N)."""
    for phase, loader in (("valid", valid), ("test", test)):
        users, lists = candidates_of_part(loader._dataset, name, phase, CANDIDATE_SEED)
        by_user = np.zeros((loader._dataset.user_num, lists.shape[1]), dtype=np.int64)
        by_user[users] = lists
        loader.candidates = by_user
