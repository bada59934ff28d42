"""Evaluation: RecBole's numbers, one pass for every protocol, history masked alike for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.evaluator import Collector, Evaluator

from recbole_mm.config import MMConfig
from recbole_mm.quick_start import prepare_data
from recbole_mm.trainer.evaluation import EvaluationMixin

SMALL = {"user_inter_num_interval": "[20,40]", "eval_batch_size": 100, "show_progress": False}


class FixedScores(torch.nn.Module):
    """Scores that depend on user and item alone, so that any order of evaluation gives the same."""

    def __init__(self, n_users: int, n_items: int, uid: str, pairs_only: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(n_users, n_items, generator=generator)
        self.uid, self.pairs_only = uid, pairs_only

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        if self.pairs_only:
            raise NotImplementedError
        return self.table[interaction[self.uid]]

    def predict(self, interaction: Any) -> torch.Tensor:
        return self.table[interaction[self.uid], interaction["item_id"]]


class Trainer(EvaluationMixin):
    def __init__(self, config: MMConfig, model: Any, train: Any) -> None:
        self.config, self.model, self.device = config, model, config["device"]
        self.data_collect(train)


def prepare(model: str = "SASRec", pairs_only: bool = False, **overrides: Any) -> tuple[Any, Any]:
    config = MMConfig(model, "ml-100k", overrides={**SMALL, **overrides})
    data = prepare_data(config)
    scores = FixedScores(data.dataset.user_num, data.dataset.item_num, "user_id", pairs_only)
    return Trainer(config, scores, data.train), data


def histories(data: Any) -> dict[int, set[int]]:
    """Everything but the last item of each user, straight from the raw interactions."""
    config = MMConfig("BPR", "ml-100k", overrides=SMALL)
    from recbole_mm.data.preparation import create_dataset

    dataset = create_dataset(config)
    frame = dataset.inter_feat.sort_values(["user_id", "timestamp"], kind="stable")
    return {int(u): set(g["item_id"].tolist()[:-1]) for u, g in frame.groupby("user_id")}


def test_full_ranking_is_recboles() -> None:
    trainer, data = prepare()
    ours = trainer.evaluate(data.test, load_best_model=False)
    collector, evaluator = Collector(trainer.config), Evaluator(trainer.config)
    for interaction, _, positive_u, positive_i in data.test:
        scores = trainer.model.full_sort_predict(interaction)
        scores[:, 0] = -np.inf
        collector.eval_batch_collect(scores, interaction, positive_u, positive_i)
    theirs = evaluator.evaluate(collector.get_data_struct())
    assert ours == pytest.approx({k: float(v) for k, v in theirs.items()})


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_masking_takes_out_the_history_and_only_that(model: str) -> None:
    """Against ranks computed by hand, for a sequential and a general loader."""
    trainer, data = prepare(
        model, mask_history=True, valid_metric="MRR@200", topk=[200], metrics=["Recall", "MRR"]
    )
    result = trainer.evaluate(data.test, load_best_model=False, every_protocol=True)
    seen = histories(data)
    feat = data.test._dataset.inter_feat
    ranks = {"full": [], "full-masked": []}
    for user, target in zip(feat["user_id"].tolist(), feat["item_id"].tolist(), strict=True):
        scores = trainer.model.table[user].clone()
        scores[0] = -np.inf
        ranks["full"].append(int((scores > scores[target]).sum()))
        scores[list(seen[user] - {target})] = -np.inf
        ranks["full-masked"].append(int((scores > scores[target]).sum()))
    for protocol, zero_based in ranks.items():
        hits = [rank < 200 for rank in zero_based]
        gains = [1 / (rank + 1) if rank < 200 else 0.0 for rank in zero_based]
        expected = {"recall@200": np.mean(hits), "mrr@200": np.mean(gains)}
        assert trainer.all_results[protocol] == pytest.approx(expected, abs=1e-6)
    assert result == trainer.all_results["full-masked"]
    assert result != trainer.all_results["full"]


def test_sequential_and_general_loaders_hold_the_same_users_and_targets() -> None:
    rows = []
    for model in ("SASRec", "BPR"):
        _, data = prepare(model)
        feat = data.test._dataset.inter_feat
        rows.append(sorted(zip(feat["user_id"].tolist(), feat["item_id"].tolist(), strict=True)))
    assert rows[0] == rows[1]


def test_models_that_score_pairs_get_the_same_ranking() -> None:
    trainer, data = prepare(pairs_only=True)
    by_pairs = trainer.evaluate(data.test, load_best_model=False)
    trainer.model.pairs_only = False
    assert by_pairs == trainer.evaluate(data.test, load_best_model=False)


def test_rows_pick_users() -> None:
    trainer, data = prepare()
    everyone = trainer.evaluate(data.valid, load_best_model=False, rows=torch.arange(305))
    assert everyone == trainer.evaluate(data.valid, load_best_model=False)
    parts = [torch.arange(0, 305, 2), torch.arange(1, 305, 2)]
    halves = [trainer.evaluate(data.valid, load_best_model=False, rows=rows) for rows in parts]
    weighted = sum(h["recall@10"] * len(p) for h, p in zip(halves, parts, strict=True)) / 305
    assert weighted == pytest.approx(everyone["recall@10"], abs=1e-5)


def test_candidate_lists_rank_the_target_among_negatives_of_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(
        tmp_path
    )  # lists of ml-100k go to cache/ when its folder cannot be written to
    trainer, data = prepare(
        eval_candidates="cand20", topk=[5], metrics=["Recall"], valid_metric="Recall@5"
    )
    result = trainer.evaluate(data.test, load_best_model=False)
    feat = data.test._dataset.inter_feat
    hits = []
    for user, target in zip(feat["user_id"].tolist(), feat["item_id"].tolist(), strict=True):
        negatives = data.test.candidates[user]
        assert target not in negatives
        assert len(set(negatives.tolist())) == 20
        assert not histories(data)[user] & set(negatives.tolist()) if user < 5 else True
        row = trainer.model.table[user]
        hits.append(int((row[negatives] > row[target]).sum()) < 5)
    assert result["recall@5"] == pytest.approx(np.mean(hits), abs=1e-6)
