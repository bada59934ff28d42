"""Categories of each release: short names, and the names of the datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset_tools.amazon_releases import RELEASES, category_of, dataset_name

from .amazon_files import PRODUCTS_2014, REVIEWS, make, pack

BY_NAME = {release.name: release for release in RELEASES}
# In all three releases.
COMMON = """
    Automotive Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry
    Digital_Music Electronics Grocery_and_Gourmet_Food Home_and_Kitchen Kindle_Store Movies_and_TV
    Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies Sports_and_Outdoors
    Tools_and_Home_Improvement Toys_and_Games Video_Games
"""
LATER = """
    All_Beauty Appliances Arts_Crafts_and_Sewing Gift_Cards Industrial_and_Scientific
    Magazine_Subscriptions Software
"""
OWN = {
    "amazon2014": """
        Amazon_Instant_Video Apps_for_Android Baby Beauty Health_and_Personal_Care
    """,
    "amazon2018": f"{LATER} AMAZON_FASHION Luxury_Beauty Prime_Pantry",
    "amazon2023": f"""
        {LATER} Amazon_Fashion Baby_Products Beauty_and_Personal_Care Handmade_Products
        Health_and_Household Health_and_Personal_Care Subscription_Boxes Unknown
    """,
}
KNOWN = {name: [*COMMON.split(), *own.split()] for name, own in OWN.items()}


@pytest.mark.parametrize("name", KNOWN)
def test_no_two_categories_make_the_same_dataset(name: str) -> None:
    release, categories = BY_NAME[name], KNOWN[name]
    assert len({dataset_name(release, category) for category in categories}) == len(categories)
    assert all(category_of(release, category) == category for category in categories)


@pytest.mark.parametrize(
    ("release", "given", "category", "name"),
    [
        ("amazon2014", "Clothing", "Clothing_Shoes_and_Jewelry", "amazon-clothing"),
        ("amazon2014", "Sports", "Sports_and_Outdoors", "amazon-sports"),
        ("amazon2014", "TOYS", "Toys_and_Games", "amazon-toys"),
        ("amazon2014", "Beauty", "Beauty", "amazon-beauty"),
        ("amazon2014", "Baby", "Baby", "amazon-baby"),
        ("amazon2014", "Books", "Books", "amazon-books"),
        ("amazon2018", "All_Beauty", "All_Beauty", "amazon2018-beauty"),
        ("amazon2018", "Beauty", "Beauty", "amazon2018-beauty"),
        ("amazon2018", "Luxury_Beauty", "Luxury_Beauty", "amazon2018-luxury-beauty"),
        ("amazon2018", "Amazon_Fashion", "AMAZON_FASHION", "amazon2018-fashion"),
        ("amazon2023", "fashion", "Amazon_Fashion", "amazon2023-fashion"),
        ("amazon2023", "All_Beauty", "All_Beauty", "amazon2023-beauty"),
        ("amazon2023", "Baby", "Baby_Products", "amazon2023-baby"),
        ("amazon2023", "games", "Video_Games", "amazon2023-games"),
        (
            *("amazon2023", "Beauty_and_Personal_Care", "Beauty_and_Personal_Care"),
            "amazon2023-beauty-and-personal-care",
        ),
    ],
)
def test_short_names(release: str, given: str, category: str, name: str) -> None:
    assert category_of(BY_NAME[release], given) == category
    assert dataset_name(BY_NAME[release], given) == name


def test_a_short_name_finds_the_files_and_the_card_has_the_sources(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    pack(raw / "reviews_Toys_and_Games_5.json.gz", REVIEWS)
    pack(raw / "meta_Toys_and_Games.json.gz", PRODUCTS_2014)
    assert make(raw, tmp_path, "amazon2014", "Toys", "--min_inter=2") == 0
    assert "--category Toys_and_Games" in (tmp_path / "amazon-toys" / "README.md").read_text()
