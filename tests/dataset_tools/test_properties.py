"""Every dataset of a paper has a YAML: it loads, is packaged, and says how the dataset is made."""

from __future__ import annotations

import argparse
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dataset_tools.__main__ import _parser
from dataset_tools.amazon import Converter
from dataset_tools.amazon_releases import dataset_name
from dataset_tools.filters import Filters
from dataset_tools.movielens import VARIANTS
from dataset_tools.verify import PUBLISHED
from recbole_mm.config import MMConfig, read_yaml
from recbole_mm.paths import properties_dir
from tests.conftest import REPO

NAMES = sorted(path.stem for path in (properties_dir() / "dataset").glob("*.yaml"))
GENERATED = {"mm-demo", "mm-demo-permuted"}
OF_PAPERS = {
    *(f"amazon-{name}" for name in ("beauty", "clothing", "sports", "toys")),
    *(f"amazon2018-{name}" for name in ("sports", "grocery", "arts", "phones")),
    *(f"amazon2018-{name}" for name in ("books", "clothing")),
    *(f"amazon2023-{name}" for name in ("baby", "games")),
    *(f"microlens-{name}" for name in ("50k", "100k", "1m")),
    *("movielens-100k", "ml-1m", "ml-latest-small"),
}


def command(name: str) -> argparse.Namespace:
    """The command of a YAML, parsed as the command line does."""
    words = shlex.split(read_yaml(properties_dir() / "dataset" / f"{name}.yaml")["dataset_command"])
    assert words[:3] == ["python", "-m", "dataset_tools"]
    parsed = _parser().parse_args(words[3:])
    parsed.converter = words[3]
    return parsed


def test_no_paper_lacks_one() -> None:
    assert set(NAMES) == OF_PAPERS | GENERATED
    assert set(PUBLISHED) <= OF_PAPERS


@pytest.mark.parametrize("name", NAMES)
def test_it_loads(name: str) -> None:
    config = MMConfig("LRURec", name)
    assert config["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}
    assert config["dataset"] == name
    assert Path(config["data_path"]).name == name  # RecBole takes none from its own package


@pytest.mark.parametrize("name", sorted(OF_PAPERS))
def test_its_command_makes_the_dataset_of_that_name(name: str) -> None:
    parsed = command(name)
    converter = parsed.run.__self__ if hasattr(parsed.run, "__self__") else None
    if isinstance(converter, Converter):
        made = dataset_name(converter.release, parsed.category)
    elif parsed.converter == "movielens":
        made = VARIANTS[parsed.variant].name
    else:
        made = parsed.name or f"microlens-{parsed.variant.lower()}"
    assert made == name
    assert parsed.out == "dataset"
    Filters.of(parsed)


@pytest.mark.parametrize(
    ("name", "filters"),
    [
        ("amazon-toys", Filters((), 0, (5, 5), 0, 2020, 0)),
        ("amazon2018-arts", Filters(("image", "description"), 0, (5, 5), 0, 2020, 0)),
        ("amazon2018-books", Filters(("title",), 200, (3, 0), 80_000, 2020, 0)),
        ("amazon2018-clothing", Filters(("title",), 200, (3, 0), 100_000, 2020, 0)),
        ("amazon2023-baby", Filters((), 0, (6, 5), 0, 2020, 0)),
        ("microlens-50k", Filters((), 0, (6, 5), 0, 2020, 0)),
    ],
)
def test_its_filters_are_those_of_the_paper(name: str, filters: Filters) -> None:
    parsed = command(name)
    assert Filters.of(parsed) == filters
    if parsed.converter == "amazon2018":
        assert parsed.all_reviews == (filters.least[1] == 0)


def test_all_are_packaged() -> None:
    """`test_packaging` builds the wheel; this asks what it would take."""
    with (REPO / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    patterns = setuptools["package-data"]["recbole_mm.properties.dataset"]
    assert "recbole_mm.properties.dataset" in setuptools["packages"]
    assert all(any(fnmatch(f"{name}.yaml", p) for p in patterns) for name in NAMES)
