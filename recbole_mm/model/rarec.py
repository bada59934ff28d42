"""RA-Rec: the vectors of a trained ID model as prefixes in every layer of a frozen language model.

Paper: Yu et al., "RA-Rec: An Efficient ID Representation Alignment Framework for LLM-based
Recommendation", 2024 (https://arxiv.org/abs/2402.04527). There is no official code.

Differs from the paper:
- Equation 13 is minimised, 14 and 15 contrast pairs with the others of the batch, and equal users
  or items are no negatives of each other; as printed neither would train anything.
- Contrasted are the projected vector p and the mean text state that enters the layer; the paper
  leaves open what is pooled.
- A user's ID vector is that of the sample's own history, never of a later one.
- ID vectors are scaled, each side by one number, so that an alignment does not depend on the ID
  model's scale; both sides' projectors begin alike, so that their product is near the ID model's.
- ``negatives: in_batch``, the default: a softmax over the batch instead of equation 13's one other.
  Half of the loss is to meet the ID model's own distribution over these and items that it likes
  (``distill``).
- An ID model's bias an item is one more dimension of its vectors.
- Trained are 1,216,512 parameters at the paper's sizes (its 18,432 are the instructions alone).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_mm.data.construction import MODES
from recbole_mm.data.content import ItemContent
from recbole_mm.errors import UserError
from recbole_mm.model.layers.aligned_model import AlignedModel, AlignmentSettings
from recbole_mm.model.layers.alignment_stage import AlignmentStage, TuningSettings
from recbole_mm.model.layers.id_vectors import IdVectors, item_scorer
from recbole_mm.model.layers.kept_vectors import KeptVectors
from recbole_mm.model.layers.ranking import fuse
from recbole_mm.model.layers.retriever_stage import RetrieverStage, TrainingRows
from recbole_mm.registry import get_model
from recbole_mm.stage import Readout, Stage, StageSettings

Ints = NDArray[np.int64]
INJECT = ("prefix", "inputs", "project_inputs", "concatenate")
NEGATIVES = ("in_batch", "uniform")
TUNE = ("alignment", "both", "language_model")
SCORE_NORMS = ("none", "cosine")


class RARec(SequentialRecommender):
    """RA-Rec behind RecBole's interface; see the module's head.

    Attributes:
        id_model: any sequential model whose scores are products of vectors.
        aligned: the language model with the alignment.
        active: whose scores are read: ``id_model``, ``alignment``, or ``fusion`` of both.
        alpha: weight of the ID model's scores in ``fusion``.
        backbone_name: for the result.
    """

    inner_model = "id_model"  # the key that names it; its YAML stands below this one's
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "inject": INJECT,
        "projector": ("per_layer", "shared"),
        "tune": TUNE,
        "data_mode": MODES,
        "score_norm": SCORE_NORMS,
        "negatives": NEGATIVES,
    }
    bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "n_instructions": (0, inf),
        "n_samples": (1, inf),
        "temperature": (1e-3, inf),
        "id_scale": (1e-3, inf),
        "distill": (0, 1),
        "distill_items": (0, inf),
        "align_weight": (0, inf),
        "max_user_tokens": (1, inf),
        "max_item_tokens": (1, inf),
        "score_tokens": (1, inf),
    }
    stage_names = ("id_model", "alignment")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        _check(config)
        self.seed: int = config["seed"]
        self.active = "id_model"
        self.alpha = 0.0
        self.training_rows = TrainingRows.of(config)
        self.id_model: Any = get_model(config["id_model"])(config, dataset)
        id_size = _id_size(self.id_model, self.n_items)  # told before it is trained, too
        self.tuning = _tuning(config)
        self.ids: IdVectors
        self._items: Tensor | None = None
        self._users_kept = KeptVectors()
        self._item_ids: Tensor | None = None
        self.aligned: AlignedModel | None = None
        self.backbone_name: str | None = None
        if list(config["stages"] or self.stage_names) != ["id_model"]:
            self._build(config, dataset, id_size)

    def _build(self, config: Any, dataset: Any, id_size: int) -> None:
        """The language model and what it reads."""
        from recbole_mm.backbone.text_model import TextModelSpec, load_text_model
        from recbole_mm.backbone.text_states import TextStates
        from recbole_mm.backbone.texts import ItemTexts

        content = ItemContent(Path(config["data_path"]), config["dataset"], dataset.item_tokens())
        attributes = _attributes(config, content)
        self.titles = [_text(content, item, attributes) for item in range(self.n_items)]
        own = {} if config["dtype"] is None else {"dtype": config["dtype"]}
        spec = TextModelSpec.from_mapping({**config["backbone_spec"], **own})
        known = [title for title in self.titles if title]
        model = load_text_model(spec, known, [config["task"]], self.seed)
        self.backbone_name = model.name
        self.aligned = AlignedModel(model, id_size, _alignment(config))
        self.texts = ItemTexts(
            model,
            lambda item: self.titles[item],
            config["task"],
            config["max_user_tokens"],
            config["max_item_tokens"],
        )
        frozen = config["tune"] == "alignment"
        self.text_states = TextStates(model, Path(config["cache_dir"]), frozen)

    # --- stages ----------------------------------------------------------------------
    def enter(self, stage_name: str) -> None:
        """Scores are now those of this stage."""
        self.active = stage_name

    def make_stages(self, settings: Mapping[str, StageSettings], train_dataset: Any) -> list[Stage]:
        """The stages in order, on the training part of a dataset."""
        stages: list[Stage] = [
            RetrieverStage(
                "id_model", self.id_model, settings["id_model"], self.training_rows, train_dataset
            )
        ]
        if self.aligned is not None:
            how = settings["alignment"]
            stages.append(AlignmentStage("alignment", self, how, self.tuning, train_dataset))
        return stages

    def readouts(self, last_stage: str) -> list[Readout]:
        """The rows of the result, once the stages up to `last_stage` are in place."""
        if last_stage == "id_model":
            return [Readout("id_model", lambda: self.enter("id_model"))]
        alpha = self.alpha if self.alpha != inf else "inf"
        return [
            Readout("id_model", lambda: self.enter("id_model"), chosen=False),
            Readout("alignment", lambda: self.enter("alignment")),
            Readout("fusion", lambda: self.enter("fusion"), False, {"fusion_alpha": alpha}),
        ]

    def take_ids(self, ids: IdVectors) -> None:
        """The vectors of the trained ID model are these."""
        self.ids = ids
        self._item_ids = None
        self.forget()

    @property
    def item_ids(self) -> Tensor:
        """Scaled ID vectors of all items. Shape: (V, D)."""
        if self._item_ids is None:
            self._item_ids = self.ids.items()
        return self._item_ids

    def forget(self) -> None:
        """To be called when weights have changed: users and items are encoded once as long as they
        have not."""
        self._items = None
        self._users_kept.forget()

    # --- scores ----------------------------------------------------------------------
    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items. Shape: (B, V)."""
        if self.active != "fusion":
            return self._scores(interaction, self.active)
        ours, theirs = (self.standard_scores(interaction, s) for s in ("alignment", "id_model"))
        return fuse(ours, theirs, self.alpha)

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of one item a row. Shape: (B,)."""
        items = interaction[self.ITEM_ID]
        return self.full_sort_predict(interaction).gather(1, items[:, None])[:, 0]

    def standard_scores(self, interaction: Interaction, source: str) -> Tensor:
        """Scores with mean 0 and deviation 1 in every row, as `fusion` adds them. Shape: (B, V)."""
        scores = self._scores(interaction, source)
        rest = scores[:, 1:]  # but for the pad
        deviation = rest.std(dim=1, keepdim=True).clamp(min=1e-9)
        return (scores - rest.mean(dim=1, keepdim=True)) / deviation

    def _scores(self, interaction: Interaction, source: str) -> Tensor:
        if source == "id_model":
            found: Tensor = self.id_model.full_sort_predict(interaction)
            return found.view(len(interaction), -1)
        return self._users(interaction) @ self._item_vectors().T  # (B, V)

    def _users(self, interaction: Interaction) -> Tensor:
        """A vector for each row; equal histories are read once, until weights change. (B, H)"""
        items = interaction[self.ITEM_SEQ].cpu().numpy()
        ends = interaction[self.ITEM_SEQ_LEN].cpu().numpy()
        rows = [row[:end] for row, end in zip(items, ends, strict=True)]
        return self._users_kept.of(rows, self._encoded)

    def _encoded(self, histories: list[Ints]) -> Tensor:
        texts = [self.texts.history(history) for history in histories]
        return self._aligned().users(texts, self.ids.users(histories))

    def _item_vectors(self) -> Tensor:
        """Of all items, the pad's of its empty text. Shape: (V, H)."""
        if self._items is None:
            texts = [self.texts.item(item) for item in range(self.n_items)]
            self._items = self._aligned().items(texts, self.item_ids)
        return self._items

    def _aligned(self) -> AlignedModel:
        if self.aligned is None:
            raise UserError("stages is 'id_model' alone: add alignment to stages.")
        return self.aligned


def _check(config: Any) -> None:
    """Raises `UserError` for keys that leave nothing to align, or to align by."""
    buckets = config["n_buckets"]
    if len(buckets) != 2 or not all(type(n) is int and n >= 1 for n in buckets):
        raise UserError(
            "n_buckets: expected two whole numbers above 0, quantiles of history length and of "
            f"popularity, such as [10, 10], got {buckets}."
        )
    if not config["use_id"] and (config["inject"] != "prefix" or config["n_instructions"] == 0):
        raise UserError(
            "use_id is False: without ID vectors there is only inject: prefix with n_instructions "
            "of 1 or more."
        )
    if config["distill"] and config["negatives"] == "uniform":
        raise UserError(
            "distill needs a batch's items to spread over: set negatives: in_batch, or distill: 0."
        )
    if config["inject"] == "concatenate" and config["tune"] != "alignment":
        raise UserError(
            "inject: concatenate reads vectors of a frozen language model: set tune to alignment."
        )


def _id_size(model: Any, n_items: int) -> int:
    table, bias = item_scorer(model, n_items)
    return int(table.weight.shape[1]) + (bias is not None)


def _alignment(config: Any) -> AlignmentSettings:
    keys = ("inject", "projector", "use_id", "n_instructions", "tune", "score_norm", "score_tokens")
    return AlignmentSettings(*(config[key] for key in keys))


def _tuning(config: Any) -> TuningSettings:
    return TuningSettings(
        config["data_mode"],
        config["n_samples"],
        tuple(config["n_buckets"]),
        config["allow_repeats"],
        config["alignment_batch_size"],
        config["align_weight"],
        config["temperature"],
        config["negatives"],
        config["id_scale"],
        config["distill"],
        config["distill_items"],
    )


def _attributes(config: Any, content: ItemContent) -> list[str]:
    """Those of the configured attributes that the dataset has.

    Raises:
        UserError: it has none, or none is configured.
    """
    if not config["attributes"]:
        raise UserError("attributes is empty: name what the language model is to read, [title].")
    found = [name for name in config["attributes"] if name in content.attributes]
    path = content.path("text")
    if not path.is_file():
        raise UserError(
            f"This model reads texts, but there is no {path}: make the dataset with one (python -m "
            "dataset_tools table --items FILE, or a converter of its source)."
        )
    if not found:
        raise UserError(
            f"The language model reads {', '.join(config['attributes'])}, but "
            f"{path} has none of them: set attributes to columns it has."
        )
    return found


def _text(content: ItemContent, item: int, attributes: Sequence[str]) -> str | None:
    values = [content.text(item, name) for name in attributes]
    return ", ".join(value for value in values if value) or None
