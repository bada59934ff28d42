"""Language models that read text alone, such as Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from recbole_mm.backbone.families.base import Family, PictureSettings

if TYPE_CHECKING:
    from recbole_mm.backbone.tiny import TinySizes


class CausalLM(Family):
    """A causal language model of `transformers` whose head is its `lm_head`; tiny, it is a Llama.

    The turn is written in words, as for models that were never trained to chat (LlamaRec, Yue et
    al. 2023, arXiv 2311.02089): a chat model's own template is not used.
    """

    chat_head = "### Instruction:\n"
    chat_tail = "\n### Response:\n"
    special_tokens: ClassVar[tuple[str, ...]] = ("<unk>", "<s>", "</s>")
    special_roles: ClassVar[Mapping[str, str]] = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }

    def __init__(self, tokenizer: Any, config: Any, pictures: PictureSettings) -> None:
        super().__init__(tokenizer, config, pictures)
        self.answer_end = tokenizer.eos_token

    @staticmethod
    def model_class() -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    @staticmethod
    def tiny_model(sizes: TinySizes, tokenizer: Any, attention: str) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            **sizes.language_model(tokenizer),
            tie_word_embeddings=True,
            attn_implementation=attention,
        )
        return LlamaForCausalLM(config)

    def language_model(self, model: Any) -> nn.Module:
        return model.base_model
