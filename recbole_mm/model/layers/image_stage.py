"""The stage that trains I-LLMRec: alignment (ILA) and retrieval (IRE) on windows of sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm.data.sequences import UserSequences, epoch_plan
from recbole_mm.data.windows import Windows, draw_windows
from recbole_mm.model.layers.id_vectors import item_table, standardized
from recbole_mm.model.layers.retrieval_heads import retrieval_loss
from recbole_mm.stage import Stage, StageContext, StageSettings, UnfitWeightsError

Ints = NDArray[np.int64]
NEG_EXCLUDE = ("target", "history")
_FINGERPRINT = "text_fingerprint"
_TRIES = 20  # draws for a negative outside the history


@dataclass(frozen=True)
class ImageTuning:
    """What is trained on, and by which losses.

    Attributes:
        batch_size: users a plan entry.
        window: see `draw_windows`.
        ila_weight: of the alignment's loss; 0: there is none.
        two_stage: epochs of alignment alone that come first; after them the adaptor stays as it
            is and there is retrieval alone. 0: both at once.
        ire_reduction: ``sum`` over feature types, or ``mean``.
        n_neg: items drawn against each target.
        neg_shared: whether they are the same for all feature types.
        neg_exclude: what they never are: the ``target``, or all the ``history``.
    """

    batch_size: int
    window: str
    ila_weight: float
    two_stage: int
    ire_reduction: str
    n_neg: int
    neg_shared: bool
    neg_exclude: str

    @classmethod
    def of(cls, config: Any) -> ImageTuning:
        """What a recommender's configuration says of it."""
        keys = ("alignment_batch_size", "train_window", "ila_weight", "two_stage", "ire_reduction")
        return cls(*(config[key] for key in (*keys, "n_neg", "neg_shared", "neg_exclude")))


@dataclass(frozen=True)
class WindowBatch:
    """An entry of the plan; its questions and negatives are drawn from `seed`."""

    windows: Windows
    seed: tuple[int, int, int]
    ila: bool
    ire: bool


class ImageStage(Stage):
    """Trains adaptor, heads and what else of an `ILLMRec` is to be trained.

    Args:
        name: of the stage.
        model: an `ILLMRec`; its CF model is as the stage before left it.
        settings: how it is optimised.
        tuning: on what.
        train_dataset: the training part, with its `train_sequences`.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        settings: StageSettings,
        tuning: ImageTuning,
        train_dataset: Any,
    ) -> None:
        super().__init__(name, model.reader, settings)
        self.model, self.tuning = model, tuning
        self.sequences: UserSequences = train_dataset.train_sequences

    @torch.no_grad()
    def prepare(self, context: StageContext) -> None:
        """Takes the item table of the trained CF model; items that it never saw have zeros."""
        model = self.model
        table = item_table(model.cf, model.n_items, "cf").weight[: model.n_items].detach().clone()
        counts = np.bincount(self.sequences.items, minlength=model.n_items)
        warm = torch.from_numpy(counts > 0).to(table.device)
        scaled = standardized(table, warm) if model.standardize else table * warm[:, None]
        model.take_cf(scaled, warm)

    def plan(self, epoch: int) -> list[WindowBatch]:
        """Batches of windows of like length, one window a user."""
        seed, how = self.model.seed, self.tuning
        windows = draw_windows(self.sequences, self.model.max_history, how.window, seed, epoch)
        batches = epoch_plan(windows.lengths(), how.batch_size, seed, epoch)
        ila = self.model.aligns and (epoch < how.two_stage or not how.two_stage)
        ire = epoch >= how.two_stage or not self.model.aligns
        return [
            WindowBatch(
                Windows(windows.owner[rows], windows.begin[rows], windows.target[rows]),
                (seed, epoch, number),
                ila,
                ire,
            )
            for number, rows in enumerate(batches)
        ]

    def loss(self, batch: WindowBatch) -> Tensor:
        """Equation 7. Shape: ()."""
        model, windows = self.model, batch.windows
        model.forget()
        rng = np.random.default_rng(batch.seed)
        targets = self.sequences.items[windows.target]  # (B,)
        spans = zip(windows.begin, windows.target, strict=True)
        histories = [self.sequences.items[a:b] for a, b in spans]
        asked = model.questions(targets, rng) if batch.ila else None
        trains_adaptor = batch.ila or not self.tuning.two_stage
        states, told = model.read(histories, asked, batch.ire, trains_adaptor)
        loss = self.tuning.ila_weight * told
        if batch.ire:
            others = self.negatives(windows, targets, rng)
            loss = loss + self._retrieval(states, targets, others)
        if not loss.requires_grad:  # alignment alone, and nothing in the batch to align
            loss = loss + 0.0 * model.reader.rec.sum()
        return loss

    def _retrieval(self, states: Tensor, targets: Ints, others: Ints) -> Tensor:
        """The loss of all feature types, by their users, targets and drawn items. Shape: ()."""
        heads = self.model.reader.heads
        users = heads.users(states)  # (B, types, d_s)
        both = np.concatenate([targets, others.reshape(-1)])
        known, places = np.unique(both, return_inverse=True)
        items = self.model.project(torch.from_numpy(known))  # (n, types, d_s)
        at = torch.from_numpy(places).to(items.device)
        B, N, types = others.shape
        liked = (users * items[at[:B]]).sum(2)  # (B, types)
        drawn = at[B:].view(B, N, types)
        kinds = torch.arange(types, device=items.device)
        against = (users[:, None] * items[drawn, kinds]).sum(3)  # (B, N, types)
        return retrieval_loss(liked, against, self.tuning.ire_reduction)

    def negatives(self, windows: Windows, targets: Ints, rng: np.random.Generator) -> Ints:
        """Items for each target and feature type. Shape: (B, N, types)."""
        how, types = self.tuning, len(self.model.reader.heads.types)
        shape = (len(targets), how.n_neg, 1 if how.neg_shared else types)
        if how.neg_exclude == "target":
            drawn = rng.integers(1, self.model.n_items - 1, shape)
            drawn += drawn >= targets[:, None, None]
        else:
            tried = rng.integers(1, self.model.n_items, (*shape, _TRIES))
            drawn = tried[..., 0]
            for row, owner in enumerate(windows.owner):
                free = ~np.isin(tried[row], self.sequences[int(owner)])  # (N, types, tries)
                first = free.argmax(axis=-1)[..., None]
                drawn[row] = np.take_along_axis(tried[row], first, axis=-1)[..., 0]
        return np.broadcast_to(drawn, (*shape[:2], types))

    # --- what is saved ---------------------------------------------------------------------
    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """Trained weights only, and the mark of the texts' tokenizer."""
        mark = torch.tensor(list(bytes.fromhex(self.model.fingerprint)), dtype=torch.uint8)
        return {**{name: p.detach() for name, p in self._trained().items()}, _FINGERPRINT: mark}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Compares tokenizer, names and shapes with this one's own.

        Raises:
            UnfitWeightsError: they belong to another language model or to other features.
        """
        own = self.state()
        mark = state.get(_FINGERPRINT)
        if mark is None or not torch.equal(mark.cpu(), own[_FINGERPRINT]):
            raise UnfitWeightsError("they are of another language model or of other item texts")
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise UnfitWeightsError("they do not fit these features")

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave.

        Raises:
            UnfitWeightsError: see `check_state`.
        """
        self.check_state(state)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(state[name])
        self.model.forget()

    def finish(self, context: StageContext) -> dict[str, Any]:
        """How much is trained, and how long histories' prompts are."""
        model = self.model
        counts = {"trainable_parameters": sum(p.numel() for p in self._trained().values())}
        if "img" in model.features:
            counts["items_with_pictures"] = int(model.features["img"].known.sum())
        if model.prompts is not None:
            rows = model.histories(context.valid[torch.arange(min(1000, len(context.valid)))])
            lengths = [len(model.prompts.trunk(row.tolist())) for row in rows]
            counts["history_tokens"] = round(float(np.mean(lengths)))
        return counts
