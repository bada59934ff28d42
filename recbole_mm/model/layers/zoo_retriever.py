"""RecBole's models inside one of ours, trained on what RecBole trains them on: general ones and
those of sampled negatives, too."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.data.utils import get_dataloader
from recbole.sampler import RepeatableSampler, Sampler
from recbole.utils import ModelType
from torch import Tensor

from recbole_mm.config import MMConfig
from recbole_mm.data.dataset import general_part
from recbole_mm.data.pairs import score_pairs
from recbole_mm.data.sequences import Ints, epoch_plan
from recbole_mm.model.layers.retriever_stage import RetrieverStage, TrainingRows, groups_of
from recbole_mm.other_parameters import load_whole_state, whole_state
from recbole_mm.registry import get_model
from recbole_mm.stage import Stage, StageSettings, UnfitWeightsError

# Keys that say what a model is trained on, and that it reads as in a run of its own.
_OF_TRAINING = (
    "MODEL_TYPE",
    "MODEL_INPUT_TYPE",
    "loss_type",
    "train_neg_sample_args",
    "repeatable",
)


class InnerModel:
    """A model that RecBole offers, made for the data of a run of another one.

    Args:
        name: of the model.
        config: of the run, with the model's own keys in it.
        train_dataset: the training part of a sequential dataset.

    Attributes:
        model: to be trained, and asked.
    """

    def __init__(self, name: str, config: Any, train_dataset: Any) -> None:
        self._config = _own_config(name, config)
        self._is_general = self._config["MODEL_TYPE"] != ModelType.SEQUENTIAL
        self._part = general_part(train_dataset) if self._is_general else train_dataset
        self.model: Any = get_model(name)(self._config, self._part)  # type: ignore[call-arg]
        self._item_features: Interaction = train_dataset.get_item_feature()

    def stage(
        self, name: str, settings: StageSettings, how: TrainingRows, train_dataset: Any
    ) -> Stage:
        """The stage that trains it: on all items as negatives, or on those that RecBole draws."""
        config = self._config
        sampled = config["train_neg_sample_args"]["distribution"] != "none"
        if self._is_general or sampled or (config["transform"] and how.mode != "whole"):
            loader = training_loader(config, self._part)
            return ZooStage(name, self.model, settings, how.seed, loader)
        return RetrieverStage(name, self.model, settings, how, train_dataset)

    def scores(self, rows: Interaction) -> Tensor:
        """Of all items. Shape: (B, V)."""
        try:
            found: Tensor = self.model.full_sort_predict(rows)
        except NotImplementedError:
            found = score_pairs(self.model, rows, self._item_features.to(self.model.device))
        return found.view(len(rows), -1)


def _own_config(name: str, config: Any) -> Any:
    """The run's configuration, but for what the model is trained on, which is as in its own run."""
    chosen = {"data_path": "", "gpu_id": config["gpu_id"], "use_gpu": config["use_gpu"]}
    model_class: Any = get_model(name)
    if model_class.type == ModelType.SEQUENTIAL and not hasattr(model_class, "input_type"):
        chosen["loss_type"] = config["loss_type"]
    drawn = config["train_neg_sample_args"]
    if drawn["distribution"] != "none":
        chosen["train_neg_sample_args"] = drawn
    alone = MMConfig(name, config["dataset"], (), chosen)
    own = copy(config)
    own.final_config_dict = {
        **config.final_config_dict,
        **{key: alone[key] for key in _OF_TRAINING},
        "model": name,
    }
    return own


def training_loader(config: Any, part: Any) -> Any:
    """RecBole's loader for a model's training, with its sampler of negatives.

    Args:
        config: of the model.
        part: of the training data.
    """
    args, sampler = config["train_neg_sample_args"], None
    if args["distribution"] != "none":
        kind, data = (RepeatableSampler, part) if config["repeatable"] else (Sampler, [part])
        sampler = kind(["train"], data, args["distribution"], args["alpha"]).set_phase("train")
    return get_dataloader(config, "train")(config, part, sampler, shuffle=True)


class ZooStage(Stage):
    """Trains one of RecBole's models by its own loss on its own batches.

    Args:
        name: of the stage.
        model: what is trained; one that only counts has one epoch, as in RecBole.
        settings: how.
        seed: of the order of rows.
        loader: makes batches of row numbers.
    """

    def __init__(
        self, name: str, model: Any, settings: StageSettings, seed: int, loader: Any
    ) -> None:
        if model.type == ModelType.TRADITIONAL:
            settings = replace(settings, epochs=min(settings.epochs, 1))
        super().__init__(name, model, settings)
        self.of_model = type(model).__name__
        self.model, self.seed, self.loader = model, seed, loader
        if hasattr(loader, "get_model"):
            loader.get_model(model)  # chooses among negatives with `dynamic`

    def param_groups(self) -> list[dict[str, Any]]:
        """The model's groups with this stage's weight decay."""
        return groups_of(self.model, self.settings.weight_decay)

    def plan(self, epoch: int) -> list[Ints]:
        """Shuffled batches of row numbers."""
        rows = np.ones(self.loader.sample_size, dtype=np.int64)
        return epoch_plan(rows, self.loader.step, self.seed, epoch, bucket=False)

    def loss(self, batch: Ints) -> Tensor:
        """The model's loss, the sum of its parts. Shape: ()."""
        rows = self.loader.collate_fn(batch).to(self.model.device)
        found = self.model.calculate_loss(rows)
        loss: Tensor = torch.stack([*found]).sum() if isinstance(found, tuple) else found.sum()
        return loss

    def state(self) -> dict[str, Tensor]:
        """Its weights, and what it has counted."""
        return whole_state(self.model)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave.

        Raises:
            UnfitWeightsError: they are of something else.
        """
        try:
            load_whole_state(self.model, state)
        except RuntimeError as error:
            raise UnfitWeightsError("they are of another model or of other sizes") from error
