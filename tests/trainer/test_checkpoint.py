"""Checkpoint folders: whole or not at all, no code in them, every random generator in them."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from recbole_mm.errors import UserError
from recbole_mm.other_parameters import pack_other, unpack_other
from recbole_mm.trainer import checkpoint as ck


def make(value: float = 1.0) -> ck.Checkpoint:
    weight = torch.full((3, 2), value)
    return ck.Checkpoint(
        tensors={"weight": weight, "tied": weight.t()},
        state={"stage": "train", "epoch": 2},
        config={"model": "LRURec", "dataset": "toy", "seed": 7},
        items=["[PAD]", "a\\nb", "line\nbreak", "\\", "tab\t"],
        optimizer={"step": torch.tensor(3)},
    )


def test_round_trip(tmp_path: Path) -> None:
    ck.write_checkpoint(tmp_path / "best", make())
    back = ck.read_checkpoint(tmp_path / "best")
    assert torch.equal(back.tensors["tied"], torch.ones(2, 3))
    assert back.items == make().items
    assert back.state["epoch"] == 2
    assert back.config["seed"] == 7
    assert back.optimizer == {"step": torch.tensor(3)}
    assert (tmp_path / "best" / "README.md").read_text().startswith("# LRURec on toy")


def test_a_kill_at_any_write_or_rename_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the disk fails once; an earlier or the new checkpoint must be
    readable."""
    ck.write_checkpoint(tmp_path / "best", make(1.0))
    calls = 0

    def breaking(real, at):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError("disk full")
            return real(*args, **kwargs)

        return call

    reached = 0
    for at in range(1, 40):
        calls = 0
        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "mkdir"):
                patch.setattr(Path, name, breaking(getattr(Path, name), at))
            patch.setattr(ck.os, "fsync", breaking(ck.os.fsync, at))
            patch.setattr(ck.torch, "save", breaking(ck.torch.save, at))
            try:
                ck.write_checkpoint(tmp_path / "best", make(2.0))
            except OSError:
                reached += 1
        value = ck.read_checkpoint(tmp_path / "best").tensors["weight"][0, 0].item()
        assert value in (1.0, 2.0)
        ck.write_checkpoint(tmp_path / "best", make(1.0))
    assert reached >= 15, "the test must have broken the writes"


def test_half_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").write_bytes(b"")
    assert not ck.has_checkpoint(tmp_path / "best")
    with pytest.raises(UserError, match="no whole checkpoint"):
        ck.read_checkpoint(tmp_path / "best")


class Bomb:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_in_the_optimizer_file_is_refused(tmp_path: Path) -> None:
    ck.write_checkpoint(tmp_path / "last", make())
    torch.save({"state": Bomb()}, tmp_path / "last" / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        ck.read_checkpoint(tmp_path / "last")


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="knows 4 items, the dataset has 1"):
        ck.check_items(make(), ["[PAD]", "a"], tmp_path)


def test_other_parameters_survive() -> None:
    matrix = sp.random(4, 5, density=0.4, format="csr", random_state=0)
    given = {
        "w": matrix,
        "dense": np.eye(2),
        "t": torch.ones(1),
        "module": torch.nn.Linear(1, 1),
        "no": None,
    }
    weights, other = unpack_other({"x": torch.zeros(1), **pack_other(given)})
    assert set(weights) == {"x"}
    assert set(other) == {"w", "dense", "t"}
    assert isinstance(other["w"], sp.csr_matrix)
    assert (other["w"] != matrix).nnz == 0
    np.testing.assert_array_equal(other["dense"], np.eye(2))
    with pytest.raises(TypeError, match="without pickle"):
        pack_other({"f": lambda: None})


def test_random_state_brings_every_generator_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    state = ck.random_state()
    first = draw()
    assert draw() != first
    ck.set_random_state(state)
    assert draw() == first
