"""I-LLMRec on a small generated shop, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recbole_mm.config import MMConfig
from recbole_mm.model.illmrec import ILLMRec
from recbole_mm.model.layers.image_stage import ImageStage
from recbole_mm.quick_start import Data, build_model, prepare_data
from recbole_mm.trainer.run import Run
from recbole_mm.trainer.staged import StagedTrainer

SMALL = {
    "backbone": "tiny",
    "epochs": 1,
    "train_batch_size": 8,
    "hidden_size": 16,
    "inner_size": 16,
    "dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "topk": [1, 5, 10, 20],
    "train_llm": "frozen",
    "max_history": 5,
    "n_neg": 2,
    "alignment_batch_size": 8,
    "alignment_max_steps": 2,
    "alignment_valid_users": 0,
    "show_progress": False,
}


@dataclass
class Shop:
    """A model and all it was made of; the CF model is untrained but its table is taken."""

    config: MMConfig
    data: Data
    model: ILLMRec
    stage: ImageStage

    @property
    def rows(self) -> Any:
        return self.data.test._dataset.inter_feat

    def train(self, steps: int, learning_rate: float) -> list[float]:
        """The losses of some steps on the first batch, always the same."""
        batch = self.stage.plan(0)[0]
        optimizer = torch.optim.AdamW(self.stage.param_groups(), lr=learning_rate)
        self.stage.module.train()
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.stage.loss(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        self.model.forget()
        self.model.eval()
        return losses


def shop_of(mini: Path, folder: Path, **changes: Any) -> Shop:
    keys = {**SMALL, "data_path": str(mini), "cache_dir": str(folder / "cache"), **changes}
    config = MMConfig("ILLMRec", "mini", overrides=keys)
    data = prepare_data(config)
    model = build_model(config, data)
    trainer = StagedTrainer(config, model, Run.start(folder / "saved", config))
    trainer.data_collect(data.train)
    trainer._open(data.train, data.valid, show_progress=False)
    stage = trainer.stages[-1]
    stage.prepare(trainer.context)
    model.enter("alignment")
    model.eval()
    assert isinstance(stage, ImageStage)
    return Shop(config, data, model, stage)


def said(shop: Shop, history: list[int]) -> str:
    """A prompt's history as text, # in the slots."""
    prompts = shop.model.prompts
    tokenizer = prompts.writer.encoder.tokenizer
    trunk = prompts.trunk(history)
    ids = trunk.ids.tolist()
    for slot in trunk.slots:
        ids[slot.start] = tokenizer.encode("#")[0]
    return tokenizer.decode(ids)
