"""What MLLM-MSR over the whole catalogue retrieves with: RecBole's models, general and sequential,
trained in the run or taken from one of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_mm import quick_start
from recbole_mm.config import MMConfig
from recbole_mm.errors import UserError
from recbole_mm.model.mllmmsr_rerank import MLLMMSRRerank
from recbole_mm.quick_start import Data, build_model, prepare_data
from tests.model.msr_world import SMALL
from tests.trainer.test_resume import kill_when, run

N = 6
SHARED = {"topk": [5, 20], "show_progress": False, "state": "ERROR", "epochs": 2}
RERANK = {
    **{k: v for k, v in SMALL.items() if k not in ("topk", "sft_eval_every")},
    **SHARED,
    "sft_max_steps": 1,
    "sft_valid_metric": "NDCG@5",
    "valid_metric": "NDCG@5",
    "n_candidates": N,
    "pref_mode": "none",
}
# Trained in the run; the last ones have no full sort, rows made by a transform, and autoencoders.
TRAINED = [
    *("BPR", "LightGCN", "Pop", "ItemKNN", "Random", "EASE", "FPMC", "TransRec", "VBPR"),
    *("NeuMF", "BERT4Rec", "MultiVAE", "CDAE", "LRURec"),
]


def rerank(mini: Path, **changes: Any) -> dict[str, Any]:
    keys = {**RERANK, "data_path": str(mini), "cache_dir": str(mini / "cache"), **changes}
    return quick_start.run("MLLMMSRRerank", "mini", overrides=keys)


def world(mini: Path, **changes: Any) -> tuple[Data, MLLMMSRRerank]:
    keys = {**RERANK, "data_path": str(mini), "cache_dir": str(mini / "cache"), **changes}
    config = MMConfig("MLLMMSRRerank", "mini", (), keys)
    data = prepare_data(config)
    model: MLLMMSRRerank = build_model(config, data)
    model.eval()
    return data, model


@pytest.mark.parametrize("name", TRAINED)
def test_any_kind_of_model_retrieves(mini: Path, in_folder: Path, name: str) -> None:
    result = rerank(mini, retriever=name)
    before, after = (row["test"] for row in result["rows"])
    assert before["recall@20"] == after["recall@20"], "what is not among the best keeps its place"
    again = quick_start.load(result["run_dir"])
    assert [row["test"] for row in again["rows"]] == [row["test"] for row in result["rows"]]
    epochs = result["stages"]["retriever"]["epochs"]
    assert epochs == (1 if name in ("Pop", "ItemKNN", "Random", "EASE") else 2)


def test_a_sequential_model_learns_by_pairs(mini: Path, in_folder: Path) -> None:
    """SASRec with its other loss: the stage's batches hold a negative beside each target."""
    data, model = world(mini, retriever="SASRec", loss_type="BPR", hidden_size=16, n_layers=1)
    from recbole_mm.trainer.settings import stage_settings

    config = model.inner._config
    stage = model.make_stages(stage_settings(config, model.stage_names), data.train._dataset)[0]
    batch = stage.loader.collate_fn(stage.plan(0)[0])  # type: ignore[attr-defined]
    assert len(batch["neg_item_id"]) == len(batch["item_id"])
    assert (batch["neg_item_id"] != batch["item_id"]).all()
    assert torch.isfinite(stage.loss(stage.plan(0)[0]))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("LightGCN", {}),
        ("BPR", {"embedding_size": 16}),
        ("Pop", {}),
        ("ItemKNN", {"k": 5}),
        ("EASE", {}),
        ("FPMC", {}),
        ("SASRec", {"loss_type": "BPR"}),
        ("SASRec", {}),
        ("NCL", {"num_clusters": 3, "warm_up_step": 0}),
        ("RecVAE", {}),
    ],
)
def test_a_run_of_its_own_is_taken_as_it_is(
    mini: Path, in_folder: Path, name: str, keys: dict[str, Any]
) -> None:
    """Every metric of the retriever's row, by both protocols, is the run's own."""
    shop = {**SHARED, **keys, "data_path": str(mini), "valid_metric": "NDCG@5"}
    metrics = {"metrics": ["Recall", "MRR", "NDCG"]}
    alone = quick_start.run(name, "mini", overrides={**shop, **metrics})
    result = rerank(mini, retriever=name, retriever_from=alone["run_dir"], **keys)
    row = result["rows"][0]
    for protocol in ("full", "full-masked"):
        expected = alone["test_protocols"][protocol]
        assert row["test_protocols"][protocol] == pytest.approx(expected, abs=1e-9)
    assert result["stages"]["retriever"]["stopped"] == "given"
    again = quick_start.load(result["run_dir"])
    assert again["rows"][0]["test"] == row["test"]


@pytest.mark.parametrize("mask_history", [False, True])
def test_heads_are_lifted(mini: Path, in_folder: Path, mask_history: bool) -> None:
    """Against lists sorted by hand: the best N by their answers, then all others as they were."""
    data, model = world(mini, retriever="ItemKNN", mask_history=mask_history)
    rows: Interaction = data.test._dataset.inter_feat[:7]
    taken: dict[int, list[int]] = {}
    for user, item in _all_pairs(mini, data):
        taken.setdefault(user, []).append(item)
    model.only_hits = False
    model.enter("retriever")
    first = model.full_sort_predict(rows)
    model.enter("sft")
    lifted = model.full_sort_predict(rows)
    for row in range(len(rows)):
        target = int(rows["item_id"][row])
        history = [item for item in taken[int(rows["user_id"][row])] if item != target]
        order = first[row].argsort(descending=True, stable=True).tolist()
        free = [i for i in order if i and not (mask_history and i in history)]
        # equal scores may be cut either way: what is asked about is what was lifted
        head = lifted[row].argsort(descending=True)[:N]
        assert first[row][head].min() >= first[row][free[N - 1]] - 1e-9
        assert not {*head.tolist()} - {*free}
        asked = model.candidate_scores(rows[row : row + 1], head[None])[0]
        assert (asked[:-1] >= asked[1:]).all()
        others = [item for item in range(model.n_items) if item not in head.tolist()]
        assert torch.equal(lifted[row][others], first[row][others])


def _all_pairs(mini: Path, data: Data) -> list[tuple[int, int]]:
    dataset = data.dataset
    lines = (mini / "mini" / "mini.inter").read_text().splitlines()[1:]
    return [
        (
            int(dataset.token2id(dataset.uid_field, line.split("\t")[0])),
            int(dataset.token2id(dataset.iid_field, line.split("\t")[1])),
        )
        for line in lines
    ]


def test_users_without_a_hit_need_no_questions(mini: Path, in_folder: Path) -> None:
    """Their metrics cannot differ, whether history is masked or not."""
    for mask in (False, True):
        keys = {"retriever": "BPR", "mask_history": mask}
        asked = rerank(mini, **keys)
        every = rerank(mini, **keys, metrics=["Recall", "MRR", "NDCG", "ItemCoverage"])
        test = {k: v for k, v in every["test"].items() if not k.startswith("itemcov")}
        assert asked["test"] == test


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"retriever": "FM"}, "--retriever: FM is neither a general nor a sequential model"),
        ({"retriever": "MLLMMSRRerank"}, "--retriever: MLLMMSRRerank is neither a general nor"),
        ({"retriever": "PRIME"}, "--retriever: PRIME ranks what a retriever found"),
        ({"retriever": "KSR"}, "--retriever: KSR needs a dataset of its own"),
        (
            {"retriever": "NCL"},
            r"NCL has a trainer of its own, which MLLMMSRRerank does not call: train it by "
            r"`python run_recbole_mm.py --model=NCL --dataset=nowhere` and name the folder of "
            r"that run, --retriever_from=RUN_DIR",
        ),
        ({"retriever": "BPR", "train_mode": "whole"}, "MLLMMSRRerank's BPR does not train in"),
        ({"retriever": "GPT"}, "--retriever: there is no model 'GPT'"),
    ],
)
def test_what_cannot_retrieve_is_told(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        MMConfig("MLLMMSRRerank", "nowhere", (), {"backbone": "tiny", **keys})


def test_runs_of_others_are_refused(mini: Path, demo_path: Path, in_folder: Path) -> None:
    """Of another model, whose weights would fit; of another split; of another dataset."""
    shop = {**SHARED, "data_path": str(mini), "valid_metric": "NDCG@5"}
    bpr = quick_start.run("BPR", "mini", overrides=shop)["run_dir"]
    with pytest.raises(UserError, match=r"they are of BPR, not of LightGCN: name a run of L"):
        rerank(mini, retriever="LightGCN", retriever_from=bpr)
    split = {"split": {"US": [8, 1, 1]}, "order": "TO", "mode": "full"}
    with pytest.raises(UserError, match=r"retriever_from: .* was trained on another split"):
        rerank(mini, retriever="BPR", retriever_from=bpr, eval_args=split)
    other = {**shop, "data_path": str(demo_path), "limit_users": 40}
    demo = quick_start.run("BPR", "mm-demo", overrides=other)["run_dir"]
    with pytest.raises(UserError, match=r"was trained on mm-demo, whose items are not those"):
        rerank(mini, retriever="BPR", retriever_from=demo)


@pytest.mark.parametrize("name", ["BPR", "Pop"])
def test_killed_and_resumed_equals_uninterrupted(
    demo_path: Path, tmp_path: Path, name: str
) -> None:
    """At any step of a model that is trained on sampled negatives, and of one that counts."""
    flags = [
        *("--model=MLLMMSRRerank", f"--retriever={name}", "--dataset=mm-demo", "--backbone=tiny"),
        *(f"--data_path={demo_path}", "--limit_users=40", "--pref_mode=none", "--epochs=3"),
        *("--sft_max_steps=1", "--sft_batch_size=4", "--sft_valid_users=8", "--save_every_s=0"),
        *("--n_candidates=4", "--train_batch_size=16", "--history_len=2"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = run(whole, *flags)

    def ready(state: dict[str, Any]) -> bool:
        return bool(state["stages"].get("retriever", {}).get("steps", 0) >= 5)

    kill_when(killed, ready, *flags)
    resumed = run(killed, *flags, "--resume")
    for key in ("test", "valid"):
        assert resumed[key] == expected[key]
    assert [r["test"] for r in resumed["rows"]] == [r["test"] for r in expected["rows"]]
