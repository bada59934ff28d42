"""Fixed lists of candidates: each user's target among N items that the user never touched.

The lists are a function of the data and the seed alone, in terms of raw tokens: every model ranks
the same ones, whatever order its dataset numbers items in. They are kept beside the dataset, so
that another library, or another machine, can rank them too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import recbole
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm.data.sequences import Ints, UserSequences
from recbole_mm.errors import UserError

LIST_SIZES = {"cand20": 20, "cand100": 100}  # negatives beside the one target
AUCS = ("auc", "gauc")  # metrics of a list that have no k


def candidate_lists(
    folder: Path,
    name: str,
    phase: str,
    user_tokens: Sequence[str],
    item_tokens: Sequence[str],
    own: UserSequences,
    seed: int,
    cache: Path = Path("cache"),
) -> Ints:
    """Reads, or draws and stores, N negatives for each evaluated user.

    Drawn uniformly and without replacement from all items but those the user ever took (training,
    validation and test).

    Args:
        folder: the dataset's folder; `cache` is used where it cannot be written to.
        name: ``cand20`` or ``cand100``.
        phase: ``valid`` or ``test``; each has its own lists.
        user_tokens: raw token of each evaluated user. Length: U.
        item_tokens: raw token of each item id; row 0 is the pad. Length: V.
        own: everything each evaluated user did, row i belongs to ``user_tokens[i]``; ``own.users``
            is not looked at.
        seed: of the draw.

    Returns:
        Item ids, row i for ``user_tokens[i]``. Shape: (U, N).

    Raises:
        UserError: no such list, or a user leaves fewer than N items to draw from.
    """
    if name not in LIST_SIZES:
        raise UserError(f"eval_candidates is '{name}': set it to full, {' or '.join(LIST_SIZES)}.")
    users = np.array(user_tokens, dtype=np.str_)
    items = np.array(item_tokens[1:], dtype=np.str_)  # without the pad
    user_order, item_order = np.argsort(users), np.argsort(items)
    canonical = np.empty(len(items) + 1, dtype=np.int64)  # item id -> place among sorted tokens
    canonical[item_order + 1] = np.arange(len(items))
    taken = [np.unique(canonical[own[int(row)]]) for row in user_order]
    about = {
        "list": name,
        "phase": phase,
        "seed": seed,
        "users": len(users),
        "items": len(items),
        "users_sha256": _digest(users[user_order]),
        "items_sha256": _digest(items[item_order]),
        "taken_sha256": _digest(" ".join(map(str, row)) for row in taken),
    }
    stem = f"{folder.name}.{name}.{phase}.{_digest(map(str, about.values()))[:12]}"
    lists = _read(stem, (folder, cache))
    if lists is None:
        lists = _draw(taken, len(items), about, [users[row] for row in user_order])
        _write(lists, about, stem, (folder, cache))
    result = np.empty_like(lists)
    result[user_order] = item_order[lists] + 1
    return result


def candidates_of_part(
    part: Any, name: str, phase: str, seed: int, cache: Path = Path("cache")
) -> tuple[Ints, Ints]:
    """The lists of a built dataset's part.

    Args:
        part: validation or test part of one of our datasets, after ``build``.

    Returns:
        Users of the part, ascending, and their negatives, as ids. Shapes: (U,) and (U, N).

    Raises:
        UserError: as `candidate_lists`, or the part comes from a ready-made split.
    """
    if part.sequences is None:
        raise UserError(
            "eval_candidates needs everything that each user did, which a ready-made split does "
            "not tell: leave benchmark_filename out or set eval_candidates: full."
        )
    users = np.unique(part.inter_feat[part.uid_field].numpy())
    own = part.sequences.select(np.searchsorted(part.sequences.users, users))
    tokens = part.field2id_token[part.uid_field][users].tolist()
    folder = Path(part.dataset_path).resolve()
    if Path(recbole.__file__).resolve().parent in folder.parents:  # ml-100k in RecBole's wheel
        folder = cache / folder.name
    return users, candidate_lists(folder, name, phase, tokens, part.item_tokens(), own, seed, cache)


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _draw(taken: list[Ints], n_items: int, about: dict[str, object], users: list[str]) -> Ints:
    """Draws the lists in terms of sorted users and items. Shape: (U, N)."""
    size = LIST_SIZES[str(about["list"])]
    rng = np.random.default_rng([int(str(about["seed"])), size, len(str(about["phase"]))])
    lists = np.empty((len(taken), size), dtype=np.int64)
    for row, (own, user) in enumerate(zip(taken, users, strict=True)):
        if n_items - len(own) < size:
            raise UserError(
                f"{about['list']} needs {size} items that a user never took, user '{user}' leaves "
                f"{n_items - len(own)} of {n_items}: set eval_candidates to a shorter list or full."
            )
        # Distinct items in random order stay so when the user's own are struck out.
        drawn = rng.choice(n_items, size + len(own), replace=False)
        lists[row] = drawn[~np.isin(drawn, own)][:size]
    return lists


def _read(stem: str, folders: Iterable[Path]) -> Ints | None:
    for folder in folders:
        path = folder / f"{stem}.npy"
        if path.is_file():
            lists: Ints = np.load(path, allow_pickle=False)
            return lists.astype(np.int64)
    return None


def _write(lists: Ints, about: dict[str, object], stem: str, folders: Iterable[Path]) -> None:
    """Stores lists in the first folder that takes them; the array comes last and at once."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{stem}.json").write_text(json.dumps(about, indent=1) + "\n")
            draft = folder / f"{stem}.draft.npy"
            np.save(draft, lists.astype(np.int32), allow_pickle=False)
            draft.replace(folder / f"{stem}.npy")
        except OSError:
            continue
        return


def candidate_ranks(scores: Tensor) -> Tensor:
    """The target's rank among its candidates: 1 + those above + half of those level with it.

    Args:
        scores: the target's score first. Shape: (B, 1 + N).

    Returns:
        Shape: (B,), float64.

    Raises:
        ValueError: a score is NaN, which would make every comparison with it false.
    """
    if torch.isnan(scores).any():
        rows = torch.isnan(scores).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"scores are NaN in {len(rows)} rows, first in row {rows[0]}")
    target, others = scores[:, :1], scores[:, 1:]
    above = (others > target).sum(dim=1).double()  # (B,)
    level = (others == target).sum(dim=1).double()  # (B,)
    return 1 + above + level / 2


def rank_metrics(
    ranks: Tensor | NDArray[np.float64], topk: Sequence[int], metrics: Sequence[str]
) -> dict[str, float]:
    """Means over users of RecBole's metrics, where each user has one target.

    Args:
        ranks: may be halves. Shape: (U,).
        topk: cut-offs.
        metrics: of recall, hit, precision, mrr, map, ndcg; in any case.

    Returns:
        ``recall@10`` and so on, in the order of `metrics` and `topk`.

    Raises:
        UserError: a metric that is not defined on candidate lists.
    """
    rank = torch.as_tensor(ranks, dtype=torch.float64)
    gains = {
        "recall": torch.ones_like(rank),
        "hit": torch.ones_like(rank),
        "precision": torch.ones_like(rank),
        "mrr": 1 / rank,
        "map": 1 / rank,
        "ndcg": 1 / torch.log2(rank + 1),
    }
    result = {}
    for metric in map(str.lower, metrics):
        if metric not in gains:
            raise UserError(
                f"metrics: '{metric}' is not defined on candidate lists, use {', '.join(gains)}."
            )
        for k in topk:
            mean = (gains[metric] * (rank <= k)).mean().item() if len(rank) else 0.0
            result[f"{metric}@{k}"] = mean / k if metric == "precision" else mean
    return result


def pooled_auc(scores: Tensor) -> float:
    """How often a target scores above a candidate, over all pairs of any users; ties are half.

    Args:
        scores: the target's score first. Shape: (B, 1 + N).
    """
    targets = scores[:, 0].double().contiguous()  # (B,)
    others = scores[:, 1:].double().flatten().sort().values  # (B * N,)
    below, upto = (torch.searchsorted(others, targets, right=right) for right in (False, True))
    pairs = max(len(targets) * len(others), 1)
    return float((below + upto).double().sum() / 2 / pairs)


def candidate_metrics(
    scores: Tensor, topk: Sequence[int], metrics: Sequence[str]
) -> tuple[dict[str, float], Tensor]:
    """Metrics and per-user ranks of a target among its candidates.

    Args:
        scores: the target's score first. Shape: (B, 1 + N).
        topk: cut-offs.
        metrics: those of `rank_metrics`, and auc (over all users' pairs) and gauc (the mean of
            each user's own), in any case.

    Returns:
        As `rank_metrics` and `candidate_ranks`.
    """
    ranks = candidate_ranks(scores)
    names = [metric.lower() for metric in metrics]
    result = rank_metrics(ranks, topk, [name for name in names if name not in AUCS])
    if "auc" in names:
        result["auc"] = pooled_auc(scores)
    if "gauc" in names:
        result["gauc"] = float(1 - (ranks.mean() - 1) / (scores.shape[1] - 1))
    return result, ranks
