"""A run is a folder `saved/<model>-<dataset>-<id>/` whose `state.json` says what is done."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from recbole_mm.errors import UserError
from recbole_mm.stage import ONLY_STAGE
from recbole_mm.trainer.checkpoint import write_atomically, write_json

_ID = "????????-??????-????"  # date, time and four random digits


class Run:
    """The folder of one run.

    Attributes:
        folder: `saved/<model>-<dataset>-<id>`.
        state: `config_hash`, `status` (running | finished) and a record for each stage.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder, self.state = folder, state

    @classmethod
    def start(cls, root: Path, config: Any) -> Run:
        """Makes the folder of a new run of `config`."""
        identity = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        name = f"{config['model']}-{config['dataset']}-{identity}"
        state = {
            "config_hash": config.hash(),
            "status": "running",
            "data_path": str(Path(config["data_path"]).absolute().parent),
            "stages": {},
        }
        run = cls(root / name, state)
        run.folder.mkdir(parents=True)
        write_atomically(run.folder / "config.yaml", yaml.safe_dump(config.settings()).encode())
        run.save()
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run in `folder`.

        Raises:
            UserError: there is none.
        """
        path = folder / "state.json"
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            state = {}
        if "status" not in state or not (folder / "config.yaml").is_file():
            raise UserError(
                f"{folder} is no run: name a folder such as saved/<model>-<dataset>-<id>."
            )
        return cls(folder, state)

    def config(self) -> dict[str, Any]:
        """The settings the run was started with."""
        return dict(yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8")))

    def save(self) -> None:
        """Writes `state.json`, whole or not at all."""
        write_json(self.folder / "state.json", self.state)

    def stage(self, name: str) -> dict[str, Any]:
        """The record of a stage, empty at first."""
        return dict(self.state["stages"].get(name, {}))

    def record(self, name: str, **entries: Any) -> None:
        """Adds to the record of a stage and saves."""
        self.state["stages"].setdefault(name, {}).update(entries)
        self.save()

    def is_done(self, name: str) -> bool:
        """Whether the stage has been trained to its end."""
        return bool(self.stage(name).get("done"))

    def has_trained(self, stages: Sequence[str] | None) -> bool:
        """Whether these stages, and none after them, are what the run was last asked for."""
        return list(self.state.get("asked") or ()) == list(stages or ())

    def begins(self, stages: Sequence[str]) -> bool:
        """Whether what the run was last asked for is the first of these stages."""
        asked = list(self.state.get("asked") or ())
        return bool(asked) and asked == list(stages)[: len(asked)]

    def require_done(self, stages: Sequence[str]) -> None:
        """Raises `UserError` unless these stages have been trained to their end."""
        missing = [name for name in stages if not self.is_done(name)]
        if missing:
            raise UserError(
                f"--stages: {self.folder} has not finished {', '.join(missing)}, which the stages "
                "asked for are trained on: name it too."
            )

    def reopen(self, asked: Sequence[str], names: Sequence[str]) -> None:
        """Makes ready to train again.

        Args:
            asked: stages that the user names; where a finished run has them all, they are trained
                anew, and what stages after them made of the old ones is dropped.
            names: all stages of the model, in order.
        """
        if asked and self.state["status"] == "finished" and all(map(self.is_done, asked)):
            for name in names[min(map(names.index, asked)) :]:
                self.state["stages"].pop(name, None)
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self.state["status"] = "running"
        self.save()

    def finish(self) -> None:
        """Marks the run as finished."""
        self.state["status"] = "finished"
        self.save()


def runs_of(root: Path, config: Any) -> Iterator[Run]:
    """The runs of this very configuration, newest first."""
    for run in _runs(root, config):
        if run.state.get("config_hash") == config.hash():
            yield run


def _runs(root: Path, config: Any) -> Iterator[Run]:
    """The runs of this model on this dataset, newest first."""
    folders = root.glob(f"{config['model']}-{config['dataset']}-{_ID}")
    for folder in sorted(folders, reverse=True):  # the id begins with the time
        with suppress(UserError):  # a damaged one is none
            yield Run.open(folder)


def same_run(config: Any, or_shorter: bool = False) -> Run | None:
    """A run of this very configuration that was asked for the same stages: the newest finished
    one, else the newest of those that were stopped.

    Args:
        config: of the experiment.
        or_shorter: else one that was asked for the first of these stages, to go on with.
    """
    runs = list(runs_of(Path(config["checkpoint_dir"]), config))
    same = [run for run in runs if run.has_trained(config["stages"])]
    finished = [run for run in same if run.state["status"] == "finished"]
    stages = list(config["stages"] or ())
    shorter = [run for run in runs if or_shorter and run.begins(stages)]
    return next(iter(finished or same or shorter), None)


def earlier_run(config: Any, resume: bool, earlier_stages: list[str]) -> Run | None:
    """The run to go on with, or None: a new one is to be started.

    Args:
        config: of the experiment.
        resume: whether to take the newest unfinished run of the same configuration.
        earlier_stages: stages that are needed but not to be trained now.

    Raises:
        UserError: there is no such run.
    """
    root = Path(config["checkpoint_dir"])
    if not resume and not earlier_stages:
        return None
    for run in runs_of(root, config):
        if resume and run.state["status"] == "finished":
            continue
        if all(map(run.is_done, earlier_stages)):
            return run
    if earlier_stages:
        raise UserError(
            f"--stages: no {'unfinished ' if resume else ''}run of this configuration has finished "
            f"{', '.join(earlier_stages)}: train it first, or name a run to take it from, "
            f"--{earlier_stages[0]}_from=RUN_DIR{_nearly(root, config)}."
        )
    raise UserError(
        f"--resume: {root} has no unfinished run of this configuration: start it without "
        f"--resume, or evaluate a finished one with --load=RUN_DIR{_nearly(root, config)}."
    )


def check_given(stage: str, folder: str) -> None:
    """Raises `UserError` unless a stage's weights can be taken from the run in `folder`."""
    try:
        run = Run.open(Path(folder))
    except UserError as error:
        raise UserError(f"{stage}_from: {error}") from error
    names = [name for name in (stage, ONLY_STAGE) if name in run.state["stages"]]
    if not any(map(run.is_done, names)):
        raise UserError(
            f"{stage}_from: {folder} has no finished stage {stage}: go on with it by "
            f"--resume={folder}, or name another run."
        )


def check_same(run: Run, config: Any) -> None:
    """Raises `UserError` unless the run was started with this configuration."""
    if run.state.get("config_hash") != config.hash():
        raise UserError(
            f"--resume: {run.folder} was started with another configuration: "
            f"{_difference(run, config)}."
        )


def _nearly(root: Path, config: Any) -> str:
    """How the newest run of this model and dataset differs."""
    for run in _runs(root, config):
        if run.state.get("config_hash") != config.hash():
            return f" (the newest, {run.folder}, differs: {_difference(run, config)})"
    return ""


def _difference(run: Run, config: Any) -> str:
    old, new = run.config(), config.settings()
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    plain = [k for k in keys if not isinstance(old.get(k) or new.get(k), dict)] or keys
    return (
        ", ".join(f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in plain[:3])
        or "see its config.yaml"
    )
