"""A model inside a model, such as PRIME's `retriever`: which ones it may be, told before anything
is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recbole.utils import ModelType

from recbole_mm.errors import UserError
from recbole_mm.registry import get_model, get_trainer_base

Final = Mapping[str, Any]

# Models that rank items for users by what those took.
_RANKING = (ModelType.GENERAL, ModelType.TRADITIONAL, ModelType.SEQUENTIAL)
# Trainers that do no more than a stage does.
_PLAIN_TRAINERS = ("Trainer", "TraditionalTrainer", "StagedTrainer")
# Models that read rows or files which the datasets of others lack.
_OWN_DATASETS = ("DIEN", "GRU4RecKG", "KSR")


def find_inner(model: str, model_class: Any, name: str) -> Any:
    """The class of the model that is to be inside `model`.

    Raises:
        UserError: there is none of that name, or not of the right kind.
    """
    key = model_class.inner_model
    try:
        inner: Any = get_model(name)
    except UserError as error:
        raise UserError(str(error).replace("--model", f"--{key}")) from error
    if takes_any(model_class):
        if inner.type not in _RANKING or inner is model_class:
            raise UserError(
                f"--{key}: {name} is neither a general nor a sequential model, {model} needs one."
            )
    elif inner.type != ModelType.SEQUENTIAL or inner is model_class:
        raise UserError(f"--{key}: {name} is no sequential model, {model} needs one.")
    return inner


def takes_any(model_class: Any) -> bool:
    """Whether the model inside may be trained on whatever RecBole trains it on."""
    return bool(getattr(model_class, "any_inner", False))


def inner_class(model_class: Any, final: Final) -> Any:
    """The class of the model inside a model, or None where it has none."""
    key = getattr(model_class, "inner_model", None)
    return get_model(final[key]) if key else None


def check_inner(model: str, model_class: Any, final: Final) -> None:
    """A model inside a model is trained by our stages: from sequences by its own whole loss, or
    with `any_inner` as RecBole's plain trainer trains it.

    Raises:
        UserError: it cannot be.
    """
    inner = inner_class(model_class, final)
    if inner is None:
        return
    key = model_class.inner_model
    name = final[key]
    if name in _OWN_DATASETS:
        raise UserError(f"--{key}: {name} needs a dataset of its own, {model} needs another model.")
    if final.get("benchmark_filename") and list(final["stages"] or ()) != [key]:
        raise UserError(
            f"benchmark_filename: {model} is trained on each user's sequence, which a ready-made "
            f"split does not tell: leave it out, or train the retriever alone, --stages={key}."
        )
    (_check_any if takes_any(model_class) else _check_causal)(model, key, inner, final)


def _check_causal(model: str, key: str, inner: Any, final: Final) -> None:
    name = final[key]
    if final.get("loss_type", "CE") != "CE" or hasattr(inner, "input_type"):
        raise UserError(
            f"{key}: {name} trains on sampled negatives, {model}'s retriever on cross entropy: "
            "set loss_type: CE where it has that, or take another."
        )
    prepared = final.get("transform") and final["train_mode"] != "whole"
    if prepared or (len(getattr(inner, "stage_names", ())) > 1):
        raise UserError(
            f"{key}: {name} trains on rows or in stages that {model} does not make: "
            "set train_mode: whole where it has that, or take another."
        )


def _check_any(model: str, key: str, inner: Any, final: Final) -> None:
    name = final[key]
    if hasattr(inner, "make_stages") and len(inner.stage_names) > 1:
        raise UserError(f"--{key}: {name} ranks what a retriever found, {model} needs a retriever.")
    base = get_trainer_base(inner.type, name)
    if base.__name__ not in _PLAIN_TRAINERS and not final.get(f"{key}_from"):
        raise UserError(
            f"{key}: {name} has a trainer of its own, which {model} does not call: train it by "
            f"`python run_recbole_mm.py --model={name} --dataset={final['dataset']}` and name the "
            f"folder of that run, --{key}_from=RUN_DIR."
        )
