"""PRIME with retrievers other than LRURec, and with stages that another run has trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from safetensors.torch import load_file

from recbole_mm import quick_start
from recbole_mm.config import MMConfig
from recbole_mm.data.demo import Sizes, make_demo
from recbole_mm.data.sequences import TARGETS, collate
from recbole_mm.errors import UserError
from recbole_mm.trainer.run import Run
from recbole_mm.trainer.staged import StagedTrainer
from tests.backbone.conftest import saved_folder  # noqa: F401 (a fixture)
from tests.model.prime_world import SMALL, World, world_of

RETRIEVERS = [
    {"retriever": "SASRec"},
    {"retriever": "SASRec", "train_mode": "whole"},
    {"retriever": "GRU4Rec", "train_mode": "whole"},
    {"retriever": "BERT4Rec", "train_mode": "whole"},
    {"retriever": "FMLPRec"},
    {"retriever": "ComiRec"},
    {"retriever": "ComiRec", "train_mode": "whole", "n_interests": 2},
    {"retriever": "MLP4Rec"},
    {"retriever": "Caser"},  # reads rows of full length, and has a vector a user
]
NAMES = [f"{r['retriever']}-{r.get('train_mode', 'prefix')}" for r in RETRIEVERS]


def small(changes: dict[str, Any]) -> dict[str, Any]:
    """Keys of the small retriever that this one has, and its own."""
    known = MMConfig("PRIME", "mini", (), {"backbone": "tiny", **changes}).final_config_dict
    return {**{k: v for k, v in SMALL.items() if k in known}, **changes}


def world_with(mini: Path, changes: dict[str, Any], patch: pytest.MonkeyPatch) -> World:
    patch.setattr("tests.model.prime_world.SMALL", small(changes))
    return world_of(mini)


@pytest.mark.parametrize("changes", RETRIEVERS, ids=NAMES)
def test_any_sequential_model_retrieves_and_is_optimised(
    mini: Path, in_folder: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_with(mini, changes, monkeypatch)
    run = Run.start(in_folder, world.config)
    trainer = StagedTrainer(world.config, world.model, run)
    trainer.fit(world.data.train, world.data.valid, world.data.test)
    assert type(world.model.retriever).__name__ == changes["retriever"]
    assert run.stage("retriever")["steps"] > 0
    finished = run.stage("preference")["finished"]
    assert finished["ranker_calls"] > 0
    assert 0 < finished["retrieval_rate"] < 1
    loaded = world_with(mini, changes, monkeypatch)
    again = StagedTrainer(loaded.config, loaded.model, run)
    again.load(loaded.data.train, loaded.data.valid)
    for readout, fresh in zip(
        world.model.readouts("preference"), loaded.model.readouts("preference"), strict=True
    ):
        readout.use()
        fresh.use()
        one, other = (
            t.evaluate(w.data.test, load_best_model=False)
            for t, w in ((trainer, world), (again, loaded))
        )
        assert one == pytest.approx(other, abs=1e-9), readout.name


@pytest.mark.parametrize("changes", RETRIEVERS, ids=NAMES)
def test_positions_score_as_rows_of_their_own(
    mini: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_with(mini, changes, monkeypatch)
    stage = world.stage("preference")
    stage.policy.eval()
    rows = collate(stage.rows, stage.plan(0)[0].rows)
    parts = (rows[name].tolist() for name in ("user_id", "item_id_list", TARGETS))
    full = stage.policy.max_seq_length
    with torch.no_grad():
        found = stage._scores(rows)
        expected = []
        for user, items, nexts in zip(*parts, strict=True):
            for end in range(1, len(items) + 1):
                if nexts[end - 1]:
                    row = {"item_id_list": torch.tensor([items[:end] + [0] * (full - end)])}
                    row |= {"item_length": torch.tensor([end]), "user_id": torch.tensor([user])}
                    expected.append(stage.policy.full_sort_predict(Interaction(row)).view(-1))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"retriever": "KSR"}, "--retriever: KSR needs a dataset of its own"),
        ({"retriever": "SASrec"}, r"--retriever: there is no model 'SASrec' \(did you mean 'SASR"),
        ({"retriever": "BPR"}, "--retriever: BPR is no sequential model, PRIME needs one"),
        ({"retriever": "PRIME"}, "--retriever: PRIME is no sequential model"),
        ({"retriever": "BERT4Rec"}, "retriever: BERT4Rec trains on rows or in stages that PRIME"),
        ({"retriever": "S3Rec"}, "retriever: S3Rec trains on rows or in stages"),
        ({"retriever": "FPMC"}, "retriever: FPMC trains on sampled negatives"),
        ({"retriever": "SASRec", "loss_type": "BPR"}, "retriever: SASRec trains on sampled neg"),
        ({"retriever": "FMLPRec", "train_mode": "whole"}, "PRIME's FMLPRec does not train in mode"),
    ],
)
def test_what_cannot_retrieve_is_told_before_anything_is_read(
    changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        MMConfig("PRIME", "nowhere", (), {"backbone": "tiny", **changes})


def test_a_retrievers_own_keys_are_keys_of_prime() -> None:
    config = MMConfig("PRIME", "nowhere", (), {"retriever": "SASRec", "n_heads": "1"})
    assert config["n_heads"] == 1
    assert config["hidden_dropout_prob"] == MMConfig("SASRec", "nowhere")["hidden_dropout_prob"]
    assert config["topk"] == MMConfig("PRIME", "nowhere")["topk"]


# --- stages of other runs ---
def test_a_trained_retriever_is_taken_as_it_is(mini: Path, in_folder: Path) -> None:
    """From a run of the retriever alone, of the zoo or ours; it scores as it did there."""
    shop = {"data_path": str(mini), "show_progress": False, "valid_metric": "NDCG@10"}
    for name in ("SASRec", "LRURec"):
        alone = quick_start.run(name, "mini", overrides={"epochs": 2, "topk": [5, 10, 20], **shop})
        keys = {"retriever": name, "retriever_from": alone["run_dir"], "topk": [5, 10, 20]}
        keys = {**small({**keys, "retriever_valid_metric": "Recall@20"}), **shop}
        keys = {k: v for k, v in keys.items() if k not in ("hidden_size", "inner_size")}
        result = quick_start.run("PRIME", "mini", overrides=keys)
        stage = result["stages"]["retriever"]
        assert stage["test"] == pytest.approx(alone["test"], abs=1e-9)
        assert (stage["steps"], stage["stopped"]) == (0, "given")
        again = quick_start.load(Path(result["run_dir"]))
        assert again["test"] == pytest.approx(result["test"], abs=1e-9)
        with pytest.raises(UserError, match=r"retriever_from: the weights in .* of another model"):
            quick_start.run("PRIME", "mini", overrides={**keys, "hidden_size": 32})


def test_a_trained_ranker_is_taken_as_it_is(mini: Path, in_folder: Path) -> None:
    shop = {
        **SMALL,
        "data_path": str(mini),
        "cache_dir": str(mini),
        "stages": ["retriever", "ranker"],
    }
    first = quick_start.run("PRIME", "mini", overrides=shop)
    second = quick_start.run(
        "PRIME", "mini", overrides={**shop, "seed": 7, "ranker_from": first["run_dir"]}
    )
    assert second["stages"]["ranker"]["stopped"] == "given"
    state = json.loads((Path(second["run_dir"]) / "ranker/best/state.json").read_text())
    assert state["step"] == 0
    same = ["best", "model.safetensors"]
    one, other = (
        Path(r["run_dir"]).joinpath("ranker", *same).read_bytes() for r in (first, second)
    )
    assert one == other


def test_what_does_not_fit_is_told_before_anything_is_trained(mini: Path, in_folder: Path) -> None:
    """A ranker of another tokenizer, and weights that may have seen what is held out here."""
    keys = {**SMALL, "data_path": str(mini), "cache_dir": str(mini)}
    first = quick_start.run("PRIME", "mini", overrides={**keys, "stages": ["retriever", "ranker"]})
    split = "was trained on another split of the data, limit_users was .* and is 20"
    for given, changes, told in (
        ("ranker", {"attributes": ["title"]}, "cannot be used, they were made with another token"),
        ("ranker", {"limit_users": 20}, split),
        ("retriever", {"limit_users": 20}, split),
    ):
        wrong = {**keys, f"{given}_from": first["run_dir"], **changes}
        with pytest.raises(UserError, match=f"^{given}_from: .*{told}"):
            quick_start.run("PRIME", "mini", overrides=wrong)
    assert [str(path.parent) for path in Path("saved").glob("*/retriever")] == [first["run_dir"]]


def test_a_ranker_of_another_shop_ranks_what_this_ones_retriever_finds(
    mini: Path,
    saved_folder: Path,  # noqa: F811
    in_folder: Path,
) -> None:
    """The paper's figure 6: adapters know no items."""
    shop = Sizes(12, (6, 6), aisles=1, shelves=6, staples=1, novelties=1, trials=1)
    make_demo(in_folder / "data" / "other", sizes=shop)
    keys = {
        **{**SMALL, "backbone": str(saved_folder), "cache_dir": str(in_folder)},
        **{"max_pixels": 3136, "max_attr_tokens": 4, "instruction": "Next?"},
        **{"epochs": 1, "attributes": ["image", "title"], "stages": ["retriever", "ranker"]},
    }
    here = quick_start.run("PRIME", "mini", overrides={**keys, "data_path": str(mini)})
    there = {**keys, "data_path": str(in_folder / "data"), "ranker_from": here["run_dir"]}
    result = quick_start.run("PRIME", "other", overrides=there)
    assert result["stages"]["retriever"]["steps"] > 0
    assert (result["stages"]["ranker"]["steps"], result["stages"]["ranker"]["stopped"]) == (
        0,
        "given",
    )
    one, other = (
        load_file(Path(r["run_dir"]) / "ranker/best/model.safetensors") for r in (here, result)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    there = {**there, "retriever_from": here["run_dir"]}
    with pytest.raises(UserError, match=r"retriever_from: .* was trained on mini, whose items"):
        quick_start.run("PRIME", "other", overrides=there)


def test_a_run_that_has_no_such_stage_is_told(mini: Path, in_folder: Path) -> None:
    keys = {**SMALL, "data_path": str(mini), "retriever_from": "nowhere"}
    with pytest.raises(UserError, match="retriever_from: nowhere is no run"):
        quick_start.run("PRIME", "mini", overrides=keys)
