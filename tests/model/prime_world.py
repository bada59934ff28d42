"""PRIME on a small generated shop, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recbole.data.interaction import Interaction

from recbole_mm.config import MMConfig
from recbole_mm.model.prime import PRIME
from recbole_mm.quick_start import Data, build_model, prepare_data
from recbole_mm.trainer.run import Run
from recbole_mm.trainer.settings import stage_settings
from recbole_mm.trainer.staged import StagedTrainer

K, HISTORY, USERS = 8, 3, 30
SMALL = {
    "backbone": "tiny",
    "n_candidates": K,
    "max_history_items": HISTORY,
    "epochs": 3,
    "train_batch_size": 8,
    "hidden_size": 16,
    "inner_size": 16,
    "dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "topk": [1, 5, 10, 20],
    "retriever_valid_metric": "Recall@20",
    "ranker_max_steps": 2,
    "ranker_warmup_steps": 0,
    "ranker_batch_size": 8,
    "ranker_valid_users": 0,
    "preference_batch_size": 8,
    "preference_max_steps": 2,
    "preference_eval_every": 1,
    "preference_warmup_steps": 0,
    "preference_valid_users": 0,
    "show_progress": False,
}
METRICS = ("recall", "mrr", "ndcg", "hit")


@dataclass
class World:
    """A model and all it was made of."""

    config: MMConfig
    data: Data
    model: PRIME

    def stage(self, name: str = "ranker") -> Any:
        """One of its stages."""
        settings = stage_settings(self.config, PRIME.stage_names)
        stages = self.model.make_stages(settings, self.data.train._dataset)
        return next(stage for stage in stages if stage.name == name)

    def rows(self, phase: str = "test") -> Interaction:
        """All rows of a phase: history and target."""
        return getattr(self.data, phase)._dataset.inter_feat

    def items(self) -> list[str]:
        """The raw tokens in id order."""
        return list(self.data.dataset.item_tokens())

    def raw(self) -> list[list[int]]:
        """Every user's items from the file, oldest first."""
        dataset = self.data.dataset
        path = Path(self.config["data_path"]) / "mini.inter"
        users: dict[str, list[tuple[float, int]]] = {}
        for line in path.read_text().splitlines()[1:]:
            user, item, time = line.split("\t")
            item_id = int(dataset.token2id(dataset.iid_field, item))
            users.setdefault(user, []).append((float(time), item_id))
        return [[item for _, item in sorted(rows)] for rows in users.values()]


def world_of(mini: Path, model_name: str = "PRIME", **changes: Any) -> World:
    """An untrained model; every call gives the same weights."""
    config = MMConfig(
        model_name, "mini", (), {**SMALL, "data_path": str(mini), "cache_dir": str(mini), **changes}
    )
    data = prepare_data(config)
    model = build_model(config, data)
    model.eval()
    return World(config, data, model)


@dataclass
class Trained:
    world: World
    trainer: StagedTrainer
    run: Run

    def test(self, readout: str, only_hits: bool = True) -> dict[str, float]:
        """The test metrics of one row of the result."""
        model = self.world.model
        model.only_hits = only_hits
        next(r for r in model.readouts("preference") if r.name == readout).use()
        return self.trainer.evaluate(self.world.data.test, load_best_model=False)


def retriever_lists(world: World, rows: Interaction) -> list[list[int]]:
    """All items of each row in the retriever's order."""
    with torch.no_grad():
        scores = world.model.retriever.eval().full_sort_predict(rows)
    items = range(1, world.model.n_items)
    return [sorted(items, key=lambda item, row=row: -row[item]) for row in scores]
