"""RecBole's trainers with our evaluation, checkpoints without pickle, and resume at the last
finished epoch.

Parts adapted from RecBole (MIT, (c) 2020 RUCAIBox).
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from recbole.trainer import Trainer
from recbole.utils import set_color

from recbole_mm.errors import UserError
from recbole_mm.other_parameters import load_whole_state, whole_state
from recbole_mm.stage import ONLY_STAGE
from recbole_mm.trainer.checkpoint import (
    Checkpoint,
    check_items,
    has_checkpoint,
    random_state,
    read_checkpoint,
    set_random_state,
    write_checkpoint,
)
from recbole_mm.trainer.evaluation import EvaluationMixin, Result, is_ranking_loader
from recbole_mm.trainer.run import Run


class TimeUpError(Exception):
    """Ends RecBole's `fit` between two epochs: `max_minutes` have passed."""


class ZooMixin(EvaluationMixin):
    """Put before one of RecBole's trainer classes by `zoo_trainer`."""

    run: Run
    items: list[str]
    train_data: Any
    logger: logging.Logger  # this and the next two are RecBole's
    optimizer: Any
    epochs: int
    best_valid_score: Any
    best_valid_result: Any

    def start(self, run: Run, train_data: Any) -> None:
        """Tells the trainer where to save, and takes up what an earlier attempt left there."""
        self.run, self.train_data = run, train_data
        self.items = train_data._dataset.item_tokens()
        self.data_collect(train_data)
        self._seconds_before = float(run.stage(ONLY_STAGE).get("seconds", 0.0))
        self._started = time.perf_counter()
        if has_checkpoint(self._folder("last")):
            self._go_on()

    def _folder(self, name: str) -> Path:
        return self.run.folder / ONLY_STAGE / name

    # --- RecBole's hooks
    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> Any:
        """Everything of the epoch before is settled when the next one starts: that is when it is
        saved."""
        if epoch_idx > self.start_epoch:
            self._save_last(epoch_idx - 1)
            time_up = 0 < 60 * self.config["max_minutes"] < self._seconds()
            if time_up and has_checkpoint(self._folder("best")):
                raise TimeUpError  # never before the first validation: nothing would be left
        return super()._train_epoch(train_data, epoch_idx, loss_func, show_progress)  # type: ignore[misc]

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """RecBole's, ended early when the time is up."""
        self.time_up = False
        try:
            return super().fit(*args, **kwargs)  # type: ignore[misc]
        except TimeUpError:
            self.time_up = True
            self.logger.info(f"Finished training, {self.config['max_minutes']} minutes are up")
            return self.best_valid_score, self.best_valid_result

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **_: Any) -> None:
        self._write("best", epoch, optimizer=None)
        if verbose:
            self.logger.info(set_color("Saving current", "blue") + f": {self._folder('best')}")

    def load_best(self) -> None:
        """Puts the best epoch's weights in place.

        Raises:
            UserError: nothing was saved, or on another item vocabulary.
        """
        folder = self._folder("best")
        checkpoint = read_checkpoint(folder, self.device)
        check_items(checkpoint, self.items, folder)
        load_whole_state(self.model, checkpoint.tensors)
        self.best_valid_score = checkpoint.state["best_valid_score"]
        self.logger.info(f"Loading model structure and parameters from {folder}")

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, *args: Any, **kwargs: Any
    ) -> Result:
        """Ranking by our evaluation; labelled pairs (context-aware models) by RecBole's."""
        if is_ranking_loader(eval_data):
            return super().evaluate(eval_data, load_best_model, *args, **kwargs)
        if load_best_model:
            self.load_best()
        result = Trainer.evaluate(self, eval_data, load_best_model=False)  # type: ignore[arg-type]
        self.all_results = {"labeled": {k: float(v) for k, v in result.items()}}
        self.places = None  # nothing is ranked
        return self.all_results["labeled"]

    # --- saving and going on
    def finish(self, epochs: int) -> None:
        """Writes the stage's record once `fit` has returned."""
        stopped = "epochs" if epochs >= self.epochs else "time" if self.time_up else "patience"
        seconds = round(self._seconds(), 2)
        self.run.record(ONLY_STAGE, epochs=epochs, seconds=seconds, stopped=stopped, done=True)

    def _seconds(self) -> float:
        """Spent on this run so far, before a resume too."""
        return self._seconds_before + time.perf_counter() - self._started

    def _save_last(self, epoch: int) -> None:
        optimizer = {"optimizer": self.optimizer.state_dict(), "random": random_state()}
        optimizer["loader"] = self.train_data.generator.get_state()
        self._write("last", epoch, optimizer)
        self.run.record(ONLY_STAGE, epochs=epoch + 1, seconds=round(self._seconds(), 2))

    def _write(self, name: str, epoch: int, optimizer: dict[str, Any] | None) -> None:
        state = {
            "stage": ONLY_STAGE,
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score)
            if abs(self.best_valid_score) < float("inf")
            else None,
            "best_valid_result": _floats(self.best_valid_result),
        }
        checkpoint = Checkpoint(
            whole_state(self.model), state, self.config.settings(), self.items, optimizer
        )
        write_checkpoint(self._folder(name), checkpoint)

    def _go_on(self) -> None:
        folder = self._folder("last")
        checkpoint = read_checkpoint(folder, self.device)
        check_items(checkpoint, self.items, folder)
        load_whole_state(self.model, checkpoint.tensors)
        state, saved = checkpoint.state, checkpoint.optimizer or {}
        self.start_epoch, self.cur_step = state["epoch"] + 1, state["cur_step"]
        if state["best_valid_score"] is not None:
            self.best_valid_score = state["best_valid_score"]
        self.best_valid_result = state["best_valid_result"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.train_data.generator.set_state(saved["loader"].cpu())
        set_random_state(saved["random"])
        self.logger.info(set_color("Going on", "blue") + f" after epoch {state['epoch']}")


def _floats(result: Any) -> dict[str, float] | None:
    return {k: float(v) for k, v in result.items()} if result else None


def zoo_trainer(base: type) -> type:
    """One of RecBole's trainer classes with `ZooMixin` before it.

    Raises:
        UserError: a decision-tree trainer, which is no RecBole `Trainer`.
    """
    if not issubclass(base, Trainer):
        raise UserError(f"{base.__name__}: RecBole's decision-tree models are not supported here.")
    return type(base.__name__, (ZooMixin, base), {})


def epochs_trained(trainer: Any) -> int:
    """How many epochs RecBole's `fit` has run, those before a resume counted in."""
    done: dict[int, Any] = trainer.train_loss_dict
    return max(done, default=trainer.start_epoch - 1) + 1
