"""RecBole's models mended, each under its own name: types, stages in one run, whole resumes.

`SASRec`, `GRU4Rec` and `BERT4Rec` are also offered `train_mode: whole`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model import general_recommender as general
from recbole.model import knowledge_aware_recommender as knowledge
from recbole.model import sequential_recommender as sequential
from recbole.model.loss import BPRLoss
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_mm.data.sequences import TARGETS
from recbole_mm.errors import UserError


# --- whole sequences -----------------------------------------------------------------------------
class WholeSequences:
    """Trains a causal model on a row a user: the loss of all its prefixes from one forward pass.

    For RecBole's models whose `forward` ends with `gather_indexes` of the last state and whose
    scores are dot products with ``item_embedding``. Logits are computed at valid targets alone.
    """

    train_modes = ("prefix", "whole")
    forward: Any
    item_embedding: nn.Embedding
    ITEM_SEQ: str

    def gather_indexes(self, output: Tensor, gather_index: Tensor) -> Tensor:
        """RecBole's, and with an index of shape (B, n) the states at n places. Shape: (B, n, D)."""
        if gather_index.dim() == 1:
            return super().gather_indexes(output, gather_index)  # type: ignore[misc]
        return output.take_along_dim(gather_index[..., None], dim=1)  # (B, n, D)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Mean cross entropy over the targets of a whole-sequence batch, or RecBole's loss."""
        if TARGETS not in interaction:
            return super().calculate_loss(interaction)  # type: ignore[misc]
        targets = interaction[TARGETS]  # (B, L)
        valid = targets > 0
        return F.cross_entropy(self.scores_at(interaction[self.ITEM_SEQ], valid), targets[valid])

    def scores_at(self, item_seq: Tensor, wanted: Tensor) -> Tensor:
        """Scores of all items after every wanted place, from one pass. (B, L), (B, L) -> (N, V)."""
        lengths = torch.arange(1, item_seq.shape[1] + 1, device=item_seq.device)
        every = self.forward(item_seq, lengths.expand_as(item_seq))  # (B, L, D)
        return every[wanted] @ self.item_embedding.weight.T


class SASRec(WholeSequences, sequential.SASRec):
    """Kang and McAuley, Self-attentive sequential recommendation, ICDM 2018."""


class GRU4Rec(WholeSequences, sequential.GRU4Rec):
    """Tan et al., Improved recurrent neural networks for session-based recommendation, 2016."""


class BERT4Rec(sequential.BERT4Rec):
    """Sun et al., BERT4Rec, CIKM 2019; in ``train_mode: whole`` a row is a user, as in the paper.

    RecBole masks every prefix of a user anew, and never the user's last training item.
    """

    train_modes = ("prefix", "whole")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.ft_ratio: float = config["ft_ratio"]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Mean cross entropy over the masked items of a whole-sequence batch, or RecBole's loss."""
        if TARGETS not in interaction:
            return super().calculate_loss(interaction)
        first = interaction[self.ITEM_SEQ][:, :1]
        sequence = torch.cat([first, interaction[TARGETS]], dim=1)  # (B, L)
        if sequence.shape[1] > self.max_seq_length:  # a row of one more than there are positions
            full = sequence[:, -1:] > 0
            sequence = torch.where(full, sequence[:, 1:], sequence[:, :-1])
        masked = self.masked_places(sequence)
        states = self.forward(sequence.masked_fill(masked, self.mask_token))  # (B, L, D)
        items = self.item_embedding.weight[: self.n_items]  # (V, D)
        logits = states[masked] @ items.T + self.output_bias  # (N, V)
        return F.cross_entropy(logits, sequence[masked])

    def masked_places(self, sequence: Tensor) -> Tensor:
        """Each item with chance ``mask_ratio``; ``ft_ratio`` of the rows and bare ones: the last.

        Args:
            sequence: item ids, right-padded with 0. Shape: (B, L).

        Returns:
            Whether a place is masked. Shape: (B, L), bool.
        """
        filled = sequence > 0
        last = filled & (filled.cumsum(dim=1) == filled.sum(dim=1, keepdim=True))
        drawn = filled & (torch.rand(sequence.shape, device=sequence.device) < self.mask_ratio)
        tuning = torch.rand(len(sequence), 1, device=sequence.device) < self.ft_ratio  # (B, 1)
        return torch.where(tuning | ~drawn.any(dim=1, keepdim=True), last, drawn)


# --- types ---------------------------------------------------------------------------------------
class KSR(sequential.KSR):
    """Huang et al., Knowledge-enhanced memory networks, SIGIR 2018; in single precision."""

    relation_Matrix: Tensor  # noqa: N815 (RecBole's name)

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.relation_Matrix = self.relation_Matrix.float()


# --- counts --------------------------------------------------------------------------------------
class Pop(general.Pop):
    """Scores by how often an item was taken in training, which each interaction counts for.

    RecBole counts an item once a batch, and the sampled negatives of the batch with it.
    """

    max_cnt: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.LABEL: str = config["LABEL_FIELD"]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Counts a batch; there is nothing to learn. Shape: (1,)."""
        items = interaction[self.ITEM_ID]
        taken = interaction[self.LABEL] if self.LABEL in interaction else torch.ones_like(items)
        self.item_cnt.index_add_(0, items, taken.long()[:, None])
        self.max_cnt = self.item_cnt.max(dim=0).values
        return nn.Parameter(torch.zeros(1, device=self.device))


# --- chance --------------------------------------------------------------------------------------
class Random(general.random.Random):
    """Scores by chance, but a user's are the same each time: a loaded run gives its result."""

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.seed: int = config["seed"]

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Uniform scores. Shape: (B * V,)."""
        return torch.cat([self._scores(user) for user in interaction[self.USER_ID].tolist()])

    def predict(self, interaction: Interaction) -> Tensor:
        """The scores of (user, item) pairs. Shape: (B,)."""
        users, items = interaction[self.USER_ID], interaction[self.ITEM_ID]
        table = {user: self._scores(user) for user in users.unique().tolist()}
        scores = [table[u][i] for u, i in zip(users.tolist(), items.tolist(), strict=True)]
        return torch.stack(scores)

    def _scores(self, user: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + user)
        return torch.rand(self.n_items, generator=generator).to(self.device)  # (V,)


# --- several stages in one run -------------------------------------------------------------------
def _first_stage_config(config: Any, name: str) -> Any:
    """Checks that the user leaves the stages to the run."""
    if config["pre_model_path"] or config["train_stage"] != name:
        model = config["model"]
        raise UserError(
            f"{model} runs all its stages in one command: leave train_stage and pre_model_path out."
        )
    return config


class S3Rec(sequential.S3Rec):
    """Zhou et al., S3-Rec, CIKM 2020: pre-training and fine-tuning in one run.

    ``epochs`` caps both stages, ``pretrain_epochs`` the first.
    """

    stage_names = ("pretrain", "finetune")
    loss_fct: nn.Module

    def __init__(self, config: Any, dataset: Any) -> None:
        attribute = config["item_attribute"]
        if attribute not in dataset.field2type:
            raise UserError(
                f"S3Rec pre-trains on the item column '{attribute}', which is not loaded: name one "
                "with item_attribute and load it with load_col."
            )
        super().__init__(_first_stage_config(config, "pretrain"), dataset)

    def enter(self, stage: str) -> None:
        """Chooses the loss of a stage."""
        self.train_stage = stage
        if stage == "pretrain":
            self.loss_fct = nn.BCEWithLogitsLoss(reduction="none")
        else:
            self.loss_fct = BPRLoss() if self.loss_type == "BPR" else nn.CrossEntropyLoss()


# --- whole resumes: what training changes beside the weights -------------------------------------
class _Counters:
    """Keeps counters that RecBole holds in plain attributes with the checkpoint."""

    counters: tuple[str, ...] = ()

    def other_parameter(self) -> dict[str, Any]:
        """RecBole's extra attributes and the counters, as tensors."""
        mine = {name: torch.tensor(getattr(self, name)) for name in self.counters}
        return {**super().other_parameter(), **mine}  # type: ignore[misc]

    def load_other_parameter(self, para: Mapping[str, Any] | None) -> None:
        """Takes back what `other_parameter` gave."""
        numbers = {k: v.item() for k, v in (para or {}).items() if k in self.counters}
        super().load_other_parameter({**(para or {}), **numbers})  # type: ignore[misc]


class MultiVAE(_Counters, general.MultiVAE):
    """Liang et al., Variational autoencoders for collaborative filtering, WWW 2018."""

    counters = ("update",)  # steps so far, which anneal the KL term


class MacridVAE(_Counters, general.MacridVAE):
    """Ma et al., Learning disentangled representations, NeurIPS 2019."""

    counters = ("update",)


class RaCT(_Counters, general.RaCT):
    """Lobel et al., RaCT, ICLR 2020: actor, critic and both together, in one run.

    ``epochs`` caps each of the three stages, ``pretrain_epochs`` the first two.
    """

    counters = ("update",)
    stage_names = ("actor_pretrain", "critic_pretrain", "finetune")
    metrics_k: int

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(_first_stage_config(config, "actor_pretrain"), dataset)
        self.metrics_k = min(self.metrics_k, self.n_items)  # RecBole's stops on small catalogues

    def enter(self, stage: str) -> None:
        """Chooses the loss of a stage and what it trains."""
        self.train_stage = stage
        critic = stage == "critic_pretrain"
        for name, parameter in self.named_parameters():
            parameter.requires_grad = name.startswith("critic_net") == critic


class RippleNet(knowledge.RippleNet):
    """Wang et al., RippleNet, CIKM 2018; its sampled ripple sets are drawn again from the seed."""

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.other_parameter_name: list[str] = []  # RecBole pickles the sets


class DiffRec(general.DiffRec):
    """Wang et al., Diffusion recommender model, SIGIR 2023."""

    other_parameter_name = ("Lt_history", "Lt_count")  # past losses, which choose the steps


class LDiffRec(_Counters, general.LDiffRec):
    """Wang et al., Diffusion recommender model, SIGIR 2023, in a latent space."""

    counters = ("update_count", "update_count_vae")
    other_parameter_name = ("Lt_history", "Lt_count")
