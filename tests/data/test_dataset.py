"""Datasets: RecBole's numbers on every pandas, quick augmentation, samples of users, sequences."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.dataset import (
    Dataset,
    DIENDataset,
    KnowledgeBasedDataset,
    SequentialDataset,
)

from recbole_mm.data.dataset import (
    MMDataset,
    MMDIENDataset,
    MMKGSeqDataset,
    MMKnowledgeDataset,
    MMSequentialDataset,
    gather_lists,
    prefix_rows,
)
from recbole_mm.data.frames import FrameMends
from recbole_mm.errors import UserError

from .atomic_data import LS, bare_config, random_interactions, write_atomic

L = 5
LENGTHS = [1, 2, 3, 4, 5, 6, 7, 10, 11, 14, 15]  # around L, 2L and 3L


class LoopDataset(FrameMends, SequentialDataset):
    """RecBole's own double loop, on frames that pandas 3 can hold."""


class LoopDIENDataset(FrameMends, DIENDataset):
    """The same for DIEN's, whose negatives are drawn in the order of the rows, here ours."""

    def _fill_nan(self) -> None:
        super()._fill_nan()
        sort_by_time(self)


def sort_by_time(dataset: Any) -> None:
    """What RecBole lacks: its sort by time in float32 keeps this order."""
    dataset.inter_feat = dataset.inter_feat.sort_values(
        "timestamp", kind="stable", ignore_index=True
    )


def assert_same(ours: Any, theirs: Any) -> None:
    """Two Interactions with the same fields in the same order, equal to the bit."""
    assert ours.columns == theirs.columns
    for field in theirs.columns:
        assert ours[field].dtype == theirs[field].dtype, field
        assert torch.equal(ours[field], theirs[field]), field


# --- augmentation ---
@pytest.mark.parametrize("seed", range(4))
def test_augmentation_equals_recboles_tensor_for_tensor(tmp_path: Path, seed: int) -> None:
    lengths = np.random.default_rng(seed).permutation(LENGTHS * 2).tolist()
    folder = random_interactions(tmp_path / "toy", lengths, seed=seed, extra=True)
    config = bare_config("SASRec", folder)
    for ours, theirs in zip(
        MMSequentialDataset(config).build(), LoopDataset(config).build(), strict=True
    ):
        assert len(ours) > 0
        assert_same(ours.inter_feat, theirs.inter_feat)
        assert ours.field2seqlen == theirs.field2seqlen


def test_augmentation_of_bucketed_numbers(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", LENGTHS, extra=True)
    keys = {"numerical_features": ["rating", "timestamp"], "normalize_field": ["rating"]}
    config = bare_config("SASRec", folder, **keys)
    ours, theirs = MMSequentialDataset(config), LoopDataset(config)
    for part, expected in zip(ours.build(), theirs.build(), strict=True):
        assert part.inter_feat["rating_list"].shape[1:] == (L, 2)
        assert_same(part.inter_feat, expected.inter_feat)


def test_dien_augmentation_equals_recboles(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", LENGTHS, extra=True)
    config = bare_config("DIEN", folder)
    built = []
    for cls in (MMDIENDataset, LoopDIENDataset):
        np.random.seed(3)  # RecBole samples from numpy's global generator
        built.append(cls(config).build())
    for ours, theirs in zip(*built, strict=True):
        assert ours.inter_feat["neg_item_id_list"].any()
        assert_same(ours.inter_feat, theirs.inter_feat)


def test_lists_are_the_last_items_before_each_target() -> None:
    users = torch.tensor([0] * 7 + [1] * 3 + [2])
    rows = prefix_rows(users, 4)
    values = torch.arange(1, len(users) + 1)
    lists = gather_lists(values, rows, (4,), torch.int64)
    expected = [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6], [8, 0, 0, 0], [8, 9, 0, 0]]
    assert lists[3:].tolist() == expected


@pytest.mark.parametrize("users", [[], [4], [4, 5, 6]])
def test_no_rows_without_a_second_interaction(users: list[int]) -> None:
    rows = prefix_rows(torch.tensor(users, dtype=torch.int64), 3)
    assert len(rows.target) == 0
    assert rows.firsts.tolist() == list(range(len(users)))
    assert gather_lists(torch.zeros(len(users)), rows, (3,), torch.float32).shape == (0, 3)


def test_lists_as_wide_as_the_longest_row_of_the_file(tmp_path: Path) -> None:
    """RecBole stops with a shape error when the user with the longest list is filtered out."""
    rows = [["a", f"i{t}", t, "x y z w"] for t in range(3)]
    rows += [["b", f"i{t}", t, "x y"] for t in range(6)]
    write_atomic(
        tmp_path / "toy" / "toy.inter",
        "user_id:token item_id:token timestamp:float words:token_seq",
        rows,
    )
    config = bare_config("SASRec", tmp_path / "toy", user_inter_num_interval="[4,inf)")
    train = MMSequentialDataset(config).build()[0]
    assert train.inter_feat["words_list"].shape == (3, L, 4)
    assert train.inter_feat["words_list"][..., 2:].sum() == 0


# --- the same numbers as RecBole, on every pandas ---
@pytest.mark.parametrize(
    ("model", "cls", "stock"),
    [
        ("SASRec", MMSequentialDataset, SequentialDataset),
        ("BPR", MMDataset, Dataset),
        ("CKE", MMKnowledgeDataset, KnowledgeBasedDataset),
    ],
)
def test_ml_100k_equals_recboles(model: str, cls: type, stock: type) -> None:
    keys: dict[str, Any] = {"user_inter_num_interval": "[20,40]"}
    if model == "CKE":
        keys["load_col"] = {
            "inter": ["user_id", "item_id", "timestamp"],
            "kg": ["head_id", "relation_id", "tail_id"],
            "link": ["item_id", "entity_id"],
        }
    config = bare_config(model, None, **keys)
    ours, theirs = cls(config), stock(config)
    sort_by_time(theirs)  # RecBole leaves what is a minute apart in the order of the file
    for part, expected in zip(ours.build(), theirs.build(), strict=True):
        assert_same(part.inter_feat, expected.inter_feat)
    for field, tokens in theirs.field2id_token.items():
        assert ours.field2id_token[field].tolist() == tokens.tolist()
    if model == "CKE":
        assert_same(ours.kg_feat, theirs.kg_feat)


def digest(feat: Any) -> str:
    sha = hashlib.sha256()
    for field in sorted(feat.columns):
        sha.update(f"{field} {feat[field].dtype} {tuple(feat[field].shape)}".encode())
        sha.update(feat[field].contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


class FileOrder(MMSequentialDataset):
    """Without our sort by time, to be compared with RecBole's digests."""

    def _sort_by_time(self) -> None:
        pass


def test_item_features_equal_what_recbole_gives_on_pandas_2() -> None:
    """Digests made with RecBole itself on numpy 1.26 and pandas 2.3 (it fails on pandas 3)."""
    config = bare_config(
        "FDSA",
        None,
        user_inter_num_interval="[20,40]",
        normalize_all=True,
        load_col={
            "inter": ["user_id", "item_id", "rating", "timestamp"],
            "item": ["item_id", "movie_title", "release_year", "class"],
            "user": ["user_id", "age", "gender"],
        },
    )
    dataset = FileOrder(config)
    parts = dataset.build()
    digests = [digest(feat) for feat in (dataset.item_feat, dataset.user_feat)]
    digests += [digest(part.inter_feat) for part in parts]
    assert digests == STOCK_DIGESTS


STOCK_DIGESTS = [
    "8379f8b5daf628e7",
    "8de2cbcced92100f",
    "d38387b3aef1da0a",
    "5845eb33dbd8531e",
    "fe6ce0ecb568a88f",
]


def write_with_gaps(folder: Path) -> None:
    write_atomic(
        folder / "gaps.inter",
        "user_id:token item_id:token timestamp:float",
        [["u", f"i{t}", t] for t in range(5)] + [["NA", f"i{t}", t] for t in range(5)],
    )
    write_atomic(
        folder / "gaps.item",
        "item_id:token brand:token price:float tags:token_seq vector:float_seq",
        [
            ["i0", "null", "1.5", "a b", "1 2 3"],
            ["i1", "", "", "", ""],
            ["i2", "None", "2.5", "b", "4"],
            ["i3", "x", "NaN", "c a", "5 6"],
            ["i4", "x", "-1", " a  b ", "7"],
        ],
    )


def gaps_config(folder: Path, **keys: Any) -> Any:
    write_with_gaps(folder)
    columns = {"inter": "*", "item": "*"}
    return bare_config("SASRec", folder, load_col=columns, **keys)


def test_missing_values(tmp_path: Path) -> None:
    dataset = MMDataset(gaps_config(tmp_path / "gaps"))
    dataset.build()
    items = dataset.item_feat
    assert dataset.field2id_token["user_id"].tolist() == ["[PAD]", "u", "NA"]  # RecBole drops NA
    assert dataset.item_tokens() == ["[PAD]", "i0", "i1", "i2", "i3", "i4"]
    brands = dataset.field2id_token["brand"][items["brand"]].tolist()
    assert brands == ["[PAD]", "null", "[PAD]", "None", "x", "x"]
    assert items["price"].tolist() == [1.0, 1.5, 1.0, 2.5, 1.0, -1.0]  # the mean of what is there
    tags = [dataset.field2id_token["tags"][row].tolist() for row in items["tags"]]
    pad = "[PAD]"
    assert tags == [[pad] * 2, ["a", "b"], [pad] * 2, ["b", pad], ["c", "a"], ["a", "b"]]
    assert items["vector"].tolist()[:4] == [[0, 0, 0], [1, 2, 3], [0, 0, 0], [4, 0, 0]]


def test_bucketed_number_sequences(tmp_path: Path) -> None:
    dataset = MMDataset(gaps_config(tmp_path / "gaps", numerical_features=["vector"]))
    dataset.build()
    value, weight = dataset.item_feat["vector"].unbind(-1)
    assert value.tolist() == [[0, 0, 0], [1, 2, 3], [0, 0, 0], [4, 0, 0], [5, 6, 0], [7, 0, 0]]
    assert torch.equal(weight, (value > 0).float())
    rule = {"vector": {"method": "ED", "bucket": 3}}
    keys = {"numerical_features": ["vector"], "discretization": rule}
    dataset = MMDataset(gaps_config(tmp_path / "gaps", **keys))
    dataset.build()
    buckets = dataset.item_feat["vector"][..., 1].tolist()
    assert buckets == [[0, 0, 0], [1, 1, 1], [0, 0, 0], [2, 0, 0], [2, 3, 0], [3, 0, 0]]
    assert dataset.num("vector") == 4


def test_number_sequences_are_normalised_over_all_rows(tmp_path: Path) -> None:
    dataset = MMDataset(gaps_config(tmp_path / "gaps", normalize_field=["vector"]))
    dataset.build()
    vector = dataset.item_feat["vector"]
    expected = [
        [0, 0, 0],
        [0, 1 / 6, 2 / 6],
        [0, 0, 0],
        [3 / 6, 0, 0],
        [4 / 6, 5 / 6, 0],
        [1, 0, 0],
    ]
    torch.testing.assert_close(vector, torch.tensor(expected))


def test_seq_len_cuts_sequences(tmp_path: Path) -> None:
    dataset = MMDataset(gaps_config(tmp_path / "gaps", seq_len={"vector": 2}))
    dataset.build()
    assert dataset.item_feat["vector"][1].tolist() == [1, 2]


def test_ready_made_split_works_and_has_no_sequences(tmp_path: Path) -> None:
    header = "user_id:token item_id_list:token_seq item_id:token"
    rows = [["u1", "a b", "c"], ["u2", "c", "a"]]
    for part in ("train", "valid", "test"):
        write_atomic(tmp_path / "toy" / f"toy.{part}.inter", header, rows)
    config = bare_config(
        "SASRec",
        tmp_path / "toy",
        benchmark_filename=["train", "valid", "test"],
        alias_of_item_id=["item_id_list"],
    )
    parts = MMSequentialDataset(config).build()
    assert [part.inter_feat["item_length"].tolist() for part in parts] == [[2, 1]] * 3
    assert parts[0].train_sequences is None
    config["limit_users"] = 1
    with pytest.raises(UserError, match="benchmark_filename"):
        MMSequentialDataset(config)


# --- vocabulary ---
def test_side_files_and_item_file_leave_the_vocabulary_alone(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [8, 9, 7])
    plain = MMSequentialDataset(bare_config("SASRec", folder)).item_tokens()
    ghosts = [[f"i{i}", "x"] for i in range(60)]
    write_atomic(folder / "toy.item", "item_id:token brand:token", ghosts)
    write_atomic(folder / "toy.text", "item_id:token title:text", ghosts)
    write_atomic(folder / "toy.image", "item_id:token image:image", ghosts)
    for columns in ({"inter": "*", "item": "*"}, None):
        config = bare_config("SASRec", folder, load_col=columns)
        assert MMSequentialDataset(config).item_tokens() == plain


def test_side_files_as_additional_features_are_refused(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [8])
    with pytest.raises(UserError, match="additional_feat_suffix"):
        MMDataset(bare_config("SASRec", folder, additional_feat_suffix=["text"]))


# --- a sample of users ---
def sampled_users(folder: Path, limit: int, **keys: Any) -> set[str]:
    columns = {"inter": "*", "item": "*", "user": "*"}
    dataset = MMDataset(bare_config("BPR", folder, limit_users=limit, load_col=columns, **keys))
    return set(dataset.field2id_token["user_id"][1:].tolist())


def test_limit_users_is_a_seeded_nested_sample(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 30)
    small, large = sampled_users(folder, 5), sampled_users(folder, 12)
    assert (len(small), len(large)) == (5, 12)
    assert small < large
    assert small == sampled_users(folder, 5)
    assert small != sampled_users(folder, 5, seed=1)
    assert len(sampled_users(folder, 99)) == 30


def test_limit_users_drops_interactions_features_and_items(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 30, items=200)
    items, users = [[f"i{i}", "x"] for i in range(200)], [[f"u{u}", "x"] for u in range(30)]
    write_atomic(folder / "toy.item", "item_id:token brand:token", items)
    write_atomic(folder / "toy.user", "user_id:token city:token", users)
    columns = {"inter": "*", "item": "*", "user": "*"}
    dataset = MMDataset(bare_config("BPR", folder, limit_users=4, load_col=columns))
    assert dataset.inter_num == 24
    assert dataset.item_num == len(set(dataset.inter_feat["item_id"])) + 1
    assert len(dataset.user_feat) == 5
    assert len(dataset.item_feat) == dataset.item_num


def test_limit_users_samples_those_who_pass_the_filters(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [2] * 20 + [8] * 6)
    users = sampled_users(folder, 6, user_inter_num_interval="[5,inf)")
    assert users == {f"u{u}" for u in range(20, 26)}


def test_limit_users_below_one_is_an_error(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 3)
    with pytest.raises(UserError, match="limit_users is 0"):
        sampled_users(folder, 0)


# --- sequences ---
def naive_sequences(folder: Path) -> dict[str, list[str]]:
    lines = (folder / f"{folder.name}.inter").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    rows.sort(key=lambda row: float(row[2]))  # stable: equal times keep the file's order
    users: dict[str, list[str]] = {}
    for user, item, *_ in rows:
        users.setdefault(user, []).append(item)
    return users


@pytest.mark.parametrize(("model", "cls"), [("SASRec", MMSequentialDataset), ("BPR", MMDataset)])
def test_train_sequences_are_whole_and_end_before_what_is_held_out(
    tmp_path: Path, model: str, cls: type
) -> None:
    folder = random_interactions(tmp_path / "toy", LENGTHS)
    dataset = cls(bare_config(model, folder))
    train, valid, test = dataset.build()
    tokens = np.array(dataset.item_tokens())
    names = dataset.field2id_token["user_id"]
    known = {names[u]: tokens[train.train_sequences[r]].tolist()
             for r, u in enumerate(train.train_sequences.users)}  # fmt: skip
    whole = {names[u]: tokens[test.sequences[r]].tolist()
             for r, u in enumerate(test.sequences.users)}  # fmt: skip
    expected = naive_sequences(folder)
    assert whole == expected
    held_out = {u: min(2, max(len(s) - 2, 0)) for u, s in expected.items()}
    trained = {u: s[: len(s) - held_out[u]] for u, s in expected.items()}
    if cls is MMSequentialDataset:  # a single interaction gives no row
        trained = {u: s for u, s in trained.items() if len(s) > 1}
    assert known == trained
    assert valid.train_sequences is None


def test_general_and_sequential_models_have_the_same_targets(
    tmp_path: Path,
) -> None:
    folder = random_interactions(tmp_path / "toy", LENGTHS)
    parts = [
        cls(bare_config(model, folder)).build()
        for model, cls in (("SASRec", MMSequentialDataset), ("BPR", MMDataset))
    ]
    for sequential, general in zip(*(p[1:] for p in parts), strict=True):
        rows = [
            sorted(
                zip(p.inter_feat["user_id"].tolist(), p.inter_feat["item_id"].tolist(), strict=True)
            )
            for p in (sequential, general)
        ]
        assert rows[0] == rows[1]
        assert rows[0]


def test_kg_sequences_on_ml_100k() -> None:
    columns = {
        "inter": ["user_id", "item_id", "timestamp"],
        "kg": ["head_id", "relation_id", "tail_id"],
        "link": ["item_id", "entity_id"],
    }
    keys = {"user_inter_num_interval": "[20,30]", "load_col": columns}
    with pytest.raises(UserError, match=r"KSR needs the file .*ml-100k\.ent"):
        MMKGSeqDataset(bare_config("KSR", None, **keys))
    keys["additional_feat_suffix"] = None
    train, _, test = MMKGSeqDataset(bare_config("KSR", None, **keys)).build()
    assert train.train_sequences is not None
    assert len(train) + len(train.train_sequences) == len(train.train_sequences.items)
    assert train.entity_num > train.item_num
    assert len(test) == len(train.train_sequences)


# --- order in time ---
@pytest.mark.parametrize(("model", "cls"), [("SASRec", MMSequentialDataset), ("BPR", MMDataset)])
@pytest.mark.parametrize("keys", [{}, {"numerical_features": ["timestamp"]}])
def test_the_last_of_unix_seconds_is_held_out_whatever_the_files_order(
    tmp_path: Path, model: str, cls: type, keys: dict[str, Any]
) -> None:
    rows = [[f"u{u}", f"i{n}", 1_700_000_000 + 3 * n + u] for u in range(20) for n in range(9)]
    np.random.default_rng(0).shuffle(rows)
    header = "user_id:token item_id:token timestamp:float"
    write_atomic(tmp_path / "toy" / "toy.inter", header, rows)
    dataset = cls(bare_config(model, tmp_path / "toy", **keys))
    _, valid, test = dataset.build()
    names = np.array(dataset.item_tokens())
    assert names[valid.inter_feat["item_id"]].tolist() == ["i7"] * 20
    assert names[test.inter_feat["item_id"]].tolist() == ["i8"] * 20
    assert [names[row].tolist() for row in test.sequences.items.reshape(20, 9)] == [
        [f"i{n}" for n in range(9)]
    ] * 20


def test_the_order_of_the_file_stays_where_time_does_not_order(tmp_path: Path) -> None:
    rows = [["u", f"i{n}", 9 - n] for n in range(5)]
    write_atomic(
        tmp_path / "toy" / "toy.inter", "user_id:token item_id:token timestamp:float", rows
    )
    config = bare_config("BPR", tmp_path / "toy", eval_args={**LS, "order": "RO"})
    assert MMDataset(config).inter_feat["timestamp"].tolist() == [9, 8, 7, 6, 5]
