"""LLaVA-1.6 (LLaVA-NeXT) on Mistral, MLLM-MSR's backbone: one view of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_mm.backbone.families.base import Grid
from recbole_mm.backbone.families.llava import Llava

if TYPE_CHECKING:
    from recbole_mm.backbone.tiny import TinySizes


class LlavaNext(Llava):
    """LLaVA-1.6 (Liu et al. 2024), with the whole picture at the tower's size and a line break.

    That is 577 tokens; the tiles of a larger view, another 600 to 2,300, are not made.
    """

    chat_head = "[INST] "
    chat_tail = " [/INST]"

    @staticmethod
    def model_class() -> Any:
        from transformers import LlavaNextForConditionalGeneration

        return LlavaNextForConditionalGeneration

    @staticmethod
    def tiny_model(sizes: TinySizes, tokenizer: Any, attention: str) -> Any:
        from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

        config = LlavaNextConfig(
            text_config={
                "model_type": "mistral",
                "sliding_window": None,
                **sizes.language_model(tokenizer),
            },
            vision_config={"model_type": "clip_vision_model", **sizes.square_tower()},
            image_grid_pinpoints=[[sizes.image_size, sizes.image_size]],
            image_token_index=tokenizer.get_vocab()["<image>"],
            image_seq_length=(sizes.image_size // sizes.patch_size) ** 2,
            tie_word_embeddings=True,
            attn_implementation=attention,
        )
        return LlavaNextForConditionalGeneration(config)

    def token_grid(self, grid: Grid) -> Grid:
        return 1, 1, grid[1] * grid[2] + 1  # the line break stands behind the patches

    def _rows(self, model: Any, values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        rows = self._projected(model, values)[:, 1:]  # without CLS
        line = model.model.image_newline.to(rows).expand(len(rows), 1, -1)
        return list(torch.cat([rows, line], dim=1))

    def _one_row(self, model: Any, values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        return list(self._projected(model, values)[:, :1])

    def _projected(self, model: Any, values: Tensor) -> Tensor:
        """States of the layer that LLaVA reads, as words. Shape: (B, 1 + patches, D)."""
        layer = model.config.vision_feature_layer
        states = model.model.vision_tower(values, output_hidden_states=True).hidden_states[layer]
        found: Tensor = model.model.multi_modal_projector(states)
        return found
