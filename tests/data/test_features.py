"""Feature matrices on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_mm.data.atomic import write_text
from recbole_mm.data.features import FeatureStore, feature_paths, hash_inputs, save_features
from recbole_mm.errors import UserError

ITEMS = ["i1", "i2", "i3"]
MATRIX = np.arange(12, dtype=np.float16).reshape(3, 4)


def save(folder: Path, matrix: Any = MATRIX, items: list[str] = ITEMS, **about: Any) -> Path:
    save_features(folder, "d", "clip", matrix, items, encoder="org/clip", **about)
    return folder


def rewrite_info(folder: Path, **changes: Any) -> None:
    path = feature_paths(folder, "d", "clip")[1]
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_saved_is_opened(tmp_path: Path) -> None:
    about = {"revision": "abc", "pooling": "mean", "inputs": "f" * 64}
    store = FeatureStore.open(save(tmp_path, **about), "d", "clip", inputs="f" * 64)
    np.testing.assert_array_equal(store.matrix, MATRIX)
    assert isinstance(store.matrix, np.memmap)
    assert store.info.items == ITEMS
    assert (store.info.revision, store.info.pooling) == ("abc", "mean")
    assert (store.info.dtype, store.info.shape) == ("float16", [3, 4])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.clip.json", "d.clip.npy"]


def test_rows_follow_internal_ids(tmp_path: Path) -> None:
    store = FeatureStore.open(save(tmp_path), "d", "clip")
    rows, mask = store.rows(["i2", "i3", "new", "i1"])  # row 0 is the pad, whatever its name
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, [[0] * 4, MATRIX[2], [0] * 4, MATRIX[0]])
    assert mask.tolist() == [False, True, False, True]


def test_no_item_in_common(tmp_path: Path) -> None:
    rows, mask = FeatureStore.open(save(tmp_path), "d", "clip").rows(["[PAD]", "x"])
    assert not rows.any()
    assert not mask.any()


def test_other_inputs_make_features_stale(tmp_path: Path) -> None:
    save(tmp_path, inputs="a")
    with pytest.raises(UserError, match=r"d.clip.npy is stale"):
        FeatureStore.open(tmp_path, "d", "clip", inputs="b")
    save(tmp_path)  # from unknown inputs: the user's own
    FeatureStore.open(tmp_path, "d", "clip", inputs="b")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_value_that_is_not_finite_names_its_item(
    value: float, dtype: Any, tmp_path: Path
) -> None:
    matrix = MATRIX.astype(dtype)
    save(tmp_path, matrix)
    matrix[1, 2] = value
    np.save(feature_paths(tmp_path, "d", "clip")[0], matrix)
    with pytest.raises(UserError, match=r"row 1 \(item 'i2'\): a value is NaN"):
        FeatureStore.open(tmp_path, "d", "clip")
    with pytest.raises(UserError, match="row 1"):
        save(tmp_path, matrix)


def test_a_double_that_no_float_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="beyond 32 bits"):
        save(tmp_path, np.full((3, 4), 1e300))


@pytest.mark.parametrize(
    ("matrix", "sentence"),
    [
        (MATRIX.astype(np.int64), "a matrix of floats"),
        (MATRIX[0], "a matrix of floats"),
        (MATRIX[None], "a matrix of floats"),
        (MATRIX[:2], "its JSON tells of 3 items"),
    ],
)
def test_a_matrix_of_another_shape(matrix: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        save(tmp_path, matrix)
    assert list(tmp_path.iterdir()) == []
    np.save(feature_paths(save(tmp_path), "d", "clip")[0], matrix)
    with pytest.raises(UserError, match=sentence):
        FeatureStore.open(tmp_path, "d", "clip")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"items": ["i1", "i2", "i2"]}, "'i2' has more than one row"),
        ({"items": ["i1"]}, "tells of 1 items"),
        ({"shape": [3, 5]}, r"shape \(3, 5\)"),
        ({"items": None}, "'items' must be a list"),
        ({"shape": 3}, "'shape' must be a list"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    ],
)
def test_a_json_that_does_not_fit(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    rewrite_info(save(tmp_path), **changes)
    with pytest.raises(UserError, match=sentence):
        FeatureStore.open(tmp_path, "d", "clip")


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"items": []}', "\xff"])
def test_a_broken_json(text: str, tmp_path: Path) -> None:
    feature_paths(save(tmp_path), "d", "clip")[1].write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"d.clip.json: .*must be a JSON object of items"):
        FeatureStore.open(tmp_path, "d", "clip")


def test_a_broken_matrix(tmp_path: Path) -> None:
    path = feature_paths(save(tmp_path), "d", "clip")[0]
    whole = path.read_bytes()
    for data in (b"", b"no matrix", whole[:-3]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"d.clip.npy"):
            FeatureStore.open(tmp_path, "d", "clip")


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    path = feature_paths(save(tmp_path), "d", "clip")[0]
    np.save(path, np.array([[{}] * 4] * 3, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"no plain .npy matrix"):
        FeatureStore.open(tmp_path, "d", "clip")


@pytest.mark.parametrize("missing", [0, 1])
def test_an_absent_file(missing: int, tmp_path: Path) -> None:
    feature_paths(save(tmp_path), "d", "clip")[missing].unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        FeatureStore.open(tmp_path, "d", "clip")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_name_that_is_no_file_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Feature name"):
        FeatureStore.open(tmp_path, "d", name)


def test_large_matrices_are_checked_to_the_last_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recbole_mm.data.features._CHUNK", 8)  # two rows at a time
    matrix = np.zeros((5, 4), dtype=np.float32)
    matrix[4, 3] = np.nan
    with pytest.raises(UserError, match=r"row 4 \(item 'e'\)"):
        save(tmp_path, matrix, list("abcde"))


def test_fresh_is_what_was_made_of_the_same_content(tmp_path: Path) -> None:
    """Of items with and without a row; features of unknown content are the user's own."""

    def write(**texts: str) -> None:
        write_text(tmp_path / "d.text", ["title"], [(item, [text]) for item, text in texts.items()])

    write(i1="one", i2="two", i3="three")
    now = hash_inputs(tmp_path, "d", ITEMS, ["i4"], ["title"])
    save(tmp_path, inputs=now, fields=["title"], without=["i4"])
    store = FeatureStore.open_fresh(tmp_path, "d", "clip")
    assert (store.info.fields, store.info.without) == (["title"], ["i4"])
    write(i3="three", i1="one", i2="two", i5="another")
    FeatureStore.open_fresh(tmp_path, "d", "clip")
    write(i1="one", i2="two", i3="three", i4="four")
    with pytest.raises(UserError, match=r"d.clip.npy is stale"):
        FeatureStore.open_fresh(tmp_path, "d", "clip")
    for unknown in ({"inputs": now}, {"fields": ["title"]}):
        save(tmp_path, **unknown)
        FeatureStore.open_fresh(tmp_path, "d", "clip")
