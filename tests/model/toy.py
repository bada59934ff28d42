"""A few random users, and the keys of a short quiet run, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recbole_mm.config import MMConfig
from recbole_mm.data.preparation import create_dataset, data_preparation
from tests.data.atomic_data import random_interactions


def keys(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "epochs": 1,
        "user_inter_num_interval": "[20,40]",
        "show_progress": False,
        "state": "ERROR",
        "checkpoint_dir": str(folder / "saved"),
        **more,
    }


def losses_of(model: Any, train: Any, learning_rate: float, epochs: int) -> list[float]:
    """Trains a model; the loss of each epoch's last batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(epochs):
        for batch in train:
            optimizer.zero_grad()
            value = model.calculate_loss(batch)
            value.backward()
            optimizer.step()
        losses.append(value.item())
    return losses


def toy_data(folder: Path, model: str, lengths: list[int], **more: Any) -> tuple[Any, Any]:
    """A configuration and the three loaders on a few random users."""
    if not (folder / "toy").is_dir():
        random_interactions(folder / "toy", lengths)
    config = MMConfig(model, "toy", overrides=keys(folder, data_path=str(folder), **{
        "user_inter_num_interval": "[1,inf)", "MAX_ITEM_LIST_LENGTH": 8, **more}))  # fmt: skip
    dataset = create_dataset(config)
    return config, data_preparation(config, dataset, config.model_class)
