"""Asks a backbone a question that is answered by one of two words (MLLM-MSR).

    p = p(yes) / (p(yes) + p(no))

is read from one forward pass, at the position where the answer begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recbole_mm.backbone.batch import by_length, collate
from recbole_mm.backbone.load import Backbone
from recbole_mm.backbone.prompt import Fork, Prompt, join, text_piece
from recbole_mm.backbone.verbalizer import row_logits
from recbole_mm.backbone.vision import ItemImages, PictureReader
from recbole_mm.errors import UserError

Bools = NDArray[np.bool_]
LOSS_ON = ("answer", "all")
_WORTH_SHARING = 0.5  # of a branch's tokens: a shorter trunk is quicker read again for each


@dataclass(frozen=True)
class Answers:
    """Token ids of the two answers, and of the end behind either."""

    yes: int
    no: int
    end: int


def find_answers(backbone: Backbone, words: Sequence[str]) -> Answers:
    """The tokens that the tokenizer makes of the answers where they stand: behind a prompt.

    Args:
        backbone: who answers.
        words: yes and no, as a user would write them.

    Raises:
        UserError: there are not two, or one is several tokens there, or both are the same.
    """
    if len(words) != 2:
        raise UserError(f"answers has {len(words)} words: name two, such as [Yes, No].")
    tokens = [_behind(backbone, word) for word in words]
    for word, ids in zip(words, tokens, strict=True):
        if len(ids) != 1:
            raise UserError(
                f"answers: the tokenizer of backbone '{backbone.name}' writes '{word}' in "
                f"{len(ids)} tokens: take words of one token, such as [Yes, No]."
            )
    if tokens[0] == tokens[1]:
        raise UserError(f"answers: {words[0]} and {words[1]} are one token: take two words.")
    end = backbone.encoder.trusted(backbone.family.answer_end)[0]
    return Answers(tokens[0][0], tokens[1][0], end)


def _behind(backbone: Backbone, word: str) -> list[int]:
    """What a prompt with the word behind it has more than the prompt."""
    encoder, tail = backbone.encoder, backbone.family.chat_tail
    start = encoder.trusted(tail)
    is_mark = bool(start) and start[-1] in backbone.tokenizer.get_added_vocab().values()
    space = "" if tail[-1:].isspace() or is_mark else " "
    whole = encoder.trusted(f"{tail}{space}{word}")
    return whole[len(start) :] if whole[: len(start)] == start else whole


class YesNoScorer(PictureReader):
    """A backbone whose answers to yes/no questions are trained and read.

    Args:
        backbone: reads the prompts.
        images: feature rows of item pictures.
        answers: see `find_answers`.
        loss_on: ``answer``: the answer and its end; ``all``: all words of the prompt too, as the
            paper writes its loss.
        max_tokens: padded tokens scored in one forward pass.
        worth_sharing: a shared beginning of less than this share of what follows is read again.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: ItemImages,
        answers: Answers,
        loss_on: str = "answer",
        max_tokens: int = 16_384,
        worth_sharing: float = _WORTH_SHARING,
    ) -> None:
        super().__init__(backbone, images)
        self.answers, self.loss_on, self.max_tokens = answers, loss_on, max_tokens
        self.worth_sharing = worth_sharing

    def loss(self, prompts: Sequence[Prompt], is_yes: Bools) -> Tensor:
        """Mean cross entropy of what is to be said. Shape: ().

        Args:
            prompts: B of them, up to where the answer begins.
            is_yes: the right answer to each. Shape: (B,).
        """
        answers = [self.answers.yes if yes else self.answers.no for yes in is_yes]
        axes = self.backbone.family.axes
        answered = [
            join([prompt, text_piece([answer, self.answers.end], axes)])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        batch = collate(answered, self.backbone.pad_id).to(self.backbone.device)
        states = self.backbone.run(batch, self.images).last_hidden_state  # (B, T, D)
        said = self._said(answered, batch.ids.shape[1]).to(states.device)  # (B, T)
        logits = self.backbone.head(states[:, :-1][said[:, 1:]]).float()  # (n, vocabulary)
        return F.cross_entropy(logits, batch.ids[said])

    def _said(self, answered: Sequence[Prompt], T: int) -> Tensor:
        """Tokens that the loss is taken of; never a picture's, and not the first. (B, T)."""
        said = torch.zeros(len(answered), T, dtype=torch.bool)
        for row, prompt in enumerate(answered):
            first = 1 if self.loss_on == "all" else len(prompt) - 2
            said[row, first : len(prompt)] = True
            for slot in prompt.slots:
                said[row, slot.start : slot.start + slot.count] = False
        return said

    @torch.no_grad()
    def log_odds(self, forks: Sequence[Fork]) -> list[Tensor]:
        """ln p(yes) - ln p(no) at the end of every branch; on the CPU. Each of shape (S,).

        What the branches of a fork begin with is read once, unless it is short.

        Args:
            forks: questions; the number S of branches may differ.
        """
        if not self._shares(forks):
            return self._unshared(forks)
        found: list[Tensor] = [torch.empty(0)] * len(forks)
        costs = [len(fork.trunk) + sum(map(len, fork.branches)) for fork in forks]
        for rows in by_length(costs, self.max_tokens):
            part = [forks[row] for row in rows]
            odds = self._odds(self.backbone.ends(part, self.images))
            for row, own in zip(rows, odds.split([len(f.branches) for f in part]), strict=True):
                found[row] = own
        return found

    def _shares(self, forks: Sequence[Fork]) -> bool:
        trunks = sum(len(fork.trunk) for fork in forks)
        branches = sum(len(fork.branches[0]) for fork in forks)
        several = any(len(fork.branches) > 1 for fork in forks)
        return several and trunks >= self.worth_sharing * branches

    def _unshared(self, forks: Sequence[Fork]) -> list[Tensor]:
        prompts = [_whole(fork.trunk, branch) for fork in forks for branch in fork.branches]
        found = torch.empty(len(prompts))
        for rows in by_length([len(prompt) for prompt in prompts], self.max_tokens):
            batch = collate([prompts[row] for row in rows], self.backbone.pad_id)
            found[rows] = self._odds(self.backbone.hidden(batch, self.images)[:, 0])
        return list(found.split([len(fork.branches) for fork in forks]))

    def _odds(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n,)"""
        ids = (self.answers.yes, self.answers.no)
        logits = row_logits(hidden, self.backbone.head, ids)  # (n, 2)
        return (logits[:, 0] - logits[:, 1]).cpu()


def _whole(trunk: Prompt, branch: Prompt) -> Prompt:
    """A branch that stands behind its trunk as a prompt of its own."""
    back = Prompt(branch.ids, branch.positions - trunk.span, branch.span, branch.slots)
    return join([trunk, back])
