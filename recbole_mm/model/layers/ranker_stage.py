"""The stage that trains a lettered ranker on a retriever's dataset (PRIME, section 3.2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm.data.sequences import epoch_plan
from recbole_mm.model.layers.adapter_stage import AdapterStage
from recbole_mm.model.layers.ranking import (
    NegativeSampler,
    choose_alpha,
    item_counts,
    lettered,
    ndcg,
    prefix_samples,
)
from recbole_mm.model.layers.retriever_stage import prefix_scores
from recbole_mm.stage import Stage, StageContext, StageSettings

Ints = NDArray[np.int64]
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class RankerBatch:
    """An entry of the ranker's plan; its negatives and letters are drawn from `seed`."""

    samples: Ints
    seed: tuple[int, int, int]


class RankedStage(Stage):
    """A stage of a two-stage model: what it retrieves for validation, and the weight of `fusion`.

    Args:
        model: a `PRIME`; what it reads is decided by its `enter`.
    """

    model: Any

    @torch.no_grad()
    def hits(self, context: StageContext) -> tuple[Tensor, Tensor, Tensor]:
        """Validation rows with a retrieved target, their candidates (n, K) and their scores."""
        model = self.model
        model.scoring.eval()
        found = []
        for rows in torch.arange(len(context.valid)).split(_ROWS_AT_ONCE):
            part = context.valid[rows].to(model.device)
            scores = model.scoring.full_sort_predict(part)  # (B, V)
            candidates = model.candidates(part, scores)  # (B, K)
            hit = (candidates == part[model.ITEM_ID][:, None]).any(dim=1).nonzero()[:, 0]
            best = scores.gather(1, candidates)[hit]
            found.append((rows[hit.cpu()], candidates[hit], best))
        rows, candidates, best = zip(*found, strict=True)
        return torch.cat(rows), torch.cat(candidates), torch.cat(best)

    def retrieval(self, context: StageContext) -> dict[str, float]:
        """Of all validation users: how often the target is retrieved, and recall and ndcg at 10, or
        at K where that is less, in the candidates' own order."""
        rows, candidates, _ = self.hits(context)
        places = self._places(context, rows, candidates)
        share = len(rows) / max(1, len(context.valid))
        k = min(10, candidates.shape[1])
        order = -torch.arange(candidates.shape[1], dtype=torch.float32).expand(candidates.shape)
        return {
            "retrieval_rate": round(share, 6),
            f"recall@{k}": round(int((places < k).sum()) / max(1, len(context.valid)), 6),
            f"ndcg@{k}": round(ndcg(order, places.cpu(), k) * share, 6),
        }

    def _places(self, context: StageContext, rows: Tensor, candidates: Tensor) -> Tensor:
        """Where the target stands among each row's candidates. Shape: (n,)."""
        targets = context.valid[rows][self.model.ITEM_ID].to(candidates.device)
        return (candidates == targets[:, None]).float().argmax(dim=1)

    def finish(self, context: StageContext) -> dict[str, Any]:
        """Chooses the weight of the retriever in `fusion` on the validation rows."""
        rows, candidates, best = self.hits(context)
        if len(rows) == 0:
            self.model.alpha = float("inf")
            return {"fusion_alpha": "inf", "validation_hits": 0}
        self.model.eval()
        ranking = self.model.rank(context.valid[rows], candidates)
        places = self._places(context, rows, candidates)
        self.model.alpha, tried = choose_alpha(ranking, best, places)
        return {
            "fusion_alpha": str(self.model.alpha),
            "validation_hits": len(rows),
            "hits_ndcg@10": {str(alpha): round(value, 6) for alpha, value in tried.items()},
        }

    def restore(self, finished: Mapping[str, Any]) -> None:
        """Takes back the weight of the retriever."""
        self.model.alpha = float(finished.get("fusion_alpha", 0.0))


class RankerStage(AdapterStage, RankedStage):
    """Trains the ranker to name the label among sampled negatives (PRIME, section 3.2.2).

    Args:
        name: of the stage.
        model: a `PRIME`, whose ranker is trained; its retriever is as the stage before left it.
        settings: how.
        train_dataset: the training part, with its `train_sequences`.
    """

    def __init__(self, name: str, model: Any, settings: StageSettings, train_dataset: Any) -> None:
        super().__init__(name, model.the_ranker(), settings)
        self.model, self.ranker = model, model.the_ranker()
        sequences = train_dataset.train_sequences
        self.samples = prefix_samples(sequences)
        self.sampler = NegativeSampler(
            item_counts(sequences.items, model.n_items),
            model.neg_source,
            model.n_candidates - 1,
            self._retrieve,
        )

    def prepare(self, context: StageContext) -> None:
        """A frozen vision tower encodes every picture now, and never again."""
        self.ranker.encode_pictures(range(1, self.model.n_items), context.show_progress)

    def plan(self, epoch: int) -> list[RankerBatch]:
        """Batches of samples with histories of like length."""
        seen = np.minimum(self.samples.end - self.samples.begin, self.model.max_history)
        batches = epoch_plan(seen, self.model.ranker_batch_size, self.model.seed, epoch)
        return [
            RankerBatch(samples, (self.model.seed, epoch, number))
            for number, samples in enumerate(batches)
        ]

    def loss(self, batch: RankerBatch) -> Tensor:
        """Mean cross entropy of the labels' letters. Shape: ()."""
        self.model.forget()
        rng = np.random.default_rng(batch.seed)
        labels = self.samples.labels(batch.samples)
        negatives = self.sampler.draw(batch.samples, labels, rng)
        candidates, places = lettered(labels, negatives, rng)
        histories = [self.samples.history(row, self.model.max_history) for row in batch.samples]
        loss: Tensor = self.ranker.loss(histories, candidates, places)
        return loss

    @torch.no_grad()
    def _retrieve(self, samples: Ints) -> Tensor:
        """The retriever's scores of all items after each sample's history. Shape: (B, V)."""
        model = self.model
        rows = np.zeros((len(samples), model.max_seq_length), dtype=np.int64)  # (B, L)
        histories = [self.samples.history(row, model.max_seq_length) for row in samples]
        for row, history in zip(rows, histories, strict=True):
            row[: len(history)] = history
        lengths = torch.tensor([len(history) for history in histories])
        users = torch.from_numpy(self.samples.users[samples])
        model.retriever.eval()
        return prefix_scores(model.retriever, users, torch.from_numpy(rows), lengths)

    # --- validation ----------------------------------------------------------------------
    def valid_rows(self, context: StageContext) -> Tensor | None:
        """A seeded sample of the users whose target was retrieved: no other can tell anything."""
        rows = self.hits(context)[0]
        size = self.settings.valid_users
        if len(rows) == 0:
            return None
        if size is None or size >= len(rows):
            return rows
        generator = torch.Generator().manual_seed(context.seed)
        return rows[torch.randperm(len(rows), generator=generator)[:size]].sort().values
