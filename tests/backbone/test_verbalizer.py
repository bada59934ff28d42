"""Letters read from a few rows of the head against the full-vocabulary computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recbole_mm.backbone.load import Backbone
from recbole_mm.backbone.ranker import LetterRanker
from recbole_mm.backbone.verbalizer import LETTERS, Verbalizer
from recbole_mm.errors import UserError
from tests.backbone.shop import CANDIDATES, HISTORIES, PLACES, backbone_of, ranker_of
from tests.backbone.test_families import stock_inputs, stock_logits

K = CANDIDATES.shape[1]


def verbalizer_of(backbone: Backbone, candidates: int = 26) -> Verbalizer:
    return Verbalizer(backbone.encoder, candidates, backbone.family.answer_end)


def test_letters_are_single_tokens_and_all_different(backbone: Backbone) -> None:
    verbalizer = verbalizer_of(backbone)
    assert len(set(verbalizer.ids)) == 26
    assert [backbone.tokenizer.decode([token]) for token in verbalizer.ids] == list(LETTERS)
    assert backbone.tokenizer.decode([verbalizer.end_id]) == "<|im_end|>"


@pytest.mark.parametrize("candidates", [-1, 0, 1, 27, 100])
def test_more_candidates_than_letters_is_the_users_mistake(
    backbone: Backbone, candidates: int
) -> None:
    with pytest.raises(UserError, match=r"n_candidates is -?\d+.*between 2 and 26"):
        verbalizer_of(backbone, candidates)


@pytest.mark.parametrize("unknown", ["<e>", None])  # a token that is left out, or one that stays
def test_a_tokenizer_without_a_token_of_each_letter_is_the_users_mistake(
    unknown: str | None,
) -> None:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    from recbole_mm.backbone.prompt import TextEncoder

    core = Tokenizer(WordLevel({"A": 0, "<e>": 1}, unk_token="<e>"))  # knows no B and no C
    core.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unknown))
    with pytest.raises(UserError, match="single-token letters"):
        Verbalizer(encoder, 3, "<e>")


@pytest.mark.parametrize("count", [2, K, 26])
def test_rows_of_the_head_give_the_full_heads_logits(backbone: Backbone, count: int) -> None:
    verbalizer, head = verbalizer_of(backbone), backbone.head
    hidden = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    expected = head(hidden)[:, verbalizer.ids[:count]]
    found = verbalizer.logits(hidden, head, count)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_heads_bias_counts(backbone: Backbone) -> None:
    verbalizer = verbalizer_of(backbone)
    head = nn.Linear(8, len(backbone.tokenizer))
    hidden = torch.randn(3, 8)
    expected = head(hidden)[:, verbalizer.ids[:K]]
    torch.testing.assert_close(verbalizer.logits(hidden, head, K), expected)


def test_sixteen_bit_states_give_logits_in_fp32(backbone: Backbone) -> None:
    head = nn.Linear(128, len(backbone.tokenizer), bias=False).bfloat16()
    logits = verbalizer_of(backbone).logits(torch.randn(2, 128).bfloat16(), head, K)
    assert logits.dtype == torch.float32


# --- scores and losses of whole prompts -----------------------------------------------------------


def stock_letter_logits(ranker: LetterRanker) -> Tensor:
    """(B, K), by way of every logit of every position."""
    prompts = ranker._write(HISTORIES, CANDIDATES)
    logits = stock_logits(ranker.backbone, prompts)  # (B, T, vocabulary)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
    return logits[torch.arange(len(prompts)), ends][:, ranker.verbalizer.ids]


def stock_letter_loss(ranker: LetterRanker) -> Tensor:
    return F.cross_entropy(stock_letter_logits(ranker), torch.from_numpy(PLACES))


def stock_letter_eos_loss(ranker: LetterRanker) -> Tensor:
    """Hugging Face's own loss, with the answer behind each prompt and labels at it alone."""
    verbalizer, backbone = ranker.verbalizer, ranker.backbone
    prompts = ranker._write(HISTORIES, CANDIDATES)
    inputs = stock_inputs(backbone, prompts)
    inputs = {k: F.pad(v, (0, 2)) if v.ndim == 2 and k != "pixel_values" and k != "image_grid_thw"
              else v for k, v in inputs.items()}  # fmt: skip
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (prompt, place) in enumerate(zip(prompts, PLACES, strict=True)):
        answer = torch.tensor([verbalizer.ids[place], verbalizer.end_id])
        end = len(prompt)
        inputs["input_ids"][row, end : end + 2] = answer
        inputs["attention_mask"][row, end : end + 2] = 1
        labels[row, end : end + 2] = answer
    model: Any = backbone.model
    loss: Tensor = model(**inputs, labels=labels, use_cache=False).loss
    return loss


NAIVE = {"letter": stock_letter_loss, "letter_eos": stock_letter_eos_loss}


@pytest.mark.parametrize("supervise", NAIVE)
def test_losses_and_gradients_are_the_naive_ones(supervise: str) -> None:
    ranker = ranker_of(backbone_of(seed=4), supervise=supervise)
    losses, gradients = [], []
    for compute in (
        lambda: ranker.loss(HISTORIES, CANDIDATES, PLACES),
        lambda: NAIVE[supervise](ranker),
    ):
        ranker.zero_grad()
        loss = compute()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in ranker.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    for name, expected in gradients[1].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(
            gradients[0][name], expected, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- memory with a large vocabulary ---------------------------------------------------------------
LARGE = 150_000  # tokens, about as many as Qwen2-VL's


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns while it is on."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.fixture(scope="module")
def wordy() -> Backbone:
    """A tiny backbone with a large vocabulary."""
    backbone: Any = backbone_of(seed=4)
    backbone.model.resize_token_embeddings(LARGE, mean_resizing=False)
    return backbone


def largest(compute: Any) -> int:
    with Largest() as seen:
        compute()
    return seen.numel


def test_scoring_makes_nothing_of_the_vocabularys_size(wordy: Backbone) -> None:
    ranker = ranker_of(wordy)
    one_token_a_prompt = len(HISTORIES) * LARGE
    assert largest(lambda: ranker.log_probs(HISTORIES, CANDIDATES)) < one_token_a_prompt
    with torch.no_grad():
        assert largest(lambda: stock_letter_logits(ranker)) > 50 * one_token_a_prompt


@pytest.mark.parametrize("supervise", NAIVE)
def test_training_makes_no_logits_of_all_tokens(wordy: Backbone, supervise: str) -> None:
    """The largest thing is the gradient of the head's own weights, (vocabulary, D)."""
    ranker = ranker_of(wordy, supervise=supervise)
    weights = wordy.head.weight.numel()
    tokens = sum(len(prompt) for prompt in ranker._write(HISTORIES, CANDIDATES))
    assert tokens * LARGE > 2 * weights
    found = largest(lambda: ranker.loss(HISTORIES, CANDIDATES, PLACES).backward())
    assert found <= weights
    wordy.zero_grad(set_to_none=True)
    assert largest(lambda: NAIVE[supervise](ranker).backward()) > 2 * weights
    wordy.zero_grad(set_to_none=True)


def test_the_two_supervisions_differ() -> None:
    backbone = backbone_of(seed=4)
    one, other = (
        ranker_of(backbone, supervise=name).loss(HISTORIES, CANDIDATES, PLACES) for name in NAIVE
    )
    assert abs(one.item() - other.item()) > 0.1


def test_an_unknown_supervision_is_the_users_mistake(backbone: Backbone) -> None:
    with pytest.raises(UserError, match="supervise is 'letters': use letter or letter_eos"):
        ranker_of(backbone, supervise="letters")


@torch.no_grad()
def test_log_probs_are_those_of_the_stock_logits(backbone: Backbone) -> None:
    ranker = ranker_of(backbone)
    expected = stock_letter_logits(ranker).log_softmax(dim=1)
    found = ranker.log_probs(HISTORIES, CANDIDATES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.std() > 1e-3


def test_a_batch_of_one_equals_a_batch_of_many(backbone: Backbone) -> None:
    together = ranker_of(backbone).log_probs(HISTORIES, CANDIDATES)
    alone = ranker_of(backbone, max_tokens=1).log_probs(HISTORIES, CANDIDATES)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    for row, (history, candidates) in enumerate(zip(HISTORIES, CANDIDATES, strict=True)):
        single = ranker_of(backbone).log_probs([history], candidates[None])
        torch.testing.assert_close(single[0], together[row], atol=1e-5, rtol=0)


def test_rows_come_back_in_the_order_they_were_asked_in(backbone: Backbone) -> None:
    order = [2, 0, 3, 1]
    together = ranker_of(backbone).log_probs(HISTORIES, CANDIDATES)
    other = ranker_of(backbone).log_probs([HISTORIES[row] for row in order], CANDIDATES[order])
    torch.testing.assert_close(other, together[order], atol=1e-5, rtol=0)


def test_fewer_candidates_than_letters_are_scored_among_themselves(backbone: Backbone) -> None:
    ranker = ranker_of(backbone, n_candidates=6)
    found = ranker.log_probs(HISTORIES, CANDIDATES)
    assert found.shape == CANDIDATES.shape
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(len(CANDIDATES)))


def test_it_overfits_a_handful_of_prompts() -> None:
    torch.manual_seed(0)
    ranker = ranker_of(backbone_of(seed=0)).train()
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = ranker.loss(HISTORIES, CANDIDATES, PLACES)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.0  # ln 4 = 1.39
    assert losses[-1] < 0.2
    best = ranker.log_probs(HISTORIES, CANDIDATES).argmax(dim=1)
    assert best.tolist() == PLACES.tolist()
