"""What I-LLMRec trains: the adaptor before a language model, the heads behind it, the slot between.

Source: Kim et al., "Image is All You Need", 2025, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_mm.backbone.slots import SlotBatch, SlotModel
from recbole_mm.model.layers.retrieval_heads import Projector, RetrievalHeads

TRAIN_LLM = ("frozen", "lora", "full")


class ImageReader(nn.Module):
    """Language model, adaptor and heads: all that the stage ``alignment`` may train.

    Args:
        language_model: a causal one of `transformers`, or None for the control without one.
        widths: of each type of features.
        slot_width: of what fills an item's slot; None: items are told in words.
        config: of the model.
    """

    def __init__(
        self, language_model: Any, widths: Mapping[str, int], slot_width: int | None, config: Any
    ) -> None:
        super().__init__()
        self.language_model = None if language_model is None else SlotModel(language_model)
        self.trained: str = config["train_llm"]
        n_user = sum(widths.values())
        self.adaptor: Projector | None = None
        self.rec: nn.Parameter | None = None  # the vector of the slot that is read
        if self.language_model is not None:
            n_user = self.language_model.width
            self._choose_weights(config["train_token_emb"])
            self.rec = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, n_user))[0])
            if slot_width is not None:
                hidden, how = config["adaptor_hidden"], config["adaptor_act"]
                self.adaptor = Projector(slot_width, hidden, n_user, how, config["adaptor_norm"])
        self.heads = RetrievalHeads(n_user, widths, config["head_hidden"], config["d_s"])

    def _choose_weights(self, embeddings: bool) -> None:
        model: Any = self.language_model.model if self.language_model is not None else None
        if self.trained == "frozen":
            model.requires_grad_(False)
        elif self.trained == "full":
            model.float().requires_grad_(True)
        if embeddings:
            model.get_input_embeddings().float().requires_grad_(True)

    def train(self, mode: bool = True) -> ImageReader:
        """A frozen language model stays as it is evaluated, without dropout."""
        super().train(mode)
        if self.language_model is not None and self.trained == "frozen":
            self.language_model.eval()
        return self

    def forward(
        self, batch: SlotBatch, slots: Tensor, train_adaptor: bool
    ) -> tuple[Tensor, Tensor]:
        """Users' states and the mean cross entropy of what is to be answered.

        Args:
            batch: a `SlotBatch`.
            slots: features of its keys. Shape: (n, width).
            train_adaptor: whether the gradient goes on to the adaptor.

        Returns:
            Shape (reads, width), float32, and shape (); 0 where nothing is asked.
        """
        model = self.language_model
        assert model is not None
        vectors = slots if self.adaptor is None else self.adaptor(slots)
        states = model(batch, vectors if train_adaptor else vectors.detach(), self.rec)
        told = states.new_zeros((), dtype=torch.float32)
        if len(batch.answer_at):
            logits = model.logits(states[batch.answer_at])  # (n, vocabulary)
            told = F.cross_entropy(logits, batch.answer_ids)
        return states[batch.read_at].float(), told
