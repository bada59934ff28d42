"""MLP4Rec: histories of items and their fields mixed by MLPs along three axes.

Paper: Li et al., "MLP4Rec: A Pure MLP Architecture for Sequential Recommendations", IJCAI 2022
(https://arxiv.org/abs/2204.11510). Official code: https://github.com/Li-Muyang/MLP4Rec.

Differs from the official code:
- Rows are moved to the right end of the grid, so that the newest item, whose state is read, always
  stands in the last place; a mixer along positions has weights a place, and official rows end in as
  many places as there are lengths.
- The pad and an item without a field are zeros where they enter and stay so, and the softmax is
  over items alone; in RecBole's rows the pad is one more item.
- `share_layers: False` gives each layer mixers of its own; the official code has one set.
- Fields are token columns; several tokens of one field are averaged. Without any there is no
  mixer along fields, and the model is an MLP-Mixer.
- Not reproduced: a batch of one row fails there (a squeeze), and states are written in place into a
  list.
"""

from __future__ import annotations

from math import inf
from typing import Any, ClassVar

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import FeatureType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_mm.errors import UserError
from recbole_mm.model.layers.losses import full_softmax_loss
from recbole_mm.model.layers.rows import ProductScores, to_the_right

FIELDS, POSITIONS, CHANNELS = -3, -2, -1  # the axes of (B, F, L, D)


class Mixer(nn.Module):
    """x + W2 gelu(W1 LN(x)) along one axis, with the same weights everywhere else.

    Args:
        axis: ``FIELDS``, ``POSITIONS`` or ``CHANNELS``.
        size: of that axis.
        hidden_size: D, which LayerNorm is over.
        expansion: width of the inner layer, in units of `size`.
        dropout_prob: of the inner layer and of what is added.
        eps: of LayerNorm.
    """

    def __init__(
        self,
        axis: int,
        size: int,
        hidden_size: int,
        expansion: int,
        dropout_prob: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.axis = axis
        self.layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.inner = nn.Linear(size, expansion * size)
        self.outer = nn.Linear(expansion * size, size)
        self.dropout = nn.Dropout(dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, L, D) -> (B, F, L, D)."""
        along = self.layer_norm(x).transpose(self.axis, -1)
        mixed: Tensor = self.outer(self.dropout(F.gelu(self.inner(along))))
        return x + self.dropout(mixed).transpose(self.axis, -1)


class Layer(nn.Module):
    """Mixers along positions, channels and, where there are several, fields.

    Args:
        shape: F, L and D.
        expansion: and the others: see `Mixer`.
    """

    def __init__(
        self, shape: tuple[int, int, int], expansion: int, dropout_prob: float, eps: float
    ) -> None:
        super().__init__()
        n_fields, length, D = shape
        rest = (D, expansion, dropout_prob, eps)
        self.positions = Mixer(POSITIONS, length, *rest)
        self.within = nn.Sequential(Mixer(CHANNELS, D, *rest))  # a place
        if n_fields > 1:
            self.within.append(Mixer(FIELDS, n_fields, *rest))

    def forward(self, x: Tensor, only_last: bool = False) -> Tensor:
        """(B, F, L, D) -> (B, F, L, D), or with `only_last` (B, F, 1, D), the last place."""
        x = self.positions(x)
        mixed: Tensor = self.within(x[:, :, -1:] if only_last else x)
        return mixed


class FieldEmbedding(nn.Module):
    """One field of the items: the mean of its tokens' embeddings, zeros for an item without any.

    Args:
        tokens: of each item, padded with 0. Shape: (V, n).
        n_tokens: how many there are, the pad counted.
        hidden_size: D.
    """

    tokens: Tensor

    def __init__(self, tokens: Tensor, n_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens, persistent=False)
        self.embedding = nn.Embedding(n_tokens, hidden_size, padding_idx=0)

    def forward(self, items: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        tokens = self.tokens[items]  # (B, L, n)
        count = (tokens > 0).sum(2, keepdim=True).clamp(min=1)  # (B, L, 1)
        total: Tensor = self.embedding(tokens).sum(2)  # (B, L, D)
        return total / count


class MLP4Rec(ProductScores, SequentialRecommender):
    """MLP4Rec behind RecBole's interface."""

    optional_features = True  # `selected_features: ~` is what the dataset has, be it nothing
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"loss_type": ("CE",)}
    bounds: ClassVar[dict[str, tuple[float, float]]] = {"expansion": (1, inf)}

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        D, self.n_layers = config["hidden_size"], config["n_layers"]
        self.item_embedding = nn.Embedding(self.n_items, D, padding_idx=0)
        self.fields = nn.ModuleList(
            FieldEmbedding(field_tokens(dataset, name), dataset.num(name), D)
            for name in config["selected_features"] or ()
        )
        sets = 1 if config["share_layers"] else self.n_layers
        shape = (1 + len(self.fields), self.max_seq_length, D)
        how = [config[key] for key in ("expansion", "hidden_dropout_prob", "layer_norm_eps")]
        self.layers = nn.ModuleList(Layer(shape, *how) for _ in range(sets))
        for module in self.modules():
            _initialise(module, config["initializer_range"])

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """The state of each row's last item. (B, L), (B,) -> (B, D)."""
        short = self.max_seq_length - item_seq.shape[1]  # a mixer has weights a place
        items = to_the_right(F.pad(item_seq, (0, short)), item_seq_len)  # (B, L)
        embedded = [self.item_embedding(items), *(field(items) for field in self.fields)]
        x = torch.stack(embedded, dim=1)  # (B, F, L, D)
        for number in range(self.n_layers):
            layer = self.layers[number % len(self.layers)]
            x = layer(x, only_last=number == self.n_layers - 1)
        return x[:, 0, -1]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Cross entropy over all items. Shape: ()."""
        hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])  # (B, D)
        table = self.item_embedding.weight[1:]
        return full_softmax_loss(hidden, table, None, interaction[self.POS_ITEM_ID] - 1)


def field_tokens(dataset: Any, name: str) -> Tensor:
    """The tokens of every item in one column of `.item`, padded with 0. Shape: (V, n).

    Raises:
        UserError: the column is not loaded, or has no tokens.
    """
    features = dataset.get_item_feature()
    if name not in features.columns or name == dataset.iid_field:
        raise UserError(
            f"selected_features: the column '{name}' of {dataset.dataset_name}.item is not loaded: "
            f"name it in load_col (item: [{dataset.iid_field}, {name}]), or leave "
            "selected_features out, which takes every token column."
        )
    kind = dataset.field2type[name]
    if kind not in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ):
        raise UserError(
            f"selected_features: MLP4Rec embeds tokens, and '{name}' is of type {kind.value}: "
            "name columns of type token or token_seq."
        )
    return features[name].view(len(features), -1)


def _initialise(module: nn.Module, std: float) -> None:
    """Normal weights but for the pad's zeros, and zero biases."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.zeros_(module.weight[0])
