"""What a model that trains in stages tells the trainer about each of them.

The trainer knows stages and never a model: it walks a stage's plan, steps the optimiser, validates,
keeps the best weights and can stop and go on at any step. The model says what a batch is and what
its loss is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StageSettings:
    """How one stage is optimised and when it stops; all counts of steps are optimiser steps."""

    epochs: int  # 0: the weights are left as they are
    learning_rate: float
    weight_decay: float = 0.0
    adam_eps: float = 1e-8
    max_steps: int | None = None  # None: no cap beyond the epochs
    max_minutes: float = 0.0  # ends after so many, validations included; 0: never
    accumulate: int = 1  # plan entries a step
    clip_norm: float | None = None  # global L2 norm
    schedule: str = "constant"  # constant | linear | cosine (both fall to 0)
    warmup_steps: int = 0
    eval_every: int = 0  # steps between validations; 0: once every `eval_epochs`
    eval_epochs: int = 1
    patience: int = 10  # validations without a better one before the stage stops
    valid_metric: str = "ndcg@10"
    valid_users: int | None = None  # validate on a seeded sample of this many users; None: all
    validate_first: bool = False  # before the first step too: the weights it begins with may stay
    weights_from: str | None = None  # a run whose weights are taken; then nothing is trained


ONLY_STAGE = "train"  # the name of the stage of a model that has no others


class UnfitWeightsError(ValueError):
    """Weights that a stage cannot take, with the reason."""


SCHEDULES = ("constant", "linear", "cosine")

# Plain keys of the configuration that a stage can have its own of: the stage `ranker` reads
# `ranker_learning_rate` before `learning_rate`. Beside each a value of its type; 0 is off.
STAGE_KEYS: dict[str, Any] = {
    "epochs": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "adam_eps": 1e-8,
    "max_steps": 0,
    "max_minutes": 0.0,
    "accumulate": 1,
    "clip_norm": 0.0,
    "clip_grad_norm": {"max_norm": 5.0},
    "schedule": "constant",
    "warmup_steps": 0,
    "eval_every": 0,
    "eval_step": 1,
    "stopping_step": 10,
    "valid_metric": "NDCG@10",
    "valid_users": 0,
}


@dataclass(frozen=True)
class StageContext:
    """What the trainer hands to a stage: data the model has not seen at construction."""

    valid: Any  # RecBole Interaction: all validation rows, history and target
    run_dir: Path
    seed: int
    device: torch.device
    show_progress: bool = False
    test: Any = None  # as `valid`, for what is made of histories before they are asked about


class Stage:
    """One stage of training. Subclasses override `plan` and `loss`, and what else they need.

    Attributes:
        name: as in `stages:` of the configuration, e.g. ``retriever``.
        module: its parameters with ``requires_grad`` are trained and saved with the stage.
        settings: how it is optimised.
        of_items: whether its weights belong to one catalogue of items.
        of_model: the name of the model whose weights they are; "" where another run's are told
            by their sizes.
        trains: False: nothing is trained, validated or saved; `prepare` makes what later stages
            read, takes up what an earlier attempt left, and `finish` says what there is.
    """

    name: str
    module: nn.Module
    settings: StageSettings
    of_items = True
    of_model = ""
    trains = True

    def __init__(self, name: str, module: nn.Module, settings: StageSettings) -> None:
        self.name, self.module, self.settings = name, module, settings

    def prepare(self, context: StageContext) -> None:
        """Called once before the stage trains, evaluates or is loaded."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW; by default one, of all parameters that require a gradient."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad]}]

    def plan(self, epoch: int) -> Sequence[Any]:
        """The epoch's batches, as light as possible; a function of the seed and `epoch` alone."""
        raise NotImplementedError  # pragma: no cover

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of one entry of the plan, with its graph. Shape: ()."""
        raise NotImplementedError  # pragma: no cover

    def valid_rows(self, context: StageContext) -> Tensor | None:
        """Rows of `context.valid` to validate on while training; None: all. Shape: (n,)."""
        size = self.settings.valid_users
        return None if size is None else seeded_rows(len(context.valid), size, context.seed)

    def state(self) -> dict[str, Tensor]:
        """What `model.safetensors` of this stage holds; by default the module's whole state."""
        return dict(self.module.state_dict())

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Called before any stage is trained, with weights of another run that this one is to take;
        by default nothing can be said that early.

        Raises:
            UnfitWeightsError: they are of something else.
        """

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave.

        Raises:
            UnfitWeightsError: they are of something else.
        """
        fill(self.module, state)

    def finish(self, context: StageContext) -> dict[str, Any]:
        """Called with the best weights in place; what it returns is stored in `state.json`."""
        return {}

    def restore(self, finished: Mapping[str, Any]) -> None:
        """Takes back what `finish` returned, when a finished stage is loaded."""


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts weights into a module.

    Raises:
        UnfitWeightsError: they are not the module's.
    """
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise UnfitWeightsError("they are of another model or of other sizes") from error


def seeded_rows(n_rows: int, size: int, seed: int) -> Tensor | None:
    """A seeded sample of row numbers in ascending order, or None for all. Shape: (size,)."""
    if size >= n_rows:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n_rows, generator=generator)[:size].sort().values


@dataclass
class Readout:
    """One way to read final scores from a trained model, a row of the result table."""

    name: str
    use: Callable[[], None]  # makes the model's full_sort_predict score this way
    chosen: bool = True  # the row that is the result
    extra: dict[str, Any] = field(default_factory=dict)
