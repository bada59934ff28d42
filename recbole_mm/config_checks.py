"""What a whole configuration must keep to, told before a run folder is made or data is read.

A key that a model accepts and does not honour is a mistake too: its numbers would be another
experiment's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recbole.evaluator import metric_types
from recbole.evaluator.register import metric_information
from recbole.utils import EvaluatorType, ModelType

from recbole_mm.errors import UserError

Final = Mapping[str, Any]

PICKLE_KEYS = ("save_dataset", "dataset_save_path", "save_dataloaders", "dataloaders_save_path")
EVAL_CANDIDATES = ("full", "cand20", "cand100")
# Numbers that must be above 0: of every model, of those that train in stages, of each stage.
_POSITIVE = (
    "epochs",
    "learning_rate",
    "train_batch_size",
    "eval_batch_size",
    "MAX_ITEM_LIST_LENGTH",
)
_POSITIVE_STAGED = ("eval_step",)
_POSITIVE_OF_STAGE = ("epochs", "learning_rate", "batch_size", "accumulate")


def check_all(model: str, model_class: Any, final: Final) -> None:
    """Checks RecBole's finished configuration of one model.

    Args:
        model: its name.
        model_class: its class; `stage_names`, `make_stages` and `train_modes` say what it can do.
        final: every key.

    Raises:
        UserError: the first value or combination that cannot work.
    """
    stages: tuple[str, ...] = tuple(getattr(model_class, "stage_names", ()))
    _check_pickles(final)
    _check_positive(model_class, stages, final)
    _check_metrics(stages, final)
    _check_protocol(model, model_class, final)
    _check_train_mode(model, model_class, final)
    _check_stages(model, model_class, stages, final)
    _check_clipping(model, model_class, final)
    _check_learner(model, model_class, final)
    _check_backbone(final)


def _is_staged(model_class: Any) -> bool:
    return hasattr(model_class, "make_stages")


def _check_pickles(final: Final) -> None:
    pickled = [key for key in PICKLE_KEYS if final.get(key)]
    if pickled:
        raise UserError(
            f"{pickled[0]}: RecBole stores this as a pickle, which we refuse to load; leave it off."
        )


def _check_positive(model_class: Any, stages: tuple[str, ...], final: Final) -> None:
    keys = [*_POSITIVE]
    if _is_staged(model_class):
        keys += _POSITIVE_STAGED
        keys += [f"{stage}_{key}" for stage in stages for key in _POSITIVE_OF_STAGE]
    for key in keys:
        value = final.get(key)
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise UserError(f"{key}: it must be a number above 0, got {value!r}.")


# ---------------------------------------------------------------- evaluation


def measured(metrics: list[str], topk: list[int]) -> list[str]:
    """What results hold, as RecBole writes it but for capitals: `NDCG@10`, and `AUC` without k."""
    return [f"{m}@{k}" for m in metrics if _has_k(m) for k in topk] + [
        m for m in metrics if not _has_k(m)
    ]


def _has_k(metric: str) -> bool:
    needs = metric_information[metric.lower()]
    is_ranking = metric_types[metric.lower()] == EvaluatorType.RANKING
    return is_ranking and bool({"rec.topk", "rec.items"} & set(needs))


def _check_metrics(stages: tuple[str, ...], final: Final) -> None:
    names = measured(final["metrics"], final["topk"])
    lower = [name.lower() for name in names]
    for key in ("valid_metric", *(f"{stage}_valid_metric" for stage in stages)):
        value = final.get(key)
        if value is not None and str(value).lower() not in lower:
            raise UserError(f"{key}: {value} is not measured, {_mend(str(value), names, final)}.")


def _mend(value: str, names: list[str], final: Final) -> str:
    """What to do about a metric that is not among `names`."""
    metric, _, k = value.partition("@")
    same = [name for name in names if name.lower().partition("@")[0] == metric.lower()]
    if same and (not k or "@" not in same[0]):  # it lacks its k, or has one and should not
        return f"write {same[-1]}"
    return (
        f"add it to metrics {final['metrics']} and topk {final['topk']}, or name another, such as "
        f"{(same or names)[-1]}"
    )


def _check_protocol(model: str, model_class: Any, final: Final) -> None:
    labels = model_class.type in (ModelType.CONTEXT, ModelType.DECISIONTREE)
    modes = set(final["eval_args"]["mode"].values())
    for mode in sorted(modes - {"full", *(["labeled"] if labels else [])}):
        raise UserError(
            f"eval_args: {model} is not evaluated in mode '{mode}', set mode: "
            f"{'labeled or full' if labels else 'full'}; for a short list of fixed negatives "
            "set eval_candidates: cand20 or cand100 beside mode: full."
        )
    if len(modes) > 1:
        raise UserError(f"eval_args: set one mode for valid and test, not {sorted(modes)}.")
    if final["eval_candidates"] not in EVAL_CANDIDATES:
        raise UserError(
            f"eval_candidates: '{final['eval_candidates']}' is none of "
            f"{', '.join(EVAL_CANDIDATES)}."
        )
    if "labeled" in modes and final["eval_candidates"] != "full":
        raise UserError(
            f"eval_candidates: {model} is evaluated on labels and ranks no candidates, leave it "
            "out or set ranking metrics and eval_args with mode: full."
        )
    if final.get("benchmark_filename") and final["mask_history"]:
        raise UserError(
            "mask_history needs everything that each user did, which a ready-made split does not "
            "tell: leave benchmark_filename out or set mask_history: False."
        )
    order = final["eval_args"]["order"]
    if model_class.type == ModelType.SEQUENTIAL and order != "TO":
        raise UserError(
            f"eval_args: {model} reads sequences, which have an order in time: set order: TO, "
            f"not {order}."
        )


# ---------------------------------------------------------------- training


def _check_train_mode(model: str, model_class: Any, final: Final) -> None:
    mode = final["train_mode"]
    if mode not in ("prefix", "whole"):
        raise UserError(f"train_mode: '{mode}' is neither prefix nor whole.")
    if mode not in getattr(model_class, "train_modes", ("prefix",)):
        raise UserError(f"train_mode: {model} does not train in mode '{mode}'.")


def _check_stages(model: str, model_class: Any, stages: tuple[str, ...], final: Final) -> None:
    """RecBole's models run all their stages in one, whatever `stages` says."""
    for name in final.get("stages") or ():
        if _is_staged(model_class) and name not in stages:
            raise UserError(f"stages: '{name}' is no stage of {model} ({', '.join(stages)}).")


def _check_clipping(model: str, model_class: Any, final: Final) -> None:
    clip = final.get("clip_grad_norm")
    if not clip:
        return
    largest = clip.get("max_norm")
    if not (isinstance(largest, (int, float)) and largest > 0):
        raise UserError(
            f"clip_grad_norm: {clip} has no max_norm above 0, write {{'max_norm': 5.0}} instead."
        )
    if _is_staged(model_class) and clip.get("norm_type", 2) != 2:
        raise UserError(
            f"clip_grad_norm: {model} clips the L2 norm, leave norm_type out of {clip}."
        )


def _check_learner(model: str, model_class: Any, final: Final) -> None:
    if _is_staged(model_class) and str(final["learner"]).lower() not in ("adam", "adamw"):
        raise UserError(
            f"learner: {model} is trained by AdamW and not by {final['learner']}: leave it out."
        )


def _check_backbone(final: Final) -> None:
    spec = final.get("backbone_spec")
    quantize = final.get("quantize") or "none"
    if spec and spec["is_tiny"] and quantize != "none":
        raise UserError(
            f"quantize: the tiny backbone trains all its weights and cannot keep them in "
            f"{quantize}: set quantize: none or another backbone."
        )
