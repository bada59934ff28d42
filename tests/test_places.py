"""Places of targets: what a run leaves of them, and the paired comparison made from it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_mm import quick_start
from recbole_mm.errors import UserError
from recbole_mm.report.places import compare, main, read_places, side, values, write_places

FLAGS = {"user_inter_num_interval": "[20,40]", "show_progress": False, "epochs": 1}
METRICS = ["Recall", "NDCG", "MRR", "Hit"]


class Tokens:
    """As much of a dataset as is asked for."""

    uid_field = "user_id"

    def id2token(self, field: str, ids: list[int]) -> list[str]:
        return [f"u{i}\tx" for i in ids]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        found = {
            name: quick_start.run(name, "ml-100k", overrides={**FLAGS, "metrics": METRICS})
            for name in ("EASE", "Pop", "GRU4Rec")
        }
        found["cand20"] = quick_start.run(
            "Pop", "ml-100k", overrides={**FLAGS, "eval_candidates": "cand20", "metrics": METRICS}
        )
    for result in found.values():
        result["run_dir"] = str(place / result["run_dir"])
    return found


@pytest.mark.parametrize("name", ["EASE", "Pop", "GRU4Rec", "cand20"])
def test_the_metrics_follow_from_the_places(runs: dict[str, dict], name: str) -> None:
    """Of a general model, a sequential one, and among candidates."""
    places = read_places(runs[name]["run_dir"])
    assert len(places) == runs[name]["test_users"]
    for metric, expected in runs[name]["test"].items():
        found = values(np.array([*places.values()]), metric).mean()
        if name != "cand20":  # ties count half there, and RecBole's metrics of half places differ
            assert found == pytest.approx(expected, abs=1e-5), metric
    ranks = np.array([*places.values()])
    assert ranks.max() <= (21 if name == "cand20" else 20)


def test_users_are_told_by_their_tokens(tmp_path: Path) -> None:
    users = torch.tensor([3, 1])
    found = {"retriever": (users, torch.tensor([4, 0])), "ranker": (users, torch.tensor([1.5, 2]))}
    write_places(tmp_path / "places.tsv", Tokens(), found)
    with (tmp_path / "places.tsv").open(newline="") as file:
        assert list(csv.reader(file, delimiter="\t")) == [
            ["user", "retriever", "ranker"],
            ["u3\tx", "4", "1.5"],
            ["u1\tx", "0", "2"],
        ]
    assert read_places(f"{tmp_path}:ranker") == {"u3\tx": 1.5, "u1\tx": 2.0}
    with pytest.raises(UserError, match=r"no row 'rankr' \(did you mean 'ranker'\?\)"):
        read_places(f"{tmp_path}:rankr")


def test_several_targets_a_user_leave_no_file(tmp_path: Path) -> None:
    write_places(tmp_path / "p", Tokens(), {"": None})
    twice = torch.tensor([1, 1])
    write_places(tmp_path / "p", Tokens(), {"": (twice, twice)})
    assert not (tmp_path / "p").exists()


def test_values_are_those_of_the_definitions() -> None:
    places = np.array([0.0, 1.0, 3.0, 11.0])
    assert values(places, "recall@10").tolist() == [0, 1, 1, 0]
    assert values(places, "ndcg@10") == pytest.approx([0, 1, 1 / 2, 0])
    assert values(places, "MRR@20") == pytest.approx([0, 1, 1 / 3, 1 / 11])
    with pytest.raises(UserError, match="'auc' is none of recall@k"):
        values(places, "auc")


def test_the_interval_is_that_of_resampled_users() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random(200).round(1), rng.random(200).round(1)
    gap = first - second
    naive = [gap[rng.integers(0, 200, 200)].mean() for _ in range(20_000)]
    found = compare(first, second, resamples=20_000)
    assert [found.low, found.high] == pytest.approx(np.quantile(naive, (0.025, 0.975)), abs=2e-3)
    assert (found.first, found.second) == pytest.approx((first.mean(), second.mean()))


def test_a_difference_is_told_from_chance() -> None:
    rng = np.random.default_rng(0)
    noise = rng.random(500)
    assert compare(noise + 0.05, noise).differ
    misses = sum(
        compare(rng.random(300), rng.random(300), resamples=500, seed=n).differ for n in range(100)
    )
    assert misses <= 12  # five in a hundred are expected


def test_two_runs_are_compared_on_the_command_line(
    runs: dict[str, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    ease, pop = runs["EASE"], runs["Pop"]
    assert main([ease["run_dir"], pop["run_dir"], "--metric=recall@10"]) == 0
    said = capsys.readouterr().out
    one, other = ease["test"]["recall@10"], pop["test"]["recall@10"]
    assert f"recall@10 of {ease['test_users']} users: {one:.4f} and {other:.4f}" in said
    assert main([pop["run_dir"], pop["run_dir"]]) == 0
    assert "which may be chance" in capsys.readouterr().out
    assert main(["nowhere", pop["run_dir"]]) == 1
    assert "nowhere/places.tsv is not there" in capsys.readouterr().err


def test_a_side_of_several_runs_is_their_mean(runs: dict[str, dict], tmp_path: Path) -> None:
    folders = [runs[name]["run_dir"] for name in ("EASE", "Pop")]
    both = side(folders, "ndcg@10")
    expected = [side([folder], "ndcg@10") for folder in folders]
    assert all(both[u] == pytest.approx((expected[0][u] + expected[1][u]) / 2) for u in both)
    (tmp_path / "places.tsv").write_text("user\tresult\nsomebody\t1\n")
    (tmp_path / "result.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(UserError, match="tested other users than the runs before it"):
        side([folders[0], str(tmp_path)], "ndcg@10")


def test_what_a_result_file_holds_is_compared_over_its_seeds(
    runs: dict[str, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [{**runs[name], "model": "A", "variant": "good"} for name in ("EASE", "Pop")]
    file = tmp_path / "r.json"
    file.write_text(json.dumps([*both, {**runs["GRU4Rec"], "variant": None}]))
    mean = (runs["EASE"]["test"]["recall@10"] + runs["Pop"]["test"]["recall@10"]) / 2
    for name in ("good", "A", "A good"):
        assert main(["--results", str(file), name, "GRU4Rec", "--metric=recall@10"]) == 0
        assert f"users: {mean:.4f} and " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ([{"model": "A", "run_dir": "x"}], "B", "no model or variant 'B'"),
        (
            [{"model": m, "variant": "v", "run_dir": "x"} for m in "AB"],
            "v",
            "'v' may be A v or B v: name one of them",
        ),
        (
            [{"model": "A", "variant": v, "run_dir": "x"} for v in "vw"],
            "A",
            "'A' may be A v or A w",
        ),
        ([1, 2], "A", "is no result file of run_recbole_mm.py"),
        ("nothing", "A", "is no result file of run_recbole_mm.py"),
    ],
)
def test_names_that_mean_nothing_or_several_things(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, name: str, says: str
) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(content))
    assert main(["--results", str(file), name, name]) == 1
    assert says in capsys.readouterr().err


def test_a_result_file_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--results", str(tmp_path / "none.json"), "a", "b"]) == 1
    assert "none.json cannot be read" in capsys.readouterr().err
    (tmp_path / "r.json").write_text("{")
    assert main(["--results", str(tmp_path / "r.json"), "a", "b"]) == 1
    assert "r.json is no JSON" in capsys.readouterr().err


def test_a_metric_beyond_what_a_run_looked_at(
    runs: dict[str, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    """General models look at 20 items; places beyond them are not known."""
    folders = [runs[name]["run_dir"] for name in ("EASE", "Pop")]
    assert main([*folders, "--metric=recall@20"]) == 0
    assert main([*folders, "--metric=recall@25"]) == 1
    assert "looked at 20 items a user: take no longer a metric" in capsys.readouterr().err
