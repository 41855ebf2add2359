from pathlib import Path

import pytest

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL
from equipoise.data.taxonomy import OTHER, load_taxonomy


def test_categories_are_the_fourteen_hazards_in_order_and_other() -> None:
    taxonomy = load_taxonomy()
    assert taxonomy.hazards == tuple(f"S{number}" for number in range(1, 15))
    assert taxonomy.ids == (*taxonomy.hazards, OTHER)
    assert [category.id for category in taxonomy] == list(taxonomy.ids)
    assert len(taxonomy) == 15


def test_every_category_has_its_own_readable_name_and_one_sentence() -> None:
    categories = list(load_taxonomy())
    assert len({category.name for category in categories}) == len(categories)
    for category in categories:
        assert category.name != category.id
        assert category.description.endswith(".")
        assert category.description.count(". ") == 0


def test_name_and_membership() -> None:
    taxonomy = load_taxonomy()
    assert taxonomy.name("S9") == "Indiscriminate weapons"
    assert taxonomy.name(HELPFUL) == "Helpful"
    assert "S14" in taxonomy
    assert "S15" not in taxonomy
    assert HELPFUL not in taxonomy


def test_an_unknown_category_has_no_name() -> None:
    with pytest.raises(DataError, match=r"'S15' is unknown; known are S1, .*OTHER and helpful"):
        load_taxonomy().name("S15")


def test_a_user_adds_categories_behind_the_shipped_ones(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("categories: {brand: {name: Brand safety, description: Running down the company.}}")
    taxonomy = load_taxonomy(str(path))
    assert taxonomy.ids == (*load_taxonomy().ids, "brand")
    assert taxonomy.name("brand") == "Brand safety"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("categories: {S1: {name: a, description: b}}", "categories.S1: expected an id"),
        ("categories: {helpful: {name: a, description: b}}", "categories.helpful: expected an id"),
        ("categories: {a/b: {name: a, description: b}}", "categories.a/b: expected an id"),
        ("categories: {a: {name: a}}", "categories.a: expected the keys name and description"),
        ("categories: {a: {name: a, description: }}", "categories.a: name and description have to be texts"),
        ("categories: [a]", "categories: expected `ID:"),
    ],
)
def test_own_categories_that_cannot_be_used_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_taxonomy(str(path))
