"""Evaluation by RecBole's collector and metrics, every protocol read from one scoring pass.

`full` ranks all items, `full-masked` gives a user's earlier items no score, `cand100` and `cand20`
rank the target among fixed candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from logging import getLogger
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.evaluator import Collector, Evaluator
from recbole.utils import set_color
from torch import Tensor
from tqdm import tqdm

from recbole_mm.data.candidates import candidate_metrics
from recbole_mm.data.pairs import score_pairs

Result = dict[str, float]


class _Collector(Collector):  # type: ignore[misc]
    """RecBole's, which moves everything it has collected to the CPU, numbers and counters too."""

    def get_data_struct(self) -> Any:
        held = self.data_struct._data_dict
        others = {key: held.pop(key) for key in list(held) if not isinstance(held[key], Tensor)}
        collected = super().get_data_struct()
        for data in (collected, self.data_struct):
            data._data_dict.update(others)
        return collected


class FullRanking:
    """RecBole's own collector and evaluator over all items; optionally without the user's
    history.

    Attributes:
        places: of each row's target in its list, 1 is the top and 0 beyond the longest `topk`; None
            where rows have several targets, or before `result`. Shape: (rows,).
    """

    places: Tensor | None = None

    def __init__(self, config: Any, masked: bool) -> None:
        self.masked = masked
        self.collector, self.evaluator = _Collector(config), Evaluator(config)

    def add(self, scores: Tensor, batch: Any, loader: Any) -> None:
        """Takes one batch. Shape of `scores`: (B, V)."""
        interaction, _, positive_u, positive_i = batch
        if self.masked:
            scores = mask_seen(
                scores, interaction[loader._dataset.uid_field], loader.seen, positive_u, positive_i
            )
        self.collector.eval_batch_collect(scores, interaction, positive_u, positive_i)

    def result(self) -> Result:
        """The metrics over all users."""
        collected = self.collector.get_data_struct()
        self.places = _places(collected.get("rec.topk")) if "rec.topk" in collected else None
        metrics = self.evaluator.evaluate(collected)
        return {name: float(value) for name, value in metrics.items()}


def _places(topk: Tensor) -> Tensor | None:
    """From RecBole's 0/1 matrix of hits, its last column the number of targets. (N, k + 1)."""
    hits, targets = topk[:, :-1], topk[:, -1]
    if (targets != 1).any():
        return None
    return torch.where(hits.any(dim=1), hits.argmax(dim=1) + 1, 0)


class CandidateRanking:
    """The target among the loader's fixed candidates, ties counted half.

    Attributes:
        places: of each row's target among its candidates, 1 is the top. Shape: (rows,).
    """

    places: Tensor | None = None

    def __init__(self, config: Any) -> None:
        self.metrics, self.topk = config["metrics"], config["topk"]
        self.digits = config["metric_decimal_place"]
        self.scores: list[Tensor] = []

    def add(self, scores: Tensor, batch: Any, loader: Any) -> None:
        """Takes one batch. Shape of `scores`: (B, V)."""
        interaction, _, _, positive_i = batch
        users = interaction[loader._dataset.uid_field].cpu().numpy()
        negatives = torch.from_numpy(loader.candidates[users]).to(scores.device)  # (B, N)
        items = torch.cat([positive_i.to(scores.device)[:, None], negatives], dim=1)  # (B, 1 + N)
        self.scores.append(scores.gather(1, items).cpu())

    def result(self) -> Result:
        """The metrics over all users."""
        scores = torch.cat(self.scores)
        metrics, self.places = candidate_metrics(scores, self.topk, self.metrics)
        return {name: round(float(value), self.digits) for name, value in metrics.items()}


def mask_seen(
    scores: Tensor, users: Tensor, seen: Any, positive_u: Tensor, positive_i: Tensor
) -> Tensor:
    """A copy of the scores with the users' earlier items at -inf; a target is never masked. Shape:
    (B, V)."""
    block = seen[users.cpu().numpy()].tocoo()
    masked = scores.clone()
    masked[torch.from_numpy(block.row).long(), torch.from_numpy(block.col).long()] = -np.inf
    masked[positive_u, positive_i] = scores[positive_u, positive_i]
    return masked


class EvaluationMixin:
    """Replaces RecBole's `evaluate`; the trainer that mixes it in has `config`, `model` and
    `device`."""

    config: Any
    model: Any
    device: Any
    all_results: dict[str, Result]
    places: tuple[Tensor, Tensor] | None  # users (rows,) and their targets' places, see FullRanking

    def data_collect(self, train_data: Any) -> None:
        """Keeps what metrics beyond accuracy need of the training data."""
        self._train_data = train_data

    def load_best(self) -> None:
        """Puts the best weights of the run in place."""
        raise NotImplementedError  # pragma: no cover

    @torch.no_grad()
    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: Any = None,
        show_progress: bool = False,
        *,
        rows: Tensor | None = None,
        every_protocol: bool = False,
    ) -> Result:
        """The metrics of the configured protocol, over all users of `eval_data`.

        Args:
            eval_data: RecBole's evaluation loader, with `seen` and, for candidate lists,
                `candidates`.
            load_best_model: first put the best weights of the run in place.
            model_file: unused; RecBole's signature.
            show_progress: a bar.
            rows: only these rows of a sequential loader. Shape: (n,).
            every_protocol: also fill `all_results` with the protocols that cost no second scoring
                pass.

        Returns:
            RecBole's metric names in lower case, e.g. `recall@10`.
        """
        if load_best_model:
            self.load_best()
        self.model.eval()
        readers = self._readers(eval_data, every_protocol)
        name = "Evaluate   "
        bar = tqdm(
            self._batches(eval_data, rows),
            total=_count_batches(eval_data, rows, self.config["eval_batch_size"]),
            ncols=100,
            desc=set_color(name, "pink"),
            disable=not show_progress,
        )
        users = []
        for batch in bar:
            users.append(batch[0][eval_data._dataset.uid_field])
            scores = self._scores(batch[0], eval_data)
            for reader in readers.values():
                reader.add(scores, batch, eval_data)
        self.all_results = {protocol: reader.result() for protocol, reader in readers.items()}
        found = readers[self.config.protocol].places
        self.places = None if found is None else (torch.cat(users), found)
        return self.all_results[self.config.protocol]

    def _readers(self, eval_data: Any, every_protocol: bool) -> dict[str, Any]:
        if self.config["eval_candidates"] != "full":
            return {self.config.protocol: CandidateRanking(self.config)}
        both = every_protocol and hasattr(eval_data, "seen")
        names = ("full", "full-masked") if both else (self.config.protocol,)
        readers = {name: FullRanking(self.config, masked=name == "full-masked") for name in names}
        for reader in readers.values():
            reader.collector.data_collect(self._train_data)
        return readers

    def _batches(self, eval_data: Any, rows: Tensor | None) -> Iterator[Any]:
        if rows is None:
            yield from eval_data
            return
        for part in rows.split(self.config["eval_batch_size"]):
            interaction = eval_data._dataset[part.numpy()]
            yield (
                interaction,
                None,
                torch.arange(len(part)),
                interaction[eval_data._dataset.iid_field],
            )

    def _scores(self, interaction: Any, eval_data: Any) -> Tensor:
        """Scores of all items; the pad column is -inf. Shape: (B, V)."""
        n_items = eval_data._dataset.item_num
        if self.config["eval_candidates"] != "full" and hasattr(self.model, "candidate_scores"):
            return self._score_lists(interaction, eval_data, n_items)
        try:
            scores = self.model.full_sort_predict(interaction.to(self.device))
        except NotImplementedError:
            features = eval_data._dataset.get_item_feature().to(self.device)
            scores = score_pairs(self.model, interaction.to(self.device), features)
        scores = scores.view(-1, n_items)
        if torch.isnan(scores).any():
            getLogger().warning("Some scores are NaN: the model has diverged.")
        scores[:, 0] = -np.inf
        return scores

    def _score_lists(self, interaction: Any, eval_data: Any, n_items: int) -> Tensor:
        """Of a model that scores an item at a time: the candidates, and nothing else, is scored."""
        users = interaction[eval_data._dataset.uid_field].cpu().numpy()
        negatives = torch.from_numpy(eval_data.candidates[users])  # (B, N)
        targets = interaction[eval_data._dataset.iid_field].cpu()[:, None]
        lists = torch.cat([targets, negatives], dim=1)  # (B, 1 + N)
        found = self.model.candidate_scores(interaction.to(self.device), lists).cpu()
        return torch.full((len(lists), n_items), -np.inf).scatter(1, lists, found)


def _count_batches(eval_data: Any, rows: Tensor | None, batch_size: int) -> int:
    return len(eval_data) if rows is None else -(-len(rows) // batch_size)


def is_ranking_loader(eval_data: Any) -> bool:
    """Whether a loader ranks items for users (what this module does) rather than labels pairs."""
    return isinstance(eval_data, FullSortEvalDataLoader)
