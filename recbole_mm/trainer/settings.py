"""A stage's settings out of the configuration: `<stage>_<key>` where it is set, else RecBole's
plain key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recbole_mm.stage import STAGE_KEYS, StageSettings

# Keys whose field in StageSettings has another name; `clip_grad_norm` ends in `clip_norm`.
_FIELDS = {"eval_step": "eval_epochs", "stopping_step": "patience"}


def stage_settings(config: Any, names: Iterable[str]) -> dict[str, StageSettings]:
    """The settings of each stage.

    `epochs` and `max_minutes` cap every stage, as RecBole's users expect of one flag; what is off
    is 0 in YAML.

    Args:
        config: anything with `config[key]` that gives None for a missing key.
        names: of the stages.
    """
    return {name: _one(config, name) for name in names}


def _one(config: Any, stage: str) -> StageSettings:
    values: dict[str, Any] = {}
    for key in STAGE_KEYS:
        own = config[f"{stage}_{key}"]
        value = config[key] if own is None else own
        if value is not None and key != "clip_grad_norm":
            values[_FIELDS.get(key, key)] = value
    values["epochs"] = min(values["epochs"], config["epochs"])
    caps = (values.get("max_minutes"), config["max_minutes"])
    values["max_minutes"] = min((cap for cap in caps if cap), default=0.0)
    values["valid_metric"] = str(values["valid_metric"]).lower()
    values["clip_norm"] = _clip_norm(config, stage, values.get("clip_norm"))
    for off in ("max_steps", "valid_users"):
        values[off] = values.get(off) or None
    values["weights_from"] = config[f"{stage}_from"] or None
    return StageSettings(**values)


def _clip_norm(config: Any, stage: str, own: float | None) -> float | None:
    """RecBole writes gradient clipping as `clip_grad_norm: {max_norm: 5.0, norm_type: 2}`; a
    stage's own norm stands above it, and 0 there is none."""
    if own is not None:
        return float(own) or None
    clip = config[f"{stage}_clip_grad_norm"] or config["clip_grad_norm"]
    return float(clip["max_norm"]) if clip else None
