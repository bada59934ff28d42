"""MLLM-MSR: language models describe items and users, a multimodal one says yes or no to an item.

Paper: Ye et al., "Harnessing Multimodal Large Language Models for Multimodal Sequential
Recommendation", AAAI 2025 (https://arxiv.org/abs/2408.09698). Official code:
https://github.com/YuyangYe/MLLM-MSR.

Differs from the official code:
- One template writes training and test prompts; official ones close the instruction differently.
- The loss is of the answer and its end; official labels are all tokens, pictures included, and no
  end. `loss_on: all` is that without the pictures.
- The answers' tokens are found behind the prompt; official code trains one spelling and reads
  another.
- Pictures are never cut; official truncation falls into them.
- Adapters are on the language model alone; official ones are on the vision tower too.
- One forward pass reads an answer, and what candidates share is computed once; official code
  decodes 30 tokens for each.
- Texts are decoded greedily in batches, kept, and without raw ids of users and items in prompts.
- All users are asked about, ties count half; official code takes the first 100 and ranks the
  target before its ties.
- Histories are chronological by default; `history_source: official_topfreq` is the code's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_mm.data.content import ItemContent
from recbole_mm.errors import UserError
from recbole_mm.model.layers.kept_vectors import make_room
from recbole_mm.model.layers.msr_parts import build
from recbole_mm.model.layers.ranking import PrefixSamples
from recbole_mm.model.layers.sft_stage import (
    NEG_SOURCES,
    ItemSummaryStage,
    SftStage,
    UserSummaryStage,
    histories_of,
    newest_targets,
)
from recbole_mm.model.layers.summaries import ITEM_TEXTS, PREF_MODES
from recbole_mm.stage import Readout, Stage, StageSettings

ORDERS = ("pref_first", "item_first")
_MOST_ANSWERS = 1 << 22  # kept: a number each
Ids = tuple[int, ...]


class MLLMMSR(SequentialRecommender):
    """MLLM-MSR behind RecBole's interface; see the module's head.

    Attributes:
        summaries: descriptions of items and preferences of users.
        scorer: a `YesNoScorer`.
        text_files: files of texts made elsewhere, by stage.
        backbone_name: for the result.
    """

    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "item_text": ITEM_TEXTS,
        "pref_mode": PREF_MODES,
        "order": ORDERS,
        "loss_on": ("answer", "all"),
        "neg_source": NEG_SOURCES,
    }
    bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "history_len": (1, inf),
        "block_size": (1, inf),
        "sft_targets": (1, inf),
        "item_summary_tokens": (1, inf),
        "user_summary_tokens": (1, inf),
        "max_item_tokens": (1, inf),
        "max_summary_tokens": (1, inf),
        "max_pref_tokens": (1, inf),
        "temperature": (0, inf),
        "top_p": (1e-6, 1),
        "generate_tokens": (1, inf),
        "score_tokens": (1, inf),
    }
    stage_names: ClassVar[tuple[str, ...]] = ("item_summary", "user_summary", "sft")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        stages = list(config["stages"] or self.stage_names)
        if "sft" not in stages:
            raise UserError(
                f"stages ends with {stages[-1]}, which ranks nothing: add sft (with --sft_epochs=0 "
                "the backbone is asked as it is)."
            )
        self.check_protocol(config)
        self.seed: int = config["seed"]
        self.history_len: int = min(config["history_len"], config["MAX_ITEM_LIST_LENGTH"])
        self.sft_targets: int = config["sft_targets"]
        self.sft_batch_size: int = config["sft_batch_size"]
        self.neg_source: str = config["neg_source"]
        self.order: str = config["order"]
        self.use_candidate_image: bool = config["use_candidate_image"]
        self.text_files = {
            "item_summary": config["item_summary_file"],
            "user_summary": config["user_summary_file"],
        }
        self.item_tokens: list[str] = dataset.item_tokens()
        self.dataset_name: str = config["dataset"]
        self._kept: dict[tuple[Ids, int], float] = {}
        content = ItemContent(Path(config["data_path"]), config["dataset"], self.item_tokens)
        parts = build(config, content, self.device)
        self.scorer, self.summaries = parts.scorer, parts.summaries
        self.questions = parts.questions
        self.backbone_name = parts.scorer.backbone.name

    def check_protocol(self, config: Any) -> None:
        """Raises `UserError` for a protocol of which nothing would come back."""
        if config["eval_candidates"] == "full":
            raise UserError(
                "eval_candidates is full, but every item of every user would be a question of its "
                "own: set eval_candidates to cand20 or cand100, or take --model=MLLMMSRRerank."
            )

    # --- stages ----------------------------------------------------------------------
    def enter(self, stage_name: str) -> None:
        """There is one way to score."""

    def make_stages(self, settings: Mapping[str, StageSettings], train_dataset: Any) -> list[Stage]:
        """The stages in order, on the training part of a dataset."""
        known = train_dataset.train_sequences
        lists = known if train_dataset.train_lists is None else train_dataset.train_lists
        samples = newest_targets(lists, self.sft_targets)
        return [
            ItemSummaryStage("item_summary", self, settings["item_summary"]),
            UserSummaryStage("user_summary", self, settings["user_summary"], samples),
            SftStage("sft", self, settings["sft"], samples, known),
        ]

    def readouts(self, last_stage: str) -> list[Readout]:
        """The rows of the result."""
        return [Readout("sft", lambda: None)]

    def sample_history(self, samples: PrefixSamples, row: int) -> Ids:
        """What a training sample has before its target, at most `history_len` items."""
        return tuple(samples.history(int(row), self.history_len).tolist())

    def prompt(self, history: Ids, item: int) -> Any:
        """The question about one user and one item."""
        return self.questions.prompt(self.summaries.user_part(history), item, self.order)

    def forget(self) -> None:
        """To be called when weights have changed."""
        self._kept.clear()
        self.scorer.forget()

    # --- scores ----------------------------------------------------------------------
    @torch.no_grad()
    def candidate_scores(self, interaction: Interaction, items: Tensor) -> Tensor:
        """ln p(yes) - ln p(no) of some items a row, kept until weights change; on the CPU.

        Args:
            interaction: B rows with their histories.
            items: shape (B, K).

        Returns:
            Shape: (B, K).
        """
        histories = histories_of(interaction, self)
        pairs = [
            (history, int(item))
            for history, row in zip(histories, items.tolist(), strict=True)
            for item in row
        ]
        make_room(self._kept, _MOST_ANSWERS)
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._kept]
        if new:
            self.summaries.prefer(dict.fromkeys(history for history, _ in new))
            self._kept.update(zip(new, self._ask(new), strict=True))
        found = torch.tensor([self._kept[pair] for pair in pairs])
        return found.view(items.shape)

    def _ask(self, pairs: Sequence[tuple[Ids, int]]) -> list[float]:
        """The score of each pair; what those of one user, or of one item, share is read once."""
        by_user = self.order == "pref_first"
        groups: dict[Any, list[int]] = {}
        for place, (history, item) in enumerate(pairs):
            groups.setdefault(history if by_user else item, []).append(place)
        forks = [
            self.questions.fork(
                [(self.summaries.user_part(pairs[place][0]), pairs[place][1]) for place in places],
                self.order,
            )
            for places in groups.values()
        ]
        found = np.empty(len(pairs))
        for places, odds in zip(groups.values(), self.scorer.log_odds(forks), strict=True):
            found[places] = odds.numpy()
        return found.tolist()

    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items, each by a question of its own. Shape: (B, V)."""
        items = torch.arange(1, self.n_items).expand(len(interaction), -1)
        scores = self.candidate_scores(interaction, items)
        return torch.cat([torch.full((len(items), 1), -inf), scores], dim=1).to(self.device)

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """p(yes) / (p(yes) + p(no)) of one item a row. Shape: (B,)."""
        items = interaction[self.ITEM_ID][:, None]
        return self.candidate_scores(interaction, items)[:, 0].sigmoid().to(self.device)
