"""What a two-stage ranker is trained and read with: samples, negatives, candidates, final lists.

Everything is plain arrays and numbers and can be used with any retriever and any ranker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm.data.sequences import UserSequences
from recbole_mm.errors import UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NEGATIVE_SOURCES = ("popularity", "uniform", "retriever", "mixed")
SHORT = 5  # items: a shorter sequence is one sample, a longer one gives a sample a prefix from here


@dataclass(frozen=True)
class PrefixSamples:
    """Prefixes of users' training sequences; the last item of each is the label.

    Attributes:
        items: all users' items, one behind the other. Shape: (N,).
        begin: first item of each sample, a place in `items`. Shape: (S,).
        end: its label, a place in `items`. Shape: (S,).
        users: the user id of each sample. Shape: (S,).
    """

    items: Ints
    begin: Ints
    end: Ints
    users: Ints

    def __len__(self) -> int:
        return len(self.begin)

    def history(self, sample: int, max_items: int) -> Ints:
        """The newest items before the label. Shape: (at most `max_items`,)."""
        end = int(self.end[sample])
        return self.items[max(int(self.begin[sample]), end - max_items) : end]

    def labels(self, samples: Ints) -> Ints:
        """The label of each sample. Shape: (B,)."""
        return self.items[self.end[samples]]


def prefix_samples(sequences: UserSequences) -> PrefixSamples:
    """PRIME's samples: a user of fewer than 5 items gives one, of n items the prefixes of 5 to n.

    Args:
        sequences: all users' training items.
    """
    first, after = sequences.offsets[:-1], sequences.offsets[1:]
    lengths = after - first
    usable = lengths >= 2  # one item leaves nothing to go by
    first, after, lengths = first[usable], after[usable], lengths[usable]
    counts = np.maximum(lengths - SHORT + 1, 1)
    begin = np.repeat(first, counts)
    back = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(counts.sum())
    users = np.repeat(sequences.users[usable], counts)
    return PrefixSamples(sequences.items, begin, np.repeat(after, counts) - 1 - back, users)


def item_counts(items: Ints, n_items: int) -> Ints:
    """How often each item occurs in training. Shape: (V,)."""
    return np.bincount(items, minlength=n_items).astype(np.int64)


class NegativeSampler:
    """Draws K - 1 items beside each label, without replacement.

    - ``popularity``: in proportion to 1 + the item's training count (PRIME; its official code also
      counts validation items, which leaks).
    - ``uniform``: every item alike.
    - ``retriever``: the retriever's best items for the history.
    - ``mixed``: half of them (rounded down) the retriever's, the others by popularity.

    Args:
        counts: how often each item occurs in training, 0 for the pad. Shape: (V,).
        source: one of the above.
        n_negatives: K - 1.
        retrieve: scores of all items for some samples, (B,) -> (B, V); for the last two sources.

    Raises:
        UserError: an unknown source, or fewer items than negatives.
    """

    def __init__(
        self,
        counts: Ints,
        source: str,
        n_negatives: int,
        retrieve: Callable[[Ints], Tensor] | None = None,
    ) -> None:
        if source not in NEGATIVE_SOURCES:
            raise UserError(f"neg_source is '{source}': use {', '.join(NEGATIVE_SOURCES)}.")
        if n_negatives > len(counts) - 2:
            raise UserError(
                f"n_candidates is {n_negatives + 1}, but the dataset has {len(counts) - 1} items: "
                "lower n_candidates."
            )
        self.n_items, self.n_negatives, self.source = len(counts), n_negatives, source
        self._weights = np.ones(len(counts)) if source == "uniform" else 1.0 + counts
        self._retrieve = retrieve
        self._n_retrieved = {"retriever": n_negatives, "mixed": n_negatives // 2}.get(source, 0)

    def draw(self, samples: Ints, labels: Ints, rng: np.random.Generator) -> Ints:
        """Negatives of each sample: no label, no pad, no item twice. (B,), (B,) -> (B, K - 1)."""
        taken = np.zeros((len(labels), self.n_items), dtype=bool)
        taken[:, 0] = True
        taken[np.arange(len(labels)), labels] = True
        best = self._best(samples, taken)  # (B, R)
        if self._n_retrieved == self.n_negatives:
            return best
        np.put_along_axis(taken, best, True, axis=1)
        others = self._random(taken, self.n_negatives - self._n_retrieved, rng)
        return np.concatenate([best, others], axis=1)

    def _best(self, samples: Ints, taken: NDArray[np.bool_]) -> Ints:
        if self._n_retrieved == 0:
            return np.zeros((len(taken), 0), dtype=np.int64)
        if self._retrieve is None:
            raise ValueError(f"neg_source {self.source} needs a retriever")
        scores = self._retrieve(samples)
        free = scores.masked_fill(torch.from_numpy(taken).to(scores.device), -torch.inf)
        return free.topk(self._n_retrieved, dim=1).indices.cpu().numpy()

    def _random(self, taken: NDArray[np.bool_], count: int, rng: np.random.Generator) -> Ints:
        """An exponential race: its first arrivals are a weighted draw without replacement."""
        arrival = rng.exponential(size=taken.shape) / self._weights  # (B, V)
        arrival[taken] = np.inf
        first = np.argpartition(arrival, count - 1, axis=1)[:, :count]  # (B, count)
        order = np.argsort(np.take_along_axis(arrival, first, axis=1), axis=1)
        return np.take_along_axis(first, order, axis=1)


def lettered(labels: Ints, negatives: Ints, rng: np.random.Generator | None) -> tuple[Ints, Ints]:
    """Puts each label among its negatives, at a random place.

    Args:
        labels: shape (B,).
        negatives: shape (B, K - 1).
        rng: None leaves every label first.

    Returns:
        Candidates (B, K), and the place of the label in each row (B,).
    """
    candidates = np.concatenate([labels[:, None], negatives], axis=1)  # (B, K)
    if rng is not None:
        candidates = rng.permuted(candidates, axis=1)
    return candidates, (candidates == labels[:, None]).argmax(axis=1)


def top_candidates(scores: Tensor, k: int, seen: Tensor | None = None) -> Tensor:
    """The k best items of each row in score order, never the pad. (B, V) -> (B, k).

    Args:
        scores: of all items. Shape: (B, V).
        k: at most V - 1.
        seen: items that are candidates only where all others are not enough; 0 for none.
            Shape: (B, L).
    """
    free = scores.clone()
    if seen is not None:
        free.scatter_(1, seen, torch.finfo(free.dtype).min)
    free[:, 0] = -torch.inf
    return free.topk(k, dim=1).indices


def rows_moved(targets: Tensor, scores: Tensor, candidates: Tensor, seen: Tensor | None) -> Tensor:
    """Rows whose target may change its place when candidates are ranked anew. Shape: (n,).

    Those whose target is a candidate, is worth as much as one, or may be passed by them.

    Args:
        targets: an item id a row. Shape: (B,).
        scores: of all items. Shape: (B, V).
        candidates: shape (B, K).
        seen: items that are no candidates, 0 for none: those may be passed. Shape: (B, L).
    """
    targets = targets.to(candidates.device)[:, None]
    worst = scores.gather(1, candidates).amin(dim=1, keepdim=True)  # (B, 1)
    moved = (scores.gather(1, targets) >= worst)[:, 0]
    if seen is not None:
        moved |= (seen.to(candidates.device) == targets).any(dim=1)
    return moved.nonzero()[:, 0]


def lift(scores: Tensor, candidates: Tensor, ranking: Tensor) -> Tensor:
    """Scores whose head is the candidates in the ranker's order and whose tail is unchanged.

    All metrics computed from the result are exact: candidate r of the ranking scores K - r above
    the best of all other items. Equal ranking scores keep the candidates' own order.

    Args:
        scores: retriever scores of all items. Shape: (B, V).
        candidates: item ids. Shape: (B, K).
        ranking: the ranker's score of each candidate. Shape: (B, K).

    Returns:
        New scores. Shape: (B, V).
    """
    K = candidates.shape[1]
    order = ranking.argsort(dim=1, descending=True, stable=True)  # (B, K)
    steps = torch.arange(K, 0, -1, device=scores.device, dtype=scores.dtype)  # K … 1
    top = scores.scatter(1, candidates, -torch.inf).amax(dim=1, keepdim=True)  # (B, 1)
    top = top.nan_to_num(neginf=0.0)
    return scores.scatter(1, candidates.gather(1, order), top + steps.expand_as(order))


def demotion(candidates: Tensor, seen: Tensor) -> Tensor:
    """A ranking that knows no content: items of the history behind all others. (B, K) -> (B, K).

    Where users never take an item twice, this alone lifts a retriever that is not told so: a gain
    of a ranker says something only beside it.

    Args:
        candidates: item ids. Shape: (B, K).
        seen: the history, 0 for none. Shape: (B, L).
    """
    held = (candidates[:, :, None] == seen[:, None, :]).any(dim=2)  # (B, K)
    return -held.float()


ALPHAS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, float("inf"))


def fuse(ranking: Tensor, retrieval: Tensor, alpha: float) -> Tensor:
    """Ranker log-probability + alpha x retriever log-probability; infinity: the retriever alone.

    Log-probabilities may lack a constant a row: only their order within a row is used.

    Args:
        ranking: shape (B, K).
        retrieval: shape (B, K).
        alpha: 0 or more.
    """
    return retrieval if alpha == float("inf") else ranking + alpha * retrieval


def choose_alpha(
    ranking: Tensor, retrieval: Tensor, target: Tensor, alphas: Sequence[float] = ALPHAS
) -> tuple[float, dict[float, float]]:
    """The alpha with the highest NDCG@10 of the target among its candidates.

    Of equal ones the largest is taken: what does not help is not used.

    Args:
        ranking: ranker log-probabilities. Shape: (B, K).
        retrieval: retriever scores of the same candidates. Shape: (B, K).
        target: place of the target in each row. Shape: (B,).
        alphas: what to choose from.

    Returns:
        The alpha, and the NDCG@10 of each.
    """
    found = {alpha: ndcg(fuse(ranking, retrieval, alpha), target) for alpha in alphas}
    best = max(found.values(), default=0.0)
    return max(alpha for alpha, value in found.items() if value == best), found


def ndcg(ranking: Tensor, target: Tensor, k: int = 10) -> float:
    """Mean NDCG@k with one target a row; equal scores keep the candidates' order.

    Args:
        ranking: scores of candidates. Shape: (B, K).
        target: place of the target in each row. Shape: (B,).
        k: ranks that count.
    """
    order = ranking.argsort(dim=1, descending=True, stable=True)  # (B, K)
    place = (order == target[:, None]).float().argmax(dim=1)  # (B,), 0 is the top
    gain = torch.where(place < k, 1.0 / torch.log2(place + 2.0), 0.0)
    return float(gain.double().mean()) if len(gain) else 0.0
