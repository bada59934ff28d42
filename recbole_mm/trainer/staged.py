"""The trainer of models that train in stages: it knows stages and never a model.

Every stage is a walk over plans of batches. After each validation and every minute the whole
position is saved: a killed run goes on where it was, with the numbers of an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from recbole.utils import dict2str, get_tensorboard, set_color
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from recbole_mm.errors import UserError
from recbole_mm.machine import give_back_memory
from recbole_mm.stage import (
    Stage,
    StageContext,
    StageSettings,
    UnfitWeightsError,
)
from recbole_mm.trainer.checkpoint import (
    Checkpoint,
    check_items,
    has_checkpoint,
    random_state,
    read_checkpoint,
    set_random_state,
    write_checkpoint,
)
from recbole_mm.trainer.evaluation import EvaluationMixin, Result
from recbole_mm.trainer.given import given_weights, unfit
from recbole_mm.trainer.run import Run
from recbole_mm.trainer.settings import stage_settings


@dataclass
class Position:
    """Where a stage is; all of it is saved."""

    epoch: int = 0
    entry: int = 0  # of the epoch's plan
    step: int = 0  # of the optimiser
    best_score: float = -math.inf
    best_step: int = 0
    validated_step: int = -1
    best_valid_result: dict[str, float] = field(default_factory=dict)
    without_better: int = 0  # validations in a row
    stopped: str = ""  # why it ended: "epochs", "steps", "patience", "time", "given", "untrained"
    epoch_loss: float = 0.0
    seconds: float = 0.0


class StagedTrainer(EvaluationMixin):
    """Trains a model's stages one after another in a run folder.

    Args:
        config: the run's configuration.
        model: has `stage_names`, `make_stages(settings, train_dataset)` and `enter(stage_name)`.
        run: where checkpoints and state go.
    """

    def __init__(self, config: Any, model: Any, run: Run) -> None:
        self.config, self.model, self.run = config, model, run
        self.device = config["device"]
        self.logger = getLogger()
        self.stages: list[Stage] = []
        self.chosen: list[str] = list(config["stages"] or model.stage_names)

    def fit(
        self, train_data: Any, valid_data: Any, test_data: Any, show_progress: bool = False
    ) -> None:
        """Trains, or loads, every stage up to the last that was asked for."""
        self.data_collect(train_data)
        self.tensorboard = get_tensorboard(self.logger)
        self._open(train_data, valid_data, test_data, show_progress=show_progress)
        self._check_given()
        for stage in self.stages:
            started = time.perf_counter()
            stage.prepare(self.context)
            self.model.enter(stage.name)
            if not self._is_to_train(stage):
                self._load(stage)
            elif stage.trains:
                StageLoop(self, stage, valid_data).run()
                self._conclude(stage, valid_data, test_data)
            else:
                self._note_made(stage, time.perf_counter() - started)

    def load(self, train_data: Any, valid_data: Any, test_data: Any = None) -> None:
        """Loads every stage of a finished run, to evaluate it again."""
        self.data_collect(train_data)
        self._open(train_data, valid_data, test_data, show_progress=False)
        for stage in self.stages:
            stage.prepare(self.context)
            self.model.enter(stage.name)
            self._load(stage)

    def load_best(self) -> None:
        """The best weights are already in place when a stage has ended."""

    def _open(
        self, train_data: Any, valid_data: Any, test_data: Any = None, *, show_progress: bool
    ) -> None:
        self.show_progress = show_progress
        self.items = train_data._dataset.item_tokens()
        self.context = StageContext(
            valid=valid_data._dataset.inter_feat,
            run_dir=self.run.folder,
            seed=self.config["seed"],
            device=self.device,
            show_progress=show_progress,
            test=None if test_data is None else test_data._dataset.inter_feat,
        )
        names = self.model.stage_names
        last = max(names.index(name) for name in self.chosen)
        settings = stage_settings(self.config, names)
        self.stages = self.model.make_stages(settings, train_data._dataset)[: last + 1]

    def _check_given(self) -> None:
        """Weights of other runs that do not fit are told before any stage is trained."""
        for stage in self.stages:
            if stage.trains and stage.settings.weights_from and self._is_to_train(stage):
                folder, checkpoint = given_weights(stage, self.config, self.items)
                with unfit(stage, folder):
                    stage.check_state(checkpoint.tensors)

    def _is_to_train(self, stage: Stage) -> bool:
        wanted = stage.name in self.chosen or stage.settings.weights_from is not None
        return wanted and not self.run.is_done(stage.name)

    def _note_made(self, stage: Stage, seconds: float) -> None:
        """A stage that trains nothing has made what it makes."""
        finished = stage.finish(self.context)
        about = {"stopped": "made", "seconds": round(seconds, 2), "finished": finished}
        self.run.record(stage.name, done=True, **about)
        self.logger.info(set_color(f"stage {stage.name}", "green") + f": {finished}")

    def _load(self, stage: Stage) -> None:
        if not stage.trains:
            return stage.restore(self.run.stage(stage.name).get("finished", {}))
        folder = self.folder(stage) / "best"
        checkpoint = read_checkpoint(folder, self.device)
        check_items(checkpoint, self.items, folder)
        try:
            stage.load_state(checkpoint.tensors)
        except UnfitWeightsError as error:
            raise UserError(
                f"The weights in {folder} cannot be used, {error}: train the stage again with "
                f"--stages={stage.name}."
            ) from error
        stage.restore(self.run.stage(stage.name).get("finished", {}))
        self.logger.info(set_color(f"Loaded stage {stage.name}", "blue") + f": {folder}")
        return None

    def _conclude(self, stage: Stage, valid_data: Any, test_data: Any) -> None:
        """Best weights in, what the stage wants to remember, its own metrics."""
        stage.load_state(read_checkpoint(self.folder(stage) / "best", self.device).tensors)
        finished = stage.finish(self.context)
        valid = self.evaluate(valid_data, load_best_model=False, show_progress=self.show_progress)
        test = self.evaluate(test_data, load_best_model=False, show_progress=self.show_progress)
        self.run.record(stage.name, done=True, finished=finished, valid=valid, test=test)
        self.logger.info(set_color(f"stage {stage.name} test", "yellow") + ": \n" + dict2str(test))

    def folder(self, stage: Stage) -> Path:
        """Where the stage's checkpoints are."""
        return self.run.folder / stage.name


class StageLoop:
    """Trains one stage: steps, validations, early stopping, saving and going on."""

    def __init__(self, trainer: StagedTrainer, stage: Stage, valid_data: Any) -> None:
        self.trainer, self.stage, self.valid_data = trainer, stage, valid_data
        self.settings: StageSettings = stage.settings
        self.logger = trainer.logger
        self.folder = trainer.folder(stage)
        self.position = Position()
        torch.manual_seed(trainer.config["seed"] + trainer.model.stage_names.index(stage.name))
        self.optimizer = AdamW(
            stage.param_groups(),
            lr=self.settings.learning_rate,
            eps=self.settings.adam_eps,
            weight_decay=self.settings.weight_decay,
        )
        self.scheduler = LambdaLR(self.optimizer, self._lr_factor)
        self.rows = stage.valid_rows(trainer.context)

    # --- the loop
    def run(self) -> None:
        """Trains to the end of the stage, from where an earlier attempt was saved."""
        self._go_on()
        if self.settings.weights_from:
            self._take()
            return self._leave("given")
        if self.settings.epochs == 0:
            return self._leave("untrained")
        if self.settings.validate_first and self.position.step == 0:
            self._validate()
        plan = self.stage.plan(self.position.epoch)
        if not plan:
            raise UserError(f"Stage {self.stage.name}: the training data hold nothing to learn.")
        while not self.position.stopped or self.position.entry >= len(plan):
            self._epoch(plan)
            plan = self.stage.plan(self.position.epoch)
        self._save_last()
        return None

    def _take(self) -> None:
        """Takes the weights of another run."""
        folder, checkpoint = given_weights(self.stage, self.trainer.config, self.trainer.items)
        with unfit(self.stage, folder):
            self.stage.load_state(checkpoint.tensors)

    def _leave(self, why: str) -> None:
        """Trains nothing: all that is left is to see what the weights are worth here."""
        self.position.stopped = why
        self._validate()
        self._save_last()

    def _epoch(self, plan: Sequence[Any]) -> None:
        position, started = self.position, time.perf_counter()
        before = position.seconds
        if position.entry >= len(plan):  # saved between the last step and the end of the epoch
            return self._end_epoch(len(plan), before)
        done = position.entry // self.settings.accumulate
        total = math.ceil(len(plan) / self.settings.accumulate)
        if self.settings.max_steps:  # the stage may end before the epoch does
            total = min(total, done + self.settings.max_steps - position.step)
        bar = tqdm(
            total=total,
            initial=done,
            ncols=100,
            desc=set_color(f"{self.stage.name} {position.epoch:>5}", "pink"),
            disable=not self.trainer.show_progress,
        )
        with bar:
            while position.entry < len(plan) and not position.stopped:
                entries = plan[position.entry : position.entry + self.settings.accumulate]
                position.epoch_loss += self._step(entries)
                position.entry += len(entries)
                position.seconds = before + time.perf_counter() - started
                bar.update()
                self._after_step()
        if position.entry >= len(plan):
            self._end_epoch(len(plan), before)
        return None

    def _step(self, entries: Sequence[Any]) -> float:
        """One optimiser step; the gradient is the mean over the entries. Returns their summed
        loss."""
        self.stage.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for entry in entries:
            loss = self.stage.loss(entry)
            if not torch.isfinite(loss):
                raise UserError(
                    f"Stage {self.stage.name}, step {self.position.step}: the loss is "
                    f"{loss.item()}; start again with a lower learning_rate or "
                    f"{self.stage.name}_learning_rate."
                )
            (loss / len(entries)).backward()
            total += loss.item()
        if self.settings.clip_norm:
            groups = self.optimizer.param_groups
            clip_grad_norm_(
                [p for group in groups for p in group["params"]], self.settings.clip_norm
            )
        self.optimizer.step()
        self.scheduler.step()
        self.position.step += 1
        return total

    def _after_step(self) -> None:
        position, settings = self.position, self.settings
        # Whatever ends the stage is settled before the validation that saves the position.
        if 0 < 60 * settings.max_minutes < position.seconds:
            position.stopped = "time"
        if settings.max_steps and position.step >= settings.max_steps:
            position.stopped = "steps"
        if position.stopped or (settings.eval_every and position.step % settings.eval_every == 0):
            self._validate()
        elif time.monotonic() - self.saved_at > self.trainer.config["save_every_s"]:
            self._save_last()

    def _end_epoch(self, entries: int, seconds_before: float) -> None:
        position = self.position
        mean = position.epoch_loss / entries
        self.logger.info(
            set_color(f"{self.stage.name} epoch {position.epoch} training", "green")
            + f" [{set_color('time', 'blue')}: {position.seconds - seconds_before:.2f}s, "
            + f"{set_color('train loss', 'blue')}: {mean:.4f}]"
        )
        self.trainer.tensorboard.add_scalar(f"{self.stage.name}/loss", mean, position.epoch)
        position.epoch, position.entry, position.epoch_loss = position.epoch + 1, 0, 0.0
        if position.epoch >= self.settings.epochs:
            position.stopped = position.stopped or "epochs"
        every = 0 if self.settings.eval_every else self.settings.eval_epochs
        if position.stopped or (every and position.epoch % every == 0):
            self._validate()

    # --- validation and early stopping
    def _validate(self) -> None:
        if self.position.validated_step == self.position.step:
            return
        started = time.perf_counter()
        self.position.validated_step = self.position.step
        result = self.trainer.evaluate(
            self.valid_data,
            load_best_model=False,
            show_progress=self.trainer.show_progress,
            rows=self.rows,
        )
        score = result[self.settings.valid_metric]
        self._judge(score, result)
        seconds = time.perf_counter() - started
        self.position.seconds += seconds
        self._report(score, result, seconds)
        self._save_last()

    def _judge(self, score: float, result: Result) -> None:
        position = self.position
        if score > position.best_score:
            position.best_score, position.best_step = score, position.step
            position.best_valid_result, position.without_better = result, 0
            self._save("best", optimizer=None)
            return
        position.without_better += 1
        if position.without_better >= self.settings.patience:
            position.stopped = position.stopped or "patience"

    def _report(self, score: float, result: Result, seconds: float) -> None:
        position = self.position
        self.logger.info(
            set_color(f"{self.stage.name} step {position.step} evaluating", "green")
            + f" [{set_color('time', 'blue')}: {seconds:.2f}s, "
            + f"{set_color('valid_score', 'blue')}: {score:.6f}]"
        )
        self.logger.info(set_color("valid result", "blue") + ": \n" + dict2str(result))
        self.trainer.tensorboard.add_scalar(f"{self.stage.name}/valid_score", score, position.step)
        if position.best_step == position.step:
            self.logger.info(set_color("Saving current", "blue") + f": {self.folder / 'best'}")
        if position.stopped == "patience":
            self.logger.info(
                f"Finished training {self.stage.name}, best eval result in step "
                f"{position.best_step}"
            )

    # --- saving and going on
    def _save_last(self) -> None:
        self._save(
            "last",
            optimizer={
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.last_epoch,
                "random": random_state(),
            },
        )
        position = self.position
        self.trainer.run.record(
            self.stage.name,
            steps=position.step,
            epochs=position.epoch,
            seconds=round(position.seconds, 2),
            stopped=position.stopped,
            best_step=position.best_step,
            best_valid=position.best_score if position.best_valid_result else None,
        )
        self.saved_at = time.monotonic()
        give_back_memory()

    def _save(self, name: str, optimizer: dict[str, Any] | None) -> None:
        state = {"stage": self.stage.name, **asdict(self.position)}
        if not self.position.best_valid_result:
            state["best_score"] = None  # minus infinity is no JSON
        checkpoint = Checkpoint(
            self.stage.state(), state, self.trainer.config.settings(), self.trainer.items, optimizer
        )
        write_checkpoint(self.folder / name, checkpoint)

    def _go_on(self) -> None:
        self.saved_at = time.monotonic()
        if not has_checkpoint(self.folder / "last"):
            return
        checkpoint = read_checkpoint(self.folder / "last", self.trainer.device)
        check_items(checkpoint, self.trainer.items, self.folder)
        state = {k: v for k, v in checkpoint.state.items() if k != "stage"}
        state["best_score"] = -math.inf if state["best_score"] is None else state["best_score"]
        self.position = Position(**state)
        self.stage.load_state(checkpoint.tensors)
        saved = checkpoint.optimizer or {}
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.last_epoch = saved["scheduler"]
        set_random_state(saved["random"])
        self.logger.info(
            set_color(f"Going on with stage {self.stage.name}", "blue")
            + f" at step {self.position.step}"
        )

    # --- learning rate
    def _lr_factor(self, step: int) -> float:
        settings = self.settings
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        if settings.schedule == "constant":
            return 1.0
        done = (step - settings.warmup_steps) / max(self._total_steps() - settings.warmup_steps, 1)
        done = min(max(done, 0.0), 1.0)
        return (
            1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        )

    def _total_steps(self) -> int:
        if not hasattr(self, "_steps"):
            per_epoch = math.ceil(len(self.stage.plan(0)) / self.settings.accumulate)
            total = per_epoch * self.settings.epochs
            self._steps = min(total, self.settings.max_steps or total)
        return self._steps
