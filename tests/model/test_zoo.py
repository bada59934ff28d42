"""RecBole's zoo on today's libraries: mended parts against RecBole's own, and whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from recbole.data.interaction import Interaction
from recbole.model import general_recommender as general
from recbole.model import sequential_recommender as sequential
from torch import Tensor

from recbole_mm import quick_start, registry
from recbole_mm.config import MMConfig
from recbole_mm.data.preparation import create_dataset
from recbole_mm.errors import UserError
from recbole_mm.model import zoo, zoo_graph
from tests.conftest import REPO
from tests.data.atomic_data import random_interactions, write_atomic
from tests.model.toy import keys, toy_data

FAST = ("SASRec", "GRU4Rec", "BPR", "Pop", "EASE", "LightGCN", "FDSA")

SEQUENTIAL = (
    *("BERT4Rec", "CORE", "Caser", "DIEN", "DIN", "FDSA", "FEARec", "FOSSIL", "FPMC", "GCSAN"),
    *("GRU4Rec", "GRU4RecCPR", "GRU4RecF", "GRU4RecKG", "HGN", "HRM", "KSR", "LightSANs", "NARM"),
    *("NPE", "NextItNet", "RepeatNet", "S3Rec", "SASRec", "SASRecCPR", "SASRecF", "SHAN", "SINE"),
    *("SRGNN", "STAMP", "TransRec"),
)
GENERAL = (
    *("ADMMSLIM", "AsymKNN", "BPR", "CDAE", "ConvNCF", "DGCF", "DMF", "DiffRec"),
    *("EASE", "ENMF", "FISM", "GCMC", "ItemKNN", "LDiffRec", "LINE", "LightGCN"),
    *("MacridVAE", "MultiDAE", "MultiVAE", "NAIS", "NCEPLRec", "NCL", "NGCF", "NNCF"),
    *("NeuMF", "Pop", "RaCT", "Random", "RecVAE", "SGL", "SLIMElastic", "SimpleX"),
    *("SpectralCF",),
)

# No full sort: they score every pair of user and item, which takes DIEN an hour for all users.
PAIRWISE = ("ConvNCF", "DIEN", "DIN")
SMALLER = {name: {"limit_users": 60, "MAX_ITEM_LIST_LENGTH": 20} for name in PAIRWISE}


# --- graphs ---
@pytest.mark.parametrize("name", ["LightGCN", "NGCF", "GCMC", "NCL", "SpectralCF"])
def test_graphs_equal_recboles(in_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """RecBole's own lines, given back the method that scipy dropped, make the same matrix."""
    monkeypatch.setattr(
        sp.dok_matrix, "_update", lambda self, pairs: self._dict.update(pairs), raising=False
    )
    config, (train, _, _) = toy_data(in_folder, name, [6, 9, 3] * 4)
    method = "get_laplacian_matrix" if name == "SpectralCF" else "get_norm_adj_mat"
    theirs = getattr(general, name)(config, train.dataset)
    ours = getattr(zoo_graph, name)(config, train.dataset)
    expected = getattr(theirs, method)().to_dense()
    torch.testing.assert_close(getattr(ours, method)().to_dense(), expected, rtol=1e-6, atol=0)
    assert (expected != 0).sum() > len(train.dataset)


def test_repeated_pairs_are_one_edge() -> None:
    pairs = sp.coo_matrix((np.ones(3), ([0, 0, 1], [1, 1, 0])), shape=(2, 3))
    graph = zoo_graph.bipartite_graph(pairs, 2, 3).toarray()
    expected = np.zeros((5, 5))
    expected[[0, 3, 1, 2], [3, 0, 2, 1]] = 1
    assert (graph == expected).all()
    half = zoo_graph.scaled(sp.coo_matrix(graph), -1, 0).to_dense()
    torch.testing.assert_close(half.sum(1), torch.tensor([1.0, 1, 1, 1, 0]), atol=1e-6, rtol=0)


def test_ncl_clusters(in_folder: Path) -> None:
    config, (train, _, _) = toy_data(in_folder, "NCL", [6] * 8, num_clusters=3)
    model = zoo_graph.NCL(config, train.dataset)
    blobs = np.repeat(np.eye(3, 64, dtype=np.float32) * 9, 5, axis=0)
    blobs += np.random.default_rng(0).normal(0, 0.01, blobs.shape).astype(np.float32)
    torch.manual_seed(1)
    centroids, members = model.run_kmeans(blobs)
    assert [len(set(members[i : i + 5].tolist())) for i in (0, 5, 10)] == [1, 1, 1]
    assert len(set(members.tolist())) == 3
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(3))
    model.k = 1000  # more clusters than rows
    assert len(set(model.run_kmeans(blobs)[1].tolist())) == 15


# --- whole sequences ---
CAUSAL = [("SASRec", zoo.SASRec, sequential.SASRec), ("GRU4Rec", zoo.GRU4Rec, sequential.GRU4Rec)]


def loss_and_gradients(model: Any, batches: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over all targets of the batches, and its gradients."""
    model.zero_grad()
    losses, counts = [], []
    for batch in batches:
        losses.append(model.calculate_loss(batch))
        has_list = "target_list" in batch
        counts.append(int((batch["target_list"] > 0).sum()) if has_list else len(batch))
    loss = sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "ours", "theirs"), CAUSAL)
def test_whole_loss_is_the_mean_of_prefix_losses(
    in_folder: Path, name: str, ours: type, theirs: type
) -> None:
    more = {"hidden_size": 16, "train_batch_size": 7}
    lengths = [3, 4, 6, 9, 11] * 3  # at most 8 inputs: no window is cut
    config, (whole, _, _) = toy_data(in_folder, name, lengths, train_mode="whole", **more)
    _, (prefix, _, _) = toy_data(in_folder, name, lengths, train_mode="prefix", **more)
    torch.manual_seed(0)
    model = ours(config, whole.dataset).double().eval()
    reference = theirs(config, prefix.dataset).double().eval()
    reference.load_state_dict(model.state_dict())
    loss, gradients = loss_and_gradients(model, whole)
    expected, expected_gradients = loss_and_gradients(reference, prefix)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-9, atol=1e-13)
    assert len(whole) < len(prefix)


MASKED = ("BERT4Rec", zoo.BERT4Rec, sequential.BERT4Rec)


def test_whole_loss_of_bert4rec_is_the_mean_over_masked_places(in_folder: Path) -> None:
    more = {"hidden_size": 16, "train_batch_size": 7, "MAX_ITEM_LIST_LENGTH": 8}
    lengths = [3, 4, 6, 9, 11] * 3  # of training 1 to 9 items: the first of nine has no position
    config, (whole, _, _) = toy_data(in_folder, "BERT4Rec", lengths, train_mode="whole", **more)
    model = zoo.BERT4Rec(config, whole.dataset).double().eval()
    reference = sequential.BERT4Rec(config, whole.dataset).double().eval()
    reference.load_state_dict(model.state_dict())
    seen = set()
    for batch in whole:
        model.zero_grad(), reference.zero_grad()
        torch.manual_seed(1)
        loss = model.calculate_loss(batch)
        loss.backward()
        torch.manual_seed(1)
        expected, items = mean_masked_loss(model, reference, batch)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for mine, its in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-9, atol=1e-13)
        seen |= items
    assert len(seen) > 10


def mean_masked_loss(model: Any, reference: Any, batch: Interaction) -> tuple[Tensor, set[int]]:
    """Row by row without padding, by RecBole's forward pass; also the items that are masked."""
    rows, losses = [], []
    for items, targets in zip(batch["item_id_list"], batch["target_list"], strict=True):
        rows.append(torch.cat([items[:1], targets[targets > 0]])[-8:])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    places = model.masked_places(padded)
    for row, masked in zip(rows, places, strict=True):
        states = reference(row.masked_fill(masked[: len(row)], reference.n_items)[None])[0]
        scores = states @ reference.item_embedding.weight[:-1].T + reference.output_bias
        chosen = masked.nonzero()[:, 0].tolist()
        losses += [-scores[i].log_softmax(0)[row[i]] for i in chosen]
    return torch.stack(losses).mean(), set(padded[places].tolist())


def test_bert4rec_masks_items_at_its_rate_and_never_padding(in_folder: Path) -> None:
    config, (train, _, _) = toy_data(in_folder, "BERT4Rec", [6] * 8, train_mode="whole")
    model = zoo.BERT4Rec(config, train.dataset)
    torch.manual_seed(0)
    sequence = (torch.arange(20) < torch.randint(2, 20, (4000, 1))).long()
    last = sequence.sum(1, keepdim=True) - 1
    model.mask_ratio, model.ft_ratio = 0.2, 0.0
    masked = model.masked_places(sequence)
    assert not masked[sequence == 0].any()
    assert masked.any(dim=1).all()
    inner = sequence.bool() & (torch.arange(20) < last)  # the last is also masked in bare rows
    assert masked[inner].float().mean().item() == pytest.approx(0.2, abs=0.01)
    model.ft_ratio = 1.0
    assert torch.equal(model.masked_places(sequence), torch.arange(20) == last)


def test_no_run_traces_autograd_because_sine_was_imported(in_folder: Path) -> None:
    random_interactions(in_folder / "toy", [6, 9, 12] * 3)
    registry.get_model("SINE")
    torch.autograd.set_detect_anomaly(True)  # as its module does when it is first imported
    more = {"data_path": str(in_folder), "user_inter_num_interval": "[1,inf)"}
    quick_start.run("Pop", "toy", overrides=keys(in_folder, **more))
    assert not torch.is_anomaly_enabled()


def test_a_bert4rec_run_is_found_and_loaded_by_its_configuration(in_folder: Path) -> None:
    """RecBole's masking writes names of fields into the configuration after it is read."""
    random_interactions(in_folder / "toy", [6, 9, 12] * 3)
    more = {"data_path": str(in_folder), "user_inter_num_interval": "[1,inf)", "n_layers": 1}
    result = run_and_load(in_folder, "BERT4Rec", "toy", **more)
    config = MMConfig("BERT4Rec", "toy", (), keys(in_folder, **more))
    assert result["config_hash"] == config.hash()


@pytest.mark.parametrize(("name", "ours", "theirs"), [*CAUSAL, MASKED])
def test_prefix_mode_and_scores_are_recboles(
    in_folder: Path, name: str, ours: type, theirs: type
) -> None:
    config, (train, _, test) = toy_data(in_folder, name, [6, 9] * 4)
    torch.manual_seed(0)
    model = ours(config, train.dataset).eval()
    reference = theirs(config, train.dataset).eval()
    reference.load_state_dict(model.state_dict())
    batch, rows = next(iter(train)), next(iter(test))[0]
    assert torch.equal(model.calculate_loss(batch), reference.calculate_loss(batch))
    assert torch.equal(model.full_sort_predict(rows), reference.full_sort_predict(rows))


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec", "BERT4Rec"])
def test_whole_mode_learns_eight_users(in_folder: Path, name: str) -> None:
    more = {"train_mode": "whole", "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0,
            "dropout_prob": 0.0, "hidden_size": 32}  # fmt: skip
    known = {k: v for k, v in more.items() if k in MMConfig(name, "ml-100k").final_config_dict}
    config, (train, _, _) = toy_data(in_folder, name, [7] * 8, **known)
    torch.manual_seed(0)
    model = config.model_class(config, train.dataset)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses = []
    for _ in range(200):
        for batch in train:
            optimizer.zero_grad()
            loss = model.calculate_loss(batch)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.4 * losses[0]  # masks change from step to step


def test_a_model_that_reads_prefixes_alone_refuses_whole_mode() -> None:
    with pytest.raises(UserError, match="train_mode"):
        MMConfig("NARM", "ml-100k", overrides={"train_mode": "whole"})


# --- whole runs ---
def run_and_load(folder: Path, model: str, dataset: str = "ml-100k", **more: Any) -> dict[str, Any]:
    """Trains, tests, loads the run again and asserts that it gives the same result."""
    overrides = keys(folder, **more)
    result = quick_start.run(model, dataset, overrides=overrides)
    path = overrides.get("data_path")
    again = quick_start.load(result["run_dir"], {"data_path": path, "show_progress": False})
    assert again["test"] == result["test"]
    assert again["valid"] == result["valid"]
    metrics = result["test"]
    assert all(0 <= metrics[name] <= 1 for name in metrics)
    assert not list(Path(result["run_dir"]).rglob("*.pth"))
    return result


def test_fast_subset_trains_and_reloads_in_a_fresh_process(in_folder: Path) -> None:
    overrides = keys(in_folder, limit_users=60, MAX_ITEM_LIST_LENGTH=10)
    results = {name: quick_start.run(name, "ml-100k", overrides=overrides) for name in FAST}
    assert {result["test_users"] for result in results.values()} == {60}
    folders = {name: result["run_dir"] for name, result in results.items()}
    script = (
        "import json, sys; from recbole_mm import quick_start\n"
        "runs = json.loads(sys.argv[1])\n"
        "tests = {n: quick_start.load(f, overrides={'state': 'ERROR'})['test']"
        " for n, f in runs.items()}\n"
        "assert not {'ray', 'transformers'} & set(sys.modules)\n"
        "print('RESULT' + json.dumps(tests))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(folders)],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reloaded = json.loads(done.stdout.rpartition("RESULT")[2])
    assert reloaded == {name: result["test"] for name, result in results.items()}


def test_item_features_leave_the_candidates_alone(in_folder: Path) -> None:
    """With features RecBole would rank 1,683 items for FDSA and 869 for SASRec."""
    sizes = set()
    for name in ("SASRec", "FDSA", "BPR"):
        config = MMConfig(name, "ml-100k", overrides=keys(in_folder))
        sizes.add(create_dataset(config).item_num)
    assert sizes == {869}


def test_pop_counts_what_was_taken_in_training(in_folder: Path) -> None:
    """Each interaction once, whatever batch it is in, and no negative."""
    config, (train, _, test) = toy_data(in_folder, "Pop", [6] * 8)
    model = zoo.Pop(config, train.dataset)
    for batch in train:
        assert {0.0, 1.0} == {*batch["label"].tolist()}, "there are negatives among them"
        model.calculate_loss(batch)
    rows = train.dataset.inter_feat["item_id"].numpy()
    expected = np.bincount(rows, minlength=model.n_items)
    assert expected.max() > len(train), "some item stands several times in a batch"
    assert model.item_cnt[:, 0].tolist() == expected.tolist()
    scores = model.full_sort_predict(test.dataset.inter_feat[:2]).view(2, -1)
    np.testing.assert_allclose(scores[1], expected / expected.max())


def test_random_is_the_same_each_time_and_no_one_is_like_another(in_folder: Path) -> None:
    config, (train, _, test) = toy_data(in_folder, "Random", [6] * 8)
    model = zoo.Random(config, train.dataset)
    users = next(iter(test))[0]
    scores = model.full_sort_predict(users).view(len(users), -1)
    assert torch.equal(scores.flatten(), model.full_sort_predict(users))
    assert len(scores.unique()) == scores.numel()
    assert torch.equal(model.full_sort_predict(users[[3]]), scores[3])  # whatever the batch
    items = torch.tensor([1, 2, 5])
    pairs = Interaction({"user_id": users["user_id"][[0, 3, 0]], "item_id": items})
    assert model.predict(pairs).tolist() == [scores[0, 1], scores[3, 2], scores[0, 5]]


# --- stages in one run ---
def test_s3rec_pre_trains_and_fine_tunes_in_one_run(in_folder: Path) -> None:
    more = attribute_data(in_folder)
    result = run_and_load(in_folder, "S3Rec", "toy", **{**more, "epochs": 2})
    assert result["stages"]["train"]["epochs"] == 4  # --epochs caps both stages
    keys_of_short = {**more, "epochs": 3, "pretrain_epochs": 1}
    short = run_and_load(in_folder, "S3Rec", "toy", **keys_of_short)
    assert short["stages"]["train"]["epochs"] == 4
    assert short["test"] != result["test"]


def attribute_data(folder: Path) -> dict[str, Any]:
    """Random users of items with two attributes each, and the keys that load them."""
    random_interactions(folder / "toy", [6, 9, 12] * 5)
    rows = [[f"i{i}", f"c{i % 3} c{3 + i % 2}"] for i in range(30)]
    write_atomic(folder / "toy" / "toy.item", "item_id:token class:token_seq", rows)
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]}
    return {
        "data_path": str(folder),
        "load_col": columns,
        "user_inter_num_interval": "[1,inf)",
        "hidden_size": 16,
        "inner_size": 16,
        "MAX_ITEM_LIST_LENGTH": 8,
    }


def test_s3rec_mistakes_are_told(in_folder: Path) -> None:
    for more in ({"train_stage": "finetune"}, {"pre_model_path": "x.pth"}):
        with pytest.raises(UserError, match="leave train_stage and pre_model_path out"):
            quick_start.run("S3Rec", "ml-100k", overrides=keys(in_folder, **more))
    with pytest.raises(UserError, match="item column 'colour', which is not loaded"):
        quick_start.run("S3Rec", "ml-100k", overrides=keys(in_folder, item_attribute="colour"))


def test_ract_trains_only_what_a_stage_is_for(in_folder: Path) -> None:
    config, (train, _, _) = toy_data(in_folder, "RaCT", [6] * 8)
    model = zoo.RaCT(config, train.dataset)
    for stage in model.stage_names:
        model.enter(stage)
        model.zero_grad()
        model.calculate_loss(next(iter(train))).backward()
        moved = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
        critic = stage == "critic_pretrain"
        assert moved == ({"critic_net"} if critic else {"encoder", "decoder"})


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(
    "model", ["MultiVAE", "RaCT", "NCL", "DiffRec", "RecVAE", "S3Rec", "CKE", "ComiRec"]
)
def test_a_stopped_run_ends_with_the_same_numbers(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Also what RecBole keeps in plain attributes goes on: annealing, clusters, past losses."""
    more = attribute_data(in_folder) if model == "S3Rec" else {}
    if not more:
        random_interactions(in_folder / "toy", [6, 9, 12] * 10)
    more |= {"epochs": 5, "user_inter_num_interval": "[1,inf)", "data_path": str(in_folder)}
    if model == "CKE":
        more |= entity_files(in_folder / "toy")
    stages: dict[str, dict[str, Any]] = {
        "ComiRec": {"softmax": "sampled", "n_negatives": 1},
        "NCL": {"m_step": 3, "num_clusters": 5, "warm_up_step": 1},
        "RaCT": {"pretrain_epochs": 3},
        "S3Rec": {"pretrain_epochs": 2},
    }
    overrides = keys(in_folder, **more, **stages.get(model, {}))
    whole = quick_start.run(model, "toy", overrides=overrides)
    trainer = registry.get_trainer_base(whole_type(model), model)
    train_epoch = trainer._train_epoch

    def stops(self: Any, train_data: Any, epoch_idx: int, *args: Any, **kwargs: Any) -> Any:
        if epoch_idx == 4:
            raise Stop
        return train_epoch(self, train_data, epoch_idx, *args, **kwargs)

    broken = {**overrides, "checkpoint_dir": str(in_folder / "broken")}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_train_epoch", stops)
        with pytest.raises(Stop):
            quick_start.run(model, "toy", overrides=broken)
    resumed = quick_start.run(model, "toy", overrides=broken, resume="")
    assert resumed["valid"] == whole["valid"]
    assert resumed["test"] == whole["test"]
    best = [Path(r["run_dir"]) / "train" / "best" / "model.safetensors" for r in (whole, resumed)]
    assert best[0].read_bytes() == best[1].read_bytes()


def whole_type(model: str) -> Any:
    return registry.get_model(model).type


# --- every model ---
def entity_files(folder: Path) -> dict[str, Any]:
    """Adds a generated knowledge graph and vectors of its entities; gives the keys that load it."""
    rng, path = np.random.default_rng(0), folder / folder.name
    lines = path.with_suffix(".inter").read_text().splitlines()[1:]
    items = sorted({line.split("\t")[1] for line in lines})
    entities, relations = [f"e{item}" for item in items], [f"r{r}" for r in range(4)]
    links = [list(pair) for pair in zip(items, entities, strict=True)]
    write_atomic(path.with_suffix(".link"), "item_id:token entity_id:token", links)
    triples = [[e, rng.choice(relations), rng.choice(entities)] for e in entities]
    header = "head_id:token relation_id:token tail_id:token"
    write_atomic(path.with_suffix(".kg"), header, triples)
    for kind, names in (("ent", entities), ("rel", relations)):
        rows = [[n, " ".join(f"{v:.4f}" for v in rng.normal(size=64))] for n in names]
        write_atomic(path.with_suffix(f".{kind}"), f"{kind}_id:token {kind}_emb:float_seq", rows)
    return {"data_path": str(folder.parent)}


@pytest.mark.slow
@pytest.mark.parametrize("model", [*SEQUENTIAL, *GENERAL])
def test_every_model_trains_evaluates_and_reloads(in_folder: Path, model: str) -> None:
    if model in ("KSR", "GRU4RecKG"):
        source = Path(MMConfig("BPR", "ml-100k")["data_path"]) / "ml-100k.inter"
        (in_folder / "ml-kg").mkdir()
        (in_folder / "ml-kg" / "ml-kg.inter").write_text(source.read_text())
        result = run_and_load(in_folder, model, "ml-kg", **entity_files(in_folder / "ml-kg"))
    else:
        result = run_and_load(in_folder, model, **SMALLER.get(model, {}))
    assert result["test_users"] == (60 if model in SMALLER else 305)


@pytest.mark.parametrize("model", ["KSR", "GRU4RecKG"])
def test_entity_models_on_generated_entities(in_folder: Path, model: str) -> None:
    random_interactions(in_folder / "toy", [6, 9, 12] * 5)
    more = entity_files(in_folder / "toy") | {"user_inter_num_interval": "[1,inf)"}
    result = run_and_load(in_folder, model, "toy", **more)
    assert result["test_users"] == 15


def test_entity_models_without_entities_say_what_is_missing(in_folder: Path) -> None:
    with pytest.raises(UserError, match=r"needs the file .*ml-100k\.ent"):
        quick_start.run("KSR", "ml-100k", overrides=keys(in_folder))


def test_the_sweep_leaves_no_model_out() -> None:
    rooms = {
        room: {n for n, p in registry.zoo_models().items() if f".{room}_recommender." in p}
        for room in ("sequential", "general")
    }
    assert {name.lower() for name in SEQUENTIAL} == rooms["sequential"]
    assert {name.lower() for name in GENERAL} == rooms["general"]
