import pytest

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL
from equipoise.data.taxonomy import OTHER, load_taxonomy


def test_categories_are_the_thirteen_hazards_in_order_and_other() -> None:
    taxonomy = load_taxonomy()
    assert taxonomy.hazards == tuple(f"S{number}" for number in range(1, 14))
    assert taxonomy.ids == (*taxonomy.hazards, OTHER)
    assert [category.id for category in taxonomy] == list(taxonomy.ids)
    assert len(taxonomy) == 14


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
    assert "S13" in taxonomy
    assert "S14" not in taxonomy
    assert HELPFUL not in taxonomy


def test_an_unknown_category_has_no_name() -> None:
    with pytest.raises(DataError, match=r"'S14' is unknown; known are S1, .*OTHER and helpful"):
        load_taxonomy().name("S14")
