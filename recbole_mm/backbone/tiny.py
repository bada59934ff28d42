"""The tiny form of a family: the same classes, two layers, a tokenizer of the dataset's own text.

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

from recbole_mm.backbone.prompt import clean_text

# Qwen2-VL's special tokens, in its order.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_FIXED_TEXT_WEIGHT = 1000  # times that fixed text counts, so that its words become single tokens
# Of Gaussian weights. Wide layers take 0.02; at 128 wide that starves attention, and learning to
# point at a line takes twice the steps.
_INIT_STD = 0.08


@dataclass(frozen=True)
class TinySizes:
    """Sizes of a tiny backbone; with the defaults 0.6 M parameters beside the vocabulary."""

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


def train_tokenizer(texts: Iterable[str], fixed: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of Qwen's class, with its pre-tokenisation and special tokens.

    Args:
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
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(texts, fixed), trainer)
    vocab, merges = _vocabulary(core)
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",  # noqa: S106 (no password)
        extra_special_tokens=list(SPECIAL_TOKENS),
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


def build_qwen2_vl(sizes: TinySizes, tokenizer: Any, seed: int, attention: str) -> Any:
    """A `Qwen2VLForConditionalGeneration` of these sizes with seeded random weights, fp32."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = tokenizer.get_vocab()
    half_head = sizes.hidden_size // sizes.heads // 2
    height = 3 * half_head // 8  # Qwen's own share: 16, 24 and 24 of 64
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "initializer_range": _INIT_STD,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [half_head - 2 * height, height, height],
        },
    }
    vision = {
        "depth": sizes.vision_depth,
        "embed_dim": sizes.vision_dim,
        "hidden_size": sizes.hidden_size,
        "num_heads": sizes.vision_heads,
        "mlp_ratio": sizes.vision_mlp_ratio,
        "initializer_range": _INIT_STD,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2VLForConditionalGeneration(config)
