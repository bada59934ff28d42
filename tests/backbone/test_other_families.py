"""Every family: our way (cached pieces, spliced rows) against its own Hugging Face model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_mm.backbone.batch import collate
from recbole_mm.backbone.families import FAMILIES
from recbole_mm.backbone.load import Backbone
from recbole_mm.backbone.prompt import TextEncoder
from recbole_mm.backbone.tiny import train_tokenizer
from recbole_mm.errors import UserError
from tests.backbone.families import (
    FAMILY_NAMES,
    SEEING,
    family_backbone,
    family_prompts,
    our_logits,
    stock_logits,
)
from tests.backbone.shop import CANDIDATES, HISTORIES, PLACES, STYLE, TEXTS, picture, ranker_of

CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "causal_lm": "LlamaForCausalLM",
    "chat_lm": "LlamaForCausalLM",
}
TOKENS = {"llava": 9, "idefics3": 9}  # a picture: 3 x 3 patches; 6 x 6 of which four are one


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def any_backbone(request: pytest.FixtureRequest) -> Backbone:
    return family_backbone(request.param)


@pytest.fixture(scope="module", params=SEEING)
def seeing(request: pytest.FixtureRequest) -> Backbone:
    return family_backbone(request.param)


@pytest.fixture(scope="module", params=SEEING)
def pooled(request: pytest.FixtureRequest) -> Backbone:
    return family_backbone(request.param, image_pooling="cls")


# --- the forward pass -----------------------------------------------------------------------------


@torch.no_grad()
def test_each_prompt_is_the_stock_models_at_every_position(any_backbone: Backbone) -> None:
    assert type(any_backbone.model).__name__ == CLASSES[any_backbone.spec.family]
    for prompt in family_prompts(any_backbone):
        ours = our_logits(any_backbone, [prompt], positions=len(prompt))
        torch.testing.assert_close(ours, stock_logits(any_backbone, [prompt]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_padded_batch_is_the_stock_models(any_backbone: Backbone) -> None:
    prompts = family_prompts(any_backbone)
    assert len({len(prompt) for prompt in prompts}) > 2
    expected, ours = stock_logits(any_backbone, prompts), our_logits(any_backbone, prompts)
    for row, prompt in enumerate(prompts):
        at_end = expected[row, len(prompt) - 1]
        torch.testing.assert_close(ours[row, 0], at_end, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_matter(any_backbone: Backbone) -> None:
    """The parity above is not for want of an effect of the positions."""
    prompt = family_prompts(any_backbone)[0]
    model: Any = any_backbone.family.language_model(any_backbone.model)
    embeds = torch.randn(1, len(prompt), 128, generator=torch.Generator().manual_seed(0))
    positions = torch.from_numpy(prompt.positions)[:, None]  # (A, 1, T)
    states = [
        model(inputs_embeds=embeds, position_ids=some.squeeze(0), use_cache=False).last_hidden_state
        for some in (positions, positions * 3)
    ]
    assert (states[0] - states[1]).abs().max() > 1e-3


def test_sets_behind_one_history_score_as_prompts_of_their_own(any_backbone: Backbone) -> None:
    ranker = ranker_of(any_backbone)
    sets = np.stack([CANDIDATES, CANDIDATES[::-1, ::-1]], axis=1)
    found = ranker.set_log_probs(HISTORIES, sets)
    for column in range(2):
        expected = ranker.log_probs(HISTORIES, sets[:, column])
        torch.testing.assert_close(found[:, column], expected, atol=1e-5, rtol=0)


def test_every_part_learns(any_backbone: Backbone) -> None:
    """What the tiny form trains: the tower and what follows it too, but what LLaVA never reads."""
    backbone = family_backbone(any_backbone.spec.family)
    prompts = family_prompts(backbone)
    our_logits(backbone, prompts).square().sum().backward()
    idle = {n for n, p in backbone.model.named_parameters() if p.grad is None or not p.grad.any()}
    tower = "model.vision_tower."
    unread = (f"{tower}post_layernorm", f"{tower}encoder.layers.1.")  # behind the selected layer
    assert all(name.startswith(unread) for name in idle), idle
    assert bool(idle) == (backbone.spec.family == "llava")


def test_a_padded_row_does_not_look_like_several_prompts(any_backbone: Backbone) -> None:
    """Positions that began anew would be taken for prompts packed together, and need a mask."""
    prompts = family_prompts(any_backbone)
    positions = collate(prompts, any_backbone.pad_id).positions
    if len(positions) == 1:
        assert (positions.diff(dim=2) == 1).all()
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    for row, prompt in enumerate(prompts):
        behind = positions[:, row, len(prompt) :]
        assert (behind == prompt.span + torch.arange(behind.shape[1])).all()
        assert (behind.shape[1] == 0) == (row == longest)


# --- pictures -------------------------------------------------------------------------------------


@torch.no_grad()
def test_as_many_rows_as_placeholders(seeing: Backbone) -> None:
    family: Any = seeing.family
    pad = seeing.tokenizer.convert_tokens_to_ids(family.placeholder)
    for item in (1, 3, 4):
        pixels = family.pixels(picture(item))
        piece = family.image_piece(item, pixels.grid)
        (rows,) = family.encode(seeing.model, [pixels])
        assert (piece.ids == pad).sum() == len(rows) == piece.slots[0].count
        assert len(rows) == TOKENS.get(seeing.spec.family, len(rows))
        assert rows.shape[1] == 128
        assert len(piece) <= len(family.largest_image_piece())


@torch.no_grad()
def test_pictures_encoded_together_are_those_encoded_alone(seeing: Backbone) -> None:
    family: Any = seeing.family
    pixels = [family.pixels(picture(item)) for item in (1, 3, 4)]
    together = family.encode(seeing.model, pixels)
    for rows, one in zip(together, pixels, strict=True):
        torch.testing.assert_close(rows, family.encode(seeing.model, [one])[0], atol=1e-5, rtol=0)


def test_a_picture_too_stretched_is_none(seeing: Backbone) -> None:
    assert seeing.family.pixels(Image.new("RGB", (4000, 20))) is None
    assert seeing.family.pixels(Image.new("RGB", (20, 3900))) is not None


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_a_tower_that_does_not_fit_the_budget_is_the_users_mistake(name: str) -> None:
    with pytest.raises(UserError, match=r"84 x 84 pixels: set max_pixels to 7056"):
        family_backbone(name, max_pixels=7055)


@pytest.mark.parametrize("name", SEEING)
def test_another_familys_tokenizer_is_the_users_mistake(name: str) -> None:
    other = "qwen2_vl" if not name.startswith("qwen") else "llava"
    tokenizer = train_tokenizer(FAMILIES[other], ["a"], STYLE.fixed_text(), 512)
    backbone = family_backbone(name)
    with pytest.raises(UserError, match="has no token <"):
        FAMILIES[name](tokenizer, backbone.model.config, backbone.spec.pictures())


# --- one token a picture --------------------------------------------------------------------------


@torch.no_grad()
def test_pooled_pictures_are_one_token_and_one_row(pooled: Backbone) -> None:
    family: Any = pooled.family
    everything: Any = family_backbone(pooled.spec.family)
    for item in (1, 4):
        pixels = family.pixels(picture(item))
        piece, whole = (of.family.image_piece(item, pixels.grid) for of in (pooled, everything))
        assert piece.slots[0].count == 1
        assert len(whole) - len(piece) == whole.slots[0].count - 1
        assert piece.span == len(piece)
        assert piece.positions[0].tolist() == list(range(len(piece)))
        (row,) = family.encode(pooled.model, [pixels])
        assert row.shape == (1, 128)
        (rows,) = everything.family.encode(everything.model, [pixels])
        is_mean = torch.allclose(row[0], rows.mean(dim=0), atol=1e-6)
        assert is_mean == (pooled.spec.family != "llava")


@torch.no_grad()
def test_llavas_one_row_is_its_cls_token_projected() -> None:
    backbone: Any = family_backbone("llava", image_pooling="cls")
    pixels = backbone.family.pixels(picture(1))
    tower, projector = backbone.model.model.vision_tower, backbone.model.model.multi_modal_projector
    states = tower(pixels.values, output_hidden_states=True).hidden_states
    (row,) = backbone.family.encode(backbone.model, [pixels])
    torch.testing.assert_close(row[0], projector(states[-2][0, 0]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_llava_nexts_rows_are_the_base_view_of_the_stock_model() -> None:
    backbone: Any = family_backbone("llava_next", tiny={"image_size": 84, "patch_size": 28})
    pixels = backbone.family.pixels(picture(4))
    (rows,) = backbone.family.encode(backbone.model, [pixels])
    views = pixels.values[None].expand(1, 2, -1, -1, -1)  # the base and one tile
    stock = backbone.model.get_image_features(views, image_sizes=torch.tensor([[84, 84]]))
    torch.testing.assert_close(rows[:9], stock.pooler_output[0][:9], atol=1e-5, rtol=1e-5)
    assert torch.equal(rows[9], backbone.model.model.image_newline)
    assert backbone.family.image_piece(4, pixels.grid).slots[0].count == len(rows) == 10


def test_a_tokenizer_without_a_chat_template_is_the_users_mistake() -> None:
    backbone: Any = family_backbone("chat_lm")
    backbone.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template: take a model that was trained to"):
        FAMILIES["chat_lm"](backbone.tokenizer, backbone.model.config, backbone.spec.pictures())


def test_pooled_prompts_are_shorter_and_still_see(pooled: Backbone) -> None:
    lengths = [len(prompt) for prompt in family_prompts(pooled)]
    whole = [len(prompt) for prompt in family_prompts(family_backbone(pooled.spec.family))]
    assert all(a <= b for a, b in zip(lengths, whole, strict=True))
    assert sum(lengths) < sum(whole)
    before = ranker_of(pooled).log_probs(HISTORIES, CANDIDATES)
    blind = ranker_of(pooled)
    blind.images._load = lambda item: Image.new("RGB", (56, 56))
    assert (blind.log_probs(HISTORIES, CANDIDATES) - before).abs().max() > 1e-3


# --- prompts --------------------------------------------------------------------------------------


def test_a_prompt_is_the_whole_text_encoded_at_once(any_backbone: Backbone) -> None:
    """Chat turn, special tokens and placeholders too."""
    for prompt in family_prompts(any_backbone):
        text = any_backbone.tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False)
        head = any_backbone.family.chat_head
        assert text.startswith(head)
        assert text.endswith(any_backbone.family.chat_tail)
        assert any_backbone.encoder.trusted(text) == prompt.ids.tolist()


TURNS = {
    "llava": "<s>USER: {} ASSISTANT:",
    "idefics3": "<|im_start|>User: {}<end_of_utterance>\nAssistant:",
    "llava_next": "<s>[INST] {} [/INST]",
    "causal_lm": "<s>### Instruction:\n{}\n### Response:\n",
    "chat_lm": (
        "<|begin_of_text|><|start_of_turn|>user\n{}<|end_of_turn|><|start_of_turn|>assistant\n"
    ),
}


@pytest.mark.parametrize(("name", "turn"), TURNS.items())
def test_the_turn_of_a_chat(name: str, turn: str) -> None:
    family = family_backbone(name).family
    assert f"{family.chat_head}{{}}{family.chat_tail}" == turn


def test_words_of_the_turn_are_few_tokens(any_backbone: Backbone) -> None:
    """A tiny tokenizer is trained on the family's own words."""
    family = any_backbone.family
    assert len(any_backbone.encoder.trusted(family.chat_tail)) <= 7


# --- training -------------------------------------------------------------------------------------


def test_it_learns_a_handful_of_prompts(any_backbone: Backbone) -> None:
    backbone = family_backbone(any_backbone.spec.family)
    ranker = ranker_of(backbone).train()
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = ranker.loss(HISTORIES, CANDIDATES, PLACES)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- tokenizers that put a space before what they are given ---------------------------------------


def llama_tokenizer() -> Any:
    """Of Llama's own class: words begin with a mark, what is unknown is spelt in bytes."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaTokenizer

    texts = [value for fields in TEXTS.values() for value in fields.values()]
    texts += [*STYLE.fixed_text(), "(A) (B) (C) (D) A B C D USER: ASSISTANT:"]
    core = Tokenizer(BPE(byte_fallback=True))
    core.pre_tokenizer = Metaspace()
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(texts * 9, BpeTrainer(vocab_size=700, special_tokens=start))
    model = json.loads(core.to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def test_pieces_of_llamas_tokenizer_get_no_space_of_their_own() -> None:
    tokenizer = llama_tokenizer()
    alone = tokenizer.encode("A", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(alone) == ["▁A"]
    encoder = TextEncoder(tokenizer)
    for text in ("A", "(A)", " {", "Red bowl", "日本", "}\n", ""):
        ids = encoder.plain(text)
        assert encoder.trusted(text) == ids
        behind = tokenizer.encode(f"\n{text}", add_special_tokens=False)
        assert tokenizer.encode("\n", add_special_tokens=False) + ids == behind
    assert tokenizer.convert_ids_to_tokens(encoder.plain("A")) == ["A"]
    assert encoder.trusted("<s>A")[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in encoder.plain("<s>A")
