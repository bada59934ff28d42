"""LLaVA-1.5: a CLIP tower whose patches a two-layer projector makes words of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from recbole_mm.backbone.families.base import Grid, PictureSettings, Pixels, SquareFamily

if TYPE_CHECKING:
    from recbole_mm.backbone.tiny import TinySizes


class Llava(SquareFamily):
    """LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744): one token a CLIP patch, 576 a picture.

    A picture's shorter side is resized to the tower's, and its middle is cut out, as CLIP does.
    The features are those of the layer before the last, without the CLS token; with
    `image_pooling: cls` they are the CLS token of that layer alone, through the same projector.
    """

    chat_head = "USER: "
    chat_tail = " ASSISTANT:"
    answer_end = "</s>"
    frozen_parts = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    placeholder = "<image>"
    special_tokens = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    special_roles: ClassVar[Mapping[str, str]] = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }

    def __init__(self, tokenizer: Any, config: Any, pictures: PictureSettings) -> None:
        from transformers import CLIPImageProcessorPil

        super().__init__(tokenizer, config, pictures)
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": self.side},
            crop_size={"height": self.side, "width": self.side},
        )

    @staticmethod
    def model_class() -> Any:
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration

    @staticmethod
    def tiny_model(sizes: TinySizes, tokenizer: Any, attention: str) -> Any:
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        config = LlavaConfig(
            text_config={"model_type": "llama", **sizes.language_model(tokenizer)},
            vision_config={"model_type": "clip_vision_model", **sizes.square_tower()},
            image_token_index=tokenizer.get_vocab()["<image>"],
            image_seq_length=(sizes.image_size // sizes.patch_size) ** 2,
            tie_word_embeddings=True,
            attn_implementation=attention,
        )
        return LlavaForConditionalGeneration(config)

    def token_grid(self, grid: Grid) -> Grid:
        return grid

    def _take(self, image: Any) -> Pixels:
        out = self.processor(images=[image], return_tensors="pt")
        return Pixels(out["pixel_values"], self.largest)  # (1, 3, side, side)

    def _rows(self, model: Any, values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        return list(model.model.get_image_features(values).pooler_output)

    def _one_row(self, model: Any, values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        found = model.model.get_image_features(values, vision_feature_select_strategy="full")
        return [rows[:1] for rows in found.pooler_output]

    def language_model(self, model: Any) -> nn.Module:
        return model.model.language_model

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.vision_tower
