"""The stage that trains a sequential model by next-item cross entropy, on sequences or prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor
from torch.nn import functional as F

from recbole_mm.data.sequences import (
    Ints,
    WholeFields,
    WholeRows,
    collate,
    epoch_plan,
    whole_windows,
)
from recbole_mm.stage import Stage, StageSettings


@dataclass(frozen=True)
class TrainingRows:
    """What a batch of training rows is.

    Attributes:
        mode: ``whole``, a row a user, or ``prefix``, a row a target.
        batch_size: rows a step.
        seed: of their order.
        length_buckets: whether users of like length go together, with ``whole``.
    """

    mode: str
    batch_size: int
    seed: int
    length_buckets: bool

    @classmethod
    def of(cls, config: Any) -> TrainingRows:
        """What a recommender's configuration says of them."""
        keys = ("train_mode", "train_batch_size", "seed", "length_buckets")
        return cls(*(config[key] for key in keys))


class RetrieverStage(Stage):
    """Trains a sequential model by its own loss.

    Args:
        name: of the stage.
        model: what is trained; its ``calculate_loss`` takes the rows. One that has `param_groups`
            says what decays.
        settings: how.
        how: see `TrainingRows`.
        train_dataset: the training part, with its `train_sequences` and RecBole's prefix rows.
    """

    def __init__(
        self, name: str, model: Any, settings: StageSettings, how: TrainingRows, train_dataset: Any
    ) -> None:
        super().__init__(name, model, settings)
        self.of_model = type(model).__name__
        self.model, self.how = model, how
        self.rows: WholeRows | Interaction = train_dataset.inter_feat
        if how.mode == "whole":
            self.rows = whole_windows(train_dataset.train_sequences, model.max_seq_length)

    def param_groups(self) -> list[dict[str, Any]]:
        """The model's groups with this stage's weight decay."""
        return groups_of(self.model, self.settings.weight_decay)

    def plan(self, epoch: int) -> list[Ints]:
        """Shuffled batches of row numbers, those of `length_buckets` or just any rows together.

        Putting rows of like length together saves padding, of which LRURec has none, and gives the
        targets of short rows a larger weight in their batch's mean.
        """
        whole = isinstance(self.rows, WholeRows)
        lengths = self.rows.lengths() if whole else np.ones(len(self.rows), dtype=np.int64)
        bucket = whole and self.how.length_buckets
        return epoch_plan(lengths, self.how.batch_size, self.how.seed, epoch, bucket)

    def loss(self, batch: Ints) -> Tensor:
        """The mean loss over the targets of these rows. Shape: ()."""
        model = self.model
        if isinstance(self.rows, WholeRows):
            fields = WholeFields(model.USER_ID, model.ITEM_SEQ, model.ITEM_SEQ_LEN)
            interaction = collate(self.rows, batch, fields)
        else:
            interaction = self.rows[torch.from_numpy(batch)]
        loss: Tensor = model.calculate_loss(interaction.to(model.device))
        return loss


def groups_of(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: the model's own, or all weights, as RecBole decays them."""
    own = getattr(model, "param_groups", None)
    if own is not None:
        groups: list[dict[str, Any]] = own(weight_decay)
        return groups
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


def prefix_scores(model: Any, users: Tensor, seen: Tensor, lengths: Tensor) -> Tensor:
    """A sequential model's scores of all items after some histories, each a row of its own.

    Args:
        model: any of RecBole's or ours.
        users: whose histories; some models have a vector a user. Shape: (N,).
        seen: right-padded with 0, at most the model's `max_seq_length` long. Shape: (N, L).
        lengths: shape (N,).

    Returns:
        Shape: (N, V).
    """
    seen = F.pad(seen, (0, model.max_seq_length - seen.shape[1]))  # Caser's filters need it all
    rows = {model.USER_ID: users, model.ITEM_SEQ: seen, model.ITEM_SEQ_LEN: lengths}
    scores: Tensor = model.full_sort_predict(Interaction(rows).to(model.device))
    return scores.view(len(seen), -1)
