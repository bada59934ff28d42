"""PRIME: an LRURec retriever proposes items, a multimodal language model ranks the best of them.

Paper: Yue et al., "Preference-Optimized Retrieval and Ranking for Efficient Multimodal
Recommendation", KDD 2025. Official code: https://github.com/Yueeeeeeee/PRIME.

Differs from the official code:
- Popularity of negatives counts training items only; official counts include validation.
- Item lines are clean JSON; official ones escape every quote and every non-ASCII character.
- Rotary positions of images are M-RoPE's; official training and evaluation use 1-D positions.
- Pictures are resized once and a frozen tower encodes each once; official code resizes twice and
  encodes a picture anew in every prompt, through 4-bit weights.
- `supervise: letter` takes the loss among the letters; official code over three tokens of the whole
  vocabulary (letter, end of turn, line break), the paper over letter and end (`letter_eos`).
- Gradients of micro-batches are averaged; official code adds them up and then clips.
- Metrics are of one complete ranking a user: the head in ranker order, the tail in the retriever's.
- `fusion: valid` adds the retriever's scores to the ranker's, weighted on validation data.
- Preference optimisation draws both sets of all positions at once, from one causal pass where the
  retriever is causal, and breaks a tie of ranks by the ranker's probability of the target; official
  code takes the first set.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_mm.data.content import ItemContent
from recbole_mm.errors import UserError
from recbole_mm.model.layers.kept_vectors import make_room
from recbole_mm.model.layers.preference import SET_PROBS
from recbole_mm.model.layers.preference_stage import (
    LABELERS,
    NEITHER,
    PreferenceSettings,
    PreferenceStage,
)
from recbole_mm.model.layers.ranker_stage import RankerStage
from recbole_mm.model.layers.ranking import (
    NEGATIVE_SOURCES,
    demotion,
    fuse,
    lift,
    rows_moved,
    top_candidates,
)
from recbole_mm.model.layers.retriever_stage import RetrieverStage, TrainingRows
from recbole_mm.registry import get_model
from recbole_mm.stage import Readout, Stage, StageSettings

Ints = NDArray[np.int64]
# Metrics that read nothing of a list but the place of its target.
_OF_THE_TARGET = {"recall", "mrr", "ndcg", "hit", "map", "precision", "gauc"}


class PRIME(SequentialRecommender):
    """PRIME behind RecBole's interface; see the module's head.

    Attributes:
        retriever: an LRURec, or another sequential model.
        policy: what preference optimisation makes of it, or None without that stage.
        ranker: a `LetterRanker`, or None when no stage needs one.
        source: whose candidates `full_sort_predict` returns: ``retriever`` or ``preference``.
        active: in which order: ``retriever``, ``masked`` (items of the history at the end of all),
            ``demoted`` (at the end of the K best), ``ranker`` or ``fusion``.
        alphas: weight of each source in ``fusion``.
        backbone_name: for the result.
    """

    inner_model = "retriever"  # the key that names it; its YAML stands below PRIME's
    choices: ClassVar[dict[str, tuple[str, ...]]] = {  # what a key may be
        "neg_source": NEGATIVE_SOURCES,
        "supervise": ("letter", "letter_eos"),
        "candidate_order": ("retriever", "shuffled"),
        "set_prob": SET_PROBS,
        "neither": NEITHER,
        "labeler": LABELERS,
        "fusion": ("none", "valid"),
    }
    bounds: ClassVar[dict[str, tuple[float, float]]] = {  # smallest and largest value of a key
        "n_candidates": (2, 26),
        "max_history_items": (1, inf),
        "max_attr_tokens": (1, inf),
        "score_tokens": (1, inf),
        "beta": (0, inf),
        "set_temperature": (1e-3, inf),
    }
    stage_names = ("retriever", "ranker", "preference")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        _check(config, self.n_items)
        self.seed: int = config["seed"]
        self.n_candidates: int = config["n_candidates"]
        self.max_history: int = config["max_history_items"]
        self.mask_candidates: bool = config["candidate_mask_history"]
        self.shuffle_candidates: bool = config["candidate_order"] == "shuffled"
        self.fusion: str = config["fusion"]
        self.neg_source: str = config["neg_source"]
        self.ranker_batch_size: int = config["ranker_batch_size"]
        # A reranked head moves no target that is not in it, so that users whose target was not
        # retrieved need no ranker; other metrics look at whole lists.
        self.only_hits = {str(name).lower() for name in config["metrics"]} <= _OF_THE_TARGET
        self.source = self.active = "retriever"
        self.alphas = {"retriever": 0.0, "preference": 0.0}
        self._kept: dict[bytes, Tensor] = {}
        self.training_rows = TrainingRows.of(config)
        self.retriever: Any = get_model(config["retriever"])(config, dataset)
        wanted = list(config["stages"] or self.stage_names)
        self.preference = _preference(config)
        self.policy = deepcopy(self.retriever) if "preference" in wanted else None
        self.ranker = _ranker(config, dataset) if wanted != ["retriever"] else None
        self.backbone_name = self.ranker.backbone.name if self.ranker else None

    # --- stages ----------------------------------------------------------------------
    def enter(self, stage_name: str) -> None:
        """Scores are now those of this stage."""
        if stage_name == "preference":
            self.read("preference", "ranker")
        else:
            self.read("retriever", stage_name)

    def read(self, source: str, active: str) -> None:
        """Scores are now those of this retriever in this order."""
        if source == "preference" and self.policy is None:
            raise ValueError("this run has no stage preference")
        self.source, self.active = source, active

    @property
    def scoring(self) -> Any:
        """The retriever whose candidates are ranked now."""
        return self.policy if self.source == "preference" else self.retriever

    @property
    def alpha(self) -> float:
        """Weight of that retriever in ``fusion``."""
        return self.alphas[self.source]

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.alphas[self.source] = value

    def make_stages(self, settings: Mapping[str, StageSettings], train_dataset: Any) -> list[Stage]:
        """The stages in order, on the training part of a dataset."""
        how, rows = settings["retriever"], self.training_rows
        stages: list[Stage] = [
            RetrieverStage("retriever", self.retriever, how, rows, train_dataset)
        ]
        if self.ranker is not None:
            stages.append(RankerStage("ranker", self, settings["ranker"], train_dataset))
        if self.policy is not None:
            how = settings["preference"]
            stages.append(PreferenceStage("preference", self, how, self.preference, train_dataset))
        return stages

    def readouts(self, last_stage: str) -> list[Readout]:
        """The rows of the result, once the stages up to `last_stage` are in place."""
        if last_stage == "retriever":
            return [self._readout("retriever", "retriever", "retriever", chosen=True)]
        way = "fusion" if self.fusion == "valid" else "ranker"
        rows = [
            self._readout("retriever", "retriever", "retriever"),
            self._readout("retriever masked", "retriever", "masked"),
            self._readout("demoted history", "retriever", "demoted"),
        ]
        for stage, source in (("ranker", "retriever"), ("preference", "preference")):
            if stage == "preference" and last_stage != "preference":
                break
            last = stage == last_stage
            rows += [
                self._readout(stage, source, "ranker", last and way == "ranker"),
                self._readout(f"{stage}+fusion", source, "fusion", last and way == "fusion"),
            ]
        return rows

    def _readout(self, name: str, source: str, active: str, chosen: bool = False) -> Readout:
        alpha = self.alphas[source] if self.alphas[source] != float("inf") else "inf"
        extra = {"fusion_alpha": alpha} if active == "fusion" else {}
        return Readout(name, lambda: self.read(source, active), chosen, extra)

    # --- scores ----------------------------------------------------------------------
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items. Shape: (B, V).

        With the ranker active, the best K of the retriever stand above all others in the ranker's
        order. Where the interaction names the targets and no metric looks beyond them, rows whose
        target is not among the K are left as they are: their metrics cannot differ.
        """
        scores = self.scoring.full_sort_predict(interaction)
        if self.active == "retriever":
            return scores
        if self.active == "masked":
            return self._masked(interaction, scores)
        candidates = self.candidates(interaction, scores)  # (B, K)
        if self.active == "demoted":
            return lift(scores, candidates, demotion(candidates, interaction[self.ITEM_SEQ]))
        rows = self._rows_to_rank(interaction, scores, candidates)
        if len(rows) == 0:
            return scores
        ranking = self.rank(interaction[rows], candidates[rows])  # (n, K)
        if self.active == "fusion":
            ranking = fuse(ranking, scores[rows].gather(1, candidates[rows]), self.alpha)
        lifted = scores.clone()
        lifted[rows] = lift(scores[rows], candidates[rows], ranking)
        return lifted

    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of one item a row. Shape: (B,)."""
        scores = self.full_sort_predict(interaction)
        return scores.gather(1, interaction[self.ITEM_ID][:, None])[:, 0]

    def candidates(self, interaction: Interaction, scores: Tensor) -> Tensor:
        """The retriever's best K items in its order, never the pad. Shape: (B, K)."""
        seen = interaction[self.ITEM_SEQ] if self.mask_candidates else None
        return top_candidates(scores, self.n_candidates, seen)

    def _masked(self, interaction: Interaction, scores: Tensor) -> Tensor:
        """Items of the history last; a target that is one of them keeps its score. (B, V)."""
        masked = scores.scatter(1, interaction[self.ITEM_SEQ], -torch.inf)
        if self.ITEM_ID not in interaction:
            return masked
        target = interaction[self.ITEM_ID][:, None]
        return masked.scatter(1, target, scores.gather(1, target))

    def _rows_to_rank(self, interaction: Interaction, scores: Tensor, candidates: Tensor) -> Tensor:
        if not self.only_hits or self.ITEM_ID not in interaction:
            return torch.arange(len(candidates), device=candidates.device)
        seen = interaction[self.ITEM_SEQ] if self.mask_candidates else None
        return rows_moved(interaction[self.ITEM_ID], scores, candidates, seen)

    def rank(self, interaction: Interaction, candidates: Tensor) -> Tensor:
        """The ranker's log-probabilities, kept until weights change. (B, K) -> (B, K)."""
        ranker = self.the_ranker()
        histories = self._histories(interaction)
        rows = candidates.cpu().numpy()
        keys = [h.tobytes() + b"|" + c.tobytes() for h, c in zip(histories, rows, strict=True)]
        make_room(self._kept)
        new = {key: row for row, key in enumerate(keys) if key not in self._kept}
        if new:
            asked, back = self.in_prompt_order(rows[list(new.values())])
            found = ranker.log_probs([histories[row] for row in new.values()], asked)
            self._kept.update(zip(new, found.gather(1, torch.from_numpy(back)), strict=True))
        return torch.stack([self._kept[key] for key in keys]).to(candidates.device)

    def in_prompt_order(self, candidates: Ints) -> tuple[Ints, Ints]:
        """Candidates as the prompt lists them, and where each then stands. Shapes: (B, K)."""
        places = np.tile(np.arange(candidates.shape[1]), (len(candidates), 1))  # (B, K)
        if self.shuffle_candidates:
            for row, items in zip(places, candidates, strict=True):
                np.random.default_rng([self.seed, *items.tolist()]).shuffle(row)
        return np.take_along_axis(candidates, places, axis=1), places.argsort(axis=1)

    def _histories(self, interaction: Interaction) -> list[Ints]:
        items = interaction[self.ITEM_SEQ].cpu().numpy()
        ends = interaction[self.ITEM_SEQ_LEN].cpu().numpy()
        first = np.maximum(ends - self.max_history, 0)
        return [row[a:b] for row, a, b in zip(items, first, ends, strict=True)]

    def forget(self) -> None:
        """To be called when the ranker's weights have changed."""
        self._kept.clear()
        self.the_ranker().forget()

    def the_ranker(self) -> Any:
        """The ranker.

        Raises:
            UserError: the run has no stage that needs one.
        """
        if self.ranker is None:
            raise UserError("stages is 'retriever' alone: add ranker to stages.")
        return self.ranker


def _ranker(config: Any, dataset: Any) -> Any:
    """The ranker that the configuration describes, for the items of a dataset.

    Raises:
        UserError: a package, weights or item content are missing, or a key has a wrong value.
    """
    from recbole_mm.backbone.load import RUN_KEYS, BackboneSpec
    from recbole_mm.backbone.prompt import PromptStyle
    from recbole_mm.backbone.ranker import RankerSettings, build_ranker

    content = ItemContent(Path(config["data_path"]), config["dataset"], dataset.item_tokens())
    own = {key: config[key] for key in RUN_KEYS if config[key] is not None}
    settings = RankerSettings(
        PromptStyle(config["instruction"], _attributes(config, content), config["max_attr_tokens"]),
        config["n_candidates"],
        config["max_history_items"],
        config["supervise"],
        config["score_tokens"],
        Path(config["cache_dir"]),
        config["seed"],
    )
    return build_ranker(
        BackboneSpec.from_mapping({**config["backbone_spec"], **own}), settings, content
    )


def _preference(config: Any) -> PreferenceSettings:
    return PreferenceSettings(
        config["beta"],
        config["set_prob"],
        config["neither"],
        config["labeler"],
        config["set_temperature"],
        config["preference_dropout_prob"],
        config["preference_batch_size"],
    )


def _attributes(config: Any, content: Any) -> tuple[str, ...]:
    """Those of the configured attributes that the dataset has."""
    has = {*content.attributes, "image"}
    found = tuple(name for name in config["attributes"] if name in has)
    pictured = any(content.image_paths(item) for item in range(len(content.item_tokens)))
    if not found or (found == ("image",) and not pictured):
        raise UserError(
            f"The ranker reads {', '.join(config['attributes']) or 'nothing'}, but "
            f"{content.path('text')} and {content.path('image')} have none of them: "
            "set attributes to columns they have."
        )
    return found


def _check(config: Any, n_items: int) -> None:
    """Raises `UserError` where the dataset has too few items."""
    if config["n_candidates"] > n_items - 1:
        raise UserError(
            f"n_candidates is {config['n_candidates']}, but the dataset has {n_items - 1} items: "
            "lower n_candidates."
        )
