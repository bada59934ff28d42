"""The staged trainer against a hand-written loop, and what it does with stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from recbole_mm.cli import main
from recbole_mm.errors import UserError
from recbole_mm.stage import Stage, StageContext, StageSettings
from recbole_mm.trainer import staged
from recbole_mm.trainer.checkpoint import read_checkpoint
from recbole_mm.trainer.run import Run, runs_of
from recbole_mm.trainer.settings import stage_settings
from recbole_mm.trainer.staged import StagedTrainer

DATA = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
GOAL = DATA @ torch.tensor([1.0, -2.0, 0.5])


class Settings(dict):
    """A configuration: missing keys are None, as RecBole's are."""

    def __missing__(self, key: str) -> None:
        return None

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in self.items() if k != "device"}

    def hash(self) -> str:
        return "h"


class Regression(Stage):
    """Least squares; batches are slices and the plan depends on the epoch alone."""

    def plan(self, epoch: int) -> list[Tensor]:
        order = torch.randperm(40, generator=torch.Generator().manual_seed(epoch))
        return list(order.split(8))

    def loss(self, batch: Tensor) -> Tensor:
        noisy = nn.functional.dropout(DATA[batch], 0.2)  # draws from the global generator
        return ((self.module(noisy).squeeze(1) - GOAL[batch]) ** 2).mean()


class Toy:
    stage_names = ("first", "second")

    def __init__(self, validate_first: bool = False) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.validate_first = validate_first
        self.entered: list[str] = []

    def enter(self, name: str) -> None:
        self.entered.append(name)

    def make_stages(self, settings: dict[str, StageSettings], _: Any) -> list[Stage]:
        first = {"validate_first": self.validate_first}
        return [
            Regression(name, self.net, replace(settings[name], **first))
            for name in self.stage_names
        ]


class ToyTrainer(StagedTrainer):
    """Validates by the training loss instead of a ranking."""

    validations: list[tuple[int, float]]

    def _open(self, *_: Any, **__: Any) -> None:
        self.show_progress, self.items, self.validations = False, ["[PAD]"], []
        self.context = StageContext(None, self.run.folder, 0, torch.device("cpu"))
        settings = stage_settings(self.config, self.model.stage_names)
        last = max(map(self.model.stage_names.index, self.chosen))
        self.stages = self.model.make_stages(settings, None)[: last + 1]

    def data_collect(self, _: Any) -> None:
        pass

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        with torch.no_grad():
            score = -((self.model.net(DATA).squeeze(1) - GOAL) ** 2).mean().item()
        return {"ndcg@10": score}


def fit(
    folder: Path, model: Toy | None = None, go_on: bool = False, **keys: Any
) -> tuple[ToyTrainer, Toy]:
    config = Settings(
        epochs=3,
        learning_rate=0.05,
        weight_decay=0.1,
        stopping_step=50,
        valid_metric="NDCG@10",
        eval_step=1,
        seed=5,
        device=torch.device("cpu"),
        save_every_s=0,
        model="Toy",
        dataset="toy",
        data_path=str(folder / "toy"),
        checkpoint_dir=str(folder),
    )
    model = model or Toy(keys.pop("validate_first", False))
    config.update(keys)
    earlier = next(iter(runs_of(folder, config)), None) if go_on else None
    run = earlier or Run.start(folder, config)
    trainer = ToyTrainer(config, model, run)
    trainer.fit(None, None, None)
    return trainer, model


def by_hand(epochs: int, accumulate: int = 1, clip: float | None = None) -> nn.Linear:
    """The same training written out, without the trainer."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    stage = Regression("first", net, StageSettings(epochs=1, learning_rate=0.05))
    for epoch in range(epochs):
        plan = stage.plan(epoch)
        for start in range(0, len(plan), accumulate):
            batches = plan[start : start + accumulate]
            optimizer.zero_grad()
            sum(stage.loss(b) / len(batches) for b in batches).backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
    return net


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.5)])
def test_steps_equal_a_hand_written_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, clip: float | None
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {"accumulate": accumulate, "first_clip_norm": clip, "stages": ["first"]}
    trainer, _ = fit(tmp_path, **keys)
    last = read_checkpoint(trainer.run.folder / "first" / "last").tensors
    expected = by_hand(3, accumulate, clip)
    torch.testing.assert_close(last["weight"], expected.weight.data, rtol=0, atol=0)


def test_it_learns_and_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, toy = fit(tmp_path, epochs=60, weight_decay=0.0, stopping_step=99)
    record = trainer.run.stage("second")
    assert record["stopped"] == "epochs"
    assert record["best_valid"] > -0.5  # about -6 at the start
    assert trainer.evaluate()["ndcg@10"] == pytest.approx(record["best_valid"])
    assert toy.entered == ["first", "second"]


def test_patience_and_steps_end_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, _ = fit(tmp_path, learning_rate=0.0, stopping_step=2, epochs=9)
    assert trainer.run.stage("first")["stopped"] == "patience"
    assert trainer.run.stage("first")["steps"] == 3 * 5  # nothing moves: the first, then two more
    capped, _ = fit(tmp_path, first_max_steps=7, first_eval_every=3)
    assert capped.run.stage("first")["steps"] == 7
    assert capped.run.stage("first")["stopped"] == "steps"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.5]),
        ("cosine", [0.5, 1.0, 1.0, 0.5]),
    ],
)
def test_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, expected: list[float]
) -> None:
    """Two warm-up steps, then down to nothing over the four that are left of six."""
    monkeypatch.chdir(tmp_path)
    from recbole_mm.trainer.staged import StageLoop

    trainer, toy = fit(tmp_path, epochs=1)
    settings = StageSettings(
        epochs=9, learning_rate=1.0, schedule=schedule, warmup_steps=2, max_steps=6
    )
    loop = StageLoop(trainer, Regression("first", toy.net, settings), None)
    assert [loop._lr_factor(step) for step in (0, 1, 2, 4)] == pytest.approx(expected)
    if schedule != "constant":
        assert loop._lr_factor(6) == pytest.approx(0.0)


def test_an_infinite_loss_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    toy = Toy()
    with torch.no_grad():
        toy.net.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="Stage first, step 0: the loss is nan"):
        fit(tmp_path, toy)


def test_settings_fall_back_to_the_plain_key() -> None:
    config = Settings(
        epochs=10, learning_rate=0.1, ranker_learning_rate=0.2, ranker_epochs=20, stopping_step=3,
        valid_metric="NDCG@10", retriever_valid_metric="Recall@25", eval_step=1, ranker_max_steps=0,
        clip_grad_norm={"max_norm": 5.0, "norm_type": 2}, ranker_clip_norm=1.0,
    )  # fmt: skip
    settings = stage_settings(config, ["retriever", "ranker"])
    assert settings["ranker"].learning_rate == 0.2
    assert settings["retriever"].learning_rate == 0.1
    assert settings["ranker"].epochs == 10  # `epochs` caps every stage
    assert settings["retriever"].valid_metric == "recall@25"
    assert settings["ranker"].max_steps is None
    assert (settings["retriever"].clip_norm, settings["ranker"].clip_norm) == (5.0, 1.0)


def test_a_stage_needs_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--model=PRIME", "--dataset=ml-100k", "--backbone=tiny", "--stages=ranker"]) == 1
    assert "no run of this configuration has finished retriever" in capsys.readouterr().err


class KilledError(Exception):
    """Stands for the end of the process."""


def test_weights_that_a_stage_begins_with_may_stay_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    untrained = Toy().net.state_dict()
    trainer, model = fit(tmp_path, learning_rate=1e-12, validate_first=True)
    for name in Toy.stage_names:
        record = trainer.run.stage(name)
        assert (record["best_step"], record["steps"]) == (0, 15)
    assert all(torch.equal(v, untrained[k]) for k, v in model.net.state_dict().items())
    careless, _ = fit(tmp_path / "careless", learning_rate=1e-12)
    assert careless.run.stage("first")["best_step"] > 0


@pytest.mark.parametrize(("size", "count"), [(0, None), (3, 3), (9, 9), (10, None), (99, None)])
def test_stages_validate_on_a_seeded_sample(size: int, count: int | None) -> None:
    rows = range(10)

    def sample(seed: int) -> Any:
        settings = stage_settings(Settings(epochs=1, valid_metric="MRR@5", learning_rate=1.0,
                                           first_valid_users=size), ["first"])  # fmt: skip
        stage = Stage("first", nn.Linear(1, 1), settings["first"])
        return stage.valid_rows(StageContext(rows, Path(), seed, torch.device("cpu")))

    if count is None:
        assert sample(1) is None
        return
    chosen = sample(1).tolist()
    assert len(set(chosen)) == count
    assert sorted(chosen) == chosen
    assert set(chosen) <= set(rows)
    assert sample(1).tolist() == chosen
    assert any(sample(seed).tolist() != chosen for seed in range(2, 9))


@pytest.mark.parametrize(
    "keys",
    [
        {"epochs": 1},
        {"epochs": 3, "first_max_steps": 4, "first_eval_every": 2, "second_max_steps": 1},
        {"epochs": 2, "first_max_steps": 5, "first_eval_every": 5, "second_max_steps": 5},
        {"epochs": 4, "stopping_step": 1, "learning_rate": 1e-9},
        {"epochs": 2, "validate_first": True},
        {"epochs": 2, "validate_first": True, "learning_rate": 1e-12},
    ],
)
def test_killed_after_any_save_it_ends_as_if_it_had_not_been(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, expected = fit(tmp_path / "whole", **keys)
    write = staged.write_checkpoint

    def killed_after(saves: int) -> bool:
        left = iter(range(saves))

        def save(*arguments: Any) -> None:
            write(*arguments)
            if next(left, None) is None:
                raise KilledError

        monkeypatch.setattr(staged, "write_checkpoint", save)
        try:
            fit(tmp_path / str(saves), save_every_s=1e9, **keys)
        except KilledError:
            return True
        finally:
            monkeypatch.setattr(staged, "write_checkpoint", write)
        return False

    saves = 0
    while killed_after(saves):
        resumed, model = fit(tmp_path / str(saves), go_on=True, save_every_s=1e9, **keys)
        for name, record in whole.run.state["stages"].items():
            again = resumed.run.state["stages"][name]
            for key in ("steps", "epochs", "stopped", "best_step", "best_valid"):
                assert again[key] == record[key], (saves, name, key)
        torch.testing.assert_close(
            model.net.state_dict(), expected.net.state_dict(), rtol=0, atol=0
        )
        saves += 1
    assert saves > 4


class Making(Regression):
    """Counts what it makes; an earlier attempt's count is taken up."""

    trains = False
    made: ClassVar[list[str]] = []

    def prepare(self, context: StageContext) -> None:
        self.made.append(f"made {self.name}")

    def finish(self, context: StageContext) -> dict[str, Any]:
        return {"texts": 3}

    def loss(self, batch: Tensor) -> Tensor:
        raise AssertionError("it trains nothing")


class MakingToy(Toy):
    def make_stages(self, settings: dict[str, StageSettings], _: Any) -> list[Stage]:
        return [
            Making("first", self.net, settings["first"]),
            Regression("second", self.net, settings["second"]),
        ]


def test_a_stage_that_trains_nothing_is_made_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step, no validation, no weights of its own; once it is done it is only prepared."""
    monkeypatch.chdir(tmp_path)
    Making.made.clear()
    trainer, _ = fit(tmp_path, MakingToy())
    first, second = (trainer.run.stage(name) for name in ("first", "second"))
    assert (first["done"], first["stopped"], first["finished"]) == (True, "made", {"texts": 3})
    assert "steps" not in first
    assert second["steps"] > 0
    assert not trainer.folder(trainer.stages[0]).exists()
    trainer.fit(None, None, None)
    assert Making.made == ["made first"] * 2
    assert trainer.run.stage("first") == first
