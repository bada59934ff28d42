"""RecBole's `other_parameter`: what a model needs beside its weights, as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

_OTHER = "other_parameter."


def pack_other(parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """RecBole's extra attributes as named tensors.

    Modules are left out: their weights are in the state dict and the constructor builds the rest.

    Raises:
        TypeError: a kind of value that no model of the zoo has had so far.
    """
    packed: dict[str, Tensor] = {}
    for name, value in parameters.items():
        packed.update({f"{_OTHER}{name}{k}": v for k, v in _pack_one(name, value).items()})
    return packed


def _pack_one(name: str, value: Any) -> dict[str, Tensor]:
    if value is None or isinstance(value, torch.nn.Module):
        return {}
    if isinstance(value, Tensor):
        return {":tensor": value}
    if isinstance(value, (np.ndarray, np.generic)):
        return {":array": torch.from_numpy(np.atleast_1d(np.asarray(value)))}
    if sp.issparse(value):
        coo = value.tocoo()
        return {
            f":sparse.{value.format}.data": torch.from_numpy(coo.data),
            f":sparse.{value.format}.index": torch.from_numpy(
                np.stack([coo.row, coo.col]).astype(np.int64)
            ),
            f":sparse.{value.format}.shape": torch.tensor(coo.shape),
        }
    raise TypeError(
        f"cannot store the attribute '{name}' of type {type(value).__name__} without pickle"
    )


def unpack_other(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a checkpoint's tensors into weights and RecBole's extra attributes."""
    weights = {k: v for k, v in tensors.items() if not k.startswith(_OTHER)}
    other: dict[str, Any] = {}
    for key in tensors.keys() - weights.keys():
        name, _, kind = key.removeprefix(_OTHER).partition(":")
        if kind == "tensor":
            other[name] = tensors[key]
        elif kind == "array":
            other[name] = tensors[key].cpu().numpy()
        elif kind.endswith(".data"):
            other[name] = _unpack_sparse(tensors, f"{_OTHER}{name}:{kind.removesuffix('.data')}")
    return weights, other


def _unpack_sparse(tensors: Mapping[str, Tensor], prefix: str) -> Any:
    data = tensors[f"{prefix}.data"].cpu().numpy()
    row, col = tensors[f"{prefix}.index"].cpu().numpy()
    shape = tuple(tensors[f"{prefix}.shape"].tolist())
    return sp.coo_matrix((data, (row, col)), shape=shape).asformat(prefix.rsplit(".", 1)[1])


def whole_state(model: Any) -> dict[str, Tensor]:
    """All that one of RecBole's models needs to score as it does now."""
    return {**model.state_dict(), **pack_other(model.other_parameter())}


def load_whole_state(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Takes back what `whole_state` gave; what was computed with other weights is forgotten.

    Raises:
        RuntimeError: the weights are not the model's.
    """
    weights, other = unpack_other(tensors)
    model.load_state_dict(weights)
    stale = [k for k, v in model.other_parameter().items() if isinstance(v, Tensor)]
    model.load_other_parameter({**dict.fromkeys(stale), **other})
