"""I-LLMRec's projectors and losses against their equations, and features with what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_mm.data.content import ItemContent
from recbole_mm.data.features import save_features
from recbole_mm.errors import UserError
from recbole_mm.model.layers.feature_types import FeatureReader, FeatureSettings
from recbole_mm.model.layers.questions import ANSWERS, PROPERTIES, QUESTIONS
from recbole_mm.model.layers.retrieval_heads import Projector, RetrievalHeads, retrieval_loss


def test_the_papers_sizes_have_its_parameters() -> None:
    """14,956,032: adaptor, three user and three item heads, and the vector of the slot [REC]."""
    adaptor = Projector(1152, 512, 2560, "gelu")
    heads = RetrievalHeads(2560, {"img": 1152, "cf": 50, "text": 768}, 1024, 512)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in
             (("adaptor", adaptor), *((f"{k} item", h) for k, h in heads.of_items.items()),
              *((f"{k} user", h) for k, h in heads.of_users.items()))}  # fmt: skip
    assert count["adaptor"] == 1_904_640
    assert [count[f"{k} item"] for k in ("img", "cf", "text")] == [1_707_520, 579_072, 1_314_304]
    assert [count[f"{k} user"] for k in ("img", "cf", "text")] == [3_149_312] * 3
    assert sum(count.values()) + 2560 == 14_956_032


@pytest.mark.parametrize("norm", [True, False])
def test_a_projector_is_what_it_says(norm: bool) -> None:
    torch.manual_seed(0)
    projector = Projector(5, 7, 3, "relu", norm)
    x = torch.randn(4, 5)
    first, last = projector[0], projector[-1]
    hidden = x @ first.weight.T + first.bias
    if norm:
        mean, deviation = hidden.mean(1, keepdim=True), hidden.std(1, keepdim=True, correction=0)
        hidden = (hidden - mean) / (deviation**2 + 1e-8).sqrt()
    expected = hidden.clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(projector(x), expected)


def test_the_retrieval_loss_is_equation_5() -> None:
    torch.manual_seed(0)
    liked = torch.randn(3, 2, requires_grad=True)
    others = torch.randn(3, 4, 2, requires_grad=True)
    total = torch.zeros(())
    for kind in range(2):
        for row in range(3):
            total = total - torch.log(torch.sigmoid(liked[row, kind])) / 3
            for n in range(4):
                total = total - torch.log(1 - torch.sigmoid(others[row, n, kind])) / 12
    torch.testing.assert_close(retrieval_loss(liked, others), total)
    torch.testing.assert_close(retrieval_loss(liked, others, "mean"), total / 2)
    ours = torch.autograd.grad(retrieval_loss(liked, others), (liked, others))
    theirs = torch.autograd.grad(total, (liked, others))
    torch.testing.assert_close(ours, theirs)


def test_every_property_has_five_questions_of_its_own() -> None:
    assert set(QUESTIONS) == set(ANSWERS) == set(PROPERTIES)
    every = [words for questions in QUESTIONS.values() for words in questions]
    assert len(every) == len(set(every)) == 20


# --- features ------------------------------------------------------------------------------------


@pytest.fixture
def content(tmp_path: Path) -> ItemContent:
    folder = tmp_path / "shop"
    folder.mkdir()
    titles = "\n".join(f"i{i}\tword{i} thing" for i in range(1, 9))
    (folder / "shop.text").write_text(f"item_id:token\ttitle:text\n{titles}\n")
    return ItemContent(folder, "shop", ["[PAD]", *(f"i{i}" for i in range(1, 9))])


def store(content: ItemContent, name: str, rows: int = 8, width: int = 6, **more: Any) -> Any:
    matrix = np.random.default_rng(width + rows).normal(3, 2, (rows, width)).astype(np.float32)
    items = [f"i{i}" for i in range(1, rows + 1)]
    save_features(content.folder, "shop", name, matrix, items, encoder="e", **more)
    return matrix


def reader(content: ItemContent, tmp_path: Path, **changes: Any) -> FeatureReader:
    settings = {"image": "pics", "text": "words", "fallback": "none", "missing_rate": 0.0,
                "standardize": True, "cache": tmp_path / "cache", "seed": 1}  # fmt: skip
    texts = [content.text(i, "title") for i in range(9)]
    return FeatureReader(FeatureSettings(**{**settings, **changes}), content, texts)


def test_features_are_rows_of_items_and_standardised(content: ItemContent, tmp_path: Path) -> None:
    matrix = store(content, "pics")
    plain = reader(content, tmp_path, standardize=False).read("img")
    assert np.allclose(plain.table[1:], matrix)
    assert (plain.table[0] == 0).all()
    scaled = reader(content, tmp_path).read("img").table[1:]
    expected = (matrix - matrix.mean(0)) / matrix.std(0)
    assert np.allclose(scaled, expected, atol=1e-5)


def test_pictures_that_are_taken_away_give_way_to_texts(
    content: ItemContent, tmp_path: Path
) -> None:
    store(content, "pics")
    words = store(content, "twin", width=6, rows=8)
    how = {"missing_rate": 0.5, "standardize": False}
    shown = reader(content, tmp_path, **how).read("img")
    assert int(shown.known.sum()) == 4
    assert (shown.table[~shown.known] == 0).all()
    assert (shown.table[shown.known].abs().sum(1) > 0).all()
    again = reader(content, tmp_path, **how, fallback="twin").read("img")
    assert torch.equal(again.known, shown.known)
    for item in range(1, 9):
        expected = shown.table[item] if shown.known[item] else torch.from_numpy(words[item - 1])
        assert torch.equal(again.table[item], expected)
    hashed = reader(content, tmp_path, **how, fallback="words").read("img")
    assert hashed.table.shape == (9, 6)
    assert (hashed.table[1:].abs().sum(1) > 0).all()
    other = reader(content, tmp_path, **{**how, "seed": 2}).read("img")
    assert not torch.equal(other.known, shown.known)


def test_mistakes_of_features_get_one_sentence(content: ItemContent, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*shop\.pics\.npy: make it with `python -m"):
        reader(content, tmp_path).read("img")
    store(content, "pics", rows=5)
    with pytest.raises(UserError, match=r"made without item 'i6' and 2 others .* --force"):
        reader(content, tmp_path).read("img")
    with pytest.raises(UserError, match=r"has a picture: set item_repr: attribute"):
        reader(content, tmp_path, image="pixels").read("img")
    assert not reader(content, tmp_path, image="pixels", missing_rate=1.0).read("img").known.any()
    path = content.folder / "shop.bad.npy"
    store(content, "bad")
    matrix = np.load(path)
    matrix[2, 3] = np.nan
    np.save(path, matrix)
    with pytest.raises(UserError, match=r"row 2 \(item 'i3'\): a value is NaN"):
        reader(content, tmp_path, image="bad").read("img")
    store(content, "wide", width=7)
    store(content, "good")
    with pytest.raises(UserError, match="'wide' has 7 numbers an item and 'good' 6"):
        reader(content, tmp_path, image="good", fallback="wide", missing_rate=0.5).read("img")
