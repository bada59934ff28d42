"""I-LLMRec's descriptions: of a file, with noise, summed up by another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_mm.backbone.generate import TextWriter
from recbole_mm.errors import UserError
from recbole_mm.model.layers.descriptions import _MARKUP, with_noise
from tests.model.illmrec_world import shop_of

DESCRIBED: dict[str, Any] = {
    "item_repr": "description",
    "max_description_tokens": 64,
    "columns": {"title": "title", "brand": "brand", "description": "categories"},
}


def test_noise_stands_between_words_and_changes_none() -> None:
    text = " ".join(f"word{n}" for n in range(400))
    noisy = with_noise(text, 0.5, (7, 3)).split()
    assert [word for word in noisy if word.startswith("word")] == text.split()
    pieces = [word for word in noisy if not word.startswith("word")]
    assert 150 < len(pieces) < 250
    assert {*pieces} == {*_MARKUP}
    assert with_noise(text, 0.5, (7, 3)).split() == noisy
    assert with_noise(text, 0.5, (7, 4)).split() != noisy
    assert len(with_noise(text, 2.0, (7, 3)).split()) == 1200
    assert with_noise(text, 0.0, (7, 3)) == text


def test_noise_is_in_prompts_and_not_in_features(mini: Path, in_folder: Path) -> None:
    plain = shop_of(mini, in_folder, **DESCRIBED).model
    noisy = shop_of(mini, in_folder / "n", description_noise=1.0, **DESCRIBED).model
    for item in range(1, plain.n_items):
        told, found = (m.prompts.writer._text(item, "description") for m in (plain, noisy))
        assert found == with_noise(told, 1.0, (2020, item))
        assert found != told
        assert noisy.prompts.writer._text(item, "title") == plain.prompts.writer._text(
            item, "title"
        )
    assert torch.equal(plain.features["text"].table, noisy.features["text"].table)


def test_a_file_of_descriptions_stands_above_the_column(mini: Path, in_folder: Path) -> None:
    plain = shop_of(mini, in_folder, **DESCRIBED).model
    file = in_folder / "d.jsonl"
    file.write_text(json.dumps({"items": ["p0003"], "text": "round and red"}) + "\n")
    model = shop_of(mini, in_folder / "f", description_file=str(file), **DESCRIBED).model
    words = {item: model.prompts.writer._text(item, "description") for item in range(1, 32)}
    assert [*words.values()].count("round and red") == 1
    others = [item for item, text in words.items() if text != "round and red"]
    for item in others:
        assert words[item] == plain.prompts.writer._text(item, "description")


def test_a_file_of_another_dataset_is_refused(mini: Path, in_folder: Path) -> None:
    file = in_folder / "d.jsonl"
    record = {"dataset": "others", "items": ["p0003"], "text": "round and red"}
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(
        UserError, match=r"of the dataset others, not of mini: set description_file"
    ):
        shop_of(mini, in_folder, description_file=str(file), **DESCRIBED)


def test_a_file_makes_up_for_a_column_that_is_not_there(mini: Path, in_folder: Path) -> None:
    file = in_folder / "d.jsonl"
    file.write_text(json.dumps({"items": ["p0003"], "text": "round and red"}) + "\n")
    shop = shop_of(mini, in_folder, description_file=str(file), item_repr="description")
    assert "description" in shop.model.prompts.asked


def test_summaries_are_written_once(
    mini: Path, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**DESCRIBED, "summarize": True, "cache_dir": str(in_folder / "kept")}
    asked: list[tuple[Any, ...]] = []
    write = TextWriter.texts

    def heard(self: TextWriter, requests: Any, *rest: Any) -> list[str]:
        asked.extend(requests)
        return write(self, requests, *rest)

    monkeypatch.setattr(TextWriter, "texts", heard)
    first = shop_of(mini, in_folder, **keys).model
    words = {n: first.prompts.writer._text(n, "description") for n in range(1, first.n_items)}
    assert len(asked) == len(words)
    said = [" ".join(part if isinstance(part, str) else part.text for part in r) for r in asked]
    for text in said:  # all that is known, the description last
        assert text.index("Title:") < text.index("Brand:") < text.index("Description:")

    def never(*_: Any) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(TextWriter, "_write", never)
    again = shop_of(mini, in_folder / "again", **keys).model
    assert words == {n: again.prompts.writer._text(n, "description") for n in words}


def test_nothing_to_sum_up(mini: Path, in_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^summarize: .* says nothing of any item"):
        shop_of(mini, in_folder, summarize=True, columns={"title": "nowhere"}, ire_features=["cf"])
