"""The stage that tunes an alignment of ID vectors with a language model (RA-Rec, section 3.3)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm.data.construction import construct
from recbole_mm.data.sequences import UserSequences, epoch_plan
from recbole_mm.errors import UserError
from recbole_mm.model.layers.alignment import bpr, distillation, in_batch_softmax, info_nce
from recbole_mm.model.layers.id_vectors import IdVectors
from recbole_mm.model.layers.preference import draw_sets
from recbole_mm.model.layers.ranking import choose_alpha
from recbole_mm.stage import Stage, StageContext, StageSettings, UnfitWeightsError, seeded_rows

Ints = NDArray[np.int64]
MANIFEST = "samples.json"
_TO_SCALE = 20_000  # histories that means and deviations are taken from
_TO_FUSE = 1_000  # validation users that the weight of `fusion` is chosen on
_TEXTS, _IDS = "text_fingerprint", "id_fingerprint"


@dataclass(frozen=True)
class TuningSettings:
    """What the alignment is tuned on and by.

    Attributes:
        data_mode: which samples, see `recbole_mm.data.construction`.
        n_samples: how many.
        n_buckets: quantiles of history length and of popularity.
        allow_repeats: whether denoising keeps a target that is in its own history.
        batch_size: samples a plan entry.
        align_weight: lambda of equation 16.
        temperature: tau of equations 14 and 15.
        negatives: ``uniform``: one item a sample (equation 13); ``in_batch``: the batch's others.
        id_scale: root mean square of an entry of the ID vectors.
        distill: weight of the ID model's own distribution, with ``in_batch``.
        distill_items: items a sample that are drawn from it, and stand beside the batch's.
    """

    data_mode: str
    n_samples: int
    n_buckets: tuple[int, int]
    allow_repeats: bool
    batch_size: int
    align_weight: float
    temperature: float
    negatives: str
    id_scale: float
    distill: float
    distill_items: int


@dataclass(frozen=True)
class TuningBatch:
    """An entry of the plan; its negatives are drawn from `seed`."""

    samples: Ints
    seed: tuple[int, int, int]


@dataclass(frozen=True)
class _Read:
    """A batch and its scores: texts and ID vectors of B users and of the n items."""

    rows: Ints  # (B,)
    texts: list[Ints]
    u: Tensor  # (B, D)
    known: Ints  # (n,)
    item_texts: list[Ints]
    i: Tensor  # (n, D)
    scores: Tensor  # (B, n)
    columns: Ints  # of the items that followed, then of those drawn. (B,) or (2B,)


def _none_left(mode: str, manifest: Mapping[str, Any]) -> str:
    """Why there is no sample."""
    if not manifest["positions"]:
        return (
            "Stage alignment: no user has two items to train on, a history and what followed: take "
            "other data, or --stages=id_model."
        )
    return (
        f"data_mode is {mode}, but none of {manifest['positions']} training positions has an item "
        "whose text shares a word with its history: set data_mode to random or all, or attributes "
        "to columns that say more."
    )


class AlignmentStage(Stage):
    """Tunes the alignment, and the language model where that is asked for.

    Args:
        name: of the stage.
        model: an `RARec`; its ID model is as the stage before left it.
        settings: how it is optimised.
        tuning: on what.
        train_dataset: the training part, with its `train_sequences`.

    Raises:
        UserError: there is no sample to tune on.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        settings: StageSettings,
        tuning: TuningSettings,
        train_dataset: Any,
    ) -> None:
        super().__init__(name, model.aligned, settings)
        self.model, self.tuning = model, tuning
        self.sequences: UserSequences = train_dataset.train_sequences
        self.samples, self.manifest = construct(
            self.sequences,
            model.titles,
            tuning.data_mode,
            tuning.n_samples,
            model.seed,
            tuning.n_buckets,
            tuning.allow_repeats,
        )
        if not len(self.samples):
            raise UserError(_none_left(tuning.data_mode, self.manifest))
        counts = np.bincount(self.sequences.items, minlength=model.n_items)
        self._show_progress = False
        self._warm = torch.from_numpy(counts > 0)
        self._log_share = torch.from_numpy(np.log(counts.clip(min=1) / counts.sum()))

    def prepare(self, context: StageContext) -> None:
        """Scales the ID vectors."""
        ids = IdVectors(self.model.id_model, self._warm, self.tuning.id_scale)
        some = seeded_rows(len(self.samples), _TO_SCALE, context.seed)
        rows = np.arange(len(self.samples)) if some is None else some.numpy()
        ids.fit([self._history(int(row)) for row in rows])
        self.model.take_ids(ids)
        path = context.run_dir / MANIFEST
        path.write_text(json.dumps(self.manifest, indent=1) + "\n", encoding="utf-8")
        self._show_progress = context.show_progress
        self._tell_cut()

    def _tell_cut(self) -> None:
        """Says how many items have a text that is longer than what is read of it."""
        read, n_items = self.model.texts, self.model.n_items
        for item in range(1, n_items):
            read.item(item)
        if read.cut:
            getLogger().warning(
                f"{len(read.cut)} of {n_items - 1} items have a text of more than "
                f"{read.max_item_tokens} tokens, which is cut: raise max_item_tokens to read all."
            )

    @property
    def _contrasts(self) -> bool:
        return self.tuning.align_weight > 0 and bool(self.model.aligned.contrasts)

    def _history(self, row: int) -> Ints:
        """The newest items before a sample's target, oldest first."""
        place = int(self.samples.place[row])
        length = min(int(self.samples.length[row]), self.model.max_seq_length)
        return self.sequences.items[place - length : place]

    def param_groups(self) -> list[dict[str, Any]]:
        """Biases and norms of a trained language model never decay; the alignment does (lambda of
        equation 13)."""
        trained = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        fixed = [p for n, p in trained if p.ndim <= 1 and n.startswith("language_model")]
        known = set(map(id, fixed))
        return [
            {"params": [p for _, p in trained if id(p) not in known]},
            {"params": fixed, "weight_decay": 0.0},
        ]

    def plan(self, epoch: int) -> list[TuningBatch]:
        """Batches of samples with histories of like length, which have texts of like length."""
        if self._contrasts:
            self._fill_states()
        lengths = np.minimum(self.samples.length, self.model.max_seq_length)
        batches = epoch_plan(lengths, self.tuning.batch_size, self.model.seed, epoch)
        return [
            TuningBatch(batch, (self.model.seed, epoch, number))
            for number, batch in enumerate(batches)
        ]

    def _fill_states(self) -> None:
        """Computes every frozen text state once; what is kept already costs nothing."""
        read = self.model.texts
        texts = [read.history(self._history(row)) for row in range(len(self.samples))]
        items = [read.item(item) for item in range(1, self.model.n_items)]
        self.model.text_states.fill([*texts, *items], self._show_progress)

    def loss(self, batch: TuningBatch) -> Tensor:
        """Equation 16. Shape: ()."""
        self.model.forget()
        read = self._read(batch)
        loss = self._ranking(read)
        if not self._contrasts:
            return loss
        owners = self.sequences.users[self.samples.owner[read.rows]]
        return loss + self.tuning.align_weight * (
            self._contrast("user", read.u, read.texts, torch.from_numpy(owners))
            + self._contrast("item", read.i, read.item_texts, torch.from_numpy(read.known))
        )

    def _read(self, batch: TuningBatch) -> _Read:
        """One forward pass over the users and the items of a batch, equal items once."""
        model, rows = self.model, batch.samples
        items = self.sequences.items[self.samples.place[rows]]  # (B,)
        if self.tuning.negatives == "uniform":
            drawn = self._negatives(rows, np.random.default_rng(batch.seed))
            items = np.concatenate([items, drawn])  # (2B,)
        histories = [self._history(row) for row in rows]
        texts = [model.texts.history(history) for history in histories]
        u = model.ids.users(histories)  # (B, D)
        known = np.unique(np.concatenate([items, self._favourites(u, batch.seed)]))
        columns = np.searchsorted(known, items)
        item_texts = [model.texts.item(item) for item in known.tolist()]
        i = model.item_ids[torch.from_numpy(known).to(u.device)]  # (n, D)
        users, found = model.aligned.users(texts, u), model.aligned.items(item_texts, i)
        scores = users @ found.T * model.aligned.scale  # (B, n)
        return _Read(rows, texts, u, known, item_texts, i, scores, columns)

    def _ranking(self, read: _Read) -> Tensor:
        """Equation 13, or a softmax over all that the forward pass has read. Shape: ()."""
        columns = torch.from_numpy(read.columns).to(read.scores.device)
        if self.tuning.negatives == "uniform":
            return bpr(*read.scores.gather(1, columns.view(2, -1).T).T)
        items, owners = read.known[read.columns], self.samples.owner[read.rows]  # (B,)
        taken = np.stack([np.isin(items, self.sequences[int(owner)]) for owner in owners])
        log_share = self._log_share[torch.from_numpy(items)].to(read.scores)
        scores = read.scores[:, columns]  # (B, B)
        loss = in_batch_softmax(scores, log_share, torch.from_numpy(taken).to(scores.device))
        weight = self.tuning.distill
        if not weight:
            return loss
        teacher = self.model.ids.scores(read.u, read.i)  # (B, n)
        return (1 - weight) * loss + weight * distillation(read.scores, teacher)

    def _favourites(self, u: Tensor, seed: tuple[int, int, int]) -> Ints:
        """What the ID model would recommend these users, drawn from its own distribution: items on
        which batches, whose items are anybody's, tell little. Shape: (n,)."""
        if not self.tuning.distill:
            return np.empty(0, dtype=np.int64)
        scores = self.model.ids.scores(u, self.model.item_ids)  # (B, V)
        warm = scores.masked_fill(~self._warm.to(scores.device), -torch.inf)
        count = min(self.tuning.distill_items, int(self._warm.sum()))
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        return draw_sets(warm, count, 1, generator).flatten().numpy(force=True)

    def _contrast(self, side: str, vectors: Tensor, texts: list[Ints], ids: Tensor) -> Tensor:
        """Equation 14 or 15. Shape: ()."""
        projected = self.model.aligned.sides[side].project(vectors)  # (N, B, H)
        states = self.model.text_states.get(texts).to(projected)  # (N, B, H)
        return info_nce(projected, states, ids.to(projected.device), self.tuning.temperature)

    def _negatives(self, rows: Ints, rng: np.random.Generator) -> Ints:
        """An item for each sample that its user never took in training; any, of one who took
        nearly all. Shape: (B,)."""
        drawn = rng.integers(1, self.model.n_items, (len(rows), 20))  # (B, 20)
        for row, owner in enumerate(self.samples.owner[rows]):
            free = ~np.isin(drawn[row], self.sequences[int(owner)])
            drawn[row, 0] = drawn[row, free.argmax()]
        return drawn[:, 0]

    def _trained(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    # --- what is saved ---------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """Trained weights only, and marks of what they belong to: tokenizer, frozen language model,
        ID vectors."""
        ids = self.model.ids.fingerprint() if self.model.aligned.use_id else ""
        return {**self._own(), _IDS: _mark(ids)}

    def _own(self) -> dict[str, Tensor]:
        """What of the state does not depend on the ID model."""
        trained = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
        model = self.model.aligned.language_model
        frozen = "" if self.model.aligned.trains_model else model.version
        return {**trained, _TEXTS: _mark(model.fingerprint + frozen)}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Compares the language model, names and shapes; the ID model may not be there yet.

        Raises:
            UnfitWeightsError: they belong to another language model or another alignment.
        """
        own = self._own()
        if not _same(state.get(_TEXTS), own[_TEXTS]):
            raise UnfitWeightsError("they are of another language model or of other item texts")
        theirs = {k: v.shape for k, v in state.items() if k != _IDS}
        if theirs != {k: v.shape for k, v in own.items()}:
            raise UnfitWeightsError("they do not fit this alignment")

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave.

        Raises:
            UnfitWeightsError: they belong to another language model, another ID model or another
                alignment.
        """
        self.check_state(state)
        own = self.state()
        if not _same(state.get(_IDS), own[_IDS]):
            raise UnfitWeightsError(
                "they were aligned with an ID model of other weights or with another id_scale"
            )
        parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for name in own.keys() - {_TEXTS, _IDS}:
                parameters[name].copy_(state[name])
        self.model.forget()

    # --- fusion ----------------------------------------------------------------------------
    @torch.no_grad()
    def finish(self, context: StageContext) -> dict[str, Any]:
        """Chooses the weight of the ID model's scores in `fusion` on validation users."""
        model = self.model
        some = seeded_rows(len(context.valid), _TO_FUSE, context.seed)
        rows = torch.arange(len(context.valid)) if some is None else some
        ours, theirs, targets = [], [], []
        for part in rows.split(256):
            batch = context.valid[part].to(model.device)
            ours.append(model.standard_scores(batch, "alignment").cpu())
            theirs.append(model.standard_scores(batch, "id_model").cpu())
            targets.append(batch[model.ITEM_ID].cpu())
        model.alpha, tried = choose_alpha(torch.cat(ours), torch.cat(theirs), torch.cat(targets))
        return {
            "trainable_parameters": sum(p.numel() for p in self._trained()),
            "fusion_alpha": str(model.alpha),
            "fusion_ndcg@10": {str(alpha): round(value, 6) for alpha, value in tried.items()},
            "samples": self.manifest,
            "cut_texts": len(self.model.texts.cut),
        }

    def restore(self, finished: Mapping[str, Any]) -> None:
        """Takes back the weight of the ID model's scores."""
        self.model.alpha = float(finished.get("fusion_alpha", 0.0))


def _mark(said: str) -> Tensor:
    """SHA-256 of a text as numbers, to be kept among weights. Shape: (32,)."""
    return torch.tensor(list(hashlib.sha256(said.encode()).digest()), dtype=torch.uint8)


def _same(mark: Tensor | None, own: Tensor) -> bool:
    return mark is not None and torch.equal(mark.cpu(), own)
