"""Published sequence files: their forms, whom they fit, and what RecBole makes of ties."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from dataset_tools.__main__ import main

from .amazon_files import interactions, make, pack, review

# Of one day each, in the order of the file: u1 a b c | d e; u2 c b a a; u3 a b | c; u4 a b.
DAYS = {
    "u1": [("a", 1), ("b", 1), ("c", 1), ("d", 2), ("e", 2)],
    "u2": [("c", 1), ("b", 1), ("a", 1), ("a", 1)],
    "u3": [("a", 1), ("b", 1), ("c", 2)],
    "u4": [("a", 1), ("b", 1)],
}
PUBLISHED = {  # u2 repeats, u3 would go back in time, u4 has another item, u9 is a stranger
    "u1": ["c", "a", "b", "e", "d"],
    "u2": ["a", "b", "a", "c"],
    "u3": ["c", "a", "b"],
    "u4": ["a", "z"],
    "u9": ["a", "b"],
}
SAID = (
    "order of {}: 2 users",
    "users that keep their own order because they have other items there: 1",
    "users that keep their own order because they would go back in time: 1",
    "users that keep their own order because they are not there: 1",
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """u5 is not published."""
    reviews = [review(user, item, day) for user, own in DAYS.items() for item, day in own]
    reviews += [review("u5", item, 1) for item in "ba"]
    pack(tmp_path / "raw" / "reviews_Beauty_5.json.gz", reviews)
    pack(tmp_path / "raw" / "meta_Beauty.json.gz", [])
    return tmp_path / "raw"


def numbers(names: list[str]) -> dict[str, str]:
    return {name: str(number) for number, name in enumerate(names, 1)}


USERS, ITEMS = numbers(list(PUBLISHED)), numbers(list("abcdez"))


def text(folder: Path, lists: dict[str, list[str]] = PUBLISHED) -> list[str]:
    lines = [" ".join([user, *items]) for user, items in lists.items()]
    (folder / "sequential_data.txt").write_text("\n".join(lines) + "\n\n")
    return [f"--order_from={folder}/sequential_data.txt"]


def p5(folder: Path, **maps: Any) -> list[str]:
    lists = {USERS[user]: [ITEMS[item] for item in items] for user, items in PUBLISHED.items()}
    (folder / "datamaps.json").write_text(json.dumps(maps))
    return [*text(folder, lists), f"--order_ids={folder}/datamaps.json"]


def p5_forward(folder: Path) -> list[str]:
    turned = [{number: raw for raw, number in ids.items()} for ids in (USERS, ITEMS)]
    return p5(folder, id2user=turned[0], id2item=turned[1], user2id={}, item2id={})


def p5_backward(folder: Path) -> list[str]:
    """With numbers as numbers."""
    ids = [{raw: int(number) for raw, number in ids.items()} for ids in (USERS, ITEMS)]
    return p5(folder, user2id=ids[0], item2id=ids[1])


def tsv(folder: Path) -> list[str]:
    lines = [f"{user}\t{' '.join(items)}" for user, items in PUBLISHED.items()]
    (folder / "s.tsv").write_text("reviewerID\titem_ids_chronological\n" + "\n".join(lines) + "\n")
    return [f"--order_from={folder}/s.tsv"]


def csv(folder: Path) -> list[str]:
    lines = [f'{user},"{items}"' for user, items in PUBLISHED.items()]
    (folder / "s.csv").write_text("user_id,sequence\n" + "\n".join(lines) + "\n")
    return [f"--order_from={folder}/s.csv"]


def jsonl(folder: Path) -> list[str]:
    rows = [{"user": user, "items": items} for user, items in PUBLISHED.items()]
    (folder / "s.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return [f"--order_from={folder}/s.jsonl"]


def made(raw: Path, out: Path, *flags: str) -> dict[str, str]:
    """The items of each user, in order."""
    assert make(raw, out, "amazon2014", "Beauty", "--min_inter=1", "--force", *flags) == 0
    rows = interactions(out / "amazon-beauty")
    times = [(row[0], float(row[2])) for row in rows]
    assert all(a[0] != b[0] or a[1] <= b[1] for a, b in itertools.pairwise(times))
    found: dict[str, str] = {}
    for user, item, *_ in rows:
        found[user] = found.get(user, "") + item
    return found


@pytest.mark.parametrize("form", [text, p5_forward, p5_backward, tsv, csv, jsonl])
def test_a_published_order_in_each_form(raw: Path, tmp_path: Path, form: Any) -> None:
    plain = {"u1": "abcde", "u2": "cbaa", "u3": "abc", "u4": "ab", "u5": "ba"}
    assert made(raw, tmp_path) == plain
    flags = form(tmp_path)
    assert made(raw, tmp_path, *flags) == {**plain, "u1": "cabed", "u2": "abac"}
    card = (tmp_path / "amazon-beauty" / "README.md").read_text()
    file = flags[0].rpartition("/")[2]
    for sentence in SAID:
        assert sentence.format(file) in card
    assert f"--order_from {file}" in card
    assert ("--order_ids datamaps.json" in card) == (len(flags) == 2)
    assert str(tmp_path) not in card


def test_ratings_go_with_their_interactions(tmp_path: Path) -> None:
    """Of two equal items on different days, the earlier keeps its time and stars."""
    raw = tmp_path / "raw"
    own = [("a", 1, 1.0), ("b", 1, 2.0), ("a", 2, 3.0)]
    reviews = [review("u1", item, day, overall=stars) for item, day, stars in own]
    pack(raw / "reviews_Beauty_5.json.gz", reviews)
    pack(raw / "meta_Beauty.json.gz", [])
    assert made(raw, tmp_path, *text(tmp_path, {"u1": ["b", "a", "a"]})) == {"u1": "baa"}
    rows = interactions(tmp_path / "amazon-beauty")
    assert [row[2:] for row in rows] == [["86400", "2"], ["86400", "1"], ["172800", "3"]]


def test_the_order_is_that_of_the_core(raw: Path, tmp_path: Path) -> None:
    """What the core leaves out may not be in the file."""
    flags = text(tmp_path, {"u1": ["b", "a"], "u2": ["b", "a", "a"]})
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--min_inter=2,4", *flags) == 0
    rows = interactions(tmp_path / "amazon-beauty")
    assert [row[1] for row in rows if row[0] == "u2"] == ["b", "a", "a"]
    assert [row[1] for row in rows if row[0] == "u1"] == ["b", "a"]


def test_top_frequency_breaks_ties_by_the_published_order(raw: Path, tmp_path: Path) -> None:
    """d and e of u1 are taken once each; published, e comes first."""
    flags = ("--top_frequency=4", *text(tmp_path))
    assert made(raw, tmp_path, *flags)["u1"] == "cabe"


def test_of_two_lines_of_a_user_the_first_counts(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("u4 a z\nu4 b a\nu5 a b\nu5 b a\n")
    found = made(raw, tmp_path, f"--order_from={tmp_path}/s.txt")
    assert (found["u4"], found["u5"]) == ("ab", "ab")
    card = (tmp_path / "amazon-beauty" / "README.md").read_text()
    assert "have other items there: 1" in card
    assert "are not there: 3" in card


def test_other_converters_take_an_order_too(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("7::1::5::9\n7::2::3::9\n7::3::3::9\n")
    (tmp_path / "movies.dat").write_text("1::One::Drama\n")
    words = ["movielens", "--variant=1m", f"--raw_dir={tmp_path}", f"--out={tmp_path}"]
    assert main([*words, "--min_inter=1", *text(tmp_path, {"7": ["3", "1", "2"]})]) == 0
    assert [row[1] for row in interactions(tmp_path / "ml-1m")] == ["3", "1", "2"]


@pytest.mark.parametrize(
    ("files", "flags", "says"),
    [
        ({"s.txt": "x a\ny b\n"}, ["--order_from=s.txt"], "s.txt fits no user: none has the same"),
        ({"s.txt": ""}, ["--order_from=s.txt"], "s.txt fits no user"),
        ({}, ["--order_from=s.txt"], "--order_from: there is no file"),
        ({}, ["--order_ids=m.json"], "give both"),
        ({"s.txt": "1 1"}, ["--order_from=s.txt", "--order_ids=m.json"], "--order_ids: there is n"),
        ({"s.tsv": "user_id\tx\n1\t2\n"}, ["--order_from=s.tsv"], "has no column 'item_ids'"),
        ({"s.txt": b"u1 \xff"}, ["--order_from=s.txt"], "is not UTF-8"),
        *(
            ({"s.txt": "1 1", "m.json": maps}, ["--order_from=s.txt", "--order_ids=m.json"], says)
            for maps, says in (
                ("{", "is no JSON ("),
                ("[" * 100_000, "is no JSON ("),
                ("[]", "is no JSON object"),
                ("{}", "has neither an object 'id2user' nor 'user2id'"),
                ('{"id2user": {}, "id2item": []}', "has neither an object 'id2item' nor"),
                ('{"id2user": {}, "id2item": {}}', "fits no user"),
            )
        ),
    ],
)
def test_mistakes_are_one_sentence(
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, Any],
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert make(raw, tmp_path / "out", "amazon2014", "Beauty", "--min_inter=1", *flags) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert len(said) == 1
    assert says in said[0]
    assert not (tmp_path / "out").exists()


# --- what RecBole makes of it ---
def histories(folder: Path) -> dict[str, tuple[str, str]]:
    """History and target of each user's test row, as the loaders of a sequential model have it."""
    from recbole_mm.data.dataset import MMSequentialDataset
    from tests.data.atomic_data import bare_config

    dataset = MMSequentialDataset(bare_config("GRU4Rec", folder, MAX_ITEM_LIST_LENGTH=9))
    *_, test = dataset.build()
    users, items = (dataset.field2id_token[name] for name in ("user_id", "item_id"))
    rows = test.inter_feat
    return {
        users[user]: ("".join(items[i] for i in history if i), items[target])
        for user, history, target in zip(
            rows["user_id"].tolist(),
            rows["item_id_list"].tolist(),
            rows["item_id"].tolist(),
            strict=True,
        )
    }


def test_ties_keep_their_order_up_to_the_test_row(raw: Path, tmp_path: Path) -> None:
    """All within the float32 of a unix time, where a minute or two are one number."""
    made(raw, tmp_path)
    assert histories(tmp_path / "amazon-beauty")["u1"] == ("abcd", "e")
    made(raw, tmp_path, *text(tmp_path))
    found = histories(tmp_path / "amazon-beauty")
    assert found["u1"] == ("cabe", "d")
    assert found["u2"] == ("aba", "c")
    assert found["u3"] == ("ab", "c")


def test_beauty_in_the_order_of_its_published_sequences(shared_data: Path, tmp_path: Path) -> None:
    """Reviews of three days a user, those of a day backwards; P5's files restore the order."""
    lines = (shared_data / "amazon-beauty" / "sequences.tsv").read_text().splitlines()[1:]
    items = (shared_data / "amazon-beauty" / "items.tsv").read_text(encoding="utf-8").splitlines()
    asins = dict(line.split("\t")[:2] for line in items[1:])
    users, reviews, published = {}, [], []
    for line in lines:
        number, reviewer, words = line.split("\t")
        own = [asins[word] for word in words.split()]
        users[number] = reviewer
        published += [[reviewer, item] for item in own]
        size = -(-len(own) // 3)
        days = [own[start : start + size] for start in range(0, len(own), size)]
        reviews += [
            review(reviewer, item, 16_000 + day) for day, of_day in enumerate(days)
            for item in reversed(of_day)
        ]  # fmt: skip
    raw = tmp_path / "raw"
    pack(raw / "reviews_Beauty_5.json.gz", reviews)
    pack(raw / "meta_Beauty.json.gz", [])
    (raw / "datamaps.json").write_text(json.dumps({"id2user": users, "id2item": asins}))
    sequences = [" ".join(line.split("\t")[::2]) for line in lines]
    (raw / "sequential_data.txt").write_text("\n".join(sequences))
    flags = [f"--order_from={raw}/sequential_data.txt", f"--order_ids={raw}/datamaps.json"]
    assert make(raw, tmp_path, "amazon2014", "Beauty") == 0
    assert [row[:2] for row in interactions(tmp_path / "amazon-beauty")] != published
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--force", *flags) == 0
    assert [row[:2] for row in interactions(tmp_path / "amazon-beauty")] == published
    assert (
        "order of sequential_data.txt: 22,363 users"
        in (tmp_path / "amazon-beauty" / "README.md").read_text()
    )
