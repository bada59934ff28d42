"""Language models that read text alone and have a chat template of their own, such as Llama 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from recbole_mm.backbone.families.base import PictureSettings
from recbole_mm.backbone.families.causal_lm import CausalLM
from recbole_mm.errors import UserError

_WORDS = "<<what the user says>>"  # where a template puts it


class ChatLM(CausalLM):
    """A causal language model whose tokenizer says how a turn is written; tiny, it is a Llama.

    The template is asked once, with a mark in place of the user's words: what stands before and
    after the mark frames every prompt, and no text from outside passes through it.
    """

    chat_head, chat_tail = "user\n", "assistant\n"  # words that the tiny tokenizer is to know
    asks_template = True
    special_tokens = ("<|begin_of_text|>", "<|start_of_turn|>", "<|end_of_turn|>", "<|pad|>")
    special_roles: ClassVar[Mapping[str, str]] = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_turn|>",
        "pad_token": "<|pad|>",
        # of the tiny form's tokenizer
        "chat_template": (
            "{{ bos_token }}{% for message in messages %}<|start_of_turn|>{{ message.role }}\n"
            "{{ message.content }}<|end_of_turn|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_of_turn|>assistant\n{% endif %}"
        ),
    }

    def __init__(self, tokenizer: Any, config: Any, pictures: PictureSettings) -> None:
        super().__init__(tokenizer, config, pictures)
        self.check(tokenizer)
        said = [{"role": "user", "content": _WORDS}]
        whole = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        self.chat_head, self.chat_tail = whole.split(_WORDS)

    @staticmethod
    def check(tokenizer: Any) -> None:
        """Raises `UserError` for a tokenizer that does not say how a turn is written."""
        if tokenizer.chat_template is None:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} has no chat "
                "template: take a model that was trained to chat, or set `family: causal_lm` in "
                "its YAML, which writes the turn in words."
            )
