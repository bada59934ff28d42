"""VBPR against its equation, and as a model among others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_mm.config import MMConfig
from recbole_mm.errors import UserError
from recbole_mm.model.vbpr import VBPR
from recbole_mm.quick_start import build_model, prepare_data, run
from tests.model.toy import keys, losses_of


def shop_of(mini: Path, folder: Path, **changes: Any) -> tuple[VBPR, Any]:
    flags = keys(folder, data_path=str(mini), user_inter_num_interval="[1,inf)",
                 embedding_size=5, visual_size=3, train_batch_size=64, **changes)  # fmt: skip
    config = MMConfig("VBPR", "mini", overrides=flags)
    data = prepare_data(config)
    model = build_model(config, data)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model, data


def test_a_score_is_equation_4(mini: Path, in_folder: Path) -> None:
    model, _ = shop_of(mini, in_folder)
    users, items = torch.tensor([1, 2, 7]), torch.tensor([3, 9, 9])
    row = Interaction({"user_id": users, "item_id": items})
    scores = model.predict(row)
    whole = model.full_sort_predict(row).view(3, -1)
    for place, (u, i) in enumerate(zip(users, items, strict=True)):
        f = model.pictures[i]
        expected = (
            model.item_bias.weight[i, 0]
            + model.user_embedding.weight[u] @ model.item_embedding.weight[i]
            + model.taste.weight[u] @ (model.looks.weight @ f)
            + model.appeal.weight[0] @ f
        )
        torch.testing.assert_close(scores[place], expected)
        torch.testing.assert_close(whole[place, i], expected)


def test_the_loss_is_bpr(mini: Path, in_folder: Path) -> None:
    model, _ = shop_of(mini, in_folder, reg_weight=0.0)
    row = {"user_id": [1, 2], "item_id": [3, 4], "neg_item_id": [5, 6]}
    batch = Interaction({key: torch.tensor(values) for key, values in row.items()})
    loss = model.calculate_loss(batch)
    other = Interaction({"user_id": batch["user_id"], "item_id": batch["neg_item_id"]})
    better = model.predict(batch) - model.predict(other)
    torch.testing.assert_close(loss, -torch.log(torch.sigmoid(better)).mean())
    model.reg_weight = 0.5
    assert model.calculate_loss(batch) > loss


def test_it_learns(mini: Path, in_folder: Path) -> None:
    model, data = shop_of(mini, in_folder, reg_weight=0.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    losses = losses_of(model, data.train, 0.05, 30)
    assert losses[-1] < 0.5 * losses[0]


def test_it_runs_as_a_general_model(mini: Path, in_folder: Path) -> None:
    flags = keys(in_folder, data_path=str(mini), user_inter_num_interval="[1,inf)", epochs=2)
    result = run("VBPR", "mini", overrides=flags)
    assert result["general"]
    assert 0 < result["test"]["hit@20"] <= 1
    with pytest.raises(UserError, match=r"image_features: there is no .*mini\.siglip\.npy"):
        run("VBPR", "mini", overrides={**flags, "image_features": "siglip"})
    (in_folder / "bare").mkdir()
    shutil.copy(mini / "mini" / "mini.inter", in_folder / "bare" / "bare.inter")
    with pytest.raises(UserError, match="no item of bare has a picture: take BPR, which is"):
        run("VBPR", "bare", overrides={**flags, "data_path": str(in_folder)})
