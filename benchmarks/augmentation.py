"""RecBole's prefix augmentation against ours on data of Amazon Beauty's size, tensor for tensor.

    python benchmarks/augmentation.py

Both run on the same frames in one process; the loop is RecBole's own method. Writes
`benchmarks/results/augmentation.json`.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_mm import compat

compat.restore_numpy_aliases()
compat.silence_deprecations()

from recbole.data.dataset import SequentialDataset  # noqa: E402
from recbole.data.interaction import Interaction  # noqa: E402

from recbole_mm.config import MMConfig  # noqa: E402
from recbole_mm.data.dataset import MMSequentialDataset  # noqa: E402

USERS, ITEMS, INTERACTIONS = 22_363, 12_101, 198_502
REPEATS = 5


def write_dataset(folder: Path) -> None:
    """Five interactions or more a user, as many in all as Beauty has, in shuffled rows."""
    rng = np.random.default_rng(0)
    extra = rng.multinomial(INTERACTIONS - 5 * USERS, rng.dirichlet(np.full(USERS, 0.5)))
    users = np.repeat(np.arange(USERS), 5 + extra)
    items = rng.integers(0, ITEMS, len(users))
    times, ratings = rng.integers(0, 10_000, len(users)), rng.integers(1, 6, len(users))
    rows = rng.permutation(np.stack([users, items, times, ratings], axis=1))
    header = "user_id:token\titem_id:token\ttimestamp:float\trating:float"
    folder.mkdir()
    np.savetxt(
        folder / f"{folder.name}.inter", rows, "%d", delimiter="\t", header=header, comments=""
    )


def augment(dataset: Any, method: Any) -> tuple[float, Interaction]:
    """Seconds and result of one augmentation of a fresh copy of a dataset."""
    fresh = copy.copy(dataset)
    fresh.inter_feat = Interaction(dict(dataset.inter_feat.interaction))
    for name in ("field2type", "field2source", "field2seqlen"):
        setattr(fresh, name, dict(getattr(dataset, name)))
    start = time.perf_counter()
    method(fresh)
    return time.perf_counter() - start, fresh.inter_feat


def compare(data_path: str, fields: list[str]) -> dict[str, Any]:
    """Times both on the same interactions and checks that they give the same tensors."""
    config = MMConfig(
        "SASRec",
        "beauty-size",
        overrides={"data_path": data_path, "load_col": {"inter": fields}},
    )
    dataset = MMSequentialDataset(config)
    dataset.inter_feat = dataset._dataframe_to_interaction(dataset.inter_feat)
    ours = [augment(dataset, MMSequentialDataset.data_augmentation) for _ in range(REPEATS)]
    loop = [augment(dataset, SequentialDataset.data_augmentation) for _ in range(REPEATS)]
    a, b = ours[0][1], loop[0][1]
    equal = a.columns == b.columns and all(
        a[f].dtype == b[f].dtype and torch.equal(a[f], b[f]) for f in b.columns
    )
    seconds = {"ours": [t for t, _ in ours], "recbole": [t for t, _ in loop]}
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "fields": fields,
        "rows": len(a),
        "equal": equal,
        "seconds": {n: [round(t, 3) for t in times] for n, times in seconds.items()},
        "ratio_of_medians": round(middle["recbole"] / middle["ours"], 1),
        "lowest_ratio": round(min(seconds["recbole"]) / max(seconds["ours"]), 1),
    }


def main() -> None:
    torch.set_num_threads(1)
    fields = ["user_id", "item_id", "timestamp", "rating"]
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "beauty-size")
        results = [compare(folder, fields[:3]), compare(folder, fields)]
    report = {
        "what": "SequentialDataset.data_augmentation, 22,363 users, 198,502 interactions, L = 50",
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "results": results,
    }
    path = Path(__file__).parent / "results" / "augmentation.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
