"""The plot of RA-Rec's figure 5: what is drawn, in which space, and the numbers beside it."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_mm import quick_start
from recbole_mm.errors import UserError
from recbole_mm.report import tsne
from recbole_mm.report.tsne import (
    MODELS,
    Points,
    common_space,
    item_points,
    lay_out,
    main,
    mixed,
    pair_rows,
    shared,
    user_points,
    write_coordinates,
)

SMALL = {
    **{"backbone": "tiny", "limit_users": 60, "epochs": 1, "topk": [5, 10], "score_norm": "none"},
    **{"hidden_size": 16, "n_samples": 60, "alignment_batch_size": 8, "alignment_max_steps": 2},
    **{"tune": "alignment", "show_progress": False},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run; the working directory is the one it was made in."""
    place = tmp_path_factory.mktemp("tsne")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return place / quick_start.run("RARec", "mm-demo", overrides=SMALL)["run_dir"]


@pytest.fixture(scope="module")
def loaded(run_dir: Path) -> tuple[Any, Any]:
    """Its test part and its model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run_dir.parents[1])
        data, model = quick_start.trained(str(run_dir))
    return data.test._dataset, model


def clouds(n: int, *sizes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(3, 2, (n, d)) for name, d in zip(MODELS, sizes, strict=True)}


# --- vectors ---
def test_the_vectors_are_those_that_are_scored(loaded: tuple[Any, Any]) -> None:
    test, model = loaded
    tokens = test.item_tokens()
    items = item_points(model, tokens, 30, 0)
    users = user_points(model, test, 20, 0)
    assert len(items.names) == len({*items.names}) == 30
    row_of = {t: i for i, t in enumerate(test.id2token(test.uid_field, test.inter_feat["user_id"]))}
    rows = test.inter_feat[torch.tensor([row_of[name] for name in users.names])]
    ids = [tokens.index(name) for name in items.names]
    model.enter("alignment")
    expected = model.full_sort_predict(rows)[:, ids].double().numpy()
    found = users.vectors["RA-Rec"] @ items.vectors["RA-Rec"].T
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    histories = [
        row[:end].numpy()
        for row, end in zip(rows[model.ITEM_SEQ], rows[model.ITEM_SEQ_LEN], strict=True)
    ]
    assert users.vectors["ID model"] == pytest.approx(model.ids.users(histories).double().numpy())
    alone = model.aligned.language_model
    for place in (0, 7):
        text = alone.padded([model.texts.item(ids[place])])
        expected = alone.vectors(text)[0].double().numpy()
        assert items.vectors["language model"][place] == pytest.approx(expected, abs=1e-5)
    gap = np.abs(items.vectors["language model"] - items.vectors["RA-Rec"]).max()
    assert gap > 1e-3  # the prefixes say something


def test_items_that_training_never_saw_are_left_out(loaded: tuple[Any, Any]) -> None:
    test, model = loaded
    every = item_points(model, test.item_tokens(), 10_000, 0)
    warm = {test.item_tokens()[i] for i in torch.nonzero(model.ids.warm)[:, 0].tolist()}
    assert {*every.names} == warm
    assert "[PAD]" not in every.names


# --- one space ---
def test_vectors_come_into_one_space() -> None:
    vectors = clouds(40, 20, 20, 7)
    together = common_space(vectors)
    for found in together.values():
        assert found.shape == (40, 7)
        assert found.mean(axis=0) == pytest.approx(np.zeros(7), abs=1e-9)
        assert (found**2).sum(axis=1).mean() == pytest.approx(1.0)
    smallest = vectors["ID model"]  # all of whose axes stay: nothing but a turn
    scaled = (smallest - smallest.mean(axis=0)) / smallest.std(axis=0)
    angles = [(v @ v.T) / np.trace(v @ v.T) for v in (scaled, together["ID model"])]
    assert angles[1] == pytest.approx(angles[0])


def test_there_are_fewer_axes_than_points() -> None:
    assert common_space(clouds(12, 30, 30, 16))["RA-Rec"].shape == (12, 11)
    constant = {**clouds(12, 5, 5, 5), "ID model": np.ones((12, 5))}
    assert np.isfinite(common_space(constant)["ID model"]).all()


def test_the_layout_is_seeded() -> None:
    together = common_space(clouds(15, 6, 6, 4))
    one, same = lay_out(together, 3), lay_out(together, 3)
    for model in MODELS:
        assert one[model].shape == (15, 2)
        assert (one[model] == same[model]).all()


# --- numbers ---
def naive_neighbours(vectors: np.ndarray, place: int, k: int) -> list[int]:
    def cosine(other: int) -> float:
        a, b = vectors[place], vectors[other]
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    return sorted((i for i in range(len(vectors)) if i != place), key=lambda i: -cosine(i))[:k]


def test_numbers_are_those_of_the_definitions() -> None:
    one, other = (np.random.default_rng(n).normal(size=(14, 5)) for n in (1, 2))
    both = np.concatenate([one, other])
    foreign = [
        (i >= 14) != (place >= 14) for place in range(28) for i in naive_neighbours(both, place, 3)
    ]
    assert mixed(one, other, 3) == pytest.approx(np.mean(foreign))
    common = [
        len({*naive_neighbours(one, i, 3)} & {*naive_neighbours(other, i, 3)}) / 3
        for i in range(14)
    ]
    assert shared(one, other, 3) == pytest.approx(np.mean(common))


def test_numbers_at_their_ends() -> None:
    rng = np.random.default_rng(0)
    one, turn = rng.normal(size=(300, 8)), np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert shared(one, one @ turn) == 1.0
    assert shared(one, rng.normal(size=(300, 3))) == pytest.approx(10 / 299, abs=0.02)
    assert mixed(one + 20, one - 20) == 0.0
    assert mixed(one, rng.normal(size=(300, 8))) == pytest.approx(0.5, abs=0.05)


def test_each_pair_has_a_line() -> None:
    points = Points("items", [str(n) for n in range(20)], clouds(20, 9, 9, 4))
    rows = pair_rows(points, common_space(points.vectors))
    assert [row[0] for row in rows] == [
        "items: RA-Rec, language model",
        "items: RA-Rec, ID model",
        "items: language model, ID model",
    ]
    assert all(0 <= float(number) <= 1 for row in rows for number in row[1:])


# --- the command ---
def test_coordinates_are_written(tmp_path: Path) -> None:
    points = Points("items", ["a,b", "c"], {})
    places = {"RA-Rec": np.array([[0.5, 1.0], [2.0, -3.0]])}
    write_coordinates(tmp_path / "c.csv", {"items": (points, places)})
    with (tmp_path / "c.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["side", "model", "token", "x", "y"],
            ["items", "RA-Rec", "a,b", "0.5000", "1.0000"],
            ["items", "RA-Rec", "c", "2.0000", "-3.0000"],
        ]


def test_a_run_is_drawn_by_one_command(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(run_dir.parents[1])
    before = sorted(path for path in run_dir.rglob("*") if path.is_file())
    out = run_dir.parents[1] / "drawn.png"
    assert main([str(run_dir), "--items=25", "--users=15", f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^(?:items|users): .+ \d\.\d{3} +\d\.\d{3}$", said, re.MULTILINE)) == 6
    assert out.read_bytes().startswith(b"\x89PNG")
    with out.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * (25 + 15)
    assert {line["model"] for line in lines} == {*MODELS}
    assert sorted(path for path in run_dir.rglob("*") if path.is_file()) == before


def test_mistakes_get_one_sentence(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(run_dir.parents[1])
    other = quick_start.run("Pop", "mm-demo", overrides={"limit_users": 60, "topk": [5, 10]})
    monkeypatch.setattr(tsne, "can_plot", lambda: True)
    for flags, says in (
        ([str(tmp_path)], "is no run"),
        ([other["run_dir"]], "is a run of Pop: name one of RARec"),
        ([str(run_dir), "--out=x.pdf"], "write FILE.png"),
        ([str(run_dir), "--items=-1"], "0 or more"),
        ([str(run_dir), "--items=0"], "set --items or --users above 0"),
        ([str(run_dir), "--items=3"], "3 items are too few to draw"),
    ):
        assert main(flags) == 1
        assert says in capsys.readouterr().err
    monkeypatch.setattr(tsne, "can_plot", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'recbole-mm\[plots\]'"):
        tsne.plot(str(run_dir), tmp_path / "x.png")
