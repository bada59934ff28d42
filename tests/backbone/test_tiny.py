"""The tiny backbone: the same from seed and texts in every process, and as small as it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from recbole_mm.backbone.families.qwen import Qwen2VL
from recbole_mm.backbone.load import Backbone, load_backbone
from recbole_mm.backbone.tiny import TinySizes, fingerprint, train_tokenizer
from recbole_mm.backbone.verbalizer import LETTERS
from tests.backbone.other_process import weights_digest
from tests.backbone.shop import STYLE, TEXTS, backbone_of, spec_of
from tests.conftest import REPO


def test_seed_and_texts_make_the_same_backbone(backbone: Backbone) -> None:
    again = backbone_of()
    assert again.tokenizer_fingerprint == backbone.tokenizer_fingerprint
    assert weights_digest(again.model) == weights_digest(backbone.model)


def test_another_process_makes_the_same_backbone(
    backbone: Backbone, second_process: dict[str, Any]
) -> None:
    assert second_process["fingerprint"] == backbone.tokenizer_fingerprint
    assert second_process["weights"] == weights_digest(backbone.model)


def test_another_seed_makes_other_weights_and_the_same_tokenizer(backbone: Backbone) -> None:
    other = backbone_of(seed=1)
    assert other.tokenizer_fingerprint == backbone.tokenizer_fingerprint
    assert weights_digest(other.model) != weights_digest(backbone.model)


def test_other_texts_make_another_tokenizer(backbone: Backbone) -> None:
    other = load_backbone(spec_of(), ["zebra quilt"] * 9, STYLE.fixed_text(), 0)
    assert other.tokenizer_fingerprint != backbone.tokenizer_fingerprint
    assert other.tokenizer_fingerprint == fingerprint(other.tokenizer)


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    backbone_of()
    assert torch.equal(torch.rand(3), expected)


def test_about_half_a_million_parameters_beside_the_vocabulary(backbone: Backbone) -> None:
    model: Any = backbone.model
    vocabulary = model.get_input_embeddings().weight
    assert model.lm_head.weight is vocabulary
    beside = sum(p.numel() for p in model.parameters()) - vocabulary.numel()
    assert 500_000 < beside < 650_000
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_the_shipped_sizes_are_the_defaults() -> None:
    shipped = yaml.safe_load((REPO / "properties/backbone/qwen2-vl-2b.yaml").read_text())["tiny"]
    shipped.pop("settings")
    assert TinySizes(**shipped) == TinySizes()


def test_it_is_the_real_thing_s_class(backbone: Backbone) -> None:
    from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration

    assert type(backbone.model) is Qwen2VLForConditionalGeneration
    assert isinstance(backbone.tokenizer, Qwen2Tokenizer)
    rope = backbone.model.config.text_config.rope_parameters
    assert sum(rope["mrope_section"]) == 128 // 4 // 2


def test_config_and_tokenizer_agree_on_special_tokens(backbone: Backbone) -> None:
    vocab = backbone.tokenizer.get_vocab()
    config = backbone.model.config
    assert config.image_token_id == vocab["<|image_pad|>"]
    assert config.video_token_id == vocab["<|video_pad|>"]
    assert config.vision_start_token_id == vocab["<|vision_start|>"]
    assert config.vision_end_token_id == vocab["<|vision_end|>"]
    assert config.text_config.eos_token_id == vocab["<|im_end|>"]
    assert backbone.pad_id == vocab["<|endoftext|>"]
    assert set(Qwen2VL.special_tokens) == set(backbone.tokenizer.get_added_vocab())
    for token in Qwen2VL.special_tokens:
        assert backbone.encoder.trusted(token) == [vocab[token]]


# --- the tokenizer --------------------------------------------------------------------------------


def test_the_vocabulary_is_no_larger_than_asked_for() -> None:
    texts = [f"word{n} {n * 7919} {chr(0x4E00 + n)}" for n in range(2000)]
    tokenizer = train_tokenizer(Qwen2VL, texts, STYLE.fixed_text(), 600)
    assert len(tokenizer) == 600
    assert sorted(tokenizer.get_vocab().values()) == list(range(600))


def test_words_of_the_template_are_single_tokens_however_much_text_there_is() -> None:
    texts = [f"{'ab'[n % 2]}{n * 104729:x} {n * 7919:x}" for n in range(3000)]
    tokenizer = train_tokenizer(Qwen2VL, texts, STYLE.fixed_text(), 1024)
    for word in ("image", "title", "price", "brand", "History", "Candidates", " candidate"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word


@pytest.mark.parametrize("text", ["any ünïcödé 日本 😀\n\t", "(A)(B)", "", *TEXTS[3].values()])
def test_every_text_comes_back_from_its_tokens(backbone: Backbone, text: str) -> None:
    ids = backbone.encoder.plain(text)
    assert backbone.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_letter_in_brackets_is_a_token_of_its_own() -> None:
    """Although texts are full of bracketed letters: the label and the answer are then one token."""
    texts = [f"({letter}) ({letter}) ({letter}bc)" for letter in LETTERS] * 50
    tokenizer = train_tokenizer(Qwen2VL, texts, STYLE.fixed_text(), 1024)
    for letter in LETTERS:
        ids = tokenizer.encode(f"({letter})", add_special_tokens=False)
        assert len(ids) == 3
        assert tokenizer.encode(letter, add_special_tokens=False) == [ids[1]]
