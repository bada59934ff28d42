"""MLLM-MSR on a small generated shop, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole.data.interaction import Interaction

from recbole_mm.config import MMConfig
from recbole_mm.model.mllmmsr import MLLMMSR
from recbole_mm.quick_start import Data, build_model, prepare_data
from recbole_mm.stage import StageContext
from recbole_mm.trainer.settings import stage_settings

SMALL: dict[str, Any] = {
    "backbone": "tiny",
    "history_len": 4,
    "brief": False,
    "max_item_tokens": 8,
    "max_pref_tokens": 8,
    "sft_targets": 1,
    "item_summary_tokens": 4,
    "user_summary_tokens": 4,
    "sft_batch_size": 4,
    "sft_max_steps": 4,
    "sft_eval_every": 2,
    "sft_valid_users": 0,
    "topk": [3, 5],
    "show_progress": False,
    "state": "ERROR",
}


@dataclass
class MsrWorld:
    """A model and all it was made of."""

    config: MMConfig
    data: Data
    model: MLLMMSR

    def stages(self) -> list[Any]:
        """Its three stages."""
        settings = stage_settings(self.config, MLLMMSR.stage_names)
        return self.model.make_stages(settings, self.data.train._dataset)

    def rows(self, phase: str = "test") -> Interaction:
        """All rows of a phase: history and target."""
        return getattr(self.data, phase)._dataset.inter_feat

    def context(self, folder: Path) -> StageContext:
        """What the trainer would tell its stages."""
        rows = (self.rows("valid"), folder, self.config["seed"], self.model.device)
        return StageContext(*rows, test=self.rows("test"))


def msr_world(mini: Path, **changes: Any) -> MsrWorld:
    """An untrained model; every call gives the same weights."""
    keys = {**SMALL, "data_path": str(mini), "cache_dir": str(mini / "cache"), **changes}
    config = MMConfig("MLLMMSR", "mini", (), keys)
    data = prepare_data(config)
    model = build_model(config, data)
    model.eval()
    return MsrWorld(config, data, model)
