"""Descriptors that need no weights: the same everywhere, and of what they say they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recbole_mm.backbone import descriptors
from recbole_mm.backbone.descriptors import describe_pixels, pixel_features, word_features
from recbole_mm.data.content import ItemContent


def plain(*colour: int) -> Image.Image:
    return Image.new("RGB", (40, 60), colour)


def test_colours_stand_in_their_cells() -> None:
    image = plain(255, 0, 0)
    image.paste((0, 0, 255), (20, 0, 40, 60))  # the right half
    row = describe_pixels(image)
    means = row[:48].reshape(4, 4, 3)
    assert np.allclose(means[:, :2], [1, 0, 0], atol=0.01)
    assert np.allclose(means[:, 2:], [0, 0, 1], atol=0.01)
    hues = row[96:108]
    assert set(np.flatnonzero(hues > 0.1)) == {0, 8}  # red and blue of 12


def test_edges_are_counted_by_direction() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::8] = 255
    upright = describe_pixels(Image.fromarray(stripes))[108:116]
    lying = describe_pixels(Image.fromarray(stripes.transpose(1, 0, 2)))[108:116]
    assert upright.argmax() == 0
    assert lying.argmax() == 4
    assert (describe_pixels(plain(9, 9, 9))[108:] == 0).all()


def test_pictures_are_described_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shop"
    (folder / "images").mkdir(parents=True)
    plain(10, 20, 30).save(folder / "images" / "a.png")
    (folder / "images" / "c.png").write_bytes(b"no picture")
    rows = "item_id:token\timage:image\na\ta.png\nc\tc.png\nd\tgone.png\n"
    (folder / "shop.image").write_text(rows)
    content = ItemContent(folder, "shop", ["[PAD]", "a", "b", "c", "d"])
    matrix, known = pixel_features(content, tmp_path / "cache")
    assert known.tolist() == [False, True, False, False, False]
    assert np.allclose(matrix[1], describe_pixels(plain(10, 20, 30)))
    assert (matrix[[0, 2, 3, 4]] == 0).all()

    def never(*_: object) -> None:
        raise AssertionError("described again")

    monkeypatch.setattr(descriptors._PixelReader, "pixels", never)
    again, _ = pixel_features(content, tmp_path / "cache")
    assert np.array_equal(again, matrix)


def test_words_are_hashed_into_rows_of_length_one() -> None:
    texts = [None, "Red bowl", "bowl RED", "blue kite", "  ", ""]
    matrix, known = word_features(texts, 32)
    assert known.tolist() == [False, True, True, True, False, False]
    assert np.allclose(np.linalg.norm(matrix[1:4], axis=1), 1)
    assert np.array_equal(matrix[1], matrix[2])
    assert not np.allclose(matrix[1], matrix[3])
    assert np.array_equal(word_features(texts, 32)[0], matrix)
