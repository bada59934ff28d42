"""PRIME on a small generated shop: its data, untrained and trained a little."""

from __future__ import annotations

from pathlib import Path

import pytest

from recbole_mm.data.demo import Sizes, make_demo
from recbole_mm.trainer.run import Run
from recbole_mm.trainer.staged import StagedTrainer
from tests.model.prime_world import USERS, Trained, World, world_of


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the dataset `mini`: 30 users, 48 products."""
    root = tmp_path_factory.mktemp("data")
    shop = Sizes(
        USERS, (6, 8), aisles=1, shelves=6, staples=1, novelties=1, trials=3, staples_before=2
    )
    make_demo(root / "mini", sizes=shop)
    return root


@pytest.fixture(scope="session")
def world(mini: Path) -> World:
    """Untrained; tests leave its weights alone."""
    return world_of(mini)


@pytest.fixture(scope="session")
def shared_trained(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All stages trained a little, through the trainer."""
    world = world_of(mini)
    saved = tmp_path_factory.mktemp("saved")
    run = Run.start(saved, world.config)
    trainer = StagedTrainer(world.config, world.model, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(saved)  # RecBole writes its event files below the working directory
        trainer.fit(world.data.train, world.data.valid, world.data.test)
    return Trained(world, trainer, run)


@pytest.fixture
def trained(shared_trained: Trained) -> Trained:
    """The same for each test, ranking what the retriever finds, whatever was read before."""
    shared_trained.world.model.enter("ranker")
    return shared_trained


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # RecBole writes log/ and log_tensorboard/ where it runs
    return tmp_path
