"""The stage that goes on training the retriever by the ranker's feedback (PRIME, section 3.2.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_mm.data.sequences import TARGETS, WholeFields, collate, epoch_plan, whole_windows
from recbole_mm.errors import UserError
from recbole_mm.model.layers.preference import (
    SET_PROBS,
    draw_sets,
    odds_ratio_loss,
    preferred_first,
)
from recbole_mm.model.layers.ranker_stage import RankedStage
from recbole_mm.model.layers.retriever_stage import groups_of, prefix_scores
from recbole_mm.stage import StageContext, StageSettings, UnfitWeightsError, fill

Ints = NDArray[np.int64]
LABELERS = ("ranker", "truth", "random", "none")
NEITHER = ("force", "resample", "skip")
_CALLS = "ranker_calls"
_REDRAWS = 10  # of pairs without the target, with `neither: resample`; then they are skipped


@dataclass(frozen=True)
class PreferenceSettings:
    """What preference optimisation is besides its optimiser.

    Attributes:
        beta: weight of the odds-ratio loss beside cross entropy.
        set_prob: likelihood of a set, see `set_log_prob`.
        neither: what to do where no set holds the target: ``force`` puts it into the first,
            ``resample`` draws again, ``skip`` leaves the pair out.
        labeler: which of two sets that both hold the target is preferred: ``ranker`` says,
            ``random`` is a coin, ``truth`` leaves such pairs out; ``none``: no pairs at all.
        temperature: of the softmax that sets are drawn from.
        dropout: of the retriever in this stage.
        batch_size: users a step.
    """

    beta: float = 0.01
    set_prob: str = "mean"
    neither: str = "force"
    labeler: str = "ranker"
    temperature: float = 1.0
    dropout: float = 0.1
    batch_size: int = 64

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("set_prob", self.set_prob, SET_PROBS),
            ("neither", self.neither, NEITHER),
            ("labeler", self.labeler, LABELERS),
        ):
            if value not in allowed:
                raise UserError(f"{key} is '{value}': use {', '.join(allowed)}.")
        if not self.temperature > 0:
            raise UserError(f"set_temperature is {self.temperature}: set it above 0.")
        if not self.beta >= 0:
            raise UserError(f"beta is {self.beta}: set it to 0 or more.")


@dataclass(frozen=True)
class Positions:
    """Every position of a batch that has a target, as a prefix of its own.

    Attributes:
        seen: the items up to the position, right-padded with 0. Shape: (N, L).
        lengths: how many. Shape: (N,).
        targets: the item that follows. Shape: (N,).
    """

    seen: Tensor
    lengths: Tensor
    targets: Tensor

    def __getitem__(self, rows: Tensor) -> Positions:
        return Positions(self.seen[rows], self.lengths[rows], self.targets[rows])

    def histories(self, most: int) -> list[Ints]:
        """The newest items of each prefix, `most` at most."""
        rows, ends = self.seen.cpu().numpy(), self.lengths.cpu().numpy()
        return [row[max(0, end - most) : end] for row, end in zip(rows, ends, strict=True)]


def positions_of(item_seq: Tensor, targets: Tensor) -> Positions:
    """Lists the positions of right-padded rows that have a target. (B, L), (B, L) -> N of them."""
    row, place = (targets > 0).nonzero(as_tuple=True)  # (N,), (N,)
    steps = torch.arange(item_seq.shape[1], device=item_seq.device)
    seen = item_seq[row].masked_fill(steps > place[:, None], 0)  # (N, L)
    return Positions(seen, place + 1, targets[row, place])


@dataclass(frozen=True)
class Pairs:
    """Positions with a preference, and their two sets.

    Attributes:
        at: which of the N positions. Shape: (n,).
        winner: items of the preferred set. Shape: (n, K).
        loser: items of the other. Shape: (n, K).
    """

    at: Tensor
    winner: Tensor
    loser: Tensor


@dataclass(frozen=True)
class PreferenceBatch:
    """An entry of the stage's plan; its sets are drawn from `seed`."""

    rows: Ints
    seed: int


class PreferenceStage(RankedStage):
    """Cross entropy plus the odds ratio of candidate sets that the ranker prefers.

    Both sets of a position are drawn from the retriever as it is at this step. The one that holds
    the target is preferred; where both do, the one in which the ranker puts it higher.

    Args:
        name: of the stage.
        model: a `PRIME`, whose `policy` is trained; it begins as the retriever.
        settings: how; the weights it begins with are validated and may remain the best.
        how: see `PreferenceSettings`.
        train_dataset: the training part, with its `train_sequences`.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        settings: StageSettings,
        how: PreferenceSettings,
        train_dataset: Any,
    ) -> None:
        super().__init__(name, model.policy, replace(settings, validate_first=True))
        self.model, self.policy, self.how = model, model.policy, how
        self.rows = whole_windows(train_dataset.train_sequences, model.max_seq_length)
        self.ranker_calls = 0

    def prepare(self, context: StageContext) -> None:
        """The policy begins as the retriever, with a dropout of its own."""
        self.policy.load_state_dict(self.model.retriever.state_dict())
        for module in self.policy.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.how.dropout

    def param_groups(self) -> list[dict[str, Any]]:
        """The retriever's groups with this stage's weight decay."""
        return groups_of(self.policy, self.settings.weight_decay)

    def plan(self, epoch: int) -> list[PreferenceBatch]:
        """Shuffled batches of users' rows."""
        seed = self.model.seed
        batches = epoch_plan(self.rows.lengths(), self.how.batch_size, seed, epoch, bucket=False)
        draws = np.random.default_rng([seed, epoch, 1]).integers(2**31, size=len(batches))
        return [PreferenceBatch(*pair) for pair in zip(batches, draws.tolist(), strict=True)]

    # --- the loss -----------------------------------------------------------------------
    def loss(self, batch: PreferenceBatch) -> Tensor:
        """Cross entropy + beta x odds-ratio loss (eq. 8): means over positions and over pairs.

        Shape: ().
        """
        model = self.model
        fields = WholeFields(model.USER_ID, model.ITEM_SEQ, model.ITEM_SEQ_LEN)
        rows = collate(self.rows, batch.rows, fields).to(model.device)
        pairs = self._pairs(rows, torch.Generator().manual_seed(batch.seed))
        log_p = self._scores(rows).log_softmax(dim=1)  # (N, V)
        loss = F.nll_loss(log_p, rows[TARGETS][rows[TARGETS] > 0])
        if pairs is None:
            return loss
        winner, loser = (log_p[pairs.at].gather(1, sets) for sets in (pairs.winner, pairs.loser))
        return loss + self.how.beta * odds_ratio_loss(winner, loser, self.how.set_prob)

    def _scores(self, rows: Interaction) -> Tensor:
        """The policy's scores of all items after every position with a target. Shape: (N, V).

        A causal model gives them in one pass; any other reads each prefix as a row of its own.
        """
        policy, item_seq, targets = self.policy, rows[self.policy.ITEM_SEQ], rows[TARGETS]
        if hasattr(policy, "scores_at"):
            scores: Tensor = policy.scores_at(item_seq, targets > 0)
            return scores
        positions = positions_of(item_seq, targets)
        owners = rows[policy.USER_ID].repeat_interleave((targets > 0).sum(dim=1))  # (N,)
        return prefix_scores(policy, owners, positions.seen, positions.lengths)

    @torch.no_grad()
    def _pairs(self, rows: Interaction, generator: torch.Generator) -> Pairs | None:
        """Draws two sets at every position and says which is preferred; None: cross entropy only.

        The policy draws as it is used, without dropout.
        """
        if self.how.labeler == "none" or self.how.beta == 0:
            return None
        self.policy.eval()
        scores = self._scores(rows)  # (N, V)
        self.policy.train()
        positions = positions_of(rows[self.policy.ITEM_SEQ], rows[TARGETS])
        sets = self._draw(scores, positions, generator)  # (N, 2, K)
        first, at = self._preferred(scores, positions, sets, generator)
        first, sets = first[at], sets[at]
        swapped = sets.flip(1)
        winner, loser = torch.where(first[:, None, None], sets, swapped).unbind(1)
        return Pairs(at, winner, loser)

    def _draw(self, scores: Tensor, positions: Positions, generator: torch.Generator) -> Tensor:
        """Two sets a position; where neither holds the target, what `neither` says."""
        free = scores / self.how.temperature
        if self.model.mask_candidates:
            free.scatter_(1, positions.seen, torch.finfo(free.dtype).min)
        K = self.model.n_candidates
        sets = draw_sets(free, K, 2, generator)  # (N, 2, K)
        bare = _without(sets, positions.targets)
        if self.how.neither == "force":
            sets[bare, 0, 0] = positions.targets[bare]
        for _ in range(_REDRAWS if self.how.neither == "resample" else 0):
            if len(bare) == 0:
                break
            sets[bare] = draw_sets(free[bare], K, 2, generator)
            bare = bare[_without(sets[bare], positions.targets[bare])]
        return sets

    def _preferred(
        self, scores: Tensor, positions: Positions, sets: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Whether the first set is preferred (N,), and which positions have a preference (n,)."""
        holds = (sets == positions.targets[:, None, None]).any(dim=2)  # (N, 2)
        first, both = holds[:, 0].clone(), holds.all(dim=1)  # (N,), (N,)
        asked = both.nonzero()[:, 0]
        if self.how.labeler == "truth":
            return first, (holds.any(dim=1) & ~both).nonzero()[:, 0]
        if self.how.labeler == "random":
            coin = torch.randint(2, (len(asked),), generator=generator)
            first[asked] = coin.bool().to(first.device)
        elif len(asked):
            first[asked] = self._ask(scores[asked], positions[asked], sets[asked])
        return first, holds.any(dim=1).nonzero()[:, 0]

    def _ask(self, scores: Tensor, positions: Positions, sets: Tensor) -> Tensor:
        """Whether the ranker puts the target higher in the first of both sets. Shape: (n,)."""
        model, ranker = self.model, self.model.the_ranker()
        n, _, K = sets.shape
        by_score = scores.gather(1, sets.flatten(1)).view_as(sets).argsort(dim=2, descending=True)
        sets = sets.gather(2, by_score)  # (n, 2, K), as the ranker meets them when it is used
        shown, back = model.in_prompt_order(sets.view(2 * n, K).cpu().numpy())
        ranker.eval()
        histories = positions.histories(model.max_history)
        found = ranker.set_log_probs(histories, shown.reshape(n, 2, K))  # (n, 2, K)
        found = found.gather(2, torch.from_numpy(back).view(n, 2, K)).to(sets.device)
        self.ranker_calls += 2 * n
        places = (sets == positions.targets[:, None, None]).int().argmax(dim=2)  # (n, 2)
        return preferred_first(found, places)

    # --- validation and result ------------------------------------------------------------
    def finish(self, context: StageContext) -> dict[str, Any]:
        """Chooses the weight of the policy in `fusion`; what was retrieved before and after."""
        self.model.read("retriever", "ranker")
        before = self.retrieval(context)
        self.model.enter(self.name)
        after = self.retrieval(context)
        return {
            **super().finish(context),
            "ranker_calls": self.ranker_calls,
            "retrieval_rate": after["retrieval_rate"],
            "before": before,
            "after": after,
        }

    # --- what is saved --------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """The policy's weights and how often the ranker was asked."""
        return {**self.policy.state_dict(), _CALLS: torch.tensor(self.ranker_calls)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave; the best weights are older than the count of all calls."""
        weights = dict(state)
        calls = weights.pop(_CALLS, None)
        if calls is None:
            raise UnfitWeightsError("they are of no preference optimisation")
        fill(self.policy, weights)
        if self.settings.weights_from is None:  # else another run's, which this one did not make
            self.ranker_calls = max(self.ranker_calls, int(calls))


def _without(sets: Tensor, targets: Tensor) -> Tensor:
    """Rows of which no set holds the target. (N, S, K), (N,) -> (n,)."""
    return (sets != targets[:, None, None]).flatten(1).all(dim=1).nonzero()[:, 0]
