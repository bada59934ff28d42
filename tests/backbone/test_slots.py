"""Slots: vectors where tokens would stand, and branches that do not see each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recbole_mm.backbone.prompt import Prompt, fork, join, text_piece
from recbole_mm.backbone.slots import (
    READ,
    Packed,
    SlotModel,
    block_mask,
    collate_packed,
    pack,
    slot_piece,
)

WORDS, WIDTH, PAD = 40, 16, 0
HOLDER = 7  # a token that texts have too: what stands in a slot cannot be found by its id


def causal_model(kind: str, attention: str = "sdpa") -> Any:
    """A small model with random weights that differ enough for mistakes to show."""
    import transformers

    shared = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 64,
              "attn_implementation": attention, "bos_token_id": 1, "eos_token_id": 2,
              "pad_token_id": 0}  # fmt: skip
    if kind == "OPT":
        shared |= {"ffn_dim": 24, "word_embed_proj_dim": WIDTH, "dropout": 0.0}
    else:
        shared |= {"intermediate_size": 24, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**shared)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def words(*ids: int) -> Prompt:
    return text_piece(ids, 1)


TRUNK = join([words(1, 5, HOLDER), slot_piece(9, HOLDER), words(6, 8), slot_piece(4, HOLDER)])
SHORT = join([words(1, HOLDER), slot_piece(4, HOLDER)])
ASKING = join([words(11, 12), slot_piece(READ, HOLDER)])
ANSWER = words(13, HOLDER, 14, 15, 2)


@pytest.fixture
def vectors() -> dict[int, Tensor]:
    torch.manual_seed(1)
    return {key: torch.randn(WIDTH, requires_grad=True) for key in (READ, 9, 4)}


def naive(model: Any, prompt: Prompt, vectors: dict[int, Tensor]) -> Tensor:
    """One prompt alone, its embeddings put together token by token. (T, width)."""
    at = {slot.start: slot.item for slot in prompt.slots}
    table = model.get_input_embeddings().weight
    rows = [vectors[at[t]] if t in at else table[int(i)] for t, i in enumerate(prompt.ids)]
    found = model.base_model(inputs_embeds=torch.stack(rows)[None], use_cache=False)
    return found.last_hidden_state[0]


def packed_states(
    model: Any, rows: list[Packed], vectors: dict[int, Tensor]
) -> tuple[Any, Tensor, Tensor]:
    """The batch, states of the slots `READ`, and log-probabilities of the answers."""
    batch = collate_packed(rows, PAD)
    reader = SlotModel(model)
    states = reader(batch, torch.stack([vectors[key] for key in batch.keys]), vectors[READ])
    logits = reader.logits(states[batch.answer_at])
    told = logits.log_softmax(1).gather(1, batch.answer_ids[:, None])[:, 0]
    return batch, states[batch.read_at], told


def gradients(loss: Tensor, vectors: dict[int, Tensor], model: Any) -> list[Tensor]:
    inputs = [*vectors.values(), *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "OPT"])
def test_a_packed_row_equals_prompts_of_their_own(
    kind: str, attention: str, vectors: dict[int, Tensor]
) -> None:
    model = causal_model(kind, attention)
    rows = [
        pack(fork(TRUNK, [ASKING, ANSWER]), (0, 3)),
        pack(fork(SHORT, [ASKING])),
        pack(fork(SHORT, [ASKING, ANSWER]), (0, 4)),
    ]
    _, read, told = packed_states(model, rows, vectors)
    reads, tells = [], []
    for trunk in (TRUNK, SHORT, SHORT):
        reads.append(naive(model, join([trunk, ASKING]), vectors)[-1])
    for trunk, n in ((TRUNK, 3), (SHORT, 4)):
        whole = join([trunk, ANSWER])
        logits = model.lm_head(naive(model, whole, vectors)).log_softmax(1)
        tells += [logits[t - 1, whole.ids[t]] for t in range(len(whole) - n, len(whole))]
    torch.testing.assert_close(read, torch.stack(reads), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told, torch.stack(tells), rtol=1e-4, atol=1e-5)
    weight = torch.randn(WIDTH)
    ours = gradients((read @ weight).sum() - told.sum(), vectors, model)
    loss = (torch.stack(reads) @ weight).sum() - torch.stack(tells).sum()
    for mine, theirs in zip(ours, gradients(loss, vectors, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert all(gradient.abs().sum() > 0 for gradient in ours[: len(vectors)])


def test_a_placeholder_is_never_looked_at(vectors: dict[int, Tensor]) -> None:
    model = causal_model("Llama")
    other = join([words(1, 5, HOLDER), slot_piece(9, 3), words(6, 8), slot_piece(4, 22)])
    _, read, _ = packed_states(model, [pack(fork(TRUNK, [ASKING]))], vectors)
    _, same, _ = packed_states(model, [pack(fork(other, [ASKING]))], vectors)
    assert torch.equal(read, same)


def test_a_row_alone_equals_the_row_among_others(vectors: dict[int, Tensor]) -> None:
    model = causal_model("Llama")
    rows = [pack(fork(SHORT, [ASKING])), pack(fork(TRUNK, [ASKING]))]
    _, together, _ = packed_states(model, rows, vectors)
    for row, state in zip(rows, together, strict=True):
        _, alone, _ = packed_states(model, [row], vectors)
        torch.testing.assert_close(alone[0], state, rtol=1e-5, atol=1e-6)


def test_slots_are_where_they_were_put() -> None:
    row = pack(fork(TRUNK, [ASKING, ANSWER]), (0, 2))
    assert [(slot.item, slot.start) for slot in row.prompt.slots] == [(9, 3), (4, 6), (READ, 9)]
    assert row.branch.tolist() == [0] * 7 + [1] * 3 + [2] * 5
    assert row.prompt.positions[0].tolist() == [*range(7), 7, 8, 9, 7, 8, 9, 10, 11]
    batch = collate_packed([pack(fork(SHORT, [ASKING])), row], PAD)
    T = len(row)
    assert batch.keys == [4, 9]
    assert batch.slot_at.tolist() == [2, T + 3, T + 6]
    assert batch.slot_key.tolist() == [0, 1, 0]
    assert batch.read_at.tolist() == [5, T + 9]
    assert batch.answer_at.tolist() == [T + 12, T + 13]
    assert batch.answer_ids.tolist() == [15, 2]
    assert batch.positions[0].tolist() == list(range(T))
    assert batch.branch[0].tolist() == [0] * 3 + [1] * 3 + [-1] * (T - 6)


def test_the_mask_is_what_it_says() -> None:
    branch = torch.tensor([[0, 0, 1, 2, 2, -1]])
    seen = block_mask(branch)[0, 0]
    for query in range(6):
        for key in range(6):
            of = (int(branch[0, query]), int(branch[0, key]))
            assert bool(seen[query, key]) == (key <= query and (of[1] == 0 or of[0] == of[1]))
    assert not collate_packed([pack(fork(SHORT, [ASKING]))], PAD).is_forked


def test_an_answer_follows_something() -> None:
    with pytest.raises(ValueError, match="before it"):
        pack(fork(SHORT, [ASKING, ANSWER]), (0, len(ANSWER)))


def test_adapters_leave_the_arithmetic_as_it_is() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = causal_model("Llama").to(torch.bfloat16)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj", "q_proj"]), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    model.get_input_embeddings().float()
    assert SlotModel(model).dtype == torch.bfloat16


def test_frozen_low_precision_gives_gradients_to_float_vectors(vectors: dict[int, Tensor]) -> None:
    model = causal_model("Llama").to(torch.bfloat16).requires_grad_(False)
    rows = [pack(fork(TRUNK, [ASKING, ANSWER]), (0, 3))]
    _, read, told = packed_states(model, rows, vectors)
    (read.float().sum() - told.sum()).backward()
    assert told.dtype == torch.float32
    for vector in vectors.values():
        assert vector.grad is not None
        assert vector.grad.dtype == torch.float32
        assert np.isfinite(vector.grad.numpy()).all()
