"""What the papers leave out: each filter, their order, and what the card says of them."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dataset_tools.__main__ import main
from dataset_tools.filters import top_frequency

from .amazon_files import interactions, make, pack, review, texts

LONG = "x" * 201


def product(item: str, **says: object) -> dict[str, object]:
    return {"asin": item, "title": f"Title of {item}", **says}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Six users take a, b and c; d to g are each short of something; two users take little."""
    everybody = [f"u{n}" for n in range(6)]
    reviews = [review(user, item, day) for user in everybody for day, item in enumerate("abc")]
    reviews += [review("u0", item, 9) for item in "dgef"] + [review("u1", "d", 9)]
    reviews += [review("v", "a", 1), review("v", "d", 2), review("w", "a", 1)]
    full = {"description": ["Good."], "imageURL": ["https://x/1.jpg"]}
    products = [*(product(item, **full) for item in "abc")]
    products += [
        product("d", imageURL=["https://x/1.jpg"], description=[]),
        product("e", **full) | {"title": LONG},
        product("f", description=["Good."], imageURL=["file:///x"]),
    ]
    pack(tmp_path / "raw" / "Beauty_5.json.gz", reviews)
    pack(tmp_path / "raw" / "meta_Beauty.json.gz", products)
    return tmp_path / "raw"


def made(raw: Path, out: Path, *flags: str) -> list[list[str]]:
    assert make(raw, out, "amazon2018", "Beauty", *flags) == 0
    return [row[:2] for row in interactions(out / "amazon2018-beauty")]


def card(out: Path) -> str:
    return (out / "amazon2018-beauty" / "README.md").read_text()


# --- each filter ---
@pytest.mark.parametrize(
    ("flags", "items", "says"),
    [
        ((), "abcdefg", ()),
        (("--require=title",), "abcdef", ("left out, items without title: 1 (1 interactions)",)),
        (
            ("--require=image,description",),
            "abce",
            (
                "left out, items without image: 2 (2 interactions)",  # f and g
                "left out, items without description: 1 (3 interactions)",  # d
            ),
        ),
        (
            ("--max_title=200",),
            "abcdfg",
            ("left out, items with a title longer than 200: 1 (1 interactions)",),
        ),
        (("--max_title=201",), "abcdefg", ()),
        (
            ("--require=title", "--max_title=200"),
            "abcdf",
            ("items without title: 1 (", "items with a title longer than 200: 1 ("),
        ),
    ],
)
def test_items_that_say_too_little_or_too_much(
    raw: Path, tmp_path: Path, flags: tuple[str, ...], items: str, says: tuple[str, ...]
) -> None:
    rows = made(raw, tmp_path, "--min_inter=1", *flags)
    assert {item for _, item in rows} == set(items)
    assert set(texts(tmp_path / "amazon2018-beauty")) == set(items) - {"g"}  # g has no record
    for sentence in says:
        assert sentence in card(tmp_path)
    assert card(tmp_path).count("left out, items") == len(says)
    assert " ".join(flag.replace("=", " ") for flag in flags) in card(tmp_path)


def test_no_images_asks_for_addresses_all_the_same(raw: Path, tmp_path: Path) -> None:
    rows = made(raw, tmp_path, "--min_inter=1", "--require=image", "--no-images")
    assert {item for _, item in rows} == set("abcde")
    assert not (tmp_path / "amazon2018-beauty" / "amazon2018-beauty.urls").exists()
    assert "--raw_dir raw --require image --min_inter 1 --no-images" in card(tmp_path)


def test_the_command_on_the_card_can_be_given_again(raw: Path, tmp_path: Path) -> None:
    made(raw, tmp_path, "--min_inter=3, 1", "--require= image ,title")
    assert "--require ' image ,title' --min_inter '3, 1'" in card(tmp_path)
    [line] = [line for line in card(tmp_path).splitlines() if "amazon2018 --category" in line]
    words = shlex.split(line)[3:]
    words[words.index("--raw_dir") + 1] = str(raw)
    assert main([*words, f"--out={tmp_path}/again"]) == 0
    first, again = (place / "amazon2018-beauty" for place in (tmp_path, tmp_path / "again"))
    assert interactions(first) == interactions(again)


def test_a_core_of_users_and_items_is_counted(raw: Path, tmp_path: Path) -> None:
    rows = made(raw, tmp_path, "--min_inter=3,6")
    assert {user for user, _ in rows} == {f"u{n}" for n in range(6)}
    assert {item for _, item in rows} == set("abc")
    assert "left out by --min_inter 3,6: 2 users, 4 items, 8 interactions" in card(tmp_path)


def test_users_are_drawn_once_each_and_keep_their_order(raw: Path, tmp_path: Path) -> None:
    everything = made(raw, tmp_path / "all", "--min_inter=1")
    samples = {}
    for count in (2, 5, 8, 99):
        rows = made(raw, tmp_path / f"{count}", "--min_inter=1", f"--sample_users={count}")
        users = samples[count] = {user for user, _ in rows}
        assert len(users) == min(count, 8)
        assert rows == [row for row in everything if row[0] in users]
        assert f"users drawn by seed 2020: {min(count, 8)} of 8" in card(tmp_path / f"{count}")
    assert samples[2] < samples[5] < samples[8]
    again = made(raw, tmp_path / "again", "--min_inter=1", "--sample_users=5")
    assert {user for user, _ in again} == samples[5]
    others = [
        made(raw, tmp_path / f"s{n}", "--min_inter=1", "--sample_users=5", f"--seed={n}")
        for n in range(4)
    ]
    assert len({tuple(sorted({user for user, _ in rows})) for rows in others}) > 1
    assert "--sample_users 5 --seed 3" in card(tmp_path / "s3")


def test_the_most_frequent_items_of_a_user_in_order_of_time(raw: Path, tmp_path: Path) -> None:
    """u0 has a, b, c, then d, g, e and f of one day: taken 8, 6, 6, 3, 1, 1 and 1 times."""
    rows = made(raw, tmp_path, "--min_inter=1", "--top_frequency=5")
    assert [item for user, item in rows if user == "u0"] == ["a", "b", "c", "d", "g"]
    assert [item for user, item in rows if user == "v"] == ["a", "d"]
    assert "left out by --top_frequency 5: 2 interactions" in card(tmp_path)
    two = made(raw, tmp_path / "two", "--min_inter=1", "--top_frequency=2")
    assert [item for user, item in two if user == "u3"] == ["a", "b"]  # b came before c


def naive_top(rows: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    often = Counter(item for _, item in rows)
    kept = set()
    for user in {user for user, _ in rows}:
        own = [place for place, row in enumerate(rows) if row[0] == user]
        kept |= set(sorted(own, key=lambda place: (-often[rows[place][1]], place))[:count])
    return [row for place, row in enumerate(rows) if place in kept]


@pytest.mark.parametrize("seed", range(4))
def test_top_frequency_is_that_of_a_naive_loop(seed: int) -> None:
    """Users stand together in any order, items repeat."""
    rng = np.random.default_rng(seed)
    users = rng.permutation(12).repeat(rng.integers(1, 15, 12)).tolist()
    items = rng.geometric(0.1, len(users)).tolist()
    rows = list(zip(users, items, strict=True))
    frame = pd.DataFrame(rows, columns=["user_id", "item_id"])
    for count in (1, 3, 20):
        kept = frame[top_frequency(frame, count)]
        assert list(kept.itertuples(index=False, name=None)) == naive_top(rows, count)


# --- their order ---
def test_items_are_left_out_before_the_core(raw: Path, tmp_path: Path) -> None:
    """Without d, v has one interaction left; after the core v would have stayed."""
    assert "v" in {user for user, _ in made(raw, tmp_path / "all", "--min_inter=2,1")}
    rows = made(raw, tmp_path, "--min_inter=2,1", "--require=description")
    assert "v" not in {user for user, _ in rows}


def test_users_are_drawn_after_the_core(raw: Path, tmp_path: Path) -> None:
    """No item of two users would pass a core of six."""
    rows = made(raw, tmp_path, "--min_inter=3,6", "--sample_users=2")
    assert len(rows) == 6
    assert "users drawn by seed 2020: 2 of 6" in card(tmp_path)


def test_frequency_is_that_of_the_core_and_not_of_the_drawn(tmp_path: Path) -> None:
    """Among all, b is more frequent than a; with any one of x and y, a is as frequent and earlier.
    What the core leaves out does not count: c is the most frequent before it."""
    raw = tmp_path / "raw"
    reviews = [review(user, "a", 1) for user in ("x", "y")]
    reviews += [review(user, "b", 2) for user in ("x", "y", "z")]
    reviews += [review("z", "d", 3)]
    reviews += [review(user, "c", 3) for user in ("x", "p", "q", "r", "s")]
    pack(raw / "Beauty_5.json.gz", reviews)
    pack(raw / "meta_Beauty.json.gz", [])
    flags = ("--min_inter=2,1", "--top_frequency=1")
    assert made(raw, tmp_path / "all", *flags) == [["x", "b"], ["y", "b"], ["z", "b"]]
    for seed in range(6):
        drawn = made(raw, tmp_path / f"{seed}", *flags, "--sample_users=1", f"--seed={seed}")
        assert drawn[0][1] == "b"


# --- mistakes ---
@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--require=titel", "'titel' is none of title, price, brand, categories, description, im"),
        ("--require=brand", "all are without brand"),
        ("--max_title=-1", "--max_title is -1: give 0 or more"),
        ("--sample_users=-1", "--sample_users is -1: give 0 or more"),
        ("--top_frequency=-1", "--top_frequency is -1: give 0 or more"),
        ("--seed=-1", "--seed is -1: give 0 or more"),
        ("--limit=-1", "--limit is -1: give 0 or more"),
        ("--min_inter=9", "--min_inter 9,9 leaves no interaction"),
        ("--name=../x", "use letters, digits"),
        ("--name=ml-100k", "RecBole reads the copy in its own package under this name"),
    ],
)
def test_mistakes_are_one_sentence(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, says: str
) -> None:
    assert make(raw, tmp_path / "out", "amazon2018", "Beauty", "--min_inter=1", flag) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert len(said) == 1
    assert says in said[0]
    assert not (tmp_path / "out").exists()


# --- the other converters ---
def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (9, 9), "red").save(folder / f"{name}.jpg")
    return folder


def test_movielens_and_microlens_ask_for_a_file(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shown = pictures(raw / "MicroLens-50k_covers", "1", "3")
    (raw / "ratings.dat").write_text("7::1::5::1\n7::2::3::2\n8::3::3::2\n")
    (raw / "movies.dat").write_text("1::One::Drama\n2::Two::Drama\n")
    (raw / "MicroLens-50k_pairs.csv").write_text("user,item,timestamp\n7,1,1\n7,2,2\n8,3,2\n")
    (raw / "MicroLens-50k_titles.csv").write_text("item,title\n1,One\n2,Two\n")
    common = [f"--raw_dir={raw}", f"--out={tmp_path}", "--min_inter=1", "--require=image"]
    movies = ["movielens", "--variant=1m", f"--posters={shown}", *common]
    videos = ["microlens", "--variant=50k", *common]
    for words, name in ((movies, "ml-1m"), (videos, "microlens-50k")):
        for more in ([], ["--no-images", "--force"]):
            assert main([*words, *more]) == 0
            assert [row[1] for row in interactions(tmp_path / name)] == ["1", "3"]
            assert (tmp_path / name / f"{name}.image").exists() == (not more)
        said = (tmp_path / name / "README.md").read_text()
        assert "items without image: 1 (1 interactions)" in said
        assert "--require image --min_inter 1 --no-images" in said
    titled = ["--require=title,image", "--force"]
    assert main([*videos, *titled]) == 0
    assert [row[1] for row in interactions(tmp_path / "microlens-50k")] == ["1"]


def test_tables_have_the_same_filters(tmp_path: Path) -> None:
    """x has everything; y no colour; z no row; p a picture that is not there."""
    pictures(tmp_path / "photos", "x", "y")
    rows = [f"{user},{item},{n}" for n, item in enumerate("xypz") for user in "abc"]
    (tmp_path / "c.csv").write_text("user,item,time\n" + "\n".join([*rows, "d,x,1"]) + "\n")
    items = ["x,Soap,red,x.jpg", "y,Long comb,,y.jpg", "p,Tin,blue,p.jpg", "unsold,T,r,"]
    (tmp_path / "i.csv").write_text("item,title,colour,image\n" + "\n".join(items) + "\n")
    words = ["table", f"--interactions={tmp_path}/c.csv", f"--items={tmp_path}/i.csv"]
    words += [f"--images={tmp_path}/photos", f"--out={tmp_path}"]

    def kept(name: str, *flags: str) -> list[list[str]]:
        assert main([*words, f"--name={name}", *flags]) == 0
        return [row[:2] for row in interactions(tmp_path / name)]

    assert len(kept("all")) == 13
    assert {item for _, item in kept("shown", "--require=image")} == set("xy")
    assert {item for _, item in kept("red", "--require=image,colour")} == {"x"}
    assert {item for _, item in kept("short", "--max_title=5")} == set("xpz")
    assert len({user for user, _ in kept("few", "--sample_users=2")}) == 2
    assert kept("top", "--top_frequency=1", "--min_inter=2,1") == [[user, "x"] for user in "abc"]
    said = (tmp_path / "red" / "README.md").read_text()
    assert "left out, items without image: 2 (6 interactions)" in said
    assert "left out, items without colour: 1 (3 interactions)" in said
    assert "--require image,colour" in said


def test_a_table_names_the_attributes_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.csv").write_text("user,item,time\na,x,1\n")
    (tmp_path / "i.csv").write_text("item,title,colour\nx,Soap,red\n")
    words = ["table", f"--interactions={tmp_path}/c.csv", f"--items={tmp_path}/i.csv", "--name=d"]
    assert main([*words, f"--out={tmp_path}", "--require=color"]) == 1
    said = capsys.readouterr().err
    assert "'color' is none of title, colour, image (did you mean 'colour'?)" in said
