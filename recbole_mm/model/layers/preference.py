"""Preference optimisation of a retriever: candidate sets drawn from it, and the odds-ratio loss.

PRIME (KDD 2025), section 3.2.4; the odds ratio is that of Hong, Lee and Thorne, ORPO, EMNLP 2024.
Everything is plain tensors and can be used with any retriever and any ranker. Letters: N prefixes,
V items with the pad, S sets, K items of a set.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_mm.errors import UserError

SET_PROBS = ("mean", "geomean", "product")
_NOISE_AT_ONCE = 1 << 24  # numbers drawn together, so that memory does not grow with the prefixes


def draw_sets(scores: Tensor, k: int, n_sets: int, generator: torch.Generator) -> Tensor:
    """Sets of distinct items, drawn without replacement from the softmax of each row's scores.

    The k largest of scores with Gumbel noise are such a draw, item after item (Kool, van Hoof and
    Welling, ICML 2019); sets of a row are independent.

    Args:
        scores: of all items; the pad's is never drawn. Shape: (N, V).
        k: K, at most V - 1.
        n_sets: S.
        generator: on the CPU, so that a seed means the same everywhere.

    Returns:
        Item ids in the order they were drawn. Shape: (N, S, K).
    """
    free = scores.clone()
    free[:, 0] = -torch.inf
    rows = max(1, _NOISE_AT_ONCE // (n_sets * scores.shape[1]))
    return torch.cat([_draw(part, k, n_sets, generator) for part in free.split(rows)])


def _draw(scores: Tensor, k: int, n_sets: int, generator: torch.Generator) -> Tensor:
    race = torch.empty(len(scores), n_sets, scores.shape[1])  # (N, S, V)
    race.exponential_(generator=generator)
    noisy = scores[:, None] - race.to(scores.device).log()
    return noisy.topk(k, dim=2).indices  # (N, S, K)


def set_log_prob(log_p: Tensor, how: str) -> Tensor:
    """Log-probability of sets from those of their items. (..., K) -> (...).

    - ``mean``: of the mean of the items' probabilities (the paper's code).
    - ``geomean``: of their geometric mean, the likelihood ORPO takes.
    - ``product``: of their product (the paper's equation 4).

    Args:
        log_p: log-probabilities of distinct items. Shape: (..., K).
        how: one of the above.

    Raises:
        UserError: an unknown `how`.
    """
    if how == "mean":
        return log_p.logsumexp(-1) - math.log(log_p.shape[-1])
    if how == "geomean":
        return log_p.mean(-1)
    if how == "product":
        return log_p.sum(-1)
    raise UserError(f"set_prob is '{how}': use {', '.join(SET_PROBS)}.")


def log_odds(log_prob: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P, exact where P is all but 0 and all but 1 (equation 5).

    A probability that is 1 to the last digit counts as the largest below it.
    """
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    return log_prob - _log1mexp(log_prob)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 (Maechler 2012): each branch where it loses no digits.

    The branch that is not taken gets a harmless argument: its gradient would be not-a-number.
    """
    small = x > -math.log(2.0)
    near, far = x.where(small, -1.0), x.where(~small, -1.0)
    return torch.where(small, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))


def odds_ratio_loss(winner: Tensor, loser: Tensor, how: str) -> Tensor:
    """-log sigmoid(log odds of the preferred set - log odds of the other) (equations 5 to 7).

    Args:
        winner: log-probabilities of the preferred set's items. Shape: (N, K).
        loser: the same of the other set. Shape: (N, K).
        how: see `set_log_prob`.

    Returns:
        The mean, 0 for no pair. Shape: ().
    """
    if len(winner) == 0:
        return winner.sum()
    gap = log_odds(set_log_prob(winner, how)) - log_odds(set_log_prob(loser, how))
    return -F.logsigmoid(gap).mean()


def preferred_first(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Whether the ranker prefers the first of two sets that both hold the target.

    The set in which the target ranks higher is preferred; where it ranks alike, the one in which
    its probability is larger; then the first.

    Args:
        log_probs: the ranker's, of each item among those of its set. Shape: (N, 2, K).
        targets: the target's place in each set. Shape: (N, 2).

    Returns:
        Shape: (N,), bool.
    """
    own = log_probs.gather(2, targets[:, :, None])  # (N, 2, 1)
    rank = (log_probs > own).sum(2)  # (N, 2), 0 is the top
    first, second = rank.unbind(1)
    margin = own[:, 0, 0] >= own[:, 1, 0]
    return (first < second) | ((first == second) & margin)
