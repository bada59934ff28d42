"""LRURec against an official-style reference: left-padded, masked, logits at every position."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_mm.data.sequences import (
    STARTS,
    TARGETS,
    UserSequences,
    WholeRows,
    collate,
    group_by_user,
    whole_windows,
)
from recbole_mm.errors import UserError
from recbole_mm.model.layers.lru import LRUBlock
from recbole_mm.model.lrurec import LRUEncoder, LRURec, RetrieverStage
from recbole_mm.stage import StageSettings

PROPERTIES = Path(__file__).resolve().parents[2] / "properties"
V, L = 30, 9
FIELDS = {
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length",
    "NEG_PREFIX": "neg_",
    "device": torch.device("cpu"),
    "seed": 2020,
}


def config_of(**changes: Any) -> dict[str, Any]:
    """The shipped defaults and what RecBole adds, small and without dropout unless changed."""
    defaults = yaml.safe_load((PROPERTIES / "model" / "LRURec.yaml").read_text())
    small = {
        "hidden_size": 8,
        "inner_size": 16,
        "dropout_prob": 0.0,
        "attn_dropout_prob": 0.0,
        "MAX_ITEM_LIST_LENGTH": L,
        "train_batch_size": 4,
    }
    return defaults | FIELDS | small | changes


def model_of(n_items: int = V, **changes: Any) -> LRURec:
    torch.manual_seed(0)
    return LRURec(config_of(**changes), SimpleNamespace(num=lambda field: n_items))


def sequences_of(lengths: list[int], n_items: int = V, seed: int = 0) -> UserSequences:
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return group_by_user(users, rng.integers(1, n_items, len(users)))


def whole_batch(sequences: UserSequences, max_len: int = L) -> Interaction:
    rows = whole_windows(sequences, max_len)
    return collate(rows, np.arange(len(rows)))


def prefix_rows(sequences: UserSequences, max_len: int = L) -> Interaction:
    """RecBole's augmentation, spelt out."""
    histories, targets = [], []
    for user in range(len(sequences)):
        items = sequences[user].tolist()
        for t in range(1, len(items)):
            histories.append(items[max(0, t - max_len) : t])
            targets.append(items[t])
    lengths = torch.tensor([len(h) for h in histories])
    grid = torch.zeros(len(histories), max_len, dtype=torch.int64)
    for row, history in enumerate(histories):
        grid[row, : len(history)] = torch.tensor(history)
    return Interaction(
        {"item_id_list": grid, "item_length": lengths, "item_id": torch.tensor(targets)}
    )


# --- the official computation, in its own layout --------------------------------------------------


def official_block(made: LRUBlock, x: Tensor, mask: Tensor) -> Tensor:
    """(B, L', D), left-padded; a cell gets no state from a padded one."""
    layer, ff = made.lru, made.feed_forward
    nu, theta, gamma = layer.params_log.exp()
    lam = torch.exp(torch.complex(-nu, theta))
    w, b, out = layer.in_proj.weight, layer.in_proj.bias, layer.out_proj.weight
    B, c_b = torch.complex(w[0::2], w[1::2]), torch.complex(b[0::2], b[1::2])
    C = torch.complex(out[:, 0::2], -out[:, 1::2])
    u = gamma * (x.to(B.dtype) @ B.T + c_b)  # (B, L', H)
    states = [u[:, 0]]
    for t in range(1, x.shape[1]):
        states.append(lam * states[-1] * mask[:, t - 1, None] + u[:, t])
    y = (torch.stack(states, 1) @ C.T).real + layer.out_proj.bias
    y = layer.layer_norm(y + x)
    return ff.layer_norm(ff.w_2(F.gelu(ff.w_1(y))) + y)


def official_logits(encoder: LRUEncoder, items: Tensor) -> Tensor:
    """Logits of every cell of left-padded rows, padded further to a power of two. (B, L, V)."""
    width = items.shape[1]
    items = F.pad(items, (2 ** (width - 1).bit_length() - width, 0))
    x = encoder.layer_norm(encoder.item_embedding(items))
    for made in encoder.blocks:
        x = official_block(made, x, items > 0)
    return (x @ encoder.item_embedding.weight.T + encoder.output_bias)[:, -width:]


def official_loss(encoder: LRUEncoder, sequences: UserSequences, bos: bool, width: int) -> Tensor:
    """Labels are a user's last items, inputs those but the last: one cell fewer, left-padded."""
    inputs, labels = [], []
    for user in range(len(sequences)):
        items = sequences[user].tolist()
        label = items[-width:] if bos else items[1:][-width:]
        inputs.append([0] * (width - len(items[:-1])) + items[:-1][-width:])
        labels.append([0] * (width - len(label)) + label)
    logits = official_logits(encoder, torch.tensor(inputs))
    return F.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten(), ignore_index=0)


@pytest.mark.parametrize("bos", [True, False])
def test_loss_and_gradients_are_the_official_ones(bos: bool) -> None:
    model = model_of(bos_target=bos).double()
    for parameter in model.parameters():  # large enough for every term to count
        parameter.data += 0.2 * torch.randn_like(parameter)
    sequences = sequences_of([3, 9, 5, 2, 7, 2])
    ours = model.calculate_loss(whole_batch(sequences))
    official = official_loss(model.encoder, sequences, bos, L)
    torch.testing.assert_close(ours, official, rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    got = torch.autograd.grad(ours, parameters)
    for a, b in zip(got, torch.autograd.grad(official, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    pad = got[[n for n, _ in model.named_parameters()].index("encoder.item_embedding.weight")][0]
    assert pad.abs().max() > 0  # the pad is trained: always by the softmax, and as the first input


def test_scores_are_the_official_ones() -> None:
    model = model_of().double().eval()
    batch = prefix_rows(sequences_of([3, 9, 5, 12]))
    left = torch.stack(
        [
            torch.roll(row, L - int(n))
            for row, n in zip(batch["item_id_list"], batch["item_length"], strict=True)
        ]
    )
    scores = model.full_sort_predict(batch)
    torch.testing.assert_close(
        scores, official_logits(model.encoder, left)[:, -1], rtol=0, atol=1e-10
    )
    # RecBole's `predict` scores one item a row.
    picked = scores.gather(1, batch["item_id"][:, None]).squeeze(1)
    torch.testing.assert_close(model.predict(batch), picked, rtol=0, atol=1e-12)


def test_parameter_count_is_the_official_one_without_dead_biases() -> None:
    encoder = LRUEncoder(12_102)
    assert sum(p.numel() for p in encoder.parameters()) == 920_518 - 2 * 64


# --- rows and modes -------------------------------------------------------------------------------


def test_whole_rows_and_prefix_rows_have_the_same_loss() -> None:
    model = model_of(bos_target=False).double().eval()
    sequences = sequences_of([3, 10, 5, 2, 7, 1])
    whole, prefix = whole_batch(sequences), prefix_rows(sequences)
    assert int((whole[TARGETS] > 0).sum()) == len(prefix)
    torch.testing.assert_close(
        model.calculate_loss(whole), model.calculate_loss(prefix), rtol=0, atol=1e-10
    )


def test_first_items_are_targets_of_a_lone_pad() -> None:
    with_bos = model_of(bos_target=True).double()
    without = model_of(bos_target=False).double()
    batch = whole_batch(sequences_of([3, 25, 5, 2]))  # the second user has three rows
    starts, targets = batch[STARTS], batch[TARGETS]
    assert starts.tolist() == [True, True, False, False, True, True]
    pad = with_bos.encoder.scores(with_bos(torch.zeros(1, 1).long(), torch.ones(1).long()))
    firsts = batch["item_id_list"][starts, 0]
    first_loss = F.cross_entropy(pad.expand(len(firsts), -1), firsts)
    n, m = int((targets > 0).sum()), len(firsts)
    expected = (without.calculate_loss(batch) * n + first_loss * m) / (n + m)
    torch.testing.assert_close(with_bos.calculate_loss(batch), expected, rtol=0, atol=1e-10)


def test_targets_on_amazon_beauty(shared_data: Path) -> None:
    lines = (shared_data / "amazon-beauty" / "sequences.tsv").read_text().splitlines()[1:]
    train = [[int(i) for i in line.split("\t")[2].split()][:-2] for line in lines]
    users = np.repeat(np.arange(1, len(train) + 1), [len(items) for items in train])
    rows = whole_windows(group_by_user(users, np.concatenate(train)), 50)
    assert len(rows) == 22_512
    assert int(rows.lengths().sum()) == 131_413
    assert int(rows.lengths().sum() + rows.starts.sum()) == 153_776
    # PRIME's code cuts labels at the last 50; a user of more has no first-item label.
    assert sum(min(len(items), 50) for items in train) == 150_258
    assert sum(min(len(items) - (len(items) <= 50), 50) for items in train) == 128_031


# --- states ---------------------------------------------------------------------------------------


def test_states_are_those_of_every_prefix() -> None:
    model = model_of().double().eval()
    lengths = torch.tensor([3, 9, 1])
    grid = torch.randint(1, V, (3, L)) * (torch.arange(L) < lengths[:, None])
    states = model.states(grid)
    assert states.shape == (3, L, 8)
    for row, n in enumerate(lengths.tolist()):
        for t in range(1, n + 1):
            alone = model(grid[row : row + 1, :t], torch.tensor([t]))
            torch.testing.assert_close(states[row, t - 1], alone[0], rtol=0, atol=1e-12)
        assert torch.equal(states[row, n:], torch.zeros(L - n, 8).double())


def test_steps_score_like_the_whole_history() -> None:
    model = model_of().double().eval()
    grid = torch.randint(1, V, (4, L))
    state = model.start_state(4)
    for t in range(L):
        scores, state = model.step(state, grid[:, t])
        batch = Interaction({"item_id_list": grid, "item_length": torch.full((4,), t + 1)})
        torch.testing.assert_close(scores, model.full_sort_predict(batch), rtol=0, atol=1e-10)


def test_a_row_scores_the_same_alone_and_among_others() -> None:
    model = model_of().eval()
    batch = prefix_rows(sequences_of([3, 9, 5]))
    together = model.full_sort_predict(batch)
    for row in range(len(batch)):
        torch.testing.assert_close(
            model.full_sort_predict(batch[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-6
        )


# --- training -------------------------------------------------------------------------------------


def stage_of(model: LRURec, sequences: UserSequences, **settings: Any) -> RetrieverStage:
    train = SimpleNamespace(train_sequences=sequences, inter_feat=prefix_rows(sequences))
    made = StageSettings(epochs=1, learning_rate=1e-2, **settings)
    return model.make_stages({"train": made}, train)[0]


def fit(stage: RetrieverStage, epochs: int) -> float:
    optimizer = torch.optim.AdamW(stage.param_groups(), lr=stage.settings.learning_rate)
    for epoch in range(epochs):
        total = 0.0
        for batch in stage.plan(epoch):
            optimizer.zero_grad()
            loss = stage.loss(batch)
            loss.backward()
            optimizer.step()
            total += loss.item() / len(stage.plan(epoch))
    return total


@pytest.mark.parametrize("mode", ["whole", "prefix"])
def test_it_learns_eight_users_by_heart(mode: str) -> None:
    # Each user begins with an item of their own and goes on at random among eight: what comes next
    # can only be told by remembering how the row began.
    grid = torch.cat([torch.arange(1, 9)[:, None], torch.randint(1, 9, (8, 5))], 1)
    sequences = group_by_user(np.repeat(np.arange(1, 9), 6), grid.flatten().numpy())
    rows = 8 if mode == "whole" else 40  # one batch
    changes = {"hidden_size": 32, "train_batch_size": rows, "bos_target": False}
    model = model_of(9, train_mode=mode, **changes)
    assert fit(stage_of(model, sequences), 100) < 0.05
    model.eval()
    batch = Interaction({"item_id_list": grid[:, :5], "item_length": torch.full((8,), 5)})
    assert torch.equal(model.full_sort_predict(batch).argmax(1), grid[:, 5])


def test_first_items_are_learnt_as_a_prior() -> None:
    model = model_of(6, hidden_size=16)
    users = np.repeat(np.arange(1, 9), 2)
    sequences = group_by_user(users, np.array([1, 3] * 6 + [2, 4] * 2))
    fit(stage_of(model, sequences), 100)
    pad = model.encoder.scores(model(torch.zeros(1, 1).long(), torch.ones(1).long()))
    probability = pad.softmax(1)[0]
    torch.testing.assert_close(probability[1:3], torch.tensor([0.75, 0.25]), rtol=0, atol=0.05)


@pytest.mark.parametrize("changes", [{}, {"length_buckets": True}, {"train_mode": "prefix"}])
def test_plan_is_a_function_of_the_epoch_and_takes_every_row_once(changes: dict[str, Any]) -> None:
    sequences = sequences_of([5, 3, 9, 12, 2, 2, 7, 8, 4, 6])
    stage = stage_of(model_of(**changes), sequences)
    first, second = stage.plan(0), stage.plan(1)
    assert [b.tolist() for b in first] == [b.tolist() for b in stage.plan(0)]
    assert [b.tolist() for b in first] != [b.tolist() for b in second]
    rows = len(stage.rows)
    assert rows == (48 if changes.get("train_mode") == "prefix" else 11)
    assert sorted(np.concatenate(first).tolist()) == list(range(rows))
    assert all(len(batch) <= 4 for batch in first)
    assert isinstance(stage.rows, WholeRows) == (changes.get("train_mode") != "prefix")
    assert stage.loss(first[0]).item() > 0


@pytest.mark.parametrize(("decay_lru", "free"), [(True, False), (False, True)])
def test_param_groups_hold_every_parameter_once(decay_lru: bool, free: bool) -> None:
    model = model_of(decay_log_params=decay_lru)
    stage = stage_of(model, sequences_of([3]), weight_decay=0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, fixed = ([names[id(p)] for p in g["params"]] for g in stage.param_groups())
    assert [g["weight_decay"] for g in stage.param_groups()] == [0.01, 0.0]
    assert sorted(decayed + fixed) == sorted(names.values())
    assert "encoder.item_embedding.weight" in decayed
    assert "encoder.output_bias" in fixed
    assert ("encoder.blocks.0.lru.params_log" in fixed) == free
    assert not [n for n in decayed if "bias" in n or "layer_norm" in n]


def test_same_seed_same_model() -> None:
    first, second = model_of().state_dict(), model_of().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_loss_and_gradients() -> None:
    batch = whole_batch(sequences_of([3, 9, 5, 12, 2]))
    grads = []
    for device in ("cpu", "cuda"):
        model = model_of().double().to(device)
        model.calculate_loss(batch.to(device)).backward()
        grads.append([p.grad.cpu() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# --- benchmark ------------------------------------------------------------------------------------


def test_benchmark_asserts_equal_losses_and_writes_its_ratios(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    script = PROPERTIES.parent / "benchmarks" / "lrurec_step.py"
    sizes = ["--items=200", "--rows=8", "--batches=2", f"--out={out}"]
    subprocess.run([sys.executable, script, *sizes], check=True, capture_output=True)
    result = json.loads(out.read_text())
    whole = [v for k, v in result["losses_without_dropout"].items() if "prefix" not in k]
    assert max(whole) - min(whole) < 1e-5 * whole[0]
    assert all(row["times_ours"] > 0 for row in result["step"].values())
    assert set(result["goals"]) == {"naive", "prefix, naive layers", "evaluation"}


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss_type": "BPR"}, "loss_type is BPR"),
        ({"train_mode": "windows"}, "train_mode is windows"),
        ({"r_min": 0.99, "r_max": 0.8}, "r_min is 0.99"),
        ({"r_max": 1.0}, "r_max 1.0"),
    ],
)
def test_a_wrong_value_is_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        model_of(**changes)


@pytest.mark.parametrize("recipe", ["lrurec_prime_retriever", "lrurec_official"])
def test_recipes_set_known_keys_and_make_a_model(recipe: str) -> None:
    values = yaml.safe_load((PROPERTIES / "paper" / f"{recipe}.yaml").read_text())
    assert set(values) - set(config_of()) == {"mask_history"}
    model = LRURec(config_of() | values, SimpleNamespace(num=lambda field: V))
    assert model.encoder.dropout.p == values["dropout_prob"]
    assert model.max_seq_length == 50
    assert values["valid_metric"].split("@")[1] in map(str, values["topk"])


def test_prime_recipe_is_the_default() -> None:
    values = yaml.safe_load((PROPERTIES / "paper" / "lrurec_prime_retriever.yaml").read_text())
    defaults = yaml.safe_load((PROPERTIES / "model" / "LRURec.yaml").read_text())
    assert {key: defaults[key] for key in values if key in defaults} | {
        "topk": values["topk"],
        "mask_history": False,
    } == values
