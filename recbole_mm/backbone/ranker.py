"""Ranks lettered candidates with a backbone: prompts in, one forward pass, letter scores out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recbole_mm.backbone.batch import by_length, collate
from recbole_mm.backbone.limits import check_context, check_sight
from recbole_mm.backbone.load import Backbone, BackboneSpec, load_backbone
from recbole_mm.backbone.prompt import Fork, Prompt, PromptStyle, PromptWriter, join, text_piece
from recbole_mm.backbone.verbalizer import Verbalizer
from recbole_mm.backbone.vision import ItemImages, PictureReader
from recbole_mm.data.content import ItemContent
from recbole_mm.data.images import ImageStore
from recbole_mm.errors import UserError

Ints = NDArray[np.int64]
_WORTH_SHARING = 0.5  # of a set's tokens: a shorter history is quicker read again for each set
SUPERVISE = ("letter", "letter_eos")


def worth_sharing(forks: Sequence[Fork]) -> bool:
    """Whether their histories, all in all, are long enough to be read once for all sets."""
    history, one_set = (
        sum(map(len, part)) for part in ((f.trunk for f in forks), (f.branches[0] for f in forks))
    )
    return history >= _WORTH_SHARING * one_set


class LetterRanker(PictureReader):
    """A backbone that answers a ranking prompt with the letter of a candidate.

    Args:
        backbone: reads the prompts.
        images: feature rows of item pictures.
        writer: writes the prompts.
        verbalizer: reads the letters.
        supervise: ``letter``: cross entropy among the letters at the answer's first position;
            ``letter_eos``: the mean over the letter and the end of the answer, each among the
            whole vocabulary (PRIME, section 3.2.3).
        max_tokens: padded tokens scored in one forward pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: ItemImages,
        writer: PromptWriter,
        verbalizer: Verbalizer,
        supervise: str = "letter",
        max_tokens: int = 16_384,
    ) -> None:
        super().__init__(backbone, images)
        if supervise not in SUPERVISE:
            raise UserError(f"supervise is '{supervise}': use {' or '.join(SUPERVISE)}.")
        self.writer, self.verbalizer = writer, verbalizer
        self.supervise, self.max_tokens = supervise, max_tokens

    def loss(self, histories: Sequence[Ints], candidates: Ints, places: Ints) -> Tensor:
        """Mean cross entropy of the labels' letters.

        Args:
            histories: item ids, oldest first. B arrays.
            candidates: item ids, in the order of their letters. Shape: (B, K).
            places: place of the label in each row. Shape: (B,).

        Returns:
            Shape: ().
        """
        prompts = self._write(histories, candidates)
        if self.supervise == "letter":
            logits = self._letters(prompts, candidates.shape[1])  # (B, K)
            return F.cross_entropy(logits, torch.as_tensor(places, device=logits.device))
        return self._whole_vocabulary(prompts, [self.verbalizer.ids[place] for place in places])

    def _whole_vocabulary(self, prompts: Sequence[Prompt], answers: Sequence[int]) -> Tensor:
        """Mean cross entropy of the letters' tokens and of the end of the answer."""
        axes = self.backbone.family.axes
        answered = [
            join([prompt, text_piece([answer], axes)])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        hidden = self._hidden(answered, positions=2)
        logits = self.backbone.head(hidden).float()  # (B, 2, vocabulary)
        ends = [self.verbalizer.end_id] * len(answers)
        targets = torch.tensor([answers, ends], device=logits.device).T  # (B, 2)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def log_probs(self, histories: Sequence[Ints], candidates: Ints) -> Tensor:
        """Log-probability of each candidate among the candidates; on the CPU.

        Args:
            histories: item ids, oldest first. B arrays.
            candidates: item ids, in the order of their letters. Shape: (B, K).

        Returns:
            Shape: (B, K).
        """
        prompts = self._write(histories, candidates)
        out = torch.empty(candidates.shape)
        lengths = [len(prompt) for prompt in prompts]
        for rows in by_length(lengths, self.max_tokens):
            logits = self._letters([prompts[row] for row in rows], candidates.shape[1])
            out[rows] = logits.log_softmax(dim=1).cpu()
        return out

    @torch.no_grad()
    def set_log_probs(self, histories: Sequence[Ints], sets: Ints) -> Tensor:
        """`log_probs` of several candidate sets a history; on the CPU.

        Histories that are not all too short are read once; what follows them must then look back
        through a mask, which costs more than a second reading of a short one.

        Args:
            histories: item ids, oldest first. B arrays.
            sets: item ids, in the order of their letters. Shape: (B, S, K).

        Returns:
            Shape: (B, S, K).
        """
        B, S, K = sets.shape
        forks = [
            self.writer.write_fork(history.tolist(), row.tolist())
            for history, row in zip(histories, sets, strict=True)
        ]
        if not worth_sharing(forks):
            each = [history for history in histories for _ in range(S)]
            return self.log_probs(each, sets.reshape(B * S, K)).view(B, S, K)
        out = torch.empty(B, S, K)
        for rows in by_length([len(fork) for fork in forks], self.max_tokens):
            hidden = self.backbone.branch_hidden([forks[row] for row in rows], self.images)
            logits = self.verbalizer.logits(hidden, self.backbone.head, K)  # (b, S, K)
            out[rows] = logits.log_softmax(dim=2).cpu()
        return out

    def _write(self, histories: Sequence[Ints], candidates: Ints) -> list[Prompt]:
        return [
            self.writer.write(history.tolist(), row.tolist())
            for history, row in zip(histories, candidates, strict=True)
        ]

    def _hidden(self, prompts: Sequence[Prompt], positions: int) -> Tensor:
        batch = collate(prompts, self.backbone.pad_id)
        return self.backbone.hidden(batch, self.images, positions)  # (B, positions, D)

    def _letters(self, prompts: Sequence[Prompt], count: int) -> Tensor:
        hidden = self._hidden(prompts, positions=1)[:, 0]  # (B, D)
        return self.verbalizer.logits(hidden, self.backbone.head, count)


@dataclass(frozen=True)
class RankerSettings:
    """What a lettered ranker is besides its backbone.

    Attributes:
        style: what a prompt says.
        n_candidates: K; at most 26.
        supervise: see `LetterRanker`.
        max_history: items of the history that a prompt shows, at most.
        max_tokens: padded tokens scored in one forward pass.
        cache: folder where a frozen tower's features are kept.
        seed: of a tiny backbone's weights and of new adapters.
    """

    style: PromptStyle
    n_candidates: int
    max_history: int
    supervise: str
    max_tokens: int
    cache: Path
    seed: int


def build_ranker(
    spec: BackboneSpec, settings: RankerSettings, content: ItemContent
) -> LetterRanker:
    """Loads a backbone and makes it a ranker of a dataset's items.

    Raises:
        UserError: see `load_backbone`, `Verbalizer`, `LetterRanker`, `check_sight` and
            `check_context`.
    """
    style = settings.style
    check_sight(spec, style)
    columns = [name for name in style.attributes if name != "image"]
    items = range(1, len(content.item_tokens))
    texts = (content.text(item, name) for item in items for name in columns)
    backbone = load_backbone(spec, filter(None, texts), style.fixed_text(), settings.seed)
    images = ItemImages(
        backbone.family,
        ImageStore(content).get,
        lambda item: next(iter(content.image_paths(item)), None),
        frozen=not backbone.trains_vision,
        log=backbone.vision_log(settings.cache),
    )
    end = backbone.family.answer_end
    verbalizer = Verbalizer(backbone.encoder, settings.n_candidates, end)
    check_context(backbone, style, verbalizer.letters, settings.max_history, content)
    writer = PromptWriter(
        backbone.encoder, backbone.family, style, content.text, images.piece, verbalizer.letters
    )
    return LetterRanker(
        backbone, images, writer, verbalizer, settings.supervise, settings.max_tokens
    )
