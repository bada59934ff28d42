"""I-LLMRec's variants on a small generated shop: what each trains, mistakes, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_mm.errors import UserError
from recbole_mm.quick_start import run
from tests.model.illmrec_world import SMALL, Shop, said, shop_of


def trained_names(shop: Shop) -> set[str]:
    named = shop.stage.module.named_parameters()
    return {name.partition(".")[0] for name, p in named if p.requires_grad}


def test_a_frozen_language_model_stays_as_it_is(mini: Path, in_folder: Path) -> None:
    shop = shop_of(mini, in_folder)
    assert trained_names(shop) == {"rec", "adaptor", "heads"}
    before = {n: p.detach().clone() for n, p in shop.stage.module.named_parameters()}
    shop.stage.module.train()
    assert not shop.model.reader.language_model.training
    shop.train(2, 1e-2)
    for name, parameter in shop.stage.module.named_parameters():
        is_llm = name.startswith("language_model")
        assert torch.equal(before[name], parameter) == is_llm, name


def test_two_stages_train_the_adaptor_and_then_the_rest(mini: Path, in_folder: Path) -> None:
    shop = shop_of(mini, in_folder, two_stage=1)
    named = {n: p for n, p in shop.stage.module.named_parameters() if p.requires_grad}

    def moved(epoch: int) -> set[str]:
        loss = shop.stage.loss(shop.stage.plan(epoch)[0])
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        has = [n for n, g in zip(named, found, strict=True) if g is not None and g.abs().sum() > 0]
        return {name.partition(".")[0] for name in has}

    assert moved(0) == {"adaptor"}
    assert moved(1) == {"heads", "rec"}


def test_a_batch_with_nothing_to_align_changes_nothing(mini: Path, in_folder: Path) -> None:
    shop = shop_of(mini, in_folder, two_stage=1)
    shop.model.prompts.writer._text = lambda item, name: None
    loss = shop.stage.loss(shop.stage.plan(0)[0])
    loss.backward()
    assert loss == 0
    trained = (p for p in shop.stage.module.parameters() if p.grad is not None)
    assert all((p.grad == 0).all() for p in trained)


VARIANTS: list[dict[str, Any]] = [
    {"item_repr": "attribute"},
    {"item_repr": "cf"},
    {"item_repr": "image", "missing_image_rate": 0.5},
    {"item_repr": "image", "missing_image_rate": 1.0},
    {"item_repr": "image", "ire_features": ["cf"]},
    {"use_llm": False},
    {"train_llm": "lora"},
    {"train_llm": "full", "packed": False},
    {"train_token_emb": True},
    {"ila_weight": 0.0},
    {"ila_loss_on": "full", "ire_reduction": "mean", "train_window": "official"},
    {"cf": "SASRec", "n_heads": 2},
    {"adaptor_act": "relu", "adaptor_norm": False},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_learns_and_keeps_what_it_learnt(
    mini: Path, in_folder: Path, changes: dict[str, Any]
) -> None:
    shop = shop_of(mini, in_folder, **changes)
    before = shop.model.full_sort_predict(shop.rows)
    losses = shop.train(6, 3e-3)
    assert losses[-1] < losses[0]
    after = shop.model.full_sort_predict(shop.rows)
    assert torch.isfinite(after[:, 1:]).all()
    assert not torch.allclose(before, after)
    state = {name: tensor.clone() for name, tensor in shop.stage.state().items()}
    other = shop_of(mini, in_folder / "other", **changes)
    other.stage.load_state(state)
    torch.testing.assert_close(other.model.full_sort_predict(shop.rows), after)


def test_what_is_trained_follows_the_keys(mini: Path, in_folder: Path) -> None:
    lora = shop_of(mini, in_folder, train_llm="lora")
    named = [n for n, p in lora.stage.module.named_parameters() if p.requires_grad]
    of_llm = [name for name in named if name.startswith("language_model")]
    assert of_llm
    assert all("lora_" in name for name in of_llm)
    words = shop_of(mini, in_folder / "words", train_token_emb=True)
    named = [n for n, p in words.stage.module.named_parameters() if p.requires_grad]
    assert [n for n in named if n.startswith("language_model")] == [
        "language_model.model.model.embed_tokens.weight"
    ]
    control = shop_of(mini, in_folder / "control", use_llm=False)
    assert trained_names(control) == {"heads"}
    assert control.model.backbone_name is None


def test_the_control_reads_the_mean_of_the_history(mini: Path, in_folder: Path) -> None:
    shop = shop_of(mini, in_folder, use_llm=False)
    model = shop.model
    states, told = model.read([np.array([2, 9]), np.array([4])])
    tables = torch.cat([model.features[t].table for t in ("img", "cf", "text")], dim=1)
    torch.testing.assert_close(states[0], (tables[2] + tables[9]) / 2)
    torch.testing.assert_close(states[1], tables[4])
    assert told == 0


def test_missing_pictures_are_told_in_words(mini: Path, in_folder: Path) -> None:
    shop = shop_of(mini, in_folder, missing_image_rate=0.5)
    known, n = shop.model.features["img"].known, shop.model.n_items - 1
    assert int(known.sum()) == n - round(n / 2)
    for item in range(1, shop.model.n_items):
        text = said(shop, [item])
        assert ("#" in text) == bool(known[item])
        assert ("Category:" in text) != bool(known[item])
    assert shop.stage.finish(shop_context(shop))["items_with_pictures"] == known.sum()


def shop_context(shop: Shop) -> Any:
    from recbole_mm.stage import StageContext

    rows = shop.data.valid._dataset.inter_feat
    return StageContext(rows, Path("."), 0, torch.device("cpu"))


def test_it_learns_a_few_users_by_heart(mini: Path, in_folder: Path) -> None:
    shop = shop_of(mini, in_folder, train_llm="full", n_neg=8)
    losses = shop.train(80, 3e-3)
    assert losses[-1] < 0.2 * losses[0]
    batch = shop.stage.plan(0)[0]
    items, windows = shop.stage.sequences.items, batch.windows
    histories = [items[a:b] for a, b in zip(windows.begin, windows.target, strict=True)]
    with torch.no_grad():
        scores = shop.model._users(histories) @ shop.model._item_vectors().T
    place = scores[:, 1:].argsort(dim=1, descending=True) + 1
    found = (place[:, :3] == torch.from_numpy(items[windows.target])[:, None]).any(dim=1)
    assert found.float().mean() > 0.8


# --- mistakes and runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ire_features": ["image"]}, "ire_features is .*: name some of img, cf, text"),
        ({"ire_features": []}, "name some of img"),
        ({"ila_properties": ["colour"]}, "ila_properties is .*: name some of title"),
        ({"item_repr": "description"}, "has no such column: name it in columns"),
        ({"columns": {"titel": "title"}}, "'titel' is no property"),
        ({"max_context": 40}, "max_context is 40, but item 'p0.*: raise it, or lower"),
        ({"max_context": 40_000}, "reads 32768 tokens"),
        ({"backbone": "tiny-qwen2-vl"}, "is no language model of text alone"),
        ({"cf": "HGN"}, "^cf is HGN, whose scores are no products"),
        ({"use_llm": False, "two_stage": 2}, "^two_stage is 2, but there is nothing to align"),
        ({"ila_weight": 0.0, "two_stage": 1}, "nothing to align"),
        ({"item_repr": "attribute", "two_stage": 1}, "nothing to align"),
        ({"attention": "flash_attention_2"}, "takes no block mask"),
        ({"gradient_checkpointing": True}, "needs train_llm: lora"),
    ],
    ids=str,
)
def test_mistakes_get_one_sentence(
    mini: Path, in_folder: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as told:
        shop_of(mini, in_folder, **changes)
    assert "\n" not in str(told.value)


def test_a_run_has_both_rows(mini: Path, in_folder: Path) -> None:
    result = run("ILLMRec", "mini", overrides={**SMALL, "data_path": str(mini)})
    assert [row["name"] for row in result["rows"]] == ["cf", "alignment"]
    assert result["test"] == result["rows"][1]["test"]
    stage = result["stages"]["alignment"]
    assert stage["items_with_pictures"] == 31  # all that anybody bought
    assert stage["history_tokens"] > 20
    assert result["backbone"] == "tiny"


def test_candidates_are_ranked_for_all_alike(mini: Path, in_folder: Path) -> None:
    keys = {**SMALL, "data_path": str(mini), "eval_candidates": "cand20", "topk": [5, 10]}
    result = run("ILLMRec", "mini", overrides=keys)
    assert result["protocol"] == "cand20"
    assert 0 < result["test"]["hit@5"] <= 1


def test_the_llm_alone_can_be_trained_again(mini: Path, in_folder: Path) -> None:
    flags = {**SMALL, "data_path": str(mini)}
    first = run("ILLMRec", "mini", overrides={**flags, "stages": ["cf"]})
    assert [*first["stages"]] == ["cf"]
    second = run("ILLMRec", "mini", overrides={**flags, "cf_from": first["run_dir"]})
    assert second["stages"]["cf"]["stopped"] == "given"
    assert second["rows"][0]["test"] == first["test"]
