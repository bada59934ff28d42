"""Feature matrices of items: `D.<encoder>.npy`, memory-mapped, and `D.<encoder>.json` beside it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mm.data.atomic import IMAGE, PAD
from recbole_mm.data.content import ItemContent
from recbole_mm.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CHUNK = 1 << 22  # elements checked for NaN at a time


@dataclass(frozen=True)
class FeatureInfo:
    """What the JSON beside a matrix says.

    Attributes:
        items: raw item tokens in row order. Length: N.
        encoder: id of the encoder, e.g. a Hugging Face model id.
        revision: its revision, or None.
        pooling: how token states became one row, e.g. ``mean``, or None.
        inputs: hash of what was encoded, as `hash_inputs` gives, or None when unknown.
        dtype: of the matrix, e.g. ``float16``.
        shape: (N, M).
        fields: what of an item was encoded: text columns, or ``image``; None when unknown.
        without: items that were looked at and have no row, because they have no such content.
    """

    items: list[str]
    encoder: str
    revision: str | None
    pooling: str | None
    inputs: str | None
    dtype: str
    shape: list[int]
    fields: list[str] | None = None
    without: list[str] = field(default_factory=list)


def hash_inputs(
    folder: Path, dataset: str, items: Sequence[str], without: Sequence[str], fields: Sequence[str]
) -> str:
    """The hash that features are stored with, and by which they are known to be stale.

    It is over the items in the order of their rows and then over those without a row, so that
    whoever has the JSON can compute it again, whatever order or choice of items a run has.

    Args:
        folder: the dataset's folder.
        dataset: the dataset's name.
        items: with a row, in row order.
        without: a row.
        fields: text columns, or ``image``.
    """
    content = ItemContent(folder, dataset, [PAD, *items, *without])
    return content.hash([name for name in fields if name != IMAGE], images=IMAGE in fields)


def feature_paths(folder: Path, dataset: str, name: str) -> tuple[Path, Path]:
    """The matrix and the JSON of the features called `name`.

    Raises:
        UserError: `name` would not make a plain file name.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"Feature name '{name}': use letters, digits, '.', '_' and '-' only.")
    return folder / f"{dataset}.{name}.npy", folder / f"{dataset}.{name}.json"


def save_features(
    folder: Path,
    dataset: str,
    name: str,
    matrix: NDArray[Any],
    items: Sequence[str],
    *,
    encoder: str,
    revision: str | None = None,
    pooling: str | None = None,
    inputs: str | None = None,
    fields: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> None:
    """Writes a feature matrix, one row an item; see `FeatureInfo` for the arguments.

    Both files are complete before either takes its place.

    Raises:
        UserError: not one finite row an item, or a repeated item.
    """
    paths = feature_paths(Path(folder), dataset, name)
    shape = [int(size) for size in matrix.shape]
    dtype, known = str(matrix.dtype), None if fields is None else list(fields)
    info = FeatureInfo(
        list(items), encoder, revision, pooling, inputs, dtype, shape, known, list(without)
    )
    _check(paths[0], matrix, info)
    fresh = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        with fresh[0].open("wb") as file:
            np.save(file, matrix, allow_pickle=False)
            _sync(file)
        with fresh[1].open("w", encoding="utf-8") as text:
            json.dump(asdict(info), text)
            _sync(text)
        paths[1].unlink(missing_ok=True)  # a kill between the two leaves no pair that mismatches
        for temporary, path in zip(fresh, paths, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in fresh:
            temporary.unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True)
class FeatureStore:
    """A feature matrix on disk.

    Attributes:
        path: the `.npy` file.
        matrix: memory-mapped. Shape: (N, M).
        info: what the JSON says.
    """

    path: Path
    matrix: NDArray[Any]
    info: FeatureInfo

    @classmethod
    def open(cls, folder: Path, dataset: str, name: str, inputs: str | None = None) -> FeatureStore:
        """Opens the features called `name` and checks them.

        Args:
            folder: the dataset's folder.
            dataset: the dataset's name.
            name: of the features, the middle of the file name.
            inputs: hash of what they should have been made from; None: anything.

        Raises:
            UserError: a file is absent or broken, JSON and matrix disagree, an item is repeated,
                a value is not finite, or the features were made from other inputs.
        """
        path, json_path = feature_paths(Path(folder), dataset, name)
        info, matrix = _read_info(json_path), _read_matrix(path)
        _check(path, matrix, info)
        _refuse_stale(path, info, inputs)
        return cls(path, matrix, info)

    @classmethod
    def open_fresh(cls, folder: Path, dataset: str, name: str) -> FeatureStore:
        """Opens features and compares the content they were made from, where that is known.

        Raises:
            UserError: what `open` raises.
        """
        store = cls.open(folder, dataset, name)
        info = store.info
        if info.inputs is not None and info.fields is not None:
            now = hash_inputs(Path(folder), dataset, info.items, info.without, info.fields)
            _refuse_stale(store.path, info, now)
        return store

    def rows(self, item_tokens: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The features in the order of internal ids.

        Args:
            item_tokens: raw tokens by internal id, row 0 the pad. Length: V.

        Returns:
            Features, zero where an item has none, shape (V, M); and which items have any,
            shape (V,). Row 0 is always zero and unmasked. Items not asked for are ignored.
        """
        at = {token: row for row, token in enumerate(self.info.items)}
        found = [(i, at[token]) for i, token in enumerate(item_tokens) if i > 0 and token in at]
        out = np.zeros((len(item_tokens), self.matrix.shape[1]), dtype=np.float32)  # (V, M)
        mask = np.zeros(len(item_tokens), dtype=np.bool_)  # (V,)
        if found:
            ids, rows = map(list, zip(*found, strict=True))
            out[ids], mask[ids] = self.matrix[rows], True
        return out, mask


def _refuse_stale(path: Path, info: FeatureInfo, inputs: str | None) -> None:
    if inputs is not None and info.inputs is not None and info.inputs != inputs:
        raise UserError(
            f"{path} is stale: it was made from other item content than the dataset has now; "
            "encode it again or delete it."
        )


def _read_info(path: Path) -> FeatureInfo:
    try:
        info = FeatureInfo(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError) as error:
        keys = ", ".join(FeatureInfo.__dataclass_fields__)
        raise UserError(f"{path}: {error}; it must be a JSON object of {keys}.") from None
    for key in ("items", "shape", "without"):
        if not isinstance(getattr(info, key), list):
            raise UserError(f"{path}: '{key}' must be a list; write both files again.")
    return info


def _read_matrix(path: Path) -> NDArray[Any]:
    try:
        matrix: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is no plain .npy matrix ({error}); write it again.") from None
    return matrix


def _check(path: Path, matrix: NDArray[Any], info: FeatureInfo) -> None:
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise UserError(
            f"{path}: a matrix of floats (items, features) is needed, not {matrix.dtype} of shape "
            f"{matrix.shape}."
        )
    if list(matrix.shape) != list(info.shape) or len(info.items) != len(matrix):
        raise UserError(
            f"{path}: the matrix has shape {matrix.shape}, but its JSON tells of "
            f"{len(info.items)} items and shape {tuple(info.shape)}; write both again."
        )
    if len(set(info.items)) != len(info.items):
        [(item, _)] = Counter(info.items).most_common(1)
        raise UserError(f"{path}: item '{item}' has more than one row; keep one.")
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        small = np.abs(matrix[start : start + step]) <= np.finfo(np.float32).max  # False for NaN
        finite = small.all(axis=1)  # (step,)
        if not finite.all():
            row = start + int(finite.argmin())
            raise UserError(
                f"{path}, row {row} (item '{info.items[row]}'): a value is NaN, infinite or beyond "
                "32 bits; encode that item again or leave it out."
            )
