"""Texts and picture paths by internal item id."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recbole_mm.data.atomic import write_images, write_text
from recbole_mm.data.content import ItemContent
from recbole_mm.errors import UserError
from tests.data.atomic_data import bare_config, write_atomic

TOKENS = ["[PAD]", "i2", "i1", "i3"]


def folder_with(
    tmp_path: Path, texts: bool = True, images: bool = True, stranger: bool = False
) -> Path:
    folder = tmp_path / "d"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    extra = [("stranger", ("x", "y"))] if stranger else []
    if texts:
        rows = [("i1", ("one", "")), ("i2", ("two", None)), *extra]
        write_text(folder / "d.text", ["title", "brand"], rows)
    if images:
        (folder / "images" / "2.jpg").write_bytes(b"picture")
        seen = [("i2", "gone.jpg"), ("i2", "2.jpg"), ("i1", "nothing.jpg")]
        write_images(folder / "d.image", seen + [(item, "z.jpg") for item, _ in extra])
    return folder


def content_of(folder: Path) -> ItemContent:
    return ItemContent(folder, "d", TOKENS)


def test_content_follows_internal_ids(tmp_path: Path) -> None:
    content = content_of(folder_with(tmp_path))
    titles = [content.text(item, "title") for item in range(4)]
    assert titles == [None, "two", "one", None]
    assert [content.text(item, "brand") for item in range(4)] == [None, None, "", None]
    names = [[path.name for path in content.image_paths(item)] for item in range(4)]
    assert names == [[], ["gone.jpg", "2.jpg"], ["nothing.jpg"], []]
    assert content.coverage() == {"title": 2, "brand": 0, "image": 1}


def test_files_may_be_absent(tmp_path: Path) -> None:
    content = content_of(folder_with(tmp_path, texts=False, images=False))
    assert content.attributes == []
    assert content.image_paths(1) == []
    assert content.coverage() == {"image": 0}


def test_ids_of_side_files_alone_add_no_item(tmp_path: Path) -> None:
    from recbole_mm.data.dataset import MMSequentialDataset

    folder = folder_with(tmp_path, stranger=True)
    rows = [[u, i, t] for u in ("a", "b") for t, i in enumerate(("i2", "i1", "i3"))]
    write_atomic(folder / "d.inter", "user_id:token item_id:token timestamp:float", rows)
    dataset = MMSequentialDataset(bare_config("GRU4Rec", folder))
    content = ItemContent(folder, "d", dataset.item_tokens())
    assert set(content.item_tokens) == {"[PAD]", "i1", "i2", "i3"}
    assert dataset.item_num == 4
    assert content.ignored == {"text": 1, "image": 1}
    [i1] = [i for i, token in enumerate(content.item_tokens) if token == "i1"]
    assert content.text(i1, "title") == "one"


def test_a_row_named_like_the_pad_is_no_content_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    write_text(folder / "d.text", ["title"], [("[PAD]", ("x",))])
    content = content_of(folder)
    assert content.text(0, "title") is None
    assert content.ignored["text"] == 1


def test_an_unknown_attribute_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'titel' \(did you mean 'title'\?\); it has: title, br"):
        content_of(folder_with(tmp_path)).text(1, "titel")


def test_a_link_out_of_the_images_folder_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    os.symlink(tmp_path / "secret", folder / "images" / "nothing.jpg")
    content = content_of(folder)
    with pytest.raises(UserError, match=r"'nothing.jpg' is a link out of"):
        content.image_paths(2)


def test_the_hash_sees_what_it_is_asked_for(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    content = content_of(folder)
    title, both = content.hash(["title"]), content.hash(["title"], images=True)
    assert len({title, both, content.hash(["brand"]), content.hash()}) == 4
    (folder / "images" / "2.jpg").write_bytes(b"other")
    changed = content_of(folder)
    assert changed.hash(["title"]) == title
    assert changed.hash(["title"], images=True) != both
    write_text(folder / "d.text", ["title"], [("i1", ("one!",))])
    assert content_of(folder).hash(["title"]) != title
    assert ItemContent(folder, "d", TOKENS[::-1]).hash() != content.hash()


def test_missing_and_empty_text_hash_apart(tmp_path: Path) -> None:
    digests = set()
    for n, values in enumerate([("a", None), ("a", ""), ("", "a"), (None, "a"), ("aa", None)]):
        folder = tmp_path / str(n)
        folder.mkdir()
        write_text(folder / "d.text", ["x", "y"], [("i1", values)])
        digests.add(content_of(folder).hash(["x", "y"]))
    assert len(digests) == 5
