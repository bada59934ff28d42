"""From a configuration to the three data loaders that RecBole's trainers take.

Parts adapted from RecBole (MIT, (c) 2020 RUCAIBox).
"""

from __future__ import annotations

from logging import getLogger
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.data.utils import create_samplers, get_dataloader
from recbole.sampler import KGSampler
from recbole.utils import ModelType

from recbole_mm.config_checks import PICKLE_KEYS
from recbole_mm.data.dataset import BY_MODEL, BY_TYPE
from recbole_mm.data.sequences import WholeFields, WholeTrainLoader, whole_windows
from recbole_mm.errors import UserError
from recbole_mm.inner import inner_class


def dataset_class(config: Any) -> type[Dataset]:
    """The dataset class of a model: by its name, else by its type."""
    return BY_MODEL.get(config["model"]) or BY_TYPE[config["MODEL_TYPE"]]


def create_dataset(config: Any) -> Dataset:
    """Reads, filters and numbers a dataset; nothing is read from or written to RecBole's caches.

    Raises:
        UserError: a key asks for one of RecBole's pickled caches.
    """
    for key in PICKLE_KEYS:
        if config[key]:
            raise UserError(f"{key} would keep a pickle, which is not safe to load: leave it out.")
    return dataset_class(config)(config)


def choose_train_mode(config: Any, model_class: type) -> str:
    """The mode that the configuration names, or the model's first: never another one in silence.

    Raises:
        UserError: the model does not have it.
    """
    trained = inner_class(model_class, config) or model_class
    offered: tuple[str, ...] = getattr(trained, "train_modes", ("prefix",))
    mode = config["train_mode"] or offered[0]
    if mode not in offered:
        raise UserError(
            f"{trained.__name__} cannot train with train_mode '{mode}': "
            f"set it to {' or '.join(offered)}."
        )
    return str(mode)


def data_preparation(config: Any, dataset: Dataset, model_class: type) -> tuple[Any, Any, Any]:
    """Splits a dataset and makes its loaders.

    Valid and test rows are the same in both training modes; with ``eval_users`` they are those of
    a sample of users, the same whatever the seed.

    Args:
        config: RecBole's configuration.
        dataset: as `create_dataset` gives it; it is used up.
        model_class: may offer ``train_modes``, a tuple of names; ``("prefix",)`` if it does not.

    Returns:
        Training, validation and test loader; the first is a `WholeTrainLoader` in mode ``whole``.

    Raises:
        UserError: a part has no rows, or the model does not have the training mode.
    """
    mode = choose_train_mode(config, model_class)
    parts = dataset.build()
    _check_parts(config, parts)
    _sample_users(config, parts)
    samplers = create_samplers(config, dataset, parts)
    if mode == "whole":
        train = _whole_loader(config, parts[0])
    else:
        train = _prefix_loader(config, dataset, parts[0], samplers[0])
    valid, test = (
        get_dataloader(config, phase)(config, part, sampler, shuffle=False)
        for phase, part, sampler in zip(("valid", "test"), parts[1:], samplers[1:], strict=True)
    )
    getLogger().info(
        f"[Training]: train_mode = [{mode}] train_batch_size = [{config['train_batch_size']}] "
        f"train_neg_sample_args: [{config['train_neg_sample_args']}]"
    )
    getLogger().info(
        f"[Evaluation]: eval_batch_size = [{config['eval_batch_size']}] "
        f"eval_args: [{config['eval_args']}]"
    )
    return train, valid, test


def _check_parts(config: Any, parts: list[Any]) -> None:
    """RecBole fails on a part without rows, on that of validation or test only after training."""
    names = ("training", "validation", "test")
    empty = [name for name, part in zip(names, parts, strict=True) if not len(part.inter_feat)]
    if not empty:
        return
    split = config["eval_args"]["split"]
    if split != {"LS": "valid_and_test"}:
        raise UserError(
            f"{config['dataset']}: eval_args with split {split} leaves no rows for "
            f"{' and '.join(empty)}: set split: {{LS: valid_and_test}}, or take more data."
        )
    # Of three, the last is for test and the first never a target: none is left to validate.
    raise UserError(
        f"{config['dataset']}: no user has the 4 interactions that training, validation and test "
        "need with LS: valid_and_test: lower user_inter_num_interval and item_inter_num_interval, "
        "raise limit_users, or take other data."
    )


def _sample_users(config: Any, parts: list[Any]) -> None:
    """Leaves the rows of ``eval_users`` users in validation and test.

    Raises:
        UserError: less than 1 user is asked for.
    """
    size = config["eval_users"]
    if size is None:
        return
    if size < 1:
        raise UserError(f"eval_users is {size}: set it to 1 or more, or leave it out.")
    field = config["USER_ID_FIELD"]
    users = np.unique(parts[2].inter_feat[field].numpy())
    kept = np.random.default_rng(0).permutation(users)[:size]
    for part in parts[1:]:
        rows = np.isin(part.inter_feat[field].numpy(), kept)
        part.inter_feat = part.inter_feat[torch.from_numpy(rows)]


def _prefix_loader(config: Any, dataset: Dataset, part: Dataset, sampler: Any) -> Any:
    loader = get_dataloader(config, "train")
    if config["MODEL_TYPE"] != ModelType.KNOWLEDGE:
        return loader(config, part, sampler, shuffle=config["shuffle"])
    args = config["train_neg_sample_args"]
    kg_sampler = KGSampler(dataset, args["distribution"], args["alpha"])
    both = loader(config, part, sampler, kg_sampler, shuffle=True)
    # RecBole's pair of loaders has two generators, and none of its own to save and restore.
    both.generator = both.general_dataloader.generator
    both.kg_dataloader.generator = both.kg_dataloader.sampler.generator = both.generator
    return both


def _whole_loader(config: Any, part: Any) -> WholeTrainLoader:
    if part.train_sequences is None:
        raise UserError(
            "train_mode: whole needs each user's sequence, which a ready-made split does not have: "
            "leave benchmark_filename out or set train_mode: prefix."
        )
    if config["train_neg_sample_args"]["distribution"] != "none":
        raise UserError(
            "train_mode: whole has no sampled negatives: set loss_type: CE and "
            "train_neg_sample_args: ~, or train_mode: prefix."
        )
    rows = whole_windows(part.train_sequences, config["MAX_ITEM_LIST_LENGTH"])
    fields = WholeFields(
        user=config["USER_ID_FIELD"],
        items=config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"],
        length=config["ITEM_LIST_LENGTH_FIELD"],
    )
    return WholeTrainLoader(
        part,
        rows,
        config["train_batch_size"],
        config["seed"],
        fields,
        shuffle=config["shuffle"],
        bucket=config["length_buckets"] is not False,
    )
