"""MLP4Rec against its equations written out, and as a model among others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_mm import quick_start
from recbole_mm.config import MMConfig
from recbole_mm.data.item_features import choose_item_features
from recbole_mm.errors import UserError
from recbole_mm.model.mlp4rec import CHANNELS, FIELDS, POSITIONS, Layer, Mixer, MLP4Rec
from tests.data.atomic_data import random_interactions, write_atomic
from tests.model.toy import keys, losses_of, toy_data

L, D = 8, 4
LENGTHS = [5, 9, 12] * 3
COLUMNS = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "brand", "words"]}
FIELD_KEYS = {"selected_features": ["brand", "words"], "load_col": COLUMNS}


def write_fields(folder: Path) -> None:
    """A brand for each item, none to three words, and a price."""
    rows = []
    for i in range(30):
        words = " ".join(f"w{(i + j) % 5}" for j in range(i % 4))
        rows.append([f"i{i}", f"b{i % 3}", words, i / 7])
    header = "item_id:token brand:token words:token_seq price:float"
    write_atomic(folder / "toy" / "toy.item", header, rows)


def model_of(
    folder: Path,
    lengths: list[int] = LENGTHS,
    fields: bool = True,
    fresh: bool = False,
    **more: Any,
) -> tuple[MLP4Rec, Any]:
    """In double precision, as it starts if `fresh`, else with weights far from those."""
    random_interactions(folder / "toy", lengths)
    write_fields(folder)
    small = {"hidden_size": D, "expansion": 2, "n_layers": 2, "hidden_dropout_prob": 0.0}
    given = FIELD_KEYS if fields else {}
    config, loaders = toy_data(folder, "MLP4Rec", lengths, **{**small, **given, **more})
    torch.manual_seed(0)
    model = MLP4Rec(config, loaders[0].dataset).double()
    if not fresh:
        scramble(model)
    return model, loaders


def scramble(model: MLP4Rec) -> None:
    for name, parameter in model.named_parameters():
        if "layer_norm" not in name:
            parameter.data.copy_(torch.randn_like(parameter))
    for embedding in embeddings(model):
        embedding.weight.data[0] = 0


def embeddings(model: MLP4Rec) -> list[Any]:
    return [model.item_embedding, *(field.embedding for field in model.fields)]


def mixers(layer: Layer) -> list[Any]:
    return [layer.positions, *layer.within]


def naive_mixer(mixer: Mixer, x: Tensor) -> Tensor:
    """x + W2 gelu(W1 LN(x)), one vector along the axis at a time. (F, L, D) -> (F, L, D)."""
    normed = torch.zeros_like(x)
    for f in range(x.shape[0]):
        for t in range(x.shape[1]):
            v = x[f, t]
            spread = torch.sqrt(((v - v.mean()) ** 2).mean() + 1e-5)
            normed[f, t] = (v - v.mean()) / spread * mixer.layer_norm.weight
            normed[f, t] = normed[f, t] + mixer.layer_norm.bias
    along, out = normed.movedim(mixer.axis, -1), x.movedim(mixer.axis, -1).clone()
    for a in range(along.shape[0]):
        for b in range(along.shape[1]):
            inner = mixer.inner.weight @ along[a, b] + mixer.inner.bias
            gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            out[a, b] = out[a, b] + mixer.outer.weight @ gelu + mixer.outer.bias
    return out.movedim(-1, mixer.axis)


def naive_user(model: MLP4Rec, items: list[int]) -> Tensor:
    """The state of the last item of one history, moved to the right end. Shape: (D,)."""
    padded = [0] * (L - len(items)) + items
    tables = [model.item_embedding.weight[padded]]
    for field in model.fields:
        rows = []
        for item in padded:
            tokens = [t for t in field.tokens[item].tolist() if t]
            vectors = field.embedding.weight[tokens]
            rows.append(vectors.mean(0) if tokens else torch.zeros(D).double())
        tables.append(torch.stack(rows))
    x = torch.stack(tables)  # (F, L, D)
    for number in range(model.n_layers):
        for mixer in mixers(model.layers[number if len(model.layers) > 1 else 0]):
            x = naive_mixer(mixer, x)
    return x[0, -1]


def histories(batch: Interaction) -> list[list[int]]:
    rows = zip(batch["item_id_list"].tolist(), batch["item_length"].tolist(), strict=True)
    return [items[:n] for items, n in rows]


# --- the paper's equations ---
@pytest.mark.parametrize(("fields", "share"), [(True, True), (True, False), (False, True)])
def test_loss_and_gradients_are_those_of_the_equations(
    in_folder: Path, fields: bool, share: bool
) -> None:
    model, (train, _, _) = model_of(in_folder, fields=fields, share_layers=share)
    batch = next(iter(train))[:6]
    found = model.calculate_loss(batch)
    losses = []
    for items, target in zip(histories(batch), batch["item_id"].tolist(), strict=True):
        user, table = naive_user(model, items), model.item_embedding.weight
        total = sum(torch.exp(user @ table[i]) for i in range(1, len(table)))
        losses.append(torch.log(total) - user @ table[target])
    expected = sum(losses) / len(losses)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    mine, naive = (torch.autograd.grad(x, list(model.parameters())) for x in (found, expected))
    for a, b, (name, _) in zip(mine, naive, model.named_parameters(), strict=True):
        if "embedding" in name:  # the reference has no padding_idx
            a, b = a[1:], b[1:]
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
        assert a.abs().max() > 1e-6, name


def test_what_is_mixed(in_folder: Path) -> None:
    model, _ = model_of(in_folder)
    assert [mixer.axis for mixer in mixers(model.layers[0])] == [POSITIONS, CHANNELS, FIELDS]
    assert [mixer.inner.in_features for mixer in mixers(model.layers[0])] == [L, D, 3]
    assert len(model.layers) == 1
    alone, _ = model_of(in_folder, fields=False, share_layers=False)
    assert [mixer.axis for mixer in mixers(alone.layers[0])] == [POSITIONS, CHANNELS]
    assert len(alone.layers) == 2


@torch.no_grad()
def test_an_item_has_the_fields_of_its_row_in_the_file(in_folder: Path) -> None:
    model, (train, _, _) = model_of(in_folder)
    dataset = train.dataset
    brand, words = model.fields
    for number in range(30):
        token = f"i{number}"
        if token not in dataset.field2token_id["item_id"]:
            continue
        item = torch.tensor([[dataset.token2id("item_id", token)]])
        expected = brand.embedding.weight[dataset.token2id("brand", f"b{number % 3}")]
        torch.testing.assert_close(brand(item)[0, 0], expected)
        ids = [dataset.token2id("words", f"w{(number + j) % 5}") for j in range(number % 4)]
        mean = words.embedding.weight[ids].mean(0) if ids else torch.zeros(D).double()
        torch.testing.assert_close(words(item)[0, 0], mean)
    assert (brand(torch.zeros(1, 1, dtype=torch.int64)) == 0).all()


@torch.no_grad()
def test_predict_is_a_column_of_all_scores(in_folder: Path) -> None:
    model, (_, _, test) = model_of(in_folder)
    batch = next(iter(test))[0]
    scores = model.full_sort_predict(batch)
    for item in range(1, model.n_items):
        one = Interaction({**batch.interaction, "item_id": torch.full((len(batch),), item)})
        torch.testing.assert_close(model.predict(one), scores[:, item])


# --- rows ---
@torch.no_grad()
def test_padding_and_other_rows_change_nothing(in_folder: Path) -> None:
    model, (train, _, _) = model_of(in_folder)
    batch = next(iter(train))
    items, lengths = batch["item_id_list"], batch["item_length"]
    together = model(items, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = model(items[row : row + 1, :n], lengths[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_no_target_is_read(in_folder: Path) -> None:
    """Not causal within a row; what follows the row, its target, is not in it."""
    model, (train, _, _) = model_of(in_folder)
    batch = next(iter(train))
    scores = model.full_sort_predict(batch)
    other = {**batch.interaction, "item_id": batch["item_id"].roll(1)}
    assert torch.equal(model.full_sort_predict(Interaction(other)), scores)
    items = batch["item_id_list"].clone()  # nor what lies behind the end of a history
    beyond = torch.arange(items.shape[1]) >= batch["item_length"][:, None]
    items[beyond] = 7
    other = {**batch.interaction, "item_id_list": items}
    assert torch.equal(model.full_sort_predict(Interaction(other)), scores)


# --- a model among others ---
@pytest.mark.parametrize("fields", [True, False])
def test_it_learns_eight_users(in_folder: Path, fields: bool) -> None:
    model, (train, _, _) = model_of(in_folder, [7] * 8, fields, fresh=True, hidden_size=16)
    losses = losses_of(model, train, 0.01, 80)
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    assert all((embedding.weight[0] == 0).all() for embedding in embeddings(model))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss_type": "BPR"}, "loss_type is 'BPR': use CE"),
        ({"expansion": "0"}, "expansion is 0: it must be 1 or more"),
        ({"train_mode": "whole"}, "MLP4Rec does not train in mode 'whole'"),
        ({"hidden_dropout_prob": "1"}, "hidden_dropout_prob: a probability is"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        MMConfig("MLP4Rec", "nowhere", (), changes)


def test_mistakes_in_fields_are_told(in_folder: Path) -> None:
    with pytest.raises(UserError, match=r"'colour' of toy.item is not loaded: name it in load_col"):
        model_of(in_folder, selected_features=["colour"])
    columns = {**COLUMNS, "item": ["item_id", "price"]}
    with pytest.raises(UserError, match="embeds tokens, and 'price' is of type float"):
        model_of(in_folder, selected_features=["price"], load_col=columns)


# --- which columns are fields ---
def chosen(folder: Path, model: str = "MLP4Rec", **more: Any) -> tuple[Any, Any]:
    """The fields that a run reads, and what it loads of the items."""
    config = MMConfig(model, "toy", (), {"data_path": str(folder), **more})
    choose_item_features(config)
    return config["selected_features"], (config["load_col"] or {}).get("item")


def test_fields_are_the_token_columns_that_are_there(in_folder: Path) -> None:
    random_interactions(in_folder / "toy", LENGTHS)
    assert chosen(in_folder) == ([], None)
    write_fields(in_folder)
    assert chosen(in_folder) == (["brand", "words"], ["item_id", "brand", "words"])
    assert chosen(in_folder, selected_features="[]") == ([], None)
    inside = {"retriever": "MLP4Rec", "backbone": "tiny"}
    assert chosen(in_folder, "PRIME", **inside)[0] == ["brand", "words"]
    header = "item_id:token class:token_seq brand:token"  # RecBole's default is one of them
    write_atomic(in_folder / "toy" / "toy.item", header, [["i0", "c", "b"]])
    assert chosen(in_folder)[0] == ["class", "brand"]


@pytest.mark.parametrize("fields", [True, False])
def test_it_runs_from_the_name_and_loads_again(in_folder: Path, fields: bool) -> None:
    random_interactions(in_folder / "toy", [7] * 12)
    if fields:
        write_fields(in_folder)
    shop = {"data_path": str(in_folder), "user_inter_num_interval": "[1,inf)"}
    first = quick_start.run("MLP4Rec", "toy", overrides=keys(in_folder, **shop))
    again = quick_start.load(Path(first["run_dir"]))
    assert again["test"] == first["test"]
    assert first["train_mode"] == "prefix"
    assert first["config"]["selected_features"] == (["brand", "words"] if fields else [])
