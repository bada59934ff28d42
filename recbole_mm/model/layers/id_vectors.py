"""Vectors of users and items from a trained sequential model, whatever its architecture."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_mm.errors import UserError

Ints = NDArray[np.int64]
_TOLERANCE = 1e-3


def padded(histories: list[Ints], length: int) -> tuple[Tensor, Tensor]:
    """The newest items of each history, right-padded with 0, and how many. (B, L), (B,)."""
    rows = torch.zeros(len(histories), length, dtype=torch.int64)  # (B, L)
    for row, history in zip(rows, histories, strict=True):
        newest = torch.from_numpy(np.asarray(history[-length:], dtype=np.int64))
        row[: len(newest)] = newest
    return rows, (rows > 0).sum(dim=1)


class IdVectors:
    """User and item vectors whose product is the model's score, but for a constant a user.

    Users' are divided by one number, and items' mean is taken off before theirs are, so that none
    are larger than another model's. Both keep a user's order of items; to centre or to scale each
    dimension would not: the mean user's vector is what makes popular items score high. Where the
    model has a bias an item, it is a last dimension of the items', and the same for all users.
    What the model has learnt nothing of, an item that training never saw or a history of such
    alone, has the zero vector.

    Args:
        model: any of RecBole's sequential models or ours; stays as it is.
        warm: whether training has the item. Shape: (V,).
        scale: root mean square of an entry of the vectors given.
    """

    def __init__(self, model: Any, warm: Tensor, scale: float = 1.0) -> None:
        self.model, self.warm, self.scale = model, warm, scale
        self._table, self._bias = item_scorer(model, len(warm))
        self._user_size: Tensor | None = None

    def fit(self, histories: list[Ints]) -> None:
        """Takes the size of users' vectors from these histories."""
        found = [self._raw(histories[i : i + 512]) for i in range(0, len(histories), 512)]
        self._user_size = _size(torch.cat(found))

    @torch.no_grad()
    def users(self, histories: list[Ints]) -> Tensor:
        """Scaled vectors of users with these histories, oldest item first. Shape: (B, D)."""
        size = self._fitted()
        is_known = [bool(self.warm[torch.from_numpy(np.asarray(h))].any()) for h in histories]
        known = torch.tensor(is_known, device=size.device)[:, None]
        found = self._raw(histories) * (self.scale / size)
        if self._bias is not None:
            found = F.pad(found, (0, 1), value=self.scale)
        return torch.where(known, found, 0.0)

    @torch.no_grad()
    def items(self) -> Tensor:
        """Centred and scaled vectors of all items. Shape: (V, D)."""
        n_items = len(self.warm)
        table = self._table.weight[:n_items].detach()
        warm = self.warm.to(table.device)
        found = (table - table[warm].mean(dim=0)) * (self.scale / self._item_size(warm))
        if self._bias is not None:
            bias = self._bias[:n_items].detach()
            centred = (bias - bias[warm].mean()) * (self._gain(warm) / self.scale)
            found = torch.cat([found, centred[:, None]], dim=1)
        return torch.where(warm[:, None], found, 0.0)

    def scores(self, users: Tensor, items: Tensor) -> Tensor:
        """The model's own by scaled vectors, but for a constant a user. Shape: (B, n).

        Args:
            users: shape (B, D).
            items: shape (n, D).
        """
        return users @ items.T / self._gain(self.warm.to(items.device))

    def fingerprint(self) -> str:
        """SHA-256 of what the vectors of items are made of, in hex: the same on every device."""
        weights = [self._table.weight, *([] if self._bias is None else [self._bias])]
        found = hashlib.sha256(str(self.scale).encode())
        for weight in weights:
            found.update(weight.detach().float().numpy(force=True).tobytes())
        return found.hexdigest()

    def _gain(self, warm: Tensor) -> Tensor:
        """How much larger products of scaled vectors are. Shape: ()."""
        return self.scale**2 / (self._fitted() * self._item_size(warm))

    def _item_size(self, warm: Tensor) -> Tensor:
        table = self._table.weight[: len(warm)].detach()[warm]
        return _size(table - table.mean(dim=0))

    def _fitted(self) -> Tensor:
        if self._user_size is None:
            raise ValueError("fit first")
        return self._user_size

    @torch.no_grad()
    def _raw(self, histories: list[Ints]) -> Tensor:
        self.model.eval()
        rows, lengths = padded(histories, self.model.max_seq_length)
        device = self._table.weight.device
        found: Tensor = self.model.forward(rows.to(device), lengths.to(device))
        return found


def _size(vectors: Tensor) -> Tensor:
    """Root mean square of the entries. Shape: ()."""
    return vectors.square().mean().sqrt().clamp(min=1e-6)


def standardized(table: Tensor, known: Tensor) -> Tensor:
    """Rows with mean 0 and deviation 1 in each dimension, over those that are known; others are 0.

    Args:
        table: shape (V, D).
        known: shape (V,), bool.

    Returns:
        Shape: (V, D).
    """
    known = known.to(table.device)
    if not known.any():
        return torch.zeros_like(table)
    mean, deviation = _scale(table[known])
    return torch.where(known[:, None], (table - mean) / deviation, 0.0)


def _scale(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each dimension; one that never varies is left as it is."""
    deviation = vectors.std(dim=0, correction=0)
    return vectors.mean(dim=0), torch.where(deviation > 1e-6, deviation, 1.0)


def item_table(model: Any, n_items: int, key: str = "id_model") -> nn.Embedding:
    """The embedding whose products with the model's states are its scores; see `item_scorer`."""
    return item_scorer(model, n_items, key)[0]


@torch.no_grad()
def item_scorer(
    model: Any, n_items: int, key: str = "id_model"
) -> tuple[nn.Embedding, nn.Parameter | None]:
    """The embedding whose products with the model's states are its scores, and what a score has
    beside them: a bias an item, or nothing.

    Args:
        model: any of RecBole's sequential models or ours.
        n_items: V.
        key: of the configuration, by which the model was chosen.

    Raises:
        UserError: the model has none: its scores are something else.
    """
    model.eval()
    known = torch.arange(1, n_items)
    histories = [known[i : i + 1 + i].numpy() for i in range(min(4, (n_items - 1) // 2))]
    rows, lengths = padded(histories, model.max_seq_length)
    try:
        scores = _scores(model, rows, lengths)  # (B, V)
        states = model.forward(rows.to(model.device), lengths.to(model.device)).to(scores)
    except (TypeError, IndexError, RuntimeError, KeyError):
        states = torch.empty(0)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and states.ndim == 2 and _fits(module, states, n_items):
            rest = scores - states @ module.weight[:n_items].to(scores).T  # (B, V), the items' bias
            if _spread(rest) < _TOLERANCE * _spread(scores):
                return module, _bias(model, rest[0], module.num_embeddings)
    raise UserError(
        f"{key} is {type(model).__name__}, whose scores are no products of a user's and an "
        "item's vector: take another, such as LRURec, SASRec, GRU4Rec or, with n_interests 1, "
        "ComiRec."
    )


def _bias(model: nn.Module, rest: Tensor, n_rows: int) -> nn.Parameter | None:
    """The weight that holds what is left of the scores: a number an item."""
    if rest.abs().max() < 1e-5:  # rounding: nothing is left
        return None
    for weight in model.parameters():
        if weight.shape == (n_rows,):
            missing = (rest - weight[: len(rest)].to(rest))[1:].abs().max()
            if missing < _TOLERANCE * (1 + rest.abs().max()):
                return weight
    return None


def _spread(scores: Tensor) -> Tensor:
    """How far rows differ. Shape: ()."""
    return (scores - scores[:1])[:, 1:].abs().max()


def _fits(table: nn.Embedding, states: Tensor, n_items: int) -> bool:
    return table.num_embeddings >= n_items and table.embedding_dim == states.shape[1]


def _scores(model: Any, rows: Tensor, lengths: Tensor) -> Tensor:
    users = torch.arange(len(rows), 0, -1)  # others than the lengths
    rows = F.pad(rows, (0, model.max_seq_length - rows.shape[1]))
    fields = {model.USER_ID: users, model.ITEM_SEQ: rows, model.ITEM_SEQ_LEN: lengths}
    found: Tensor = model.full_sort_predict(Interaction(fields).to(model.device))
    return found.view(len(rows), -1)
