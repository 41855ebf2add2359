"""The canonical harm categories, in their fixed order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL

OTHER = "OTHER"
"""The category of a harmful record that fits no hazard or whose category is unknown."""


@dataclass(frozen=True, slots=True)
class Category:
    """One harm category."""

    id: str
    name: str
    description: str
    """One sentence."""


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """Harm categories by id; iterating yields them in the order of the file."""

    categories: Mapping[str, Category]

    @property
    def ids(self) -> tuple[str, ...]:
        """`S1` ... `S13`, `OTHER`."""
        return tuple(self.categories)

    @property
    def hazards(self) -> tuple[str, ...]:
        """`S1` ... `S13`: the categories that have a definition of their own."""
        return tuple(id for id in self.categories if id != OTHER)

    @property
    def names(self) -> dict[str, str]:
        """Id -> readable name."""
        return {category.id: category.name for category in self}

    def name(self, id: str) -> str:
        """The readable name of a category, or of `helpful`; `DataError` for anything else."""
        if id == HELPFUL:
            return "Helpful"
        if id not in self.categories:
            raise DataError(f"Category {id!r} is unknown; known are {', '.join(self.ids)} and {HELPFUL}.")
        return self.categories[id].name

    def __contains__(self, id: object) -> bool:
        return id in self.categories

    def __iter__(self) -> Iterator[Category]:
        return iter(self.categories.values())

    def __len__(self) -> int:
        return len(self.categories)


@cache
def load_taxonomy() -> Taxonomy:
    """The shipped taxonomy, `mlcommons.yaml`."""
    entries = yaml.safe_load(Path(__file__).with_name("mlcommons.yaml").read_text(encoding="utf-8"))
    return Taxonomy({id: Category(id, **entry) for id, entry in entries.items()})
