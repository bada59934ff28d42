"""Configuration: precedence, types, names, and nothing that runs code."""

from __future__ import annotations

import importlib.util
from collections import Counter
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from recbole_mm.config import MMConfig, parse_value, read_yaml, resolve_backbone
from recbole_mm.config_checks import measured
from recbole_mm.config_types import convert
from recbole_mm.data.candidates import candidate_metrics
from recbole_mm.errors import UserError
from recbole_mm.paths import properties_dir
from recbole_mm.stage import STAGE_KEYS
from recbole_mm.trainer.settings import stage_settings

# isort: split
from recbole.evaluator import Evaluator, metric_types
from recbole.evaluator.collector import DataStruct
from recbole.utils import EvaluatorType


def config(model: str = "SASRec", **overrides: object) -> MMConfig:
    return MMConfig(model, "ml-100k", overrides=overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("1e-3", 1e-3),
        ("[20,40]", [20, 40]),
        ("None", None),
        ("true", True),
        ("False", False),
        ("{'LS': 'valid_and_test'}", {"LS": "valid_and_test"}),
        ("2-3", "2-3"),
        ("__import__('os').system('true')", "__import__('os').system('true')"),
        ("a=b", "a=b"),
        ("[" * 500, "[" * 500),
    ],
)
def test_values_are_read_and_never_run(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_precedence_of_layers(tmp_path: Path) -> None:
    assert config()["valid_metric"] == "NDCG@10"  # ours over RecBole's MRR@10
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nlearning_rate: 1e-2\n")
    mixed = MMConfig("SASRec", "ml-100k", [str(file)], {"epochs": "9"})
    assert mixed["epochs"] == 9
    assert mixed["learning_rate"] == 0.01


def test_a_recipe_may_hold_keys_of_one_model(tmp_path: Path) -> None:
    file = tmp_path / "table.yaml"
    file.write_text("epochs: 7\nper_model:\n  SASRec: {train_mode: whole}\n")
    assert MMConfig("SASRec", "ml-100k", [str(file)])["train_mode"] == "whole"
    assert MMConfig("BERT4Rec", "ml-100k", [str(file)])["train_mode"] == "prefix"
    file.write_text("per_model:\n  SASRec: {train_mod: whole}\n")
    with pytest.raises(UserError, match=r"table.yaml: SASRec has no key 'train_mod'"):
        MMConfig("SASRec", "ml-100k", [str(file)])


def test_backbone_settings_stand_between_model_and_dataset() -> None:
    model = read_yaml(properties_dir() / "model" / "PRIME.yaml")
    tiny = MMConfig("PRIME", "ml-100k", overrides={"backbone": "tiny"})
    paper = MMConfig("PRIME", "ml-100k")
    assert paper["n_candidates"] == model["n_candidates"] == 25
    assert tiny["n_candidates"] == 20
    assert MMConfig("PRIME", "mm-demo")["backbone"] == "tiny"  # the dataset's YAML
    chosen = MMConfig("PRIME", "ml-100k", overrides={"backbone": "tiny", "n_candidates": "9"})
    assert chosen["n_candidates"] == 9


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"epoch": "3"}, r"--epoch: SASRec has no key 'epoch' \(did you mean 'epochs'\?\)"),
        ({"epochs": "many"}, "epochs: expected a whole number such as .*, got 'many'"),
        ({"epochs": "True"}, "epochs: expected a whole number"),
        ({"learning_rate": "[1]"}, "learning_rate: expected a number"),
        ({"mask_history": "maybe"}, "mask_history: expected True or False"),
        ({"limit_users": "few"}, "limit_users: expected a whole number or None"),
        ({"metrics": "Foo"}, "metrics: there is no metric 'Foo'; known are .*, ndcg"),
        ({"metrics": "NDGC"}, r"no metric 'NDGC' \(did you mean 'ndcg'\?\)"),
        ({"metrics": "[]"}, "metrics: name at least one, such as NDCG"),
        ({"topk": "[]"}, "topk: name at least one, such as 10"),
        ({"topk": "abc"}, "topk: expected whole numbers above 0 .* got 'abc'"),
        ({"topk": "[5,10.5]"}, "topk: expected whole numbers above 0 .* got 10.5"),
        ({"topk": "[0]"}, "topk: expected whole numbers above 0 .* got 0"),
        ({"epochs": "1e999"}, "epochs: expected a whole number such as .*, got inf"),
        ({"learning_rate": "1e999"}, "learning_rate: it must be a number above 0, got inf"),
        ({"seed": "-1"}, r"seed: it must be 0 or more and below 2\^32, got -1"),
        ({"worker": "-1"}, "worker: it must be 0 or more"),
        ({"hidden_size": "0"}, "hidden_size: it must be 1 or more, got 0"),
        ({"n_heads": "-2"}, "n_heads: it must be 1 or more, got -2"),
        ({"hidden_dropout_prob": "1"}, "hidden_dropout_prob: a probability is .* got 1"),
        ({"attn_dropout_prob": "-0.1"}, "attn_dropout_prob: a probability is"),
        ({"loss_type": "FOO"}, "loss_type: SASRec knows CE and BPR, not 'FOO'"),
        ({"user_inter_num_interval": "5"}, r"user_inter_num_interval: .*'\[5,inf\)', got '5'"),
        ({"item_inter_num_interval": "[5,x)"}, "item_inter_num_interval: expected an interval"),
        ({"item_inter_num_interval": "[9,5]"}, "item_inter_num_interval: expected an interval"),
        ({"limit_users": "True"}, "limit_users: expected a whole number or None, got True"),
        ({"valid_metric": "NDCG@3"}, r"NDCG@3 is not measured, add it to .* topk \[5, 10, 20\]"),
        ({"eval_candidates": "cand7"}, "eval_candidates: 'cand7' is none of full, cand20, cand100"),
        ({"train_mode": "half"}, "'half' is neither prefix nor whole"),
        ({"save_dataset": "True"}, "save_dataset: RecBole stores this as a pickle"),
        ({"valid_metric": "None"}, "valid_metric: expected a text such as 'NDCG@10'"),
        ({"metrics": "None"}, "metrics: expected a list"),
        ({"valid_metric": "NDCG"}, "valid_metric: NDCG is not measured, write NDCG@20"),
        ({"epochs": "0"}, "epochs: it must be a number above 0, got 0"),
        ({"learning_rate": "-1e-3"}, "learning_rate: it must be a number above 0, got -0.001"),
        ({"learning_rate": "nan"}, "learning_rate: expected a number"),
        ({"train_batch_size": "0"}, "train_batch_size: it must be a number above 0"),
        ({"eval_batch_size": "-5"}, "eval_batch_size: it must be a number above 0"),
        ({"MAX_ITEM_LIST_LENGTH": "0"}, "MAX_ITEM_LIST_LENGTH: it must be a number above 0"),
        ({"clip_grad_norm": "{'norm_type': 2}"}, "has no max_norm above 0, write {'max_norm': 5"),
        ({"mask_history": True, "benchmark_filename": "a,b,c"}, "leave benchmark_filename out or"),
    ],
)
def test_mistakes_are_told(overrides: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config(**overrides)


def test_a_step_of_whole_rows_is_of_fewer_users_than_rows() -> None:
    assert config("SASRec")["train_batch_size"] == 2048
    assert config("SASRec", train_mode="whole")["train_batch_size"] == 128
    assert config("SASRec", train_mode="whole", train_batch_size="2048")["train_batch_size"] == 2048
    assert config("LRURec")["train_batch_size"] == 64  # its own YAML says so
    assert config("PRIME", retriever="SASRec", train_mode="whole")["train_batch_size"] == 128


def test_a_model_that_cannot_train_whole_says_so() -> None:
    with pytest.raises(UserError, match="NARM does not train in mode 'whole'"):
        config("NARM", train_mode="whole")


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"no model 'LRUrec' \(did you mean 'LRURec'\?\)"):
        config("LRUrec")
    with pytest.raises(UserError, match="neither a file nor a recipe"):
        MMConfig("SASRec", "ml-100k", ["no_such_recipe"])
    with pytest.raises(UserError, match=r"there is no backbone 'qwen'.*tiny"):
        resolve_backbone("qwen", "qwen2-vl-2b")


def test_a_local_folder_is_a_backbone_of_the_default_family(tmp_path: Path) -> None:
    spec, _ = resolve_backbone(str(tmp_path), "qwen2-vl-2b")
    assert spec["model"] == str(tmp_path)
    assert spec["family"] == "qwen2_vl"
    assert not spec["is_tiny"]


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("epochs: 3\n  learning_rate: [1\n")
    with pytest.raises(UserError, match=r"bad.yaml, line \d"):
        read_yaml(file)
    file.write_text("- 1\n")
    with pytest.raises(UserError, match="found a list"):
        read_yaml(file)
    file.write_text("x: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(file)


def test_a_key_stands_once_in_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("epochs: 3\nseed: 1\nepochs: 5\n")
    with pytest.raises(
        UserError, match=r"twice.yaml, line 3: .*'epochs' stands here a second time"
    ):
        read_yaml(file)
    file.write_text("a: {x: 1}\nb: {x: 1}\nc: &c {x: 1}\nd: {<<: *c, x: 2}\n")
    assert read_yaml(file)["d"] == {"x": 2}  # a merge is no second time


@pytest.mark.parametrize(("line", "key"), [("5: 3", "5"), ("yes: 3", "True")])
def test_keys_are_names(tmp_path: Path, line: str, key: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(line)
    with pytest.raises(UserError, match=f"keys.yaml: the key {key} is no name"):
        read_yaml(file)


def test_a_file_is_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"epochs: 3  # \xe9t\xe9\n")
    with pytest.raises(UserError, match=r"latin.yaml: byte 14 is not UTF-8"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("per_model: 5", "per_model: expected `Model: {key: value}`, got 5"),
        ("per_model: {SASRecc: {epochs: 1}}", r"no model 'SASRecc' \(did you mean 'SASRec"),
        ("per_model: {bert4rec: {epochs: 1}}", r"no model 'bert4rec' \(did you mean 'BERT4Rec'"),
        ("per_model: {BERT4Rec: 3}", "per_model: BERT4Rec: expected {key: value}, got 3"),
    ],
)
def test_per_model_names_models(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "table.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=sentence):
        MMConfig("SASRec", "ml-100k", [str(file)])


def test_an_unknown_key_is_looked_for_in_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "miss.yaml").write_text("epoch: 3\n")
    (tmp_path / "ok.yaml").write_text("seed: 3\n")
    files = [str(tmp_path / name) for name in ("miss.yaml", "ok.yaml")]
    with pytest.raises(UserError, match=r"miss.yaml: SASRec has no key 'epoch'"):
        MMConfig("SASRec", "ml-100k", files)


def test_a_dataset_is_a_name() -> None:
    for path in ("data/mm-demo", "/data/mm-demo", "mm-demo/", ""):
        with pytest.raises(UserError, match="--dataset is a name; its place is --data_path"):
            MMConfig("SASRec", path)


def test_keys_of_other_models_are_warned_of(tmp_path: Path) -> None:
    assert config().warnings == config("LRURec", dropout_prob="0.9").warnings == []
    file = tmp_path / "many.yaml"
    file.write_text("r_min: 0.5\nn_layers: 1\nr_max: 0.9\n")
    given = MMConfig("SASRec", "ml-100k", [str(file)], {"dropout_prob": "0.9"})
    only = "changes nothing, only models other than SASRec have"
    assert given.warnings[0] == f"{file}: {only} r_min, r_max."
    assert given.warnings[1:] == [f"--dropout_prob: {only} dropout_prob."]


def test_a_probability_that_recbole_writes_as_0_may_be_a_fraction() -> None:
    assert config("SASRecCPR")["hidden_dropout_prob"] == 0
    assert config("SASRecCPR", hidden_dropout_prob="0.3")["hidden_dropout_prob"] == 0.3


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_has_to_be_there() -> None:
    with pytest.raises(UserError, match="log_wandb: the package 'wandb' is missing"):
        config(log_wandb=True)


def test_numbers_in_yaml_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "n.yaml"
    file.write_text("a: 1e-3\nb: 5\nc: 0.5\nd: .inf\ne: 1E5\nf: '12'\n")
    values = read_yaml(file)
    assert values == {"a": 1e-3, "b": 5, "c": 0.5, "d": float("inf"), "e": 1e5, "f": "12"}
    assert type(values["b"]) is int


def test_convert_keeps_recbole_forms() -> None:
    assert convert("topk", 10, [5]) == [10]
    assert convert("stages", "retriever,ranker", ["x"]) == ["retriever", "ranker"]
    assert convert("gpu_id", 0, "0") == "0"
    assert convert("train_neg_sample_args", None, {"distribution": "uniform"}) is None
    assert convert("epochs", 10.0, 3) == 10


def test_protocols_of_sequential_and_general_models_agree() -> None:
    sequential, general = config("SASRec"), config("BPR")
    for key in ("eval_args", "metrics", "topk", "valid_metric", "item_inter_num_interval"):
        assert sequential[key] == general[key], key
    assert sequential["train_neg_sample_args"]["distribution"] == "none"
    assert general["train_neg_sample_args"]["distribution"] == "uniform"


# --- evaluation ---
def eval_args(**changes: object) -> dict[str, object]:
    plain = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
    return {**plain, **changes}


@pytest.mark.parametrize("model", ["SASRec", "BPR", "LRURec", "FM"])
@pytest.mark.parametrize("mode", ["uni100", "pop50", {"valid": "uni100", "test": "full"}])
def test_sampled_negatives_name_the_candidate_lists(model: str, mode: object) -> None:
    with pytest.raises(UserError, match=f"{model} is not evaluated in mode '.*eval_candidates"):
        config(model, eval_args=eval_args(mode=mode), metrics=["NDCG"], valid_metric="NDCG@10")


def test_labels_are_for_context_aware_models() -> None:
    assert config("FM").protocol == "labeled"
    with pytest.raises(UserError, match="BPR is not evaluated in mode 'labeled', set mode: full"):
        config("BPR", eval_args=eval_args(mode="labeled"))
    with pytest.raises(UserError, match="FM is evaluated on labels and ranks no candidates"):
        config("FM", eval_candidates="cand20")
    ranks = {"metrics": ["NDCG"], "valid_metric": "NDCG@10", "eval_args": eval_args()}
    assert config("FM", **ranks).protocol == "full"
    assert config("FM", **ranks, eval_candidates="cand20").protocol == "cand20"
    halves = {"valid": "labeled", "test": "full"}
    with pytest.raises(UserError, match="set one mode for valid and test"):
        config("FM", **{**ranks, "eval_args": eval_args(mode=halves)})


def test_protocols_of_ranking() -> None:
    assert config().protocol == "full"
    assert config(mask_history=True).protocol == "full-masked"
    assert config(mask_history=True, eval_candidates="cand100").protocol == "cand100"


@pytest.mark.parametrize(("model", "where"), [("SASRec", "flag"), ("BPR", "flag"), ("BPR", "file")])
def test_a_part_of_eval_args_keeps_the_rest(tmp_path: Path, model: str, where: str) -> None:
    """RecBole fills what is missing with a random split."""
    file = tmp_path / "part.yaml"
    file.write_text("eval_args: {mode: full}\n" if where == "file" else "")
    flags = {"eval_args": "{'mode':'full'}"} if where == "flag" else {}
    given = MMConfig(model, "ml-100k", [str(file)], flags)
    assert given["eval_args"] == config(model)["eval_args"]
    assert given.hash() == config(model).hash()
    assert given.split == "LS/TO"


def test_layers_of_eval_args(tmp_path: Path) -> None:
    file = tmp_path / "part.yaml"
    file.write_text("eval_args: {split: {RS: [0.8, 0.1, 0.1]}, order: TO}\n")
    given = MMConfig("BPR", "ml-100k", [str(file)], {"eval_args": "{'order': 'RO'}"})
    assert (given.split, given["eval_args"]["group_by"]) == ("RS/RO", "user")
    assert config("FM").split == "RS/RO"
    assert config(benchmark_filename="a,b,c").split == "ready-made"


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"spilt": 1}, r"eval_args: there is no 'spilt' in it \(did you mean 'split'\?\)"),
        ({"split": "LS"}, "eval_args: split: expected .*, got 'LS'"),
        ({"split": {"LS": "both"}}, "eval_args: split: expected"),
        ({"split": {"RS": [0.8, 0.2]}}, "eval_args: split: expected"),
        ({"order": "XO"}, "eval_args: order: it is TO or RO, got 'XO'"),
        ({"group_by": "item"}, "eval_args: group_by: it is user or none, got 'item'"),
        ({"mode": {"test": "full", "tset": "full"}}, "eval_args: mode: expected full"),
    ],
)
def test_mistakes_in_eval_args_are_told(part: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config("BPR", eval_args=part)


def test_candidate_lists_need_one_target_and_metrics_of_it() -> None:
    ratios = {"split": {"RS": [0.8, 0.1, 0.1]}}
    with pytest.raises(UserError, match=r"one target of a user.* set split: \{'LS'"):
        config("BPR", eval_candidates="cand20", eval_args=ratios)
    with pytest.raises(UserError, match=r"one target of a user.* leave out benchmark_filename"):
        config(eval_candidates="cand20", benchmark_filename="a,b,c")
    with pytest.raises(UserError, match="metrics: ItemCoverage is not defined on the candidate"):
        config(eval_candidates="cand20", metrics=["NDCG", "ItemCoverage"])


def test_metrics_of_candidate_lists_are_those_the_ranking_knows() -> None:
    defined, accepted = [], []
    for name in [m for m, kind in metric_types.items() if kind == EvaluatorType.RANKING]:
        with suppress(UserError):
            candidate_metrics(torch.tensor([[1.0, 0.0]]), [1], [name])
            defined.append(name)
        with suppress(UserError):
            best = measured([name], [10])[0]
            config(eval_candidates="cand20", metrics=[name], valid_metric=best)
            accepted.append(name)
    assert accepted == defined


def test_sequences_have_an_order_in_time() -> None:
    with pytest.raises(UserError, match=r"SASRec reads sequences.* set order: TO, not RO"):
        config(eval_args=eval_args(order="RO"))
    assert config("BPR", eval_args=eval_args(order="RO"))["eval_args"]["order"] == "RO"


def test_a_ready_made_split_alone_is_fine() -> None:
    assert config(benchmark_filename="a,b,c")["benchmark_filename"] == ["a", "b", "c"]


@pytest.mark.parametrize("metric", ["AUC", "LogLoss"])
def test_metrics_of_labels_have_no_k(metric: str) -> None:
    assert config("FM", valid_metric=metric)["valid_metric"] == metric
    with pytest.raises(UserError, match=f"{metric}@10 is not measured, write {metric}"):
        config("FM", valid_metric=f"{metric}@10")


def test_what_is_called_measured_is_what_recbole_gives() -> None:
    ranking = [m for m, kind in metric_types.items() if kind == EvaluatorType.RANKING]
    given = config("BPR", metrics=ranking, topk=[2, 3], valid_metric="Recall@2")
    assert set(measured(ranking, [2, 3])) == set(recboles_result(given))


def recboles_result(given: MMConfig) -> dict[str, float]:
    """RecBole's own numbers of two users and five items."""
    data = DataStruct()
    data.set("rec.items", torch.tensor([[1, 2, 3], [4, 2, 1]]))
    data.set("rec.topk", torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1]]))
    data.set("rec.meanrank", torch.tensor([[2.0, 5, 1], [1.0, 5, 1]]))
    data.set("data.num_items", 6)
    data.set("data.num_users", 3)
    data.set("data.count_items", Counter({1: 3, 2: 2, 3: 1, 4: 1}))
    data.set("data.count_users", Counter({1: 3, 2: 4}))
    return dict(Evaluator(given).evaluate(data))


# --- models that train in stages ---
@pytest.mark.parametrize(
    ("model", "overrides", "sentence"),
    [
        ("LRURec", {"topk": "[5,10]"}, r"^valid_metric: Recall@25 is not .* such as Recall@10"),
        (
            "PRIME",
            {"topk": "[5,10]"},
            r"^retriever_valid_metric: Recall@25 is not measured, add it to .*topk \[5, 10\]",
        ),
        ("PRIME", {"retriever_valid_metric": "Recall"}, "^retriever_valid_metric: Recall is not"),
        ("LRURec", {"stages": "rank"}, r"stages: 'rank' is no stage of LRURec \(train\)"),
        ("PRIME", {"stages": "retriever,rankr"}, "stages: 'rankr' is no stage of PRIME"),
        ("LRURec", {"learner": "sgd"}, "learner: LRURec is trained by AdamW and not by sgd"),
        (
            "LRURec",
            {"clip_grad_norm": "{'max_norm': 5, 'norm_type': 1}"},
            "clip_grad_norm: LRURec clips the L2 norm",
        ),
        ("LRURec", {"clip_grad_norm": "{'norm_type': 2}"}, "has no max_norm above 0"),
        ("LRURec", {"eval_step": "0"}, "eval_step: it must be a number above 0"),
        ("PRIME", {"ranker_epochs": "-1"}, r"ranker_epochs: it must be 0 \(off\) or more"),
        ("PRIME", {"ranker_batch_size": "0"}, "ranker_batch_size: it must be a number above 0"),
        ("PRIME", {"retriever_eval_step": "0"}, "retriever_eval_step: it must be a number above"),
        ("PRIME", {"ranker_warmup_steps": "-1"}, r"ranker_warmup_steps: it must be 0 \(off\) or"),
        ("PRIME", {"ranker_adam_eps": "x"}, "ranker_adam_eps: expected a number such as"),
        ("PRIME", {"rank_epochs": "1"}, r"PRIME has no key 'rank_epochs' \(did you mean 'ranker_"),
        ("SASRec", {"train_epochs": "1"}, "SASRec has no key 'train_epochs'"),
        (
            "PRIME",
            {"ranker_clip_grad_norm": "{'max_norm': 2}"},
            "ranker_clip_grad_norm: ranker_clip_norm: 1.0 stands above it",
        ),
        (
            "PRIME",
            {"retriever_clip_grad_norm": "{'norm_type': 2}"},
            "retriever_clip_grad_norm: .* has no max_norm above 0",
        ),
        ("PRIME", {"backbone": "tiny", "quantize": "nf4"}, "^quantize: the tiny backbone"),
        ("RARec", {"backbone": "tiny", "dtype": "bfloat16"}, "^dtype: the tiny backbone"),
    ],
)
def test_mistakes_in_stages_are_told(model: str, overrides: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config(model, **overrides)


def test_what_stages_do_honour_is_accepted() -> None:
    kept = {"learner": "Adam", "clip_grad_norm": "{'max_norm': 2}", "ranker_valid_users": "0"}
    assert config("PRIME", **kept)["clip_grad_norm"] == {"max_norm": 2}
    assert config("PRIME", quantize="nf4")["quantize"] == "nf4"
    for key, value in (("learner", "sgd"), ("clip_grad_norm", "{'max_norm': 1, 'norm_type': 1}")):
        assert config("SASRec", **{key: value})[key]  # RecBole's trainer honours these


def test_a_stage_can_have_its_own_of_each_setting() -> None:
    """Also of those that no YAML of the model has."""
    values: dict[str, object] = {
        "epochs": 3, "learning_rate": 0.5, "weight_decay": 0.25, "adam_eps": 1e-4, "max_steps": 7,
        "max_minutes": 0.5, "accumulate": 2, "schedule": "linear", "warmup_steps": 4,
        "eval_every": 6, "eval_step": 8, "stopping_step": 9, "valid_metric": "MRR@5",
        "valid_users": 11, "clip_grad_norm": {"max_norm": 12.0},
    }  # fmt: skip
    assert {*values, "clip_norm"} == {*STAGE_KEYS}
    given = config("PRIME", **{f"retriever_{key}": value for key, value in values.items()})
    found = stage_settings(given, given.model_class.stage_names)
    assert astuple(found["retriever"]) == (
        *(3, 0.5, 0.25, 1e-4, 7, 0.5, 2, 12.0, "linear", 4, 6, 8, 9, "mrr@5", 11, False, None),
    )
    capped = config("PRIME", max_minutes="0.25", retriever_max_minutes="0.5")
    caps = stage_settings(capped, capped.model_class.stage_names)
    assert {caps[name].max_minutes for name in caps} == {0.25}  # as epochs, it caps every stage
    plain = config("PRIME")
    assert found["ranker"] == stage_settings(plain, ["ranker"])["ranker"]
    assert given.hash() != plain.hash()
    for said, norm in (("2", 2.0), ("0", None)):  # RecBole's key for all, 5, stands below it
        given = config("LRURec", train_clip_norm=said)
        assert stage_settings(given, ["train"])["train"].clip_norm == norm
    assert type(config("PRIME", ranker_adam_eps="1")["ranker_adam_eps"]) is float


@pytest.mark.parametrize("value", ["train", ["train"], "[train]", "['train']"])
def test_stages_are_always_names(value: object) -> None:
    """Also of a model whose YAML does not list them."""
    assert config("LRURec", stages=value)["stages"] == ["train"]


def test_hash_ignores_where_and_keeps_what() -> None:
    assert config(show_progress="False").hash() == config().hash()
    assert config(seed="7").hash() != config().hash()


def test_every_yaml_key_has_a_comment_with_its_type() -> None:
    for path in properties_dir().rglob("*.yaml"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            key = line.partition(":")[0]
            if path.parent.name == "paper" or not key.strip() or key.lstrip().startswith("#"):
                continue
            nested = line.startswith(" ") and "#" not in line  # eval_args' inner lines
            section = key in ("settings", "tiny", "  settings")
            assert nested or section or "# (" in line, f"{path.name}:{number} has no comment"


def test_a_dataset_sets_keys_of_one_model_alone() -> None:
    """The demo's PRIME has a retriever with little dropout; SASRec has RecBole's."""
    assert MMConfig("PRIME", "mm-demo")["attn_dropout_prob"] == 0.2
    assert MMConfig("SASRec", "mm-demo")["attn_dropout_prob"] == 0.5
    assert MMConfig("PRIME", "mm-demo")["backbone"] == "tiny"
