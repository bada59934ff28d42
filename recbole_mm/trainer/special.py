"""Trainers for models of RecBole that have several stages, or several optimisers, in one run."""

from __future__ import annotations

from typing import Any

from recbole.trainer import RecVAETrainer as RecBoleRecVAETrainer
from recbole.trainer import Trainer
from torch.optim import Optimizer


class PhasedTrainer(Trainer):
    """Trains the stages a model names, one after the other, each with a fresh optimiser.

    RecBole runs each stage by a command of its own and joins them by the path of a pickle.
    The model has ``stage_names`` and ``enter(stage)``. Epochs are numbered through. Every stage but
    the last has ``pretrain_epochs`` (at most ``epochs``) and no validation; the last is trained as
    RecBole trains any model.
    """

    epochs: int
    start_epoch: int

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.pretrain_epochs = min(config["pretrain_epochs"], config["epochs"])
        self.epochs += self.pretrain_epochs * (len(model.stage_names) - 1)

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> Any:
        """Trains what stages are left, from ``start_epoch`` on; RecBole's arguments and result."""
        stages, last_epoch = self.model.stage_names, self.epochs
        for number, stage in enumerate(stages[:-1], start=1):
            self.epochs = number * self.pretrain_epochs
            if self.start_epoch >= self.epochs:
                continue
            self._enter(stage)
            super().fit(train_data, None, verbose, saved=False, show_progress=show_progress)
            self.start_epoch = self.epochs
            self.optimizer = self._build_optimizer()
        self.epochs = last_epoch
        self._enter(stages[-1])
        return super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)

    def _enter(self, stage: str) -> None:
        self.logger.info(f"Stage {stage}: epochs {self.start_epoch} to {self.epochs - 1}")
        self.model.enter(stage)


class OptimizerPair:
    """Two optimisers that are saved and loaded as one."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.both = {"first": first, "second": second}

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {name: optimizer.state_dict() for name, optimizer in self.both.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for name, optimizer in self.both.items():
            optimizer.load_state_dict(state[name])


class RecVAETrainer(RecBoleRecVAETrainer):
    """RecBole's, whose two optimisers are both there when an epoch is over, to be saved."""

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.optimizer = self._pair = OptimizerPair(self.optimizer_encoder, self.optimizer_decoder)

    def _train_epoch(self, *args: Any, **kwargs: Any) -> Any:
        losses = super()._train_epoch(*args, **kwargs)
        self.optimizer = self._pair
        return losses
