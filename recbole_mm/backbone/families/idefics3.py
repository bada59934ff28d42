"""Idefics3 and SmolVLM: pictures between words, few tokens each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from recbole_mm.backbone.families.base import Grid, PictureSettings, Pixels, SquareFamily

if TYPE_CHECKING:
    from recbole_mm.backbone.tiny import TinySizes


class Idefics3(SquareFamily):
    """Idefics3 (Laurençon et al. 2024, arXiv 2408.12637), trained on interleaved text and pictures.

    SmolVLM (arXiv 2504.05299) is the same class. A SigLIP tower's patches are put together by pixel
    shuffle: 81 tokens a picture for SmolVLM-2B. A picture is one square tile, stretched to the
    tower's size: it is not split into tiles, which would cost up to 17 times the tokens.
    """

    chat_head = "User: "
    chat_tail = "<end_of_utterance>\nAssistant:"
    answer_end = "<end_of_utterance>"
    frozen_parts = ("model.vision_model", "model.connector", "lm_head")
    placeholder = "<image>"
    around = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")
    special_tokens = (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>"),
        *("<image>", "<global-img>", "<end_of_utterance>"),
    )
    special_roles: ClassVar[Mapping[str, str]] = {
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
    }

    def __init__(self, tokenizer: Any, config: Any, pictures: PictureSettings) -> None:
        from transformers import Idefics3ImageProcessorPil

        super().__init__(tokenizer, config, pictures)
        self._scale = int(config.scale_factor)
        self.processor = Idefics3ImageProcessorPil(
            size={"longest_edge": self.side},
            max_image_size={"longest_edge": self.side},
            do_image_splitting=False,
        )

    def _needed(self) -> tuple[str, ...]:
        return (self.placeholder, "<fake_token_around_image>", self.answer_end)

    @staticmethod
    def model_class() -> Any:
        from transformers import Idefics3ForConditionalGeneration

        return Idefics3ForConditionalGeneration

    @staticmethod
    def tiny_model(sizes: TinySizes, tokenizer: Any, attention: str) -> Any:
        from transformers import Idefics3Config, Idefics3ForConditionalGeneration

        config = Idefics3Config(
            text_config={"model_type": "llama", **sizes.language_model(tokenizer)},
            vision_config={"model_type": "idefics3_vision", **sizes.square_tower()},
            image_token_id=tokenizer.get_vocab()["<image>"],
            scale_factor=2,
            tie_word_embeddings=True,
            attn_implementation=attention,
        )
        return Idefics3ForConditionalGeneration(config)

    def token_grid(self, grid: Grid) -> Grid:
        return grid[0], grid[1] // self._scale, grid[2] // self._scale

    def _take(self, image: Any) -> Pixels:
        out = self.processor(images=[image], return_tensors="pt")
        return Pixels(out["pixel_values"][0], self.largest)  # (1, 3, side, side)

    def _rows(self, model: Any, values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        found = model.model.get_image_features(values[:, None])  # (B, one tile, 3, side, side)
        return list(found.pooler_output)

    def language_model(self, model: Any) -> nn.Module:
        return model.model.text_model

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.vision_model
