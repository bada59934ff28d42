"""LRURec: sequential recommendation with linear recurrent units; PRIME's and LlamaRec's retriever.

Paper: Yue et al., "Linear Recurrent Units for Sequential Recommendation", WSDM 2024
(https://arxiv.org/abs/2310.02367). Official code: https://github.com/yueeeeeeee/LRURec; PRIME
(https://github.com/Yueeeeeeee/PRIME) has the same network.

Differs from the official code:
- Rows are right-padded and only their real cells are computed; official rows are left-padded to a
  power of two and masked. States, loss and gradients are equal (tests/model/test_lrurec.py).
- Logits are made for cells that have a target, and for a row's last cell at evaluation, instead of
  for every cell. Equal loss and scores.
- Complex projections are one real product each. The imaginary part of C's bias, which nothing
  reads, is gone: 128 parameters fewer with two blocks.
- Users longer than MAX_ITEM_LIST_LENGTH train on windows that use every target once; PRIME's code
  keeps their last targets only, LRURec's drops a head that does not fill a window.
- `train_mode: prefix` trains on RecBole's augmented rows; the official code has no such mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn

from recbole_mm.data.sequences import STARTS, TARGETS
from recbole_mm.errors import UserError
from recbole_mm.model.layers.losses import full_softmax_loss
from recbole_mm.model.layers.lru import (
    Cells,
    FeedForward,
    LRUBlock,
    LRULayer,
    real_cells,
    truncated_normal_init,
)
from recbole_mm.model.layers.retriever_stage import RetrieverStage, TrainingRows
from recbole_mm.stage import ONLY_STAGE, Stage, StageSettings


class LRUEncoder(nn.Module):
    """Item embeddings, LRU blocks, and scores by the same embeddings plus a bias.

    Args:
        n_items: V, with the pad.
        hidden_size: D.
        n_layers: blocks.
        state_mult: complex states of a block are H = state_mult * D.
        inner_size: width of the feed-forward layers.
        dropout_prob: of embeddings and feed-forward layers.
        attn_dropout_prob: of the recurrence's output.
        radius: range of the initial decay |lambda|.
    """

    def __init__(
        self,
        n_items: int,
        hidden_size: int = 64,
        n_layers: int = 2,
        state_mult: int = 2,
        inner_size: int = 256,
        dropout_prob: float = 0.0,
        attn_dropout_prob: float = 0.0,
        radius: tuple[float, float] = (0.8, 0.99),
    ) -> None:
        super().__init__()
        n_states = state_mult * hidden_size
        self.state_shape = (n_layers, n_states)
        self.item_embedding = nn.Embedding(n_items, hidden_size)  # row 0 is trained: see `loss`
        self.output_bias = nn.Parameter(torch.empty(n_items))
        self.dropout = nn.Dropout(dropout_prob)
        self.layer_norm = nn.LayerNorm(hidden_size)
        self.blocks = nn.ModuleList(
            LRUBlock(
                LRULayer(hidden_size, n_states, attn_dropout_prob, radius),
                FeedForward(hidden_size, inner_size, dropout_prob),
            )
            for _ in range(n_layers)
        )
        truncated_normal_init(self)

    def encode(self, items: Tensor, cells: Cells) -> Tensor:
        """States of real cells. (N,) item ids -> (N, D)."""
        x = self._embed(items)  # (N, D)
        for block in self.blocks:
            x = block(x, cells)
        return x

    def forward(self, item_seq: Tensor, lengths: Tensor) -> Tensor:
        """The state after each row's last item. (B, L), (B,) -> (B, D)."""
        cells = real_cells(lengths, item_seq.shape[1])
        return self.encode(item_seq.flatten()[cells.index], cells)[cells.last]

    def states(self, item_seq: Tensor) -> Tensor:
        """The state after every item, that is of every prefix. (B, L) -> (B, L, D).

        It is 0 at pads, except that a row without items begins with the state of a lone pad.
        """
        cells = real_cells((item_seq != 0).sum(1).clamp(min=1), item_seq.shape[1])
        hidden = self.encode(item_seq.flatten()[cells.index], cells)  # (N, D)
        grid = hidden.new_zeros(item_seq.numel(), hidden.shape[1])  # (B * L, D)
        grid = grid.index_copy(0, cells.index, hidden)
        return grid.unflatten(0, item_seq.shape)  # (B, L, D)

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits of all items. (B, D) -> (B, V)."""
        return torch.addmm(self.output_bias, hidden, self.item_embedding.weight.T)

    def loss(
        self, item_seq: Tensor, lengths: Tensor, targets: Tensor, starts: Tensor | None = None
    ) -> Tensor:
        """Mean cross entropy over all cells that have a target.

        Where `starts` is true, the row's first item is a target too: of a row of its own that holds
        one pad. That is what the official code does by accident: a user's row of targets has one
        cell more than the row of inputs, and the pad it meets there carries no state onwards. The
        pad's embedding thus learns which items users begin with.

        Args:
            item_seq: right-padded items. Shape: (B, L).
            lengths: items of each row, 1 or more. Shape: (B,).
            targets: the item that follows each item, 0 for none. Shape: (B, L).
            starts: rows that begin at their user's first item; None: no such targets. Shape: (B,).
        """
        if starts is not None:
            first = torch.zeros_like(item_seq[starts])  # (S, L)
            first_target = first.index_copy(1, first.new_zeros(1), item_seq[starts, :1])
            item_seq = torch.cat([item_seq, first])  # (B + S, L)
            targets = torch.cat([targets, first_target])  # (B + S, L)
            lengths = torch.cat([lengths, torch.ones_like(lengths[starts])])  # (B + S,)
        cells = real_cells(lengths, item_seq.shape[1])
        hidden = self.encode(item_seq.flatten()[cells.index], cells)  # (N, D)
        wanted = targets.flatten()[cells.index]  # (N,)
        kept = wanted.nonzero().squeeze(1)  # (cells with a target,)
        return self.full_softmax(hidden[kept], wanted[kept])

    def full_softmax(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of states against their targets. (N, D), (N,) -> ()."""
        return full_softmax_loss(hidden, self.item_embedding.weight, self.output_bias, targets)

    def start_state(self, rows: int = 1) -> Tensor:
        """The state before any item. Shape: (n_layers, B, H), complex."""
        n_layers, n_states = self.state_shape
        zero = self.output_bias.new_zeros(n_layers, rows, n_states, 2)
        return torch.view_as_complex(zero)

    def step(self, state: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """One more item for each row. (n_layers, B, H), (B,) -> (B, D) and the next state."""
        x, after = self._embed(item), []  # (B, D)
        blocks = cast("list[LRUBlock]", list(self.blocks))
        for block, before in zip(blocks, state, strict=True):
            x, now = block.step(before, x)
            after.append(now)
        return x, torch.stack(after)

    def _embed(self, items: Tensor) -> Tensor:
        return self.layer_norm(self.dropout(self.item_embedding(items)))


class LRURec(SequentialRecommender):
    """LRURec behind RecBole's interface, and the retriever of PRIME."""

    train_modes = ("whole", "prefix")
    stage_names = (ONLY_STAGE,)

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        _check(config)
        self.training_rows = TrainingRows.of(config)
        self.bos_target: bool = config["bos_target"]
        self.decay_log_params: bool = config["decay_log_params"]
        self.encoder = LRUEncoder(
            self.n_items,
            config["hidden_size"],
            config["n_layers"],
            config["state_mult"],
            config["inner_size"],
            config["dropout_prob"],
            config["attn_dropout_prob"],
            (config["r_min"], config["r_max"]),
        )

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Mean loss of a whole-sequence batch, or of RecBole's rows when it has no targets list."""
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        if TARGETS in interaction:
            starts = interaction[STARTS] if self.bos_target else None
            return self.encoder.loss(item_seq, lengths, interaction[TARGETS], starts)
        hidden = self.encoder(item_seq, lengths)  # (B, D)
        return self.encoder.full_softmax(hidden, interaction[self.POS_ITEM_ID])

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """The state after each row's last item. (B, L), (B,) -> (B, D)."""
        return self.encoder(item_seq, item_seq_len)

    def states(self, item_seq: Tensor) -> Tensor:
        """The state after every item, 0 at pads. (B, L) -> (B, L, D)."""
        return self.encoder.states(item_seq)

    def scores_at(self, item_seq: Tensor, wanted: Tensor) -> Tensor:
        """Scores of all items after every wanted place, from one pass. (B, L), (B, L) -> (N, V)."""
        return self.encoder.scores(self.states(item_seq)[wanted])

    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of one item a row. Shape: (B,)."""
        hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        items = interaction[self.ITEM_ID]
        table, bias = self.encoder.item_embedding.weight, self.encoder.output_bias
        return (hidden * table[items]).sum(1) + bias[items]

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items, the pad's at 0 among them. Shape: (B, V)."""
        hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return self.encoder.scores(hidden)

    def start_state(self, rows: int = 1) -> Tensor:
        """The state before any item, for `step`. Shape: (n_layers, B, H)."""
        return self.encoder.start_state(rows)

    def step(self, state: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Scores after one more item, at a cost that does not grow with the history.

        Equal to `full_sort_predict` on the whole history as long as that is no longer than
        MAX_ITEM_LIST_LENGTH; beyond it, `full_sort_predict` sees a window of the last items while
        the state still remembers older ones (0.99**50 = 0.6 of them at the slowest initial decay).

        Args:
            state: from `start_state` or the step before. Shape: (n_layers, B, H).
            item: the new item of each row. Shape: (B,).

        Returns:
            Scores (B, V) and the next state (n_layers, B, H).
        """
        hidden, state = self.encoder.step(state, item)
        return self.encoder.scores(hidden), state

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW: biases and LayerNorms never decay, `params_log` if `decay_log_params`.

        Decay pulls nu, theta and gamma to exp(0) = 1, that is |lambda| to 0.37: a prior of quick
        forgetting, which the official code has.
        """
        free = ["bias", "layer_norm"] + ([] if self.decay_log_params else ["params_log"])
        named = dict(self.named_parameters())
        fixed = [p for name, p in named.items() if any(part in name for part in free)]
        decayed = [p for name, p in named.items() if not any(part in name for part in free)]
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": fixed, "weight_decay": 0.0},
        ]

    def enter(self, stage_name: str) -> None:
        """Nothing changes from stage to stage: there is one."""

    def make_stages(
        self, settings: Mapping[str, StageSettings], train_dataset: Any
    ) -> Sequence[Stage]:
        """The one stage of this model, on the training part of a dataset."""
        stage = RetrieverStage(
            ONLY_STAGE, self, settings[ONLY_STAGE], self.training_rows, train_dataset
        )
        return [stage]


def _check(config: Any) -> None:
    """Raises `UserError` for values that LRURec cannot work with."""
    if config["loss_type"] != "CE":
        raise UserError(
            f"loss_type is {config['loss_type']}: LRURec trains with cross entropy over all items; "
            "set loss_type: CE."
        )
    if config["train_mode"] not in LRURec.train_modes:
        raise UserError(
            f"train_mode is {config['train_mode']}: for LRURec set it to whole or prefix."
        )
    if not 0 <= config["r_min"] < config["r_max"] < 1:
        raise UserError(
            f"r_min is {config['r_min']} and r_max {config['r_max']}: they bound the initial "
            "decay, so set 0 <= r_min < r_max < 1."
        )
