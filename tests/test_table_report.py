"""The table at the end: the right number in the right cell, and how each model was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_mm import quick_start
from recbole_mm.report.differences import difference_table, pair_table, shared_metric
from recbole_mm.report.table import format_rows, result_table

METRICS = ("recall", "mrr", "ndcg", "hit")


def numbers(base: float, topk: tuple[int, ...] = (5, 10)) -> dict[str, float]:
    """A different number for each metric: base + 0.01 a metric + 0.001 a k."""
    return {
        f"{name}@{k}": base + 0.01 * m + 0.001 * n
        for n, k in enumerate(topk)
        for m, name in enumerate(METRICS)
    }


def result(model: str, base: float = 0.1, **changes: Any) -> dict[str, Any]:
    """What `quick_start.run` returns, as far as a table reads it."""
    plain = {
        "model": model,
        "dataset": "shop",
        "backbone": None,
        "train_mode": "prefix",
        "protocol": "full",
        "general": False,
        "limit_users": None,
        "valid_metric": "ndcg@10",
        "test": numbers(base),
        "test_protocols": {"full": numbers(base), "full-masked": numbers(base + 0.5)},
        "test_users": 305,
        "stages": {"train": {"epochs": 7, "steps": None, "stopped": "patience"}},
        "rows": [],
        "seconds": 12.6,
    }
    return {**plain, **changes}


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a table by column title; titles and cells are two blanks apart or more."""
    _, header, rule, *rows = table.splitlines()
    assert set(rule) == {"-", " "}
    starts = [0, *(i + 2 for i in range(len(rule) - 1) if rule[i : i + 2] == "  ")]
    ends = [*(start - 2 for start in starts[1:]), None]

    def cut(line: str) -> list[str]:
        return [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]

    return [dict(zip(cut(header), cut(row), strict=True)) for row in rows]


# --- layout ---
def test_columns_are_aligned_first_left_others_right() -> None:
    table = format_rows(["model", "a"], [["x", "0.5"], ["a long name", "12.25"]])
    assert table.splitlines() == [
        "model            a",
        "-----------  -----",
        "x              0.5",
        "a long name  12.25",
    ]


# --- values ---
def test_values_of_recall_and_ndcg_with_four_digits() -> None:
    (row,) = cells(result_table([result("SASRec", 0.12344)]))
    assert row == {
        "model": "SASRec",
        "backbone": "-",
        "train mode": "prefix",
        "trained": "7 ep, early stop",
        "recall@5": "0.1234",
        "ndcg@5": "0.1434",
        "recall@10": "0.1244",
        "ndcg@10": "0.1444",
        "seconds": "13",
    }


def test_the_title_says_what_was_measured_on_whom() -> None:
    assert result_table([result("A")]).splitlines()[0] == ("shop, protocol full, test on 305 users")
    sampled = result("A", protocol="cand100", limit_users=50, test_protocols={"cand100": {}})
    title = result_table([sampled]).splitlines()[0]
    assert title == "shop, protocol cand100, test on 305 users (limit_users 50)"


def test_metrics_without_recall_and_ndcg_are_shown_as_they_are() -> None:
    only = {"mrr@5": 0.25, "hit@5": 0.5}
    (row,) = cells(result_table([result("A", test=only)]))
    assert (row["mrr@5"], row["hit@5"]) == ("0.2500", "0.5000")


def test_of_many_ks_the_last_three_are_shown() -> None:
    (row,) = cells(result_table([result("A", test=numbers(0.1, (1, 5, 10, 20, 25)))]))
    assert [name for name in row if "@" in name] == [
        f"{metric}@{k}" for k in (10, 20, 25) for metric in ("recall", "ndcg")
    ]


def test_what_a_model_has_not_measured_is_a_dash_and_not_a_zero() -> None:
    """Models that have no metric in common show all of them."""
    first, second = result("A", test={"recall@5": 0.1}), result("B", test={"recall@10": 0.0})
    rows = cells(result_table([first, second]))
    assert (rows[1]["recall@5"], rows[1]["recall@10"]) == ("-", "0.0000")


# --- a general model ranks what it was trained on first ---
def test_a_general_model_adds_a_masked_column_to_every_row() -> None:
    rows = cells(result_table([result("SASRec", 0.1), result("Pop", 0.2, general=True)]))
    for row, base in zip(rows, (0.1, 0.2), strict=True):
        shown = {name: value for name, value in row.items() if "@" in name}
        assert shown == {  # at the k of valid_metric alone
            "recall@10 unmasked": f"{base + 0.001:.4f}",
            "recall@10 masked": f"{base + 0.501:.4f}",
            "ndcg@10 unmasked": f"{base + 0.021:.4f}",
            "ndcg@10 masked": f"{base + 0.521:.4f}",
        }


def test_without_a_general_model_there_is_one_column_a_metric() -> None:
    assert "masked" not in result_table([result("SASRec"), result("GRU4Rec")])


@pytest.mark.parametrize("protocol", ["cand100", "full"])
def test_where_only_one_protocol_was_measured_there_is_no_pair(protocol: str) -> None:
    one = result("Pop", general=True, protocol=protocol, test_protocols={protocol: numbers(0.1)})
    (row,) = cells(result_table([one]))
    assert row["recall@10"] == "0.1010"
    assert "-" not in [value for name, value in row.items() if "@" in name]


def test_labels_have_a_table_of_their_own() -> None:
    """A context-aware model's AUC is no number of a ranking."""
    labels = {"auc": 0.75, "logloss": 0.5}
    context = result(
        "FM",
        protocol="labeled",
        general=True,
        valid_metric="auc",
        test=labels,
        test_protocols={"labeled": labels},
    )
    for order in ([context, result("SASRec")], [result("SASRec"), context]):
        tables = result_table(order).split("\n\n")
        assert len(tables) == 2
        labelled, ranked = sorted(tables, key=lambda table: "protocol full" in table)
        assert "protocol labeled" in labelled
        ((one,), (other,)) = cells(labelled), cells(ranked)
        assert (one["model"], one["auc"], one["logloss"]) == ("FM", "0.7500", "0.5000")
        assert (other["model"], other["recall@10"]) == ("SASRec", "0.1010")


# --- several ways to read one model ---
def test_each_readout_has_a_row_with_its_own_numbers() -> None:
    names = ("retriever", "ranker", "ranker+fusion")
    readouts = [
        {
            "name": name,
            "test": numbers(0.1 * n),
            "test_protocols": {"full": numbers(0.1 * n), "full-masked": numbers(0.1 * n + 0.05)},
        }
        for n, name in enumerate(names, 1)
    ]
    prime = result("PRIME", backbone="tiny", train_mode="whole", rows=readouts)
    rows = cells(result_table([prime]))
    assert [row["model"] for row in rows] == [f"PRIME {name}" for name in names]
    assert [row["recall@10"] for row in rows] == ["0.1010", "0.2010", "0.3010"]
    assert {(row["backbone"], row["train mode"]) for row in rows} == {("tiny", "whole")}
    beside = cells(result_table([prime, result("Pop", general=True)]))
    assert [row["recall@10 masked"] for row in beside] == ["0.1510", "0.2510", "0.3510", "0.6010"]


# --- how training ended ---
@pytest.mark.parametrize(
    ("last", "told"),
    [
        ({"epochs": 1, "stopped": "epochs"}, "1 ep, all epochs"),
        ({"epochs": 31, "steps": 900, "stopped": "patience"}, "31 ep, early stop"),
        ({"epochs": 2, "stopped": "time"}, "2 ep, time up"),
        ({"epochs": 0, "steps": 500, "stopped": "steps"}, "500 steps, all steps"),
        ({"epochs": 3}, "3 ep, -"),
    ],
)
def test_how_training_ended(last: dict[str, Any], told: str) -> None:
    stages = {"first": {"epochs": 99, "stopped": "epochs"}, "last": last}
    (row,) = cells(result_table([result("A", stages=stages)]))
    assert row["trained"] == told


# --- what really comes out of a run ---
def test_a_real_result_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {"user_inter_num_interval": "[20,40]", "topk": [10], "show_progress": False}
    real = quick_start.run("Pop", "ml-100k", overrides=keys)
    table = result_table([real])
    (row,) = cells(table)
    assert f"test on {real['test_users']} users" in table
    for title, protocol in (("unmasked", "full"), ("masked", "full-masked")):
        for metric in ("recall@10", "ndcg@10"):
            assert row[f"{metric} {title}"] == f"{real['test_protocols'][protocol][metric]:.4f}"
    assert row["trained"] == "1 ep, all epochs"


def test_models_with_other_ks_share_the_columns_they_have_in_common() -> None:
    """LRURec reports up to 25, general models up to 10: no row is all dashes."""
    long = numbers(0.1, (5, 10, 20, 25))
    both = {"full": long, "full-masked": long}
    first = result("LRURec", test=long, test_protocols=both, valid_metric="recall@25")
    for second in (result("SASRec", 0.3), result("Pop", 0.3, general=True)):
        table = cells(result_table([first, second]))
        scores = {title: cell for title, cell in table[1].items() if "@" in title}
        assert "-" not in scores.values()
        assert not any("@25" in title for title in scores)
        assert next(cell for title, cell in scores.items() if "recall@10" in title) == "0.3010"


def test_another_split_stands_in_the_title() -> None:
    assert "split" not in result_table([result("Pop", split="LS/TO")])
    assert "split RS/RO" in result_table([result("Pop", split="RS/RO")])


# --- variants and seeds ---
def of_seeds(variant: str | None, bases: dict[int, float], **changes: Any) -> list[dict[str, Any]]:
    return [
        result("PRIME", base, variant=variant, seed=seed, **changes) for seed, base in bases.items()
    ]


def test_seeds_are_one_row_of_means_with_their_standard_errors() -> None:
    table = result_table(of_seeds(None, {1: 0.10, 2: 0.12, 3: 0.17}))
    (row,) = cells(table)
    assert row["model"] == "PRIME"
    # recall@10 is the base + 0.001: mean 0.131, deviation 0.03606, over the root of 3
    assert row["recall@10"] == "0.1310 ±0.0208"
    assert "3 seeds (mean ±standard error)" in table.splitlines()[0]


def rows_of(bases: dict[str, float], chosen: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "chosen": name == chosen, "test": numbers(base), "test_protocols": {}}
        for name, base in bases.items()
    ]


def test_what_variants_share_stands_once_and_their_results_always() -> None:
    first = rows_of({"retriever": 0.1, "ranker": 0.2}, "ranker")
    second = rows_of({"retriever": 0.1, "ranker": 0.3}, "ranker")
    found = [
        result("PRIME", variant=name, rows=rows, seed=1)
        for name, rows in (("whole", first), ("text only", second), ("again", first))
    ]
    table = cells(result_table(found))
    assert [row["model"] for row in table] == [
        "PRIME whole: retriever",
        "PRIME whole: ranker",
        "PRIME text only: ranker",
        "PRIME again: ranker",
    ]


def test_a_row_that_differs_in_one_seed_is_shown() -> None:
    one = [
        result("PRIME", variant="a", seed=seed, rows=rows_of({"r": 0.1, "x": 0.2}, "x"))
        for seed in (1, 2)
    ]
    other = [
        result("PRIME", variant="b", seed=seed, rows=rows_of({"r": base, "x": 0.2}, "x"))
        for seed, base in ((1, 0.1), (2, 0.15))
    ]
    names = [row["model"] for row in cells(result_table([*one, *other]))]
    assert names == ["PRIME a: r", "PRIME a: x", "PRIME b: r", "PRIME b: x"]
    # killed after the first seed of the second: what is there is equal to what stands above
    names = [row["model"] for row in cells(result_table([*one, other[0]]))]
    assert names == ["PRIME a: r", "PRIME a: x", "PRIME b: x (1 of 2 seeds)"]


def test_seeds_that_ended_differently() -> None:
    ends = [{"epochs": 7, "stopped": "patience"}, {"epochs": 9, "stopped": "time"}]
    found = [
        result("A", seed=seed, stages={"train": end}) for seed, end in enumerate(ends, start=1)
    ]
    (row,) = cells(result_table(found))
    assert row["trained"] == "2 seeds, early stop or time up"


def test_a_stage_that_ended_by_time_is_told() -> None:
    stages = {"retriever": {"epochs": 3, "stopped": "time"}, "ranker": {"steps": 9}}
    (row,) = cells(result_table([result("PRIME", stages=stages)]))
    assert row["trained"] == "9 steps, -, retriever: time up"


def test_rows_that_lack_seeds_say_so() -> None:
    found = [*of_seeds("a", {1: 0.1, 2: 0.2}), *of_seeds("b", {1: 0.3})]
    names = [row["model"] for row in cells(result_table(found))]
    assert names == ["PRIME a", "PRIME b (1 of 2 seeds)"]
    assert "equal rows of variants once" in result_table(found).splitlines()[0]


# --- differences ---
def left(folder: Path, places: list[int], **changes: Any) -> dict[str, Any]:
    """The result of a run that left these places, one a user."""
    folder.mkdir()
    lines = [f"u{user}\t{place}" for user, place in enumerate(places)]
    (folder / "places.tsv").write_text("\n".join(["user\tresult", *lines]) + "\n")
    (folder / "result.json").write_text('{"rows": []}')
    return result("A", run_dir=str(folder), **{"seed": 1, **changes})


ALL, HALF = [1] * 40, [1, 2] * 20  # the target is always first, or second for every other user
EXPECTED = (1 / np.log2(3) - 1) / 2  # the difference in ndcg


def test_differences_are_to_the_first_row_over_the_same_users(tmp_path: Path) -> None:
    good = left(tmp_path / "good", ALL, variant="good")
    bad = left(tmp_path / "bad", HALF, variant="bad")
    title, _, _, row = difference_table([good, bad]).splitlines()
    assert title == "ndcg@10 less that of A good, paired bootstrap over users, 95 %"
    name, word, difference, low, high = row.split()
    assert (name, word) == ("A", "bad")
    assert difference == f"{EXPECTED:+.4f}"
    assert float(low) < EXPECTED < float(high) < 0
    assert difference_table([good, {**good, "variant": "same"}]).endswith("may be chance")
    assert difference_table([good]) == ""
    assert difference_table([{**good, "variant": None}, {**bad, "variant": None}]) == ""
    (tmp_path / "bad" / "places.tsv").write_text("user\tresult\nother\t1\n")
    assert "tested different users" in difference_table([good, bad])


def test_only_seeds_that_both_have_are_compared(tmp_path: Path) -> None:
    """A killed command: the second seed of the first variant is better than all."""
    first = left(tmp_path / "a1", HALF, variant="a")
    more = left(tmp_path / "a2", ALL, variant="a", seed=2)
    other = left(tmp_path / "b1", HALF, variant="b")
    row = difference_table([first, more, other]).splitlines()[-1]
    assert row.split()[:3] == ["A", "b", "+0.0000"]
    late = left(tmp_path / "c3", HALF, variant="c", seed=3)
    assert "A c" not in difference_table([first, more, other, late])


def test_protocols_are_not_mixed(tmp_path: Path) -> None:
    full = left(tmp_path / "a", HALF, variant="a")
    few = left(tmp_path / "b", ALL, variant="b", protocol="cand20")
    assert difference_table([full, few]) == ""
    assert pair_table([full, few], [["b", "a"]]) == ""


def test_a_metric_is_one_that_all_runs_have(tmp_path: Path) -> None:
    long = numbers(0.1, (10, 25))
    first = left(tmp_path / "a", ALL, variant="a", test=long, valid_metric="NDCG@25")
    assert shared_metric([first]) == "ndcg@25"
    second = left(tmp_path / "b", HALF, variant="b")
    assert shared_metric([first, second]) == "ndcg@10"
    assert difference_table([first, second]).startswith("ndcg@10 less that of A a")
    assert shared_metric([{**first, "valid_metric": "giniindex@10"}]) is None


def test_pairs_of_a_recipe(tmp_path: Path) -> None:
    good = left(tmp_path / "good", ALL, variant="good")
    bad = left(tmp_path / "bad", HALF, variant="bad")
    pairs = [["bad", "good"], ["bad", "not run"], ["A good", "good"]]
    title, _, _, one, other = pair_table([good, bad], pairs).splitlines()
    assert title == "ndcg@10 of pairs, paired bootstrap over users, 95 %"
    assert one.split()[:4] == ["bad", "less", "good", f"{EXPECTED:+.4f}"]
    assert other.startswith("A good less good")
    assert pair_table([good, bad], []) == ""
    assert "has no row 'ranker'" in pair_table([good, bad], [["bad:ranker", "good"]])
