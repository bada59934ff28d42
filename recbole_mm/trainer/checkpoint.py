"""Checkpoint folders without pickle: safetensors, plain YAML and JSON, written whole or not at all.

A folder holds `model.safetensors`, `config.yaml`, `items.txt` (raw item tokens in id order),
`state.json`, `README.md` and, while a stage is running, `optimizer.pt` (tensors only, loaded with
`weights_only=True`).
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save
from torch import Tensor

from recbole_mm.errors import UserError


@dataclass
class Checkpoint:
    """The content of a checkpoint folder."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    items: Sequence[str] = ()
    optimizer: dict[str, Any] | None = None


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name in the same folder, syncs it and renames it."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as readable JSON, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the folder beside its name and swaps it in; a kill leaves the earlier one or this one
    whole.

    Args:
        folder: where it goes, e.g. `saved/RUN/ranker/best`.
        checkpoint: its content; tensors may share memory.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in checkpoint.tensors.items()}
    write_atomically(temporary / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_atomically(temporary / "config.yaml", yaml.safe_dump(checkpoint.config).encode())
    write_atomically(temporary / "items.txt", "\n".join(map(_line, checkpoint.items)).encode())
    if checkpoint.optimizer is not None:
        buffer = io.BytesIO()
        torch.save(checkpoint.optimizer, buffer)
        write_atomically(temporary / "optimizer.pt", buffer.getvalue())
    write_json(temporary / "state.json", checkpoint.state)
    write_atomically(temporary / "README.md", _card(checkpoint).encode())
    _swap_in(temporary, folder)


def _swap_in(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _line(token: str) -> str:
    return token.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _unline(line: str) -> str:
    parts = line.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\r", "\r") for part in parts)


def _whole(folder: Path) -> Path | None:
    """The folder, or its predecessor when a kill fell between the two renames."""
    candidates = (folder, folder.with_name(f"{folder.name}.old"))
    return next((path for path in candidates if (path / "README.md").is_file()), None)


def has_checkpoint(folder: Path) -> bool:
    """Whether `read_checkpoint` will find one."""
    return _whole(folder) is not None


def read_checkpoint(folder: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Reads what `write_checkpoint` wrote.

    Raises:
        UserError: there is no whole checkpoint.
    """
    path = _whole(folder)
    if path is None:
        raise UserError(f"{folder} holds no whole checkpoint: name the folder of a finished run.")
    optimizer = None
    if (path / "optimizer.pt").is_file():
        optimizer = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
    return Checkpoint(
        tensors=load_file(path / "model.safetensors", device=str(device)),
        state=json.loads((path / "state.json").read_text(encoding="utf-8")),
        config=yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")),
        items=[
            _unline(line) for line in (path / "items.txt").read_text(encoding="utf-8").split("\n")
        ],
        optimizer=optimizer,
    )


def check_items(checkpoint: Checkpoint, items: Sequence[str], where: Path) -> None:
    """Raises `UserError` unless the checkpoint was trained on this very item vocabulary."""
    if list(checkpoint.items) != list(items):
        raise UserError(
            f"{where}: the checkpoint knows {len(checkpoint.items) - 1} items, the dataset has "
            f"{len(items) - 1} (or other ones): the data or its filters changed since; train again."
        )


def _card(checkpoint: Checkpoint) -> str:
    config, state = checkpoint.config, checkpoint.state
    valid = state.get("best_valid_result") or {}
    rows = "\n".join(f"| {name} | {value} |" for name, value in valid.items())
    return (
        f"# {config.get('model', 'model')} on {config.get('dataset', 'a dataset')}\n\n"
        f"Stage `{state.get('stage', 'train')}`, seed {config.get('seed')}, "
        f"{len(checkpoint.tensors)} tensors, {max(len(checkpoint.items) - 1, 0)} items.\n\n"
        "`model.safetensors` holds the weights, `config.yaml` the settings, `items.txt` the raw "
        "item tokens in id order, `state.json` the progress. Nothing here is a pickle.\n\n"
        "| validation | value |\n|---|---|\n" + rows + "\n"
    )


# --- the random state of a run


def random_state() -> dict[str, Any]:
    """Python's, numpy's and torch's generators, as values that `weights_only=True` loads."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    return {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Takes back what `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
