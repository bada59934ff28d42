"""MLLM-MSR over a whole catalogue: what another model retrieves, asked about item by item.

The paper ranks candidate lists alone. A question for every item of every user is out of reach; for
the best N of a retriever it is N questions a user.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, ClassVar

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recbole_mm.data.sequences import UserSequences
from recbole_mm.errors import UserError
from recbole_mm.model.layers.ranking import lift, rows_moved, top_candidates
from recbole_mm.model.layers.retriever_stage import TrainingRows
from recbole_mm.model.layers.zoo_retriever import InnerModel
from recbole_mm.model.mllmmsr import MLLMMSR
from recbole_mm.stage import Readout, Stage, StageSettings

# Metrics that read nothing of a list but the place of its target.
_OF_THE_TARGET = {"recall", "mrr", "ndcg", "hit", "map", "precision", "gauc"}


class MLLMMSRRerank(MLLMMSR):
    """A retriever's best N in the order of MLLM-MSR, above all other items in the retriever's.

    Attributes:
        retriever: any general or sequential model.
        active: whose order is read: ``retriever`` or ``sft``.
    """

    inner_model = "retriever"  # the key that names it; its YAML stands below this one's
    any_inner = True
    stage_names = ("retriever", *MLLMMSR.stage_names)
    bounds: ClassVar[dict[str, tuple[float, float]]] = {
        **MLLMMSR.bounds,
        "n_candidates": (2, inf),
    }

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.active = "retriever"
        self.n_candidates = min(config["n_candidates"], self.n_items - 1)
        self.training_rows = TrainingRows.of(config)
        # A reranked head moves no target that is not in it, so that such users need no questions;
        # other metrics look at whole lists.
        self.only_hits = {str(name).lower() for name in config["metrics"]} <= _OF_THE_TARGET
        self.mask_history: bool = config["mask_history"]
        self._known: UserSequences | None = dataset.train_sequences
        self.inner = InnerModel(config["retriever"], config, dataset)
        self.retriever: Any = self.inner.model

    def check_protocol(self, config: Any) -> None:
        """Raises `UserError` for candidate lists, in which there is nothing to retrieve."""
        if config["eval_candidates"] != "full":
            raise UserError(
                f"eval_candidates is {config['eval_candidates']}, in which nothing is retrieved: "
                "set it to full, or take --model=MLLMMSR."
            )

    def enter(self, stage_name: str) -> None:
        """Scores are now those of this stage."""
        self.active = "retriever" if stage_name == "retriever" else "sft"

    def make_stages(self, settings: Mapping[str, StageSettings], train_dataset: Any) -> list[Stage]:
        """The stages in order, on the training part of a dataset."""
        how = settings["retriever"]
        first = self.inner.stage("retriever", how, self.training_rows, train_dataset)
        return [first, *super().make_stages(settings, train_dataset)]

    def readouts(self, last_stage: str) -> list[Readout]:
        """The rows of the result."""
        return [
            Readout("retriever", lambda: self.enter("retriever"), chosen=False),
            Readout("sft", lambda: self.enter("sft")),
        ]

    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items. Shape: (B, V)."""
        scores = self.inner.scores(interaction)
        if self.active == "retriever":
            return scores
        seen = self.seen(interaction) if self.mask_history else None
        candidates = top_candidates(scores, self.n_candidates, seen)  # (B, N)
        rows = self._rows_to_ask(interaction, scores, candidates, seen)
        if len(rows) == 0:
            return scores
        asked = self.candidate_scores(interaction[rows], candidates[rows].cpu())  # (n, N)
        lifted = scores.clone()
        lifted[rows] = lift(scores[rows], candidates[rows], asked.to(scores))
        return lifted

    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of one item a row. Shape: (B,)."""
        items = interaction[self.ITEM_ID][:, None]
        return self.full_sort_predict(interaction).gather(1, items)[:, 0]

    def seen(self, interaction: Interaction) -> Tensor:
        """What users took before their targets, in training or of late; 0 is none. (B, n)."""
        recent: Tensor = interaction[self.ITEM_SEQ]  # (B, L)
        known = self._known
        if known is None:
            return recent
        users = interaction[self.USER_ID].cpu().numpy()
        rows = np.searchsorted(known.users, users).clip(max=len(known) - 1)
        taken = [
            torch.from_numpy(known[row] if known.users[row] == user else known.items[:0])
            for row, user in zip(rows.tolist(), users, strict=True)
        ]
        return torch.cat([recent, pad_sequence(taken, batch_first=True).to(recent)], dim=1)

    def _rows_to_ask(
        self, interaction: Interaction, scores: Tensor, candidates: Tensor, seen: Tensor | None
    ) -> Tensor:
        if not self.only_hits or self.ITEM_ID not in interaction:
            return torch.arange(len(candidates), device=candidates.device)
        return rows_moved(interaction[self.ITEM_ID], scores, candidates, seen)
