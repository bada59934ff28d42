"""The three stages of MLLM-MSR: descriptions of items, preferences of users, and the fine-tuning of
a model that says yes or no."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_mm.data.made_texts import read_texts, write_texts
from recbole_mm.data.sequences import UserSequences, epoch_plan
from recbole_mm.model.layers.adapter_stage import AdapterStage
from recbole_mm.model.layers.ranking import PrefixSamples, item_counts
from recbole_mm.model.layers.summaries import Summaries, about
from recbole_mm.stage import Stage, StageContext, StageSettings

Ints = NDArray[np.int64]
TEXTS = "texts.jsonl"  # what a stage leaves in its folder
NEG_SOURCES = ("uniform", "popularity")


def newest_targets(sequences: UserSequences, count: int) -> PrefixSamples:
    """Each user's last `count` items as targets, with what stands before each as history."""
    first, after = sequences.offsets[:-1], sequences.offsets[1:]
    usable = after - first >= 2  # one item leaves nothing to go by
    first, after, users = first[usable], after[usable], sequences.users[usable]
    counts = np.minimum(after - first - 1, count)
    back = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return PrefixSamples(
        sequences.items,
        np.repeat(first, counts),
        np.repeat(after, counts) - 1 - back,
        np.repeat(users, counts),
    )


class Negatives:
    """Draws an item that a user did not take in training beside each target.

    Args:
        sequences: what users took in training.
        n_items: V, the pad included.
        source: ``uniform``, or ``popularity``: in proportion to 1 + the item's training count, so
            that being popular says little.
    """

    def __init__(self, sequences: UserSequences, n_items: int, source: str) -> None:
        counts = item_counts(sequences.items, n_items)
        weights = np.ones(n_items) if source == "uniform" else 1.0 + counts
        weights[0] = 0.0  # the pad
        self._upto = np.cumsum(weights)
        self._taken = {
            int(user): frozenset(sequences[row].tolist())
            for row, user in enumerate(sequences.users)
        }
        self._most = n_items - 1

    def draw(self, users: Ints, rng: np.random.Generator) -> Ints:
        """One for each of these users, who may stand there several times. (B,) -> (B,)."""
        return np.array([self._one(self._taken[int(user)], rng) for user in users], dtype=np.int64)

    def _one(self, taken: frozenset[int], rng: np.random.Generator) -> int:
        while True:
            item = int(np.searchsorted(self._upto, rng.random() * self._upto[-1], side="right"))
            if item not in taken or len(taken) >= self._most:
                return min(item, self._most)


def histories_of(rows: Interaction, model: Any) -> list[tuple[int, ...]]:
    """The newest items before each row's target, as many as are read."""
    items = rows[model.ITEM_SEQ].cpu().numpy()
    ends = rows[model.ITEM_SEQ_LEN].cpu().numpy()
    return [
        tuple(row[max(0, end - model.history_len) : end].tolist())
        for row, end in zip(items, ends, strict=True)
    ]


# --- what is made ---------------------------------------------------------------------------------


class MakingStage(Stage):
    """A stage that makes texts and trains nothing.

    Args:
        name: of the stage.
        model: an `MLLMMSR`.
        settings: `weights_from` is a run whose texts are taken.
    """

    trains = False

    def __init__(self, name: str, model: Any, settings: StageSettings) -> None:
        super().__init__(name, model.scorer, settings)
        self.model = model
        self.summaries: Summaries = model.summaries

    def given(self, context: StageContext) -> dict[tuple[int, ...], str]:
        """Texts from another run, from a file of the user's, or that this run has made already."""
        run, file = self.settings.weights_from, self.model.text_files[self.name]
        own = context.run_dir / self.name / TEXTS
        files = [
            *([("from", Path(run) / self.name / TEXTS)] if run else []),
            *([("file", Path(file))] if file else []),
            *([("from", own)] if own.is_file() else []),
        ]
        tokens, dataset = self.model.item_tokens, self.model.dataset_name
        found: dict[tuple[int, ...], str] = {}
        for kind, path in files:
            found |= read_texts(path, tokens, dataset, f"{self.name}_{kind}")
        return found

    def made(self) -> dict[tuple[int, ...], str]:
        """What there is now."""
        raise NotImplementedError  # pragma: no cover

    def finish(self, context: StageContext) -> dict[str, Any]:
        """Leaves the texts in the run's folder."""
        made = self.made()
        if made:
            path = context.run_dir / self.name / TEXTS
            write_texts(path, made, self.model.item_tokens, self.model.dataset_name)
        self.summaries.release()
        return about(self.summaries)


class ItemSummaryStage(MakingStage):
    """Describes every item."""

    def prepare(self, context: StageContext) -> None:
        """Takes what is given and makes the rest."""
        self.summaries.descriptions |= {
            items[0]: text for items, text in self.given(context).items() if len(items) == 1
        }
        if self.summaries.settings.pref_mode != "none":
            self.summaries.describe(range(1, self.model.n_items), context.show_progress)

    def made(self) -> dict[tuple[int, ...], str]:
        return {(item,): text for item, text in self.summaries.descriptions.items()}


class UserSummaryStage(MakingStage):
    """Describes what users prefer, from each history that is asked about later."""

    def __init__(
        self, name: str, model: Any, settings: StageSettings, samples: PrefixSamples
    ) -> None:
        super().__init__(name, model, settings)
        self.samples = samples

    def prepare(self, context: StageContext) -> None:
        """Takes what is given and makes the rest, of training, validation and test together."""
        self.summaries.preferences |= self.given(context)
        wanted = [self.model.sample_history(self.samples, row) for row in range(len(self.samples))]
        for rows in (context.valid, context.test):
            wanted += [] if rows is None else histories_of(rows, self.model)
        self.summaries.prefer(wanted, context.show_progress)

    def made(self) -> dict[tuple[int, ...], str]:
        return self.summaries.preferences


# --- what is trained ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SftBatch:
    """An entry of the plan; the negatives of its samples are drawn from `seed`."""

    samples: Ints
    seed: tuple[int, int, int]


class SftStage(AdapterStage):
    """Trains the model to say yes to what a user took next, and no to something else.

    Args:
        name: of the stage.
        model: an `MLLMMSR`.
        settings: how.
        samples: histories and targets.
        sequences: what users took in training.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        settings: StageSettings,
        samples: PrefixSamples,
        sequences: UserSequences,
    ) -> None:
        super().__init__(name, model.scorer, settings)
        self.model, self.samples = model, samples
        self.negatives = Negatives(sequences, model.n_items, model.neg_source)

    def prepare(self, context: StageContext) -> None:
        """A frozen vision tower encodes every picture now, and never again."""
        self.model.summaries.release()  # a model that was lent is about to be trained
        if self.model.use_candidate_image:
            self.model.scorer.encode_pictures(range(1, self.model.n_items), context.show_progress)

    def plan(self, epoch: int) -> list[SftBatch]:
        """Batches of samples with histories of like length."""
        seen = np.minimum(self.samples.end - self.samples.begin, self.model.history_len)
        batches = epoch_plan(seen, self.model.sft_batch_size, self.model.seed, epoch)
        return [
            SftBatch(samples, (self.model.seed, epoch, number))
            for number, samples in enumerate(batches)
        ]

    def loss(self, batch: SftBatch) -> Tensor:
        """Mean cross entropy of the answers to as many targets as negatives. Shape: ()."""
        model = self.model
        model.forget()
        rng = np.random.default_rng(batch.seed)
        targets = self.samples.labels(batch.samples)
        others = self.negatives.draw(self.samples.users[batch.samples], rng)
        histories = [model.sample_history(self.samples, row) for row in batch.samples]
        prompts = [
            model.prompt(history, int(item))
            for items in (targets, others)
            for history, item in zip(histories, items, strict=True)
        ]
        is_yes = np.arange(len(prompts)) < len(targets)
        loss: Tensor = model.scorer.loss(prompts, is_yes)
        return loss

    def finish(self, context: StageContext) -> dict[str, Any]:
        """How many questions there were to learn from."""
        trained = sum(p.numel() for p in self._trained().values())
        return {"samples": len(self.samples), "trainable_parameters": trained}
