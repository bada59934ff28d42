"""Small atomic files and a bare RecBole configuration, for tests of the data floor alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from recbole_mm import compat

compat.restore_numpy_aliases()

from recbole.config import Config  # noqa: E402

LS = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}


class BareConfig(Config):
    """RecBole's configuration on today's numpy, deaf to the command line of pytest."""

    def compatibility_settings(self) -> None:
        compat.restore_numpy_aliases()

    def _load_cmd_line(self) -> dict[str, Any]:
        return {}


def bare_config(model: str, folder: Path | None, **keys: Any) -> BareConfig:
    """A configuration for the dataset in `folder`, or for RecBole's ml-100k if None."""
    settings: dict[str, Any] = {
        "train_neg_sample_args": None,
        "eval_args": LS,
        "metrics": ["Recall", "NDCG"],
        "valid_metric": "NDCG@10",
        "repeatable": True,
        "show_progress": False,
        "item_inter_num_interval": "[1,inf)",
        "user_inter_num_interval": "[1,inf)",
        "MAX_ITEM_LIST_LENGTH": 5,
    }
    if folder is not None:
        settings["data_path"] = str(folder.parent)
        settings["load_col"] = {"inter": "*"}
    name = folder.name if folder is not None else "ml-100k"
    return BareConfig(model=model, dataset=name, config_dict={**settings, **keys})


def write_atomic(path: Path, header: str, rows: list[list[Any]]) -> None:
    lines = ["\t".join(header.split())] + ["\t".join(map(str, row)) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def random_interactions(
    folder: Path, lengths: list[int], items: int = 30, seed: int = 0, extra: bool = False
) -> Path:
    """Users with so many interactions each, in shuffled rows, at times of which many are equal."""
    rng = np.random.default_rng(seed)
    rows: list[list[Any]] = []
    for user, length in enumerate(lengths):
        for item in rng.integers(0, items, length):
            row: list[Any] = [f"u{user}", f"i{item}", int(rng.integers(0, 4))]
            if extra:
                words = " ".join(f"w{w}" for w in rng.integers(0, 6, rng.integers(0, 4)))
                numbers = " ".join(f"{v:.3f}" for v in rng.normal(size=rng.integers(1, 4)))
                row += [f"{rng.normal():.4f}", words, numbers]
            rows.append(row)
    rng.shuffle(rows)  # type: ignore[arg-type]
    header = "user_id:token item_id:token timestamp:float"
    header += " rating:float words:token_seq numbers:float_seq" if extra else ""
    write_atomic(folder / f"{folder.name}.inter", header, rows)
    return folder
