"""Figure 5 of RA-Rec: what it makes of items and users, beside what its two halves make of them.

    python -m recbole_mm.report.tsne RUN_DIR [--items 500] [--users 0] [--out FILE.png]

Items (those that training has seen, a seeded sample) and, if asked for, test users are drawn as
points of three models: RA-Rec, its language model alone (the same text without a prefix) and its ID
model. Their vectors have other sizes and other axes. The paper does not say how it brought them
together; here each model's are standardised, turned to their principal axes, cut to the smallest
size of the three, and scaled to one mean length; then t-SNE (van der Maaten and Hinton 2008) lays
out all points at once. FILE.png is the plot, FILE.csv beside it the coordinates.

Two numbers a pair of models say without eyes what the plot shows, over 10 nearest neighbours by
cosine:

- mixed: in the common space, the share of a point's neighbours that are the other model's, of the
  two models' points: 0.5 where clouds lie in each other, 0 where they lie apart. Axes of different
  models are paired by their variance alone, so that this compares shapes of clouds.
- shared: among each model's own vectors, the share of an item's neighbours that are its neighbours
  in both: 1 where two models find the same items alike, 10 / (items - 1) by chance.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm.errors import UserError, told
from recbole_mm.report.table import format_rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MODELS = ("RA-Rec", "language model", "ID model")
NEIGHBOURS = 10
_LEAST = 12  # points of a side: each needs its neighbours


@dataclass(frozen=True)
class Points:
    """One side, items or users, as three models see it.

    Attributes:
        side: ``items`` or ``users``.
        names: their tokens in the dataset. Length: n.
        vectors: by model, of `MODELS`. Shapes: (n, any).
    """

    side: str
    names: Sequence[str]
    vectors: Mapping[str, Floats]


# --- vectors --------------------------------------------------------------------------------------


@torch.no_grad()
def item_points(model: Any, tokens: Sequence[str], count: int, seed: int) -> Points:
    """A sample of the items that training has seen.

    Args:
        model: an `RARec` with its weights.
        tokens: of all items, by id.
        count: at most so many.
        seed: of the sample.
    """
    known = torch.nonzero(model.ids.warm)[:, 0].numpy(force=True)
    items = _some(known[known > 0], count, seed)
    texts = [model.texts.item(item) for item in items.tolist()]
    vectors = model.item_ids[torch.from_numpy(items).to(model.item_ids.device)]
    found = (model.aligned.items(texts, vectors), _alone(model, texts), vectors)
    return _points("items", [tokens[item] for item in items], found)


@torch.no_grad()
def user_points(model: Any, test: Any, count: int, seed: int) -> Points:
    """A sample of the test users, each with the history before its target.

    Args:
        model: likewise.
        test: the test part.
        count: at most so many.
        seed: of the sample.
    """
    rows = test.inter_feat[torch.from_numpy(_some(np.arange(len(test.inter_feat)), count, seed))]
    both = (rows[model.ITEM_SEQ].numpy(), rows[model.ITEM_SEQ_LEN].numpy())
    histories = [row[:end] for row, end in zip(*both, strict=True)]
    texts = [model.texts.history(history) for history in histories]
    vectors = model.ids.users(histories)
    found = (model.aligned.users(texts, vectors), _alone(model, texts), vectors)
    names = test.id2token(test.uid_field, rows[test.uid_field].tolist())
    return _points("users", list(map(str, names)), found)


def _some(ids: Ints, count: int, seed: int) -> Ints:
    drawn = np.random.default_rng(seed).permutation(ids)[:count]
    return np.sort(drawn)


def _alone(model: Any, texts: Sequence[Ints]) -> Tensor:
    """Vectors of texts without prefixes. (n, H)"""
    from recbole_mm.backbone.batch import by_length
    from recbole_mm.backbone.text_states import TOKENS_AT_ONCE

    reads = model.aligned.language_model
    groups = list(by_length(list(map(len, texts)), TOKENS_AT_ONCE))
    parts = [reads.vectors(reads.padded([texts[row] for row in group])) for group in groups]
    return torch.cat(parts)[torch.tensor([row for group in groups for row in group]).argsort()]


def _points(side: str, names: Sequence[str], found: Sequence[Tensor]) -> Points:
    if len(names) < _LEAST:
        raise UserError(f"{len(names)} {side} are too few to draw: take {_LEAST} or more.")
    arrays = [vectors.double().numpy(force=True) for vectors in found]
    return Points(side, names, dict(zip(MODELS, arrays, strict=True)))


# --- one space ------------------------------------------------------------------------------------


def common_space(vectors: Mapping[str, Floats]) -> dict[str, Floats]:
    """Vectors of several models with one size, one mean and one mean length.

    Args:
        vectors: of the same things. Shapes: (n, D) with any D.

    Returns:
        Shapes: (n, d), d the smallest D, or n - 1 where that is less.
    """
    size = min(min(found.shape[1], len(found) - 1) for found in vectors.values())
    return {name: _principal(found, size) for name, found in vectors.items()}


def _principal(vectors: Floats, size: int) -> Floats:
    """Standardised, on their first principal axes, each of which points where its longest part
    does. (n, D) -> (n, size)"""
    deviation = vectors.std(axis=0)
    scaled = (vectors - vectors.mean(axis=0)) / np.where(deviation > 1e-9, deviation, 1.0)
    _, _, axes = np.linalg.svd(scaled, full_matrices=False)
    axes = axes[:size]  # (size, D)
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))
    found: Floats = scaled @ (axes * signs).T
    return found / max(np.sqrt((found**2).sum(axis=1).mean()), 1e-9)


def lay_out(vectors: Mapping[str, Floats], seed: int) -> dict[str, Floats]:
    """t-SNE of all models' points at once, as `common_space` gives them. (n, d) -> (n, 2)."""
    from sklearn.manifold import TSNE

    every = np.concatenate([*vectors.values()])  # (3n, d)
    perplexity = min(30.0, (len(every) - 1) / 3)
    found = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(every)
    return dict(zip(vectors, np.split(found.astype(np.float64), len(vectors)), strict=True))


# --- numbers --------------------------------------------------------------------------------------


def nearest(vectors: Floats, k: int) -> Ints:
    """The k nearest others of each by cosine. (n, D) -> (n, k)."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return np.argsort(-cosine, axis=1, kind="stable")[:, :k]


def mixed(one: Floats, other: Floats, k: int = NEIGHBOURS) -> float:
    """The share of neighbours that are the other model's, see the module's head. (n, d) both."""
    found = nearest(np.concatenate([one, other]), k)
    is_other = np.arange(len(found)) >= len(one)
    return float((is_other[found] != is_other[:, None]).mean())


def shared(one: Floats, other: Floats, k: int = NEIGHBOURS) -> float:
    """The share of neighbours that both models find, see the module's head. (n, any) both."""
    pairs = zip(nearest(one, k), nearest(other, k), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in pairs]))


def pair_rows(points: Points, together: Mapping[str, Floats]) -> list[list[str]]:
    """A line for each pair of models."""
    rows = []
    for one, other in combinations(points.vectors, 2):
        own = shared(_centred(points.vectors[one]), _centred(points.vectors[other]))
        both = mixed(together[one], together[other])
        rows.append([f"{points.side}: {one}, {other}", f"{both:.3f}", f"{own:.3f}"])
    return rows


def _centred(vectors: Floats) -> Floats:
    """Vectors of language models have much in common, which says nothing of any."""
    centred: Floats = vectors - vectors.mean(axis=0)
    return centred


# --- files ----------------------------------------------------------------------------------------


def write_coordinates(path: Path, drawn: Mapping[str, tuple[Points, Mapping[str, Floats]]]) -> None:
    """A line a point: side, model, token, x, y."""
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["side", "model", "token", "x", "y"])
        for side, (points, places) in drawn.items():
            for model, xy in places.items():
                lines = zip(points.names, xy.tolist(), strict=True)
                out.writerows([side, model, name, f"{x:.4f}", f"{y:.4f}"] for name, (x, y) in lines)


def draw(path: Path, drawn: Mapping[str, tuple[Points, Mapping[str, Floats]]]) -> None:
    """A panel for each side, a colour for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(drawn), 5), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (side, (_, places)) in zip(panels, drawn.items(), strict=True):
        for model, xy in places.items():
            panel.scatter(xy[:, 0], xy[:, 1], s=6, alpha=0.6, label=model)
        panel.set(title=side, xticks=[], yticks=[])
    panels[0].legend(markerscale=2)
    figure.savefig(path, dpi=150)


# --- the command ----------------------------------------------------------------------------------


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _check(folder: str, out: Path) -> None:
    """Raises `UserError` for what can be known to fail before anything is read."""
    from recbole_mm.model.rarec import RARec
    from recbole_mm.registry import get_model
    from recbole_mm.trainer.run import Run

    if not can_plot():
        raise UserError("The plot needs the package 'matplotlib': pip install 'recbole-mm[plots]'.")
    if out.suffix != ".png":
        raise UserError(f"--out: {out} is no name of a picture: write FILE.png.")
    run = Run.open(Path(folder))
    if not issubclass(get_model(run.config()["model"]), RARec):
        raise UserError(f"{folder} is a run of {run.config()['model']}: name one of RARec.")
    if not run.is_done("alignment"):
        raise UserError(f"{folder} has no finished stage alignment: name a run that has.")


def plot(
    folder: str, out: Path, items: int = 500, users: int = 0, data_path: str | None = None
) -> list[list[str]]:
    """Makes the picture and the coordinates of a run.

    Args:
        folder: of a finished run of RARec.
        out: the picture; the coordinates are beside it.
        items: at most so many; 0: none.
        users: likewise.
        data_path: the folder of datasets, where it is no longer what it was.

    Returns:
        A line for each pair of models: their names, mixed, shared.

    Raises:
        UserError: no such run, too few points, or no matplotlib.
    """
    from recbole_mm.quick_start import trained

    _check(folder, out)
    flags = {"show_progress": False, "state": "WARNING"}
    data, model = trained(folder, flags | ({"data_path": data_path} if data_path else {}))
    test, seed = data.test._dataset, model.seed
    asked = [item_points(model, test.item_tokens(), items, seed)] if items else []
    asked += [user_points(model, test, users, seed)] if users else []
    if not asked:
        raise UserError("There is nothing to draw: set --items or --users above 0.")
    drawn: dict[str, tuple[Points, Mapping[str, Floats]]] = {}
    rows: list[list[str]] = []
    for points in asked:
        together = common_space(points.vectors)
        drawn[points.side] = (points, lay_out(together, seed))
        rows += pair_rows(points, together)
    write_coordinates(out.with_suffix(".csv"), drawn)
    draw(out, drawn)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws, and prints the numbers. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recbole_mm.report.tsne", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", help="saved/RARec-DATASET-ID")
    parser.add_argument("--items", type=int, default=500, help="how many; 0: none")
    parser.add_argument("--users", type=int, default=0, help="how many; 0: none")
    parser.add_argument("--out", type=Path, help="FILE.png; RUN/tsne.png where it is not said")
    parser.add_argument("--data_path", help="the folder of datasets, if they have moved")
    args = parser.parse_args(arguments)
    out = args.out or Path(args.run) / "tsne.png"
    try:
        if min(args.items, args.users) < 0:
            raise UserError("--items and --users are numbers of points: 0 or more.")
        rows = plot(args.run, out, args.items, args.users, args.data_path)
    except (UserError, OSError) as error:
        print(told(error), file=sys.stderr)
        return 1
    print(format_rows(["", "mixed", "shared"], rows))
    print(f"written to {out} and {out.with_suffix('.csv')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
