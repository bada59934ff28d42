"""One tiny backbone for all tests that do not change it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_mm.backbone.load import Backbone
from tests.backbone.shop import PICTURES, backbone_of, picture
from tests.conftest import REPO


@pytest.fixture(scope="session")
def shared_backbone() -> Backbone:
    return backbone_of().eval()


@pytest.fixture
def backbone(shared_backbone: Backbone) -> Iterator[Backbone]:
    """The shared one; a test that changes its weights fails."""
    before = {name: p.detach().clone() for name, p in shared_backbone.named_parameters()}
    yield shared_backbone
    shared_backbone.zero_grad(set_to_none=True)
    for name, parameter in shared_backbone.named_parameters():
        assert torch.equal(parameter, before[name]), f"the test changed {name}: build your own"


@pytest.fixture(scope="session")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local folder as the hub's: weights, tokenizer and preprocessor of a tiny Qwen2-VL."""
    folder = tmp_path_factory.mktemp("qwen2-vl")
    backbone: Any = backbone_of(seed=3)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    backbone.family.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop's pictures as ``<item>.png``."""
    folder = tmp_path_factory.mktemp("pictures")
    for item in PICTURES:
        image = picture(item)
        assert image is not None
        image.save(folder / f"{item}.png")
    return folder


@pytest.fixture(scope="session")
def second_process(tmp_path_factory: pytest.TempPathFactory, picture_files: Path) -> dict[str, Any]:
    """What another process, with other string hashes, makes of the same seed and texts.

    Returns:
        Its ``fingerprint``, the SHA-256 of its ``weights``, and its feature ``cache``, a folder.
    """
    cache = tmp_path_factory.mktemp("cache")
    script = REPO / "tests" / "backbone" / "other_process.py"
    done = subprocess.run(
        [sys.executable, str(script), str(picture_files), str(cache)],
        cwd=REPO,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "cache": cache}
