"""Weights of another run that a stage takes instead of training, `<stage>_from`: whether they may
be taken here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recbole_mm.errors import UserError
from recbole_mm.stage import ONLY_STAGE, Stage, UnfitWeightsError
from recbole_mm.trainer.checkpoint import (
    Checkpoint,
    check_items,
    has_checkpoint,
    read_checkpoint,
)

_SPLIT = ("eval_args", "benchmark_filename", "limit_users", "history_source", "rm_dup_inter")


def given_weights(stage: Stage, config: Any, items: Sequence[str]) -> tuple[Path, Checkpoint]:
    """The weights of another run that a stage is to take, and where they are.

    Args:
        stage: with `weights_from` among its settings.
        config: of the run that takes them.
        items: raw item tokens in id order.

    Raises:
        UserError: they are of another model or other items, or have seen what is held out here.
    """
    run = Path(str(stage.settings.weights_from))
    own, only = (run / name / "best" for name in (stage.name, ONLY_STAGE))
    folder = own if has_checkpoint(own) else only
    checkpoint, key = read_checkpoint(folder, config["device"]), f"{stage.name}_from"
    if stage.of_model:
        _check_model(key, checkpoint, stage, folder)
    same = checkpoint.config.get("dataset") == config["dataset"]
    if stage.of_items and not same:
        _check_dataset(key, checkpoint, config["dataset"], items, folder)
    if stage.of_items or same:  # a ranker of this dataset has read its training rows too
        _check_split(key, checkpoint.config, config.settings(), folder)
    if stage.of_items:
        check_items(checkpoint, items, folder)
    return folder, checkpoint


@contextmanager
def unfit(stage: Stage, folder: Path) -> Iterator[None]:
    """Weights of another run that a stage cannot take are the user's mistake."""
    try:
        yield
    except UnfitWeightsError as error:
        raise UserError(
            f"{stage.name}_from: the weights in {folder} cannot be used, {error}: name another run."
        ) from error


def _check_model(key: str, checkpoint: Checkpoint, stage: Stage, folder: Path) -> None:
    """Raises `UserError` for weights of another model: BPR's fit into LightGCN."""
    theirs = checkpoint.config.get(stage.name) or checkpoint.config.get("model")
    if theirs != stage.of_model:
        raise UserError(
            f"{key}: the weights in {folder} cannot be used, they are of {theirs}, not of "
            f"{stage.of_model}: name a run of {stage.of_model}."
        )


def _check_dataset(
    key: str, checkpoint: Checkpoint, dataset: str, items: Sequence[str], folder: Path
) -> None:
    """Raises `UserError` for weights of another dataset with other items."""
    if list(checkpoint.items) != list(items):
        raise UserError(
            f"{key}: {folder} was trained on {checkpoint.config.get('dataset')}, whose items are "
            f"not those of {dataset}: name a run on {dataset}."
        )


def _check_split(
    key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], folder: Path
) -> None:
    """Weights that were trained on another split may have seen the targets of this one."""
    decide = [k for k in ours if k in _SPLIT or k.endswith("_interval")]
    drawn = ours["limit_users"] or "RS" in ours["eval_args"]["split"]
    decide += ["seed"] if drawn else []
    decide += ["topfreq_items"] if ours["history_source"] == "official_topfreq" else []
    for name in decide:
        if theirs.get(name) != ours[name]:
            raise UserError(
                f"{key}: {folder} was trained on another split of the data, {name} was "
                f"{theirs.get(name)!r} and is {ours[name]!r}: name a run of the same one."
            )
