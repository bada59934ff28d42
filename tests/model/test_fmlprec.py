"""FMLP-Rec against its equations written out, and as a model among others."""

from __future__ import annotations

import cmath
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_mm import quick_start
from recbole_mm.model.fmlprec import FilterLayer, FMLPRec
from recbole_mm.model.layers.rows import to_the_right
from tests.model.toy import keys, losses_of, toy_data

L, D = 8, 4


def naive_filter(x: Tensor, weights: Tensor) -> Tensor:
    """Equations 6 to 8 by sums over complex numbers, one channel at a time. (L, D) -> (L, D)."""
    columns = []
    for channel in range(x.shape[1]):
        values = x[:, channel]
        spectrum = []
        for k in range(L):
            wave = [cmath.exp(-2j * math.pi * k * t / L) for t in range(L)]
            spectrum.append(sum(values[t] * wave[t] for t in range(L)) / math.sqrt(L))
        half = [spectrum[k] * torch.complex(*weights[k, channel]) for k in range(L // 2 + 1)]
        # A real signal's spectrum mirrors itself; its ends are real.
        full = [half[0].real, *half[1:-1], half[-1].real, *(h.conj() for h in half[-2:0:-1])]
        signal = []
        for t in range(L):
            wave = [cmath.exp(2j * math.pi * k * t / L) for k in range(L)]
            signal.append((sum(full[k] * wave[k] for k in range(L)) / math.sqrt(L)).real)
        columns.append(torch.stack(signal))
    return torch.stack(columns, dim=1)


def test_a_filter_is_that_of_the_equations_values_and_gradients() -> None:
    torch.manual_seed(0)
    layer = FilterLayer(L, D, 0.0, 0.5, 1e-12).double()
    x = torch.randn(2, L, D, dtype=torch.float64, requires_grad=True)
    found = layer(x)
    expected = torch.stack([layer.layer_norm(row + naive_filter(row, layer.filter)) for row in x])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    probe = torch.randn_like(found)
    wanted = (x, layer.filter)
    mine = torch.autograd.grad((found * probe).sum(), wanted)
    naive = torch.autograd.grad((expected * probe).sum(), wanted)
    for a, b in zip(mine, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_rows_are_moved_to_the_right_end() -> None:
    rows = torch.tensor([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 6, 7, 8, 9]])
    moved = to_the_right(rows, torch.tensor([3, 1, 5]))
    assert moved.tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 0, 4], [5, 6, 7, 8, 9]]


def model_of(folder: Path, lengths: list[int], **more: Any) -> tuple[FMLPRec, Any]:
    config, loaders = toy_data(folder, "FMLPRec", lengths, hidden_size=16, **more)
    torch.manual_seed(0)
    return FMLPRec(config, loaders[0].dataset), loaders


@torch.no_grad()
def test_the_whole_model_is_what_the_paper_says(in_folder: Path) -> None:
    model, (train, _, _) = model_of(in_folder, [5, 9, 12] * 3)
    model.double().eval()
    batch = next(iter(train))
    found = model.full_sort_predict(batch)
    for row, length in enumerate(batch["item_length"].tolist()):
        padded = [0] * (L - length) + batch["item_id_list"][row, :length].tolist()
        x = model.item_embedding.weight[padded] + model.position_embedding.weight
        x = model.layer_norm(x)
        for block in model.blocks:
            x = block[0].layer_norm(x + naive_filter(x, block[0].filter))
            inner = block[1].inner(x)
            gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            x = block[1].layer_norm(x + block[1].outer(gelu))
        expected = x[-1] @ model.item_embedding.weight.T
        torch.testing.assert_close(found[row], expected, rtol=1e-8, atol=1e-10)
    own = batch["item_id"]
    torch.testing.assert_close(model.predict(batch), found.gather(1, own[:, None])[:, 0])


@torch.no_grad()
def test_padding_and_other_rows_change_nothing(in_folder: Path) -> None:
    model, (train, _, _) = model_of(in_folder, [5, 9, 12] * 3)
    model.eval()
    batch = next(iter(train))
    items, lengths = batch["item_id_list"], batch["item_length"]
    together = model(items, lengths)
    for row in range(len(items)):
        n = int(lengths[row])
        torch.testing.assert_close(model(items[row : row + 1, :n], lengths[row : row + 1]),
                                   together[row : row + 1], atol=1e-5, rtol=0)  # fmt: skip


@pytest.mark.parametrize("loss", ["CE", "BPR"])
def test_it_learns_eight_users(in_folder: Path, loss: str) -> None:
    more = {"hidden_dropout_prob": 0.0, "loss_type": loss}
    if loss == "BPR":
        more["train_neg_sample_args"] = "{'distribution': 'uniform', 'sample_num': 1}"
    model, (train, _, _) = model_of(in_folder, [7] * 8, **more)
    losses = losses_of(model, train, 0.01, 60)
    assert np.mean(losses[-5:]) < 0.3 * losses[0]


def test_the_loss_is_the_cross_entropy_of_the_target(in_folder: Path) -> None:
    model, (train, _, _) = model_of(in_folder, [5, 9, 12] * 3)
    model.eval()
    batch: Interaction = next(iter(train))
    scores = model.full_sort_predict(batch)
    chosen = scores.log_softmax(1).gather(1, batch["item_id"][:, None])
    torch.testing.assert_close(model.calculate_loss(batch), -chosen.mean())


def test_it_runs_from_the_name_and_loads_again(in_folder: Path) -> None:
    model_of(in_folder, [7] * 12)
    more = {"data_path": str(in_folder), "user_inter_num_interval": "[1,inf)"}
    first = quick_start.run("FMLPRec", "toy", overrides=keys(in_folder, **more))
    again = quick_start.load(Path(first["run_dir"]))
    assert again["test"] == first["test"]
    assert first["train_mode"] == "prefix"
