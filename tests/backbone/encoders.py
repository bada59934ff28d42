"""Folders of tiny encoders of the real classes, as the hub and sentence-transformers lay them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    MPNetConfig,
    MPNetModel,
    MPNetTokenizer,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTokenizer,
    T5Config,
    T5Model,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-!<>|/[]"
TITLES = [
    "red nail polish",
    "blue nail polish, 0.5 oz",
    "shampoo",
    "a shampoo for dry hair - 12 oz, pack of 2",
    "soap",
    "green tea soap with honey and oats",
    "x",
]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,  # so that vectors of tiny random models differ well
}
TOWER = {**SIZES, "image_size": 32, "patch_size": 16}


def _save(folder: Path, model: type, config: Any, *parts: Any) -> Path:
    torch.manual_seed(5)
    model(config).save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def wordpieces(*special: str) -> dict[str, int]:
    """A vocabulary of single letters, at the start of a word and inside it."""
    pieces = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return {piece: i for i, piece in enumerate(pieces)}


def bert(folder: Path, **changes: Any) -> Path:
    vocab = wordpieces("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = BertTokenizer(vocab=vocab, do_lower_case=False, model_max_length=40)
    sizes = {**SIZES, "vocab_size": len(vocab), "max_position_embeddings": 40}
    return _save(folder, BertModel, BertConfig(**{**sizes, **changes}), tokenizer)


def mpnet(folder: Path) -> Path:
    """Counts positions from its padding's on: reads 38 tokens of 40; its tokenizer says nothing."""
    vocab = wordpieces("<s>", "<pad>", "</s>", "[UNK]", "<mask>")
    sizes = {**SIZES, "vocab_size": len(vocab), "max_position_embeddings": 40}
    return _save(folder, MPNetModel, MPNetConfig(**sizes), MPNetTokenizer(vocab=vocab))


def t5(folder: Path) -> Path:
    """An encoder with a decoder, with BERT's tokenizer."""
    vocab = wordpieces("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = BertTokenizer(vocab=vocab, do_lower_case=False)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return _save(folder, T5Model, T5Config(**sizes, vocab_size=len(vocab)), tokenizer)


def sentence_transformer(
    folder: Path,
    mode: str = "mean_tokens",
    normalize: bool = True,
    most: int | None = None,
    lower: bool = False,
    kinds: tuple[str, ...] | None = None,
) -> Path:
    """The tiny BERT with the files that sentence-transformers adds."""
    kinds = kinds or ("Transformer", "Pooling", *["Normalize"] * normalize)
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    bert(folder)
    write(folder / "modules.json", modules)
    write(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": 16, **{f"pooling_mode_{m}": True for m in mode.split("+")}},
    )
    if most or lower:
        write(
            folder / "sentence_bert_config.json", {"max_seq_length": most, "do_lower_case": lower}
        )
    return folder


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def clip(folder: Path, old_end: bool = False) -> Path:
    """CLIP; `old_end`: with the wrong end token in its configuration that OpenAI's files have."""
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=24
    )
    text = {**SIZES, "vocab_size": len(pieces), "max_position_embeddings": 24}
    text["eos_token_id"] = 2 if old_end else len(pieces) - 1
    config = CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=12)
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return _save(folder, CLIPModel, config, tokenizer, pictures)


def siglip(folder: Path) -> Path:
    """SigLIP with a real SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TITLES * 4 + list(LETTERS)),
        model_writer=model,
        vocab_size=72,
        hard_vocab_limit=False,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=0,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"))
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=TOWER)
    pictures = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return _save(folder, SiglipModel, config, tokenizer, pictures)


def siglip2(folder: Path) -> Path:
    """SigLIP 2 of any resolution, whose pictures come as patches with a mask."""
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "▁": 5}
    vocab |= {letter: i + 6 for i, letter in enumerate(LETTERS)}
    tokenizer = Siglip2Tokenizer(vocab=vocab, merges=[], padding_side="right")
    text = {**SIZES, "vocab_size": len(vocab), "max_position_embeddings": 16, "projection_size": 16}
    tower = {**SIZES, "patch_size": 16, "num_patches": 4}
    config = Siglip2Config(text_config=text, vision_config=tower)
    pictures = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=4)
    return _save(folder, Siglip2Model, config, tokenizer, pictures)


TOWERS: dict[str, Callable[[Path], Path]] = {"clip": clip, "siglip": siglip, "siglip2": siglip2}


def pictures(count: int = 5) -> list[Image.Image]:
    """Noise of different shapes."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(20, 90, (count, 2))
    return [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]
