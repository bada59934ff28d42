"""The tiny form of a family: the same model classes, two layers, a tokenizer of the dataset's text.

It needs no network and is trained in full. It is there to try everything out, to test, and for data
whose signal a small model can learn from scratch; it knows nothing of language or of pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from recbole_mm.backbone.families import Family
from recbole_mm.backbone.prompt import clean_text

_FIXED_TEXT_WEIGHT = 1000  # times that fixed text counts, so that its words become single tokens
# Of Gaussian weights. Wide layers take 0.02; at 128 wide that starves attention, and learning to
# point at a line takes twice the steps.
_INIT_STD = 0.08
_CONTEXT = 32_768  # tokens, as Qwen2-VL's


@dataclass(frozen=True)
class TinySizes:
    """Sizes of a tiny backbone; with the defaults 0.6 M parameters beside the vocabulary.

    `image_size` and `patch_size`, in pixels, are of towers that take squares alone.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vision_depth: int = 2
    vision_dim: int = 64
    vision_heads: int = 2
    vision_mlp_ratio: int = 2
    image_size: int = 56
    patch_size: int = 14

    @property
    def init_std(self) -> float:
        """Standard deviation of the weights at the start."""
        return _INIT_STD

    def language_model(self, tokenizer: Any) -> dict[str, Any]:
        """The language model's part of a configuration, alike for all families."""
        return {
            "vocab_size": len(tokenizer),
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": _CONTEXT,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "initializer_range": self.init_std,
        }

    def square_tower(self) -> dict[str, Any]:
        """The configuration of a vision tower that takes squares."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.vision_dim,
            "intermediate_size": self.vision_dim * self.vision_mlp_ratio,
            "num_hidden_layers": self.vision_depth,
            "num_attention_heads": self.vision_heads,
            "initializer_range": self.init_std,
        }


def train_tokenizer(
    family: type[Family], texts: Iterable[str], fixed: Iterable[str], vocab_size: int
) -> Any:
    """A byte-level BPE tokenizer of Qwen's class and with its pre-tokenisation, for every family.

    Args:
        family: whose special tokens it has.
        texts: the dataset's own texts.
        fixed: texts of the prompt template; their words become single tokens.
        vocab_size: tokens in all; at least 512.
    """
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer(vocab={}, merges=[])
    core = blank.backend_tokenizer
    core.model = BPE()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(family.special_tokens),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(texts, fixed), trainer)
    vocab, merges = _vocabulary(core)
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        extra_special_tokens=list(family.special_tokens),
        **family.special_roles,
    )


def _corpus(texts: Iterable[str], fixed: Iterable[str]) -> Iterator[str]:
    """The training text; without brackets, so that the letter in ``(A)`` stays its own token."""
    for text in fixed:
        yield from [text.replace("(", " ")] * _FIXED_TEXT_WEIGHT
    for text in texts:
        yield clean_text(text).replace("(", " ")


def _vocabulary(core: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary with its ids, whose order is that of the merges."""
    vocab = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()


def build(family: type[Family], sizes: TinySizes, tokenizer: Any, seed: int, attention: str) -> Any:
    """A model of the family with these sizes and seeded random weights, fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.tiny_model(sizes, tokenizer, attention)
