"""Scores of lettered candidates, read from the language model head (PRIME, section 3.2.3).

The letters' rows of the head are applied to the hidden state at the one position where the answer
begins; the logits of the whole vocabulary are never made.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_mm.backbone.prompt import TextEncoder
from recbole_mm.errors import UserError

LETTERS = string.ascii_uppercase


class Verbalizer:
    """Candidate k of a prompt is letter k.

    Args:
        encoder: of the backbone's tokenizer.
        candidates: K; at most 26.
        answer_end: the special token that ends an answer.

    Raises:
        UserError: more candidates than letters, or a letter that is not one token of its own.
    """

    def __init__(self, encoder: TextEncoder, candidates: int, answer_end: str) -> None:
        if not 2 <= candidates <= len(LETTERS):
            raise UserError(
                f"n_candidates is {candidates}: the ranker names candidates by the letters A to Z, "
                "so choose between 2 and 26."
            )
        self.letters = LETTERS[:candidates]
        ids = [encoder.plain(letter) for letter in self.letters]
        if any(len(tokens) != 1 for tokens in ids) or len({*map(tuple, ids)}) < candidates:
            raise UserError(
                "The backbone's tokenizer has no single token of its own for each capital letter: "
                "choose a backbone with single-token letters, such as qwen2-vl-2b."
            )
        self.ids = [tokens[0] for tokens in ids]
        self.end_id = encoder.trusted(answer_end)[0]

    def logits(self, hidden: Tensor, head: nn.Module, count: int) -> Tensor:
        """Letter logits in fp32.

        Args:
            hidden: final hidden state where the answer begins. Shape: (..., D).
            head: the language model head, a Linear of the whole vocabulary.
            count: K, the number of letters to read.

        Returns:
            Shape: (..., K).
        """
        return row_logits(hidden, head, self.ids[:count])  # (..., K)


def row_logits(hidden: Tensor, head: nn.Module, ids: Sequence[int]) -> Tensor:
    """Logits of some tokens in fp32. (..., D) -> (..., K).

    Args:
        hidden: final hidden states.
        head: the language model head, a Linear of the whole vocabulary.
        ids: K tokens.
    """
    layer: Any = head
    rows = torch.as_tensor(ids, device=hidden.device)
    bias = None if layer.bias is None else layer.bias[rows].float()
    return F.linear(hidden.float(), layer.weight[rows].float(), bias)
