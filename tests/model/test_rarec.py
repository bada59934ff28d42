"""RA-Rec on a small generated shop: what is scored, what is trained on what, and what is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recbole_mm.config import MMConfig
from recbole_mm.model.layers.id_vectors import IdVectors, item_scorer, padded
from recbole_mm.model.rarec import RARec
from recbole_mm.quick_start import Data, build_model, prepare_data, run
from recbole_mm.trainer.run import Run
from recbole_mm.trainer.staged import StagedTrainer
from tests.backbone import encoders

SMALL = {
    "backbone": "tiny",
    "epochs": 2,
    "train_batch_size": 8,
    "hidden_size": 16,
    "inner_size": 16,
    "dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "topk": [1, 5, 10, 20],
    "tune": "alignment",
    "score_norm": "none",
    "n_samples": 60,
    "alignment_batch_size": 8,
    "alignment_max_steps": 2,
    "alignment_valid_users": 0,
    "show_progress": False,
}


@dataclass
class Shop:
    """A model and all it was made of; the ID model is untrained but its vectors are scaled."""

    config: MMConfig
    data: Data
    model: RARec
    stage: Any

    @property
    def rows(self) -> Any:
        return self.data.test._dataset.inter_feat


def shop_of(mini: Path, tmp_path: Path, **changes: Any) -> Shop:
    keys = {**SMALL, "data_path": str(mini), "cache_dir": str(tmp_path / "cache"), **changes}
    config = MMConfig("RARec", "mini", overrides=keys)
    data = prepare_data(config)
    model = build_model(config, data)
    run = Run.start(tmp_path / "saved", config)
    trainer = StagedTrainer(config, model, run)
    trainer.data_collect(data.train)
    trainer._open(data.train, data.valid, show_progress=False)
    stage = trainer.stages[-1]
    stage.prepare(trainer.context)
    model.enter("alignment")
    return Shop(config, data, model, stage)


@pytest.fixture(scope="module")
def shop(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """For tests that leave its weights alone."""
    folder = tmp_path_factory.mktemp("rarec")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield shop_of(mini, folder)


def one_by_one(model: RARec, history: list[int], side: str = "user") -> torch.Tensor:
    """A user's or an item's vector by the definition: one text, one prefix, the mean state."""
    language_model = model.aligned.language_model
    if side == "user":
        text = model.texts.history(history)
        vector = model.ids.users([np.array(history)])
    else:
        text, vector = model.texts.item(history[0]), model.item_ids[history]
    d = model.aligned.sides[side](vector)
    ids = torch.from_numpy(text)[None]
    states = language_model.reads(ids, torch.ones_like(ids), d)
    return states[0].mean(dim=0)


def test_a_score_is_the_product_of_both_towers(shop: Shop) -> None:
    model, rows = shop.model, shop.rows
    scores = model.full_sort_predict(rows)
    for row in (0, 7, 23):
        history = rows[model.ITEM_SEQ][row, : rows[model.ITEM_SEQ_LEN][row]].tolist()
        user = one_by_one(model, history)
        for item in (1, 5, 30):
            expected = user @ one_by_one(model, [item], "item")
            torch.testing.assert_close(scores[row, item], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.predict(rows), scores.gather(1, rows[model.ITEM_ID][:, None])[:, 0]
    )


def test_a_row_alone_scores_as_among_others(shop: Shop) -> None:
    together = shop.model.full_sort_predict(shop.rows)
    shop.model.forget()
    alone = shop.model.full_sort_predict(shop.rows[torch.tensor([11])])
    torch.testing.assert_close(alone[0], together[11], rtol=1e-4, atol=1e-5)


def test_users_and_items_are_read_once_until_weights_change(
    mini: Path, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = shop_of(mini, in_folder)
    model, reads = shop.model, shop.model.aligned.language_model
    rows = shop.rows[torch.tensor([0, 7, 0])]  # two histories
    vectors, read = reads.vectors, []

    def counted(texts: Any, **how: Any) -> torch.Tensor:
        read.append(len(texts[0]))
        return vectors(texts, **how)

    monkeypatch.setattr(reads, "vectors", counted)
    before = model.full_sort_predict(rows)
    assert sum(read) == model.n_items + 2
    assert torch.equal(model.full_sort_predict(rows), before)
    assert sum(read) == model.n_items + 2
    state = {name: tensor.clone() for name, tensor in shop.stage.state().items()}
    state["sides.user.weight"] += 0.01
    shop.stage.load_state(state)
    after = model.full_sort_predict(rows)
    assert sum(read) == 2 * (model.n_items + 2)
    assert not torch.equal(after, before)
    shop.stage.loss(shop.stage.plan(0)[0])  # a step may follow
    so_far = sum(read)
    assert torch.equal(model.full_sort_predict(rows), after)
    assert sum(read) == so_far + model.n_items + 2


def test_fusion_adds_standardised_scores(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = shop.model, {}
    for source in ("alignment", "id_model", "fusion"):
        monkeypatch.setattr(model, "active", source)
        monkeypatch.setattr(model, "alpha", 0.5)
        found[source] = model.full_sort_predict(shop.rows)[:, 1:]

    def standard(row: torch.Tensor) -> torch.Tensor:
        return (row - row.mean()) / row.std()

    for row in (0, 7):
        expected = standard(found["alignment"][row]) + 0.5 * standard(found["id_model"][row])
        torch.testing.assert_close(found["fusion"][row], expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(model, "alpha", math.inf)  # nothing of ours helps
    order = model.full_sort_predict(shop.rows)[:, 1:].argsort(dim=1, descending=True)
    assert torch.equal(order, found["id_model"].argsort(dim=1, descending=True))


def by_equation_13(
    model: RARec, histories: list[list[int]], liked: list[int], other: list[int]
) -> torch.Tensor:
    total = torch.zeros(())
    for history, a, b in zip(histories, liked, other, strict=True):
        better = one_by_one(model, [a], "item") - one_by_one(model, [b], "item")
        total = total - torch.log(torch.sigmoid(one_by_one(model, history) @ better))
    return total / len(histories)


def by_softmax(
    model: RARec,
    histories: list[list[int]],
    liked: list[int],
    owners: list[np.ndarray],
    trained: np.ndarray,
) -> torch.Tensor:
    """A sample's item against those of the others, but for what its user took."""
    total = torch.zeros(())
    for history, item, taken in zip(histories, liked, owners, strict=True):
        user = one_by_one(model, history)
        rivals = [item, *(other for other in liked if other not in taken)]
        logits = [
            user @ one_by_one(model, [i], "item") - np.log((trained == i).mean()) for i in rivals
        ]
        total = total + torch.stack(logits).logsumexp(0) - logits[0]
    return total / len(histories)


def by_the_teacher(model: RARec, histories: list[list[int]], items: list[int]) -> torch.Tensor:
    """The ID model's distribution over the items, and ours."""
    total, encoder = torch.zeros(()), model.id_model.encoder
    for history in histories:
        user = one_by_one(model, history)
        ours = torch.stack([user @ one_by_one(model, [i], "item") for i in items]).log_softmax(0)
        rows, lengths = padded([np.array(history)], model.max_seq_length)
        theirs = encoder.scores(encoder(rows, lengths))[0, items].detach().softmax(0)
        total = total - (theirs * ours).sum()
    return total / len(histories)


@pytest.mark.parametrize(
    ("negatives", "distill"), [("uniform", 0.0), ("in_batch", 0.0), ("in_batch", 0.3)]
)
def test_the_loss_is_equation_16(
    shop: Shop, negatives: str, distill: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stage = shop.model, shop.stage
    how = replace(stage.tuning, negatives=negatives, distill=distill)
    monkeypatch.setattr(stage, "tuning", how)
    batch = stage.plan(0)[0]
    found = stage.loss(batch)
    liked = stage.sequences.items[stage.samples.place[batch.samples]].tolist()
    histories = [stage._history(row).tolist() for row in batch.samples]
    if negatives == "uniform":
        other = stage._negatives(batch.samples, np.random.default_rng(batch.seed)).tolist()
        ranking = by_equation_13(model, histories, liked, other)
    else:
        other = []
        owners = [stage.sequences[int(row)] for row in stage.samples.owner[batch.samples]]
        ranking = by_softmax(model, histories, liked, owners, stage.sequences.items)
    if distill:
        u = model.ids.users([np.array(history) for history in histories])
        other = stage._favourites(u, batch.seed).tolist()
        teacher = by_the_teacher(model, histories, sorted({*liked, *other}))
        ranking = (1 - distill) * ranking + distill * teacher

    def text_states(text: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(text)[None]
        _, states = model.aligned.language_model.reads.states(ids, torch.ones_like(ids))
        return states[:, 0].mean(dim=1)  # (N, H)

    def contrast(side: str, vectors: torch.Tensor, texts: list[np.ndarray], ids: list[int]) -> Any:
        p = model.aligned.sides[side].project(vectors)  # (N, B, H)
        t = torch.stack([text_states(text) for text in texts], dim=1)
        total = torch.zeros(())
        for layer in range(len(p)):
            for k in range(len(ids)):
                logits = F.cosine_similarity(p[layer, k][None], t[layer], dim=1) / 0.5
                rivals = [j for j in range(len(ids)) if j == k or ids[j] != ids[k]]
                total = total + logits[rivals].logsumexp(0) - logits[k]
        return total / (len(p) * len(ids))

    owners = stage.sequences.users[stage.samples.owner[batch.samples]].tolist()
    u = model.ids.users([np.array(h) for h in histories])
    users = contrast("user", u, [model.texts.history(h) for h in histories], owners)
    items = sorted({*liked, *other})
    texts = [model.texts.item(item) for item in items]
    expected = ranking + 0.1 * (users + contrast("item", model.item_ids[items], texts, items))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # texts are kept in float16


def test_samples_end_before_what_is_held_out(shop: Shop) -> None:
    stage = shop.stage
    held = {
        (int(user), int(item))
        for part in (shop.data.valid, shop.data.test)
        for user, item in zip(
            part._dataset.inter_feat["user_id"], part._dataset.inter_feat["item_id"], strict=True
        )
    }
    for row in range(len(stage.samples)):
        owner = int(stage.sequences.users[stage.samples.owner[row]])
        target = int(stage.sequences.items[stage.samples.place[row]])
        history = stage._history(row)
        assert (owner, target) not in held
        assert target == stage.sequences[int(stage.samples.owner[row])][len(history)]
        whole = stage.sequences[int(stage.samples.owner[row])]
        assert history.tolist() == whole[: len(history)].tolist()


def test_a_users_vector_is_of_the_history_it_is_given(shop: Shop) -> None:
    before = shop.model.ids.users([np.array([3, 4])])
    among = shop.model.ids.users([np.array([5, 6, 7, 8, 9]), np.array([3, 4])])
    torch.testing.assert_close(among[1:], before)


def test_negatives_were_never_taken(shop: Shop) -> None:
    stage = shop.stage
    rows = np.arange(len(stage.samples))
    for seed in range(5):
        drawn = stage._negatives(rows, np.random.default_rng(seed))
        for row, item in zip(rows, drawn, strict=True):
            assert item not in stage.sequences[int(stage.samples.owner[row])]
            assert 1 <= item < shop.model.n_items


def test_only_the_alignment_learns_and_all_of_it(mini: Path, in_folder: Path) -> None:
    shop = shop_of(mini, in_folder)
    model, stage = shop.model, shop.stage
    named = dict(model.named_parameters())
    frozen = {n: p.clone() for n, p in named.items() if not n.startswith("aligned.sides")}
    trained = dict(model.aligned.sides.named_parameters())
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(stage.param_groups(), lr=1e-2)
    stage.loss(stage.plan(0)[0]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in trained.items())
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)
    count = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    assert count == 2 * 2 * (64 * 17 + 64 + 64)  # towers, layers, (W, b, c)


def test_frozen_weights_may_be_narrower_than_trained_ones(mini: Path, in_folder: Path) -> None:
    folder = encoders.mpnet(in_folder / "weights")
    small = {"backbone": str(folder), "task": "t", "max_user_tokens": 38, "max_item_tokens": 8}
    wide, narrow = (
        shop_of(mini, in_folder, **small, dtype=name) for name in ("float32", "bfloat16")
    )
    assert {p.dtype for p in narrow.model.aligned.language_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in narrow.model.aligned.sides.parameters()} == {torch.float32}
    for shop in (wide, narrow):
        shop.stage.loss(shop.stage.plan(0)[0]).backward()
    pairs = zip(
        wide.model.aligned.sides.parameters(), narrow.model.aligned.sides.parameters(), strict=True
    )
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=0, atol=0)  # they begin as one
        assert two.grad.dtype == torch.float32
        assert F.cosine_similarity(one.grad.flatten(), two.grad.flatten(), dim=0) > 0.99
    trained = shop_of(mini, in_folder, **small, dtype="bfloat16", tune="both")
    assert {p.dtype for p in trained.model.aligned.parameters()} == {torch.float32}


def test_a_frozen_language_model_has_no_dropout(shop: Shop) -> None:
    shop.stage.module.train()
    assert not shop.model.aligned.language_model.training
    assert shop.model.aligned.sides.training
    shop.stage.module.eval()


def test_it_learns_a_few_samples_by_heart(mini: Path, in_folder: Path) -> None:
    how = {"tune": "both", "data_mode": "random", "align_weight": 0.0, "distill": 0.0}
    shop = shop_of(mini, in_folder, n_samples=8, **how)
    stage = shop.stage
    optimizer = torch.optim.AdamW(stage.param_groups(), lr=2e-3)
    batch = stage.plan(0)[0]
    first = stage.loss(batch).item()
    for _ in range(60):
        optimizer.zero_grad()
        stage.loss(batch).backward()
        optimizer.step()
    assert stage.loss(batch).item() < 0.2 * first


VARIANTS = [
    {"use_id": False, "n_instructions": 2},
    {"projector": "shared"},
    {"n_instructions": 0},
    {"inject": "inputs"},
    {"inject": "project_inputs"},
    {"inject": "concatenate"},
    {"negatives": "uniform", "distill": 0.0},
    {"tune": "both"},
    {"tune": "language_model"},
    {"score_norm": "cosine"},
    {"data_mode": "all"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_takes_a_step(mini: Path, in_folder: Path, changes: dict[str, Any]) -> None:
    shop = shop_of(mini, in_folder, **changes)
    stage = shop.stage
    before = shop.model.full_sort_predict(shop.rows)
    optimizer = torch.optim.AdamW(stage.param_groups(), lr=1e-2)
    stage.loss(stage.plan(0)[0]).backward()
    optimizer.step()
    shop.model.forget()
    after = shop.model.full_sort_predict(shop.rows)
    assert torch.isfinite(after[:, 1:]).all()
    assert not torch.equal(before, after)
    state = {name: tensor.clone() for name, tensor in stage.state().items()}
    other = shop_of(mini, in_folder / "other", **changes)
    other.stage.load_state(state)
    other.model.id_model.load_state_dict(shop.model.id_model.state_dict())
    other.model.take_ids(shop.model.ids)
    torch.testing.assert_close(other.model.full_sort_predict(shop.rows), after)


def test_words_to_project_on_stay_while_the_models_own_are_trained(
    mini: Path, in_folder: Path
) -> None:
    shop = shop_of(mini, in_folder, inject="project_inputs", tune="both")
    own, words = (
        shop.model.aligned.language_model.reads.word_embeddings,
        shop.model.aligned.sides["user"].words,
    )
    before = own.detach().clone()
    optimizer = torch.optim.AdamW(shop.stage.param_groups(), lr=1e-2)
    shop.stage.loss(shop.stage.plan(0)[0]).backward()
    optimizer.step()
    assert not torch.equal(own, before)
    assert torch.equal(words, before)


def test_texts_that_training_never_saw_have_no_vector(shop: Shop) -> None:
    warm = torch.ones(shop.model.n_items, dtype=torch.bool)
    warm[[4, 9]] = False
    ids = IdVectors(shop.model.id_model, warm)
    ids.fit([np.array([1, 2]), np.array([3]), np.array([5, 6])])
    items = ids.items()
    assert (items[4] == 0).all()
    assert items[5].abs().sum() > 0
    torch.testing.assert_close(items[warm].mean(dim=0), torch.zeros(17), atol=1e-5, rtol=0)
    users = ids.users([np.array([4, 9]), np.array([4, 5])])
    assert (users[0] == 0).all()
    assert users[1].abs().sum() > 0


def test_id_vectors_keep_the_models_own_scores(shop: Shop) -> None:
    model, n = shop.model, shop.model.n_items
    encoder = model.id_model.encoder
    torch.nn.init.normal_(encoder.output_bias)
    assert item_scorer(model.id_model, n) == (encoder.item_embedding, encoder.output_bias)
    ids = IdVectors(model.id_model, torch.arange(n) > 0, scale=3.0)
    histories = [np.array([1, 2]), np.array([3]), np.array([5, 6, 7])]
    ids.fit(histories)
    users, items = ids.users(histories), ids.items()[1:]
    assert users.shape[1] == items.shape[1] == 16 + 1  # the bias is one more
    for vectors in (users[:, :16], items[:, :16]):
        torch.testing.assert_close(vectors.square().mean().sqrt(), torch.tensor(3.0))
    rows, lengths = padded(histories, model.max_seq_length)
    wanted = encoder.scores(encoder(rows, lengths))[:, 1:]
    ours = ids.scores(users, items)
    ours, wanted = (x - x.mean(dim=1, keepdim=True) for x in (ours, wanted))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_bias_has_none(mini: Path, in_folder: Path) -> None:
    """Not even where other weights have as many numbers as there are items, all zero at first."""
    model = shop_of(mini, in_folder, id_model="SASRec", hidden_size=32).model
    assert model.n_items == 32
    table, bias = item_scorer(model.id_model, model.n_items)
    assert (table.embedding_dim, bias) == (32, None)
    assert model.aligned.sides["user"].weight.shape[2] == 32


def test_both_sides_begin_as_one(mini: Path, in_folder: Path) -> None:
    """So that before any step the ID vectors' product is most of what the prefixes bring in."""
    model = shop_of(mini, in_folder, id_scale=15.0).model
    sides = model.aligned.sides
    torch.testing.assert_close(dict(sides["user"].state_dict()), dict(sides["item"].state_dict()))
    generator = torch.Generator().manual_seed(0)
    vectors = 15 * torch.randn(24, model.item_ids.shape[1], generator=generator)
    text = [model.texts.item(1)] * len(vectors)
    with torch.no_grad():
        users, items = model.aligned.users(text, vectors), model.aligned.items(text, vectors)

    def alone(scores: torch.Tensor) -> torch.Tensor:  # what is due to the pair
        return scores - scores.mean(0) - scores.mean(1, keepdim=True) + scores.mean()

    pairs = torch.stack([alone(users @ items.T).flatten(), alone(vectors @ vectors.T).flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.5


def test_text_states_are_computed_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    states = shop.model.text_states
    texts = [shop.model.texts.item(item) for item in (1, 2, 3)]
    kept = states.get(texts)
    fresh = shop.model.aligned.language_model.layer_means(
        shop.model.aligned.language_model.padded(texts)
    )
    torch.testing.assert_close(kept, fresh, rtol=2e-3, atol=2e-3)

    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(states.model, "layer_means", never)
    torch.testing.assert_close(states.get(texts), kept)


def test_histories_are_read_newest_first_within_their_budget(shop: Shop) -> None:
    texts, encoder = shop.model.texts, shop.model.aligned.language_model.encoder
    items = list(range(1, 30))
    row = texts.history(items)
    assert len(row) <= shop.config["max_user_tokens"]
    said = encoder.tokenizer.decode(row.tolist())
    titles = [shop.model.titles[item] for item in items]
    assert said.startswith(shop.config["task"])
    assert str(titles[-1])[:8] in said
    assert len(texts.history([1])) < len(texts.history([1, 2])) < len(row)
    short = encoder.tokenizer.decode(texts.history([1, 2]).tolist())
    assert short.index(str(titles[1])[:8]) < short.index(str(titles[0])[:8])


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_any_model_of_vectors_can_be_the_id_model(mini: Path, in_folder: Path, name: str) -> None:
    extra = {"n_heads": 2} if name == "SASRec" else {"embedding_size": 16}
    shop = shop_of(mini, in_folder, id_model=name, **extra)
    assert torch.isfinite(shop.model.full_sort_predict(shop.rows)[:, 1:]).all()


def flags(mini: Path, **changes: Any) -> dict[str, Any]:
    return {**SMALL, "data_path": str(mini), "alignment_max_steps": 6, **changes}


def test_a_run_has_all_rows_slices_and_its_samples(mini: Path, in_folder: Path) -> None:
    result = run("RARec", "mini", overrides=flags(mini))
    assert [row["name"] for row in result["rows"]] == ["id_model", "alignment", "fusion"]
    assert result["test"] == result["rows"][1]["test"]
    stage = result["stages"]["alignment"]
    assert stage["samples"]["samples"] == 60
    assert stage["trainable_parameters"] == 2 * 2 * (64 * 17 + 64 + 64)  # 17: with the bias
    manifest = json.loads((Path(result["run_dir"]) / "samples.json").read_text())
    assert manifest == stage["samples"]
    slices = result["slices"]
    assert slices["warm"]["users"] + slices["cold"]["users"] == result["test_users"]
    total = sum(part["users"] * part.get("ndcg@10", 0.0) for part in slices.values())
    assert total / result["test_users"] == pytest.approx(result["test"]["ndcg@10"], abs=1e-4)
