"""Atomic files with mistakes: one sentence with file, row and column, or a count in the log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recbole_mm.data.dataset import MMDataset, MMSequentialDataset
from recbole_mm.errors import UserError

from .atomic_data import LS, bare_config, random_interactions, write_atomic


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_id:token\titem_id:token\ttimestamp:float\nu\ti\tsoon\n", "row 2, column 'timestamp"),
        ("user_id:token\titem_id:tokens\nu\ti\n", "row 1: column 'item_id:tokens'"),
        ("user_id\titem_id:token\nu\ti\n", "row 1: column 'user_id'"),
        ("user_id:token\titem_id:token\titem_id:float\nu\ti\t1\n", "'item_id' occurs twice"),
        ("user_id:token,item_id:token\nu,i\n", r"is one column, as field_separator is '\\t'"),
        ("user_id:token\titem_id:token\n", "a header and no rows"),
        ("user:token\titem_id:token\nu\ti\n", "no column 'user_id' among user, item_id: .* USER_"),
        ("user_id:token\tsku:token\nu\ti\n", "no column 'item_id' among user_id, sku: .* ITEM_ID"),
        ("user_id:token\titem_id:float\nu\t1\n", "write item_id:token, not item_id:float"),
        ("user_id:token\titem_id:token\nu\ti\nu\ti\t5\n", "line 3"),
        ("user_id:token\titem_id:token\nu\ti\t5\n", "row 2"),
        ('user_id:token\titem_id:token\nu\t"i\n', "not a clean atomic file"),
        ("user_id:token\titem_id:token\tv:float_seq\nu\ti\t1 a\n", "column 'v:float_seq', row 2"),
    ],
)
def test_a_broken_file_is_told_by_name_row_and_column(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "toy.inter").write_text(text)
    config = bare_config("BPR", tmp_path / "toy", eval_args={**LS, "order": "RO"})  # no times
    with pytest.raises(UserError, match=message) as caught:
        MMDataset(config)
    assert "toy.inter" in str(caught.value)


def test_an_absent_dataset_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dataset_tools"):
        MMDataset(bare_config("BPR", tmp_path / "amazon-beauty"))


@pytest.mark.parametrize(("model", "cls"), [("SASRec", MMSequentialDataset), ("BPR", MMDataset)])
def test_an_order_in_time_needs_a_time(tmp_path: Path, model: str, cls: type) -> None:
    header, rows = "user_id:token item_id:token", [["u", "i"]] * 4
    write_atomic(tmp_path / "toy" / "toy.inter", header, rows)
    with pytest.raises(UserError, match=r"toy\.inter: there is no column 'timestamp' .*TIME_FIELD"):
        cls(bare_config(model, tmp_path / "toy"))
    rows = [[*row, "5"] for row in rows]
    write_atomic(tmp_path / "toy" / "toy.inter", f"{header} timestamp:token", rows)
    with pytest.raises(UserError, match="write timestamp:float, not timestamp:token"):
        cls(bare_config(model, tmp_path / "toy"))
    write_atomic(tmp_path / "toy" / "toy.inter", f"{header} timestamp:float", rows)
    with pytest.raises(UserError, match="load_col leaves out the column 'timestamp'"):
        cls(bare_config(model, tmp_path / "toy", load_col={"inter": ["user_id", "item_id"]}))


@pytest.mark.parametrize("row", [1, 3, 2_000])
def test_bytes_that_are_no_utf_8_are_told_by_file_and_row(tmp_path: Path, row: int) -> None:
    lines = ["user_id:token\titem_id:token\ttimestamp:float\tn:token"]
    lines += [f"u\ti\t{n}\tx" for n in range(2_000)]
    lines[row - 1] += "é"
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "toy.inter").write_text("\n".join(lines) + "\n", encoding="latin-1")
    with pytest.raises(UserError, match=rf"toy\.inter, row {row}: this is not utf-8; re-encode"):
        MMDataset(bare_config("BPR", tmp_path / "toy"))


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, encoding: str) -> None:
    folder = random_interactions(tmp_path / "toy", [4, 5])
    plain = MMDataset(bare_config("BPR", folder))
    path = folder / "toy.inter"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = MMDataset(bare_config("BPR", folder, encoding=encoding))
    assert marked.inter_feat.equals(plain.inter_feat)


def test_rows_without_user_or_item_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [[f"u{n % 2}", f"i{n}", n] for n in range(8)]
    rows[1][0] = rows[3][0] = rows[4][1] = rows[6][2] = ""
    header = "user_id:token item_id:token timestamp:float"
    write_atomic(tmp_path / "toy" / "toy.inter", header, rows)
    with caplog.at_level("WARNING"):
        dataset = MMDataset(bare_config("BPR", tmp_path / "toy"))
    # i6 comes by the mean of the times of i0, i2, i5 and i7; RecBole would drop i6 and keep i4
    names = np.array(dataset.item_tokens())[dataset.inter_feat["item_id"]]
    assert names.tolist() == ["i0", "i2", "i6", "i5", "i7"]
    assert [record.getMessage() for record in caplog.records] == [
        "toy.inter: rows without user_id left out: 2 of 8",
        "toy.inter: rows without item_id left out: 1 of 6",
        "toy.inter: missing timestamp set to the mean of the others: 1 of 5",
    ]


def test_filters_that_leave_nothing_are_named(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [4, 5])
    with pytest.raises(UserError, match=r"toy: the filters leave no interaction: .*user_inter_num"):
        MMDataset(bare_config("BPR", folder, user_inter_num_interval="[9,inf)"))
