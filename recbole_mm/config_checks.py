"""What a whole configuration must keep to, told before a run folder is made or data is read.

A key that a model accepts and does not honour is a mistake too: its numbers would be another
experiment's.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from math import inf
from typing import Any

from recbole.evaluator import metric_types
from recbole.evaluator.register import metric_information
from recbole.utils import EvaluatorType, ModelType

from recbole_mm.errors import UserError, nearest
from recbole_mm.inner import check_inner, inner_class
from recbole_mm.stage import SCHEDULES

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
_POSITIVE_OF_STAGE = ("learning_rate", "batch_size", "accumulate", "eval_step")
_NOT_NEGATIVE_OF_STAGE = (
    *("epochs", "max_steps", "max_minutes", "warmup_steps", "eval_every", "valid_users"),
    *("clip_norm", "weight_decay", "adam_eps"),
)
_NOT_NEGATIVE = (
    *("seed", "worker", "max_minutes", "popularity_slices"),
    *("weight_decay", "adam_eps"),
)
_SIZES = ("hidden_size", "n_layers", "n_heads", "inner_size", "embedding_size")
# What one target among candidates can be measured by.
_OF_CANDIDATES = ("recall", "hit", "precision", "mrr", "map", "ndcg", "auc", "gauc")
_OWN_SPLITS = ("US", "GT")  # of users, and at points in time: one target a user
HISTORY_SOURCES = ("chrono", "official_topfreq")


# ---------------------------------------------------------------- single values


def check_values(model: str, model_class: Any, given: Final) -> None:
    """Checks values that RecBole's own configuration would trip over or take silently.

    Args:
        model: its name.
        model_class: its class.
        given: every key, of the right type, before RecBole settles them.

    Raises:
        UserError: the first value that cannot work.
    """
    _check_numbers(given)
    _check_names_of_metrics(given)
    _check_slices(given.get("history_slices") or [])
    _check_eval_args(given["eval_args"])
    _check_intervals(given)
    _check_loss(model, model_class, given)
    if given["log_wandb"] and importlib.util.find_spec("wandb") is None:
        raise UserError("log_wandb: the package 'wandb' is missing, install it or leave this off.")


def _check_numbers(given: Final) -> None:
    for key, value in given.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and key in _SIZES and not value >= 1:
            raise UserError(f"{key}: it must be 1 or more, got {value}.")
        if is_number and key in _NOT_NEGATIVE and not 0 <= value < 2**32:
            raise UserError(f"{key}: it must be 0 or more and below 2^32, got {value}.")
        for part in value if isinstance(value, list) else [value]:
            if "dropout" in key and isinstance(part, (int, float)) and not 0 <= part < 1:
                raise UserError(f"{key}: a probability is at least 0 and below 1, got {part}.")


def _check_names_of_metrics(given: Final) -> None:
    for key, example in (("metrics", "NDCG"), ("topk", "10")):
        if not given[key]:
            raise UserError(f"{key}: name at least one, such as {example}.")
    for metric in given["metrics"]:
        if str(metric).lower() not in metric_types:
            raise UserError(
                f"metrics: there is no metric '{metric}'{nearest(str(metric), metric_types)}; "
                f"known are {', '.join(metric_types)}."
            )
    for k in given["topk"]:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise UserError(f"topk: expected whole numbers above 0 such as [5, 10], got {k!r}.")


def _check_slices(edges: list[Any]) -> None:
    whole = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in edges)
    if not whole or any(low >= high for low, high in zip([0, *edges], edges, strict=False)):
        raise UserError(
            f"history_slices: expected ascending whole numbers above 0 such as [30, 50], "
            f"got {edges}."
        )


def _check_eval_args(eval_args: Mapping[str, Any]) -> None:
    known = ("split", "order", "group_by", "mode")
    for key in eval_args:
        if key not in known:
            raise UserError(
                f"eval_args: there is no '{key}' in it{nearest(str(key), known)}, only "
                f"{', '.join(known)}."
            )
    split = eval_args["split"]
    if not (isinstance(split, dict) and len(split) == 1 and _is_split(*next(iter(split.items())))):
        raise UserError(
            "eval_args: split: expected {'LS': 'valid_and_test'} or {'RS': [0.8, 0.1, 0.1]} "
            f"(or TS, US, GT), got {split!r}."
        )
    if eval_args["order"] not in ("TO", "RO"):
        raise UserError(f"eval_args: order: it is TO or RO, got {eval_args['order']!r}.")
    if str(eval_args.get("group_by")).lower() not in ("user", "none"):
        raise UserError(f"eval_args: group_by: it is user or none, got {eval_args['group_by']!r}.")
    mode = eval_args["mode"]
    if not isinstance(mode, str) and not (isinstance(mode, dict) and {*mode} <= {"valid", "test"}):
        raise UserError(f"eval_args: mode: expected full, got {mode!r}.")


def _is_split(kind: Any, how: Any) -> bool:
    if kind == "LS":
        return how in ("valid_and_test", "valid_only", "test_only")
    is_list = kind in ("RS", "TS", *_OWN_SPLITS) and isinstance(how, list) and len(how) == 3
    return (
        is_list
        and all(isinstance(part, (int, float)) and part >= 0 for part in how)
        and sum(how) > 0
    )


def _check_intervals(given: Final) -> None:
    intervals = {k: v for k, v in given.items() if k.endswith("_num_interval")}
    for key, value in intervals.items():
        if value is not None and not all(map(_is_interval, str(value).split(";"))):
            raise UserError(f"{key}: expected an interval such as '[5,inf)', got {value!r}.")


def _is_interval(text: str) -> bool:
    ends = re.fullmatch(r"[\[(]([^,]+),([^,]+)[\])]", text.strip())
    try:
        return ends is not None and float(ends[1]) <= float(ends[2])
    except ValueError:
        return False


def _check_loss(model: str, model_class: Any, given: Final) -> None:
    loss = given.get("loss_type")
    chosen = model_class.type == ModelType.SEQUENTIAL and not hasattr(model_class, "input_type")
    if chosen and loss not in ("CE", "BPR"):
        raise UserError(f"loss_type: {model} knows CE and BPR, not {loss!r}.")


# ---------------------------------------------------------------- combinations


def check_all(model: str, model_class: Any, final: Final) -> None:
    """Checks RecBole's finished configuration of one model.

    Args:
        model: its name.
        model_class: its class; `stage_names`, `make_stages` and `train_modes` say what it can do,
            `choices` and `bounds` what some of its keys may be.
        final: every key.

    Raises:
        UserError: the first value or combination that cannot work.
    """
    stages: tuple[str, ...] = tuple(getattr(model_class, "stage_names", ()))
    _check_pickles(final)
    _check_positive(model_class, stages, final)
    for declaring in (model_class, inner_class(model_class, final)):
        _check_declared(declaring, stages, final)
    _check_metrics(stages, final)
    _check_protocol(model, model_class, final)
    check_inner(model, model_class, final)
    _check_train_mode(model, model_class, final)
    _check_stages(model, model_class, stages, final)
    _check_clipping(model, model_class, stages, final)
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
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < inf):
            raise UserError(f"{key}: it must be a number above 0, got {value!r}.")
    for key in (f"{stage}_{key}" for stage in stages for key in _NOT_NEGATIVE_OF_STAGE):
        if (final.get(key) or 0) < 0:
            raise UserError(f"{key}: it must be 0 (off) or more, got {final[key]}.")


def _check_declared(model_class: Any, stages: tuple[str, ...], final: Final) -> None:
    """Values that the model itself names: some words, or a range."""
    choices = dict(getattr(model_class, "choices", {}))
    if _is_staged(model_class):
        choices |= dict.fromkeys(("schedule", *(f"{s}_schedule" for s in stages)), SCHEDULES)
    for key, allowed in choices.items():
        if final.get(key) is not None and final[key] not in allowed:
            raise UserError(f"{key} is '{final[key]}': use {', '.join(allowed)}.")
    for key, (least, most) in getattr(model_class, "bounds", {}).items():
        if not least <= final[key] <= most:
            range_ = f"{least} or more" if most == inf else f"between {least} and {most}"
            raise UserError(f"{key} is {final[key]}: it must be {range_}.")


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
    if final["eval_candidates"] != "full":
        _check_candidates(model, final)
    if final.get("benchmark_filename") and final["mask_history"]:
        raise UserError(
            "mask_history needs everything that each user did, which a ready-made split does not "
            "tell: leave benchmark_filename out or set mask_history: False."
        )
    _check_histories(final)
    order = final["eval_args"]["order"]
    if model_class.type == ModelType.SEQUENTIAL and order != "TO":
        raise UserError(
            f"eval_args: {model} reads sequences, which have an order in time: set order: TO, "
            f"not {order}."
        )


def _check_histories(final: Final) -> None:
    """What our own splits and sources of histories need."""
    source, split = final["history_source"], next(iter(final["eval_args"]["split"]))
    if source not in HISTORY_SOURCES:
        raise UserError(f"history_source is '{source}': use {', '.join(HISTORY_SOURCES)}.")
    if final["topfreq_items"] < 2:
        raise UserError(f"topfreq_items is {final['topfreq_items']}: it must be 2 or more.")
    asked = f"split {split}" if split in _OWN_SPLITS else f"history_source: {source}"
    if split not in _OWN_SPLITS and source == "chrono":
        return
    if final["eval_args"]["order"] != "TO" or final.get("benchmark_filename"):
        raise UserError(
            f"{asked} takes each user's interactions in order of time: set order: TO in eval_args "
            "and leave benchmark_filename out."
        )


def _check_candidates(model: str, final: Final) -> None:
    eval_args, ready_made = final["eval_args"], final.get("benchmark_filename")
    if "labeled" in eval_args["mode"].values():
        raise UserError(
            f"eval_candidates: {model} is evaluated on labels and ranks no candidates, leave it "
            "out or set ranking metrics and eval_args with mode: full."
        )
    if ready_made or not {"LS", *_OWN_SPLITS} & {*eval_args["split"]}:
        mend = (
            "leave out benchmark_filename" if ready_made else "set split: {'LS': 'valid_and_test'}"
        )
        raise UserError(
            "eval_candidates: a list holds the one target of a user, which this split does not "
            f"give: set eval_candidates: full or {mend}."
        )
    for metric in final["metrics"]:
        if metric.lower() not in _OF_CANDIDATES:
            raise UserError(
                f"metrics: {metric} is not defined on the candidate lists of eval_candidates, use "
                f"{', '.join(_OF_CANDIDATES)}."
            )


# ---------------------------------------------------------------- training


def _check_train_mode(model: str, model_class: Any, final: Final) -> None:
    mode = final["train_mode"]
    if mode not in ("prefix", "whole"):
        raise UserError(f"train_mode: '{mode}' is neither prefix nor whole: set it to one.")
    trained = inner_class(model_class, final) or model_class
    if mode == "whole" and final.get("loss_type", "CE") != "CE":
        raise UserError(
            f"train_mode: whole rows are trained with cross entropy: set loss_type: CE or "
            f"train_mode: prefix, loss_type is {final['loss_type']}."
        )
    offered = getattr(trained, "train_modes", ("prefix",))
    if mode not in offered:
        name = model if trained is model_class else f"{model}'s {final[model_class.inner_model]}"
        raise UserError(
            f"train_mode: {name} does not train in mode '{mode}': set it to {' or '.join(offered)}."
        )


def _check_stages(model: str, model_class: Any, stages: tuple[str, ...], final: Final) -> None:
    """RecBole's models run all their stages in one, whatever `stages` says."""
    for name in final.get("stages") or ():
        if _is_staged(model_class) and name not in stages:
            raise UserError(f"stages: '{name}' is no stage of {model} ({', '.join(stages)}).")
    asked = [name for name in stages if name in (final.get("stages") or stages)]
    between = stages[stages.index(asked[0]) : stages.index(asked[-1])] if asked else ()
    missing = [name for name in between if name not in asked]
    if _is_staged(model_class) and missing:
        raise UserError(
            f"stages: {missing[0]} stands between {asked[0]} and {asked[-1]}: name it too, what "
            "follows is trained on what it leaves."
        )


def _check_clipping(model: str, model_class: Any, stages: tuple[str, ...], final: Final) -> None:
    for key in ("clip_grad_norm", *(f"{stage}_clip_grad_norm" for stage in stages)):
        norm = key.replace("clip_grad_norm", "clip_norm")
        if final.get(key) and final.get(norm) and key != "clip_grad_norm":
            raise UserError(f"{key}: {norm}: {final[norm]} stands above it, set that.")
        if final.get(key):
            _check_clip(key, model, model_class, final[key])


def _check_clip(key: str, model: str, model_class: Any, clip: Mapping[str, Any]) -> None:
    largest = clip.get("max_norm")
    if not (isinstance(largest, (int, float)) and largest > 0):
        raise UserError(
            f"{key}: {clip} has no max_norm above 0, write {{'max_norm': 5.0}} instead."
        )
    if _is_staged(model_class) and clip.get("norm_type", 2) != 2:
        raise UserError(f"{key}: {model} clips the L2 norm, leave norm_type out of {clip}.")


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
    if spec and spec["is_tiny"] and final.get("dtype") not in (None, "float32"):
        raise UserError(
            f"dtype: the tiny backbone trains all its weights, which are float32 and not "
            f"{final['dtype']}: leave it out or take another backbone."
        )
