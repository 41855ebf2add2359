"""The canonical harm categories in their fixed order, with those that a user adds."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL

OTHER = "OTHER"
"""The category of a harmful record that fits no hazard or whose category is unknown."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # names of metrics and files are made of it


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
        """`S1` ... `S14`, `OTHER`."""
        return tuple(self.categories)

    @property
    def hazards(self) -> tuple[str, ...]:
        """`S1` ... `S14`: the categories that have a definition of their own."""
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
def load_taxonomy(path: str | None = None) -> Taxonomy:
    """The shipped taxonomy, `mlcommons.yaml`, with the `categories` of the user's YAML at `path` behind it.

    Raises `DataError` with everything that is wrong with the user's categories.
    """
    shipped = read_yaml(Path(__file__).with_name("mlcommons.yaml"))
    categories = {id: Category(id, **entry) for id, entry in shipped.items()}
    if path is not None:
        categories |= _own_categories(path, categories)
    return Taxonomy(categories)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; `DataError` where it cannot be read or holds none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected keys with values, found {type(content).__name__}.")
    return content


def listed_problems(path: Path, problems: list[str]) -> str:
    """One message for everything that is wrong with a file, a line each."""
    lines = "\n".join(f"  {problem}" for problem in problems)
    return f"{path} has {len(problems)} problem{'s'[: len(problems) > 1]}:\n{lines}"


def _own_categories(path: str, shipped: Mapping[str, Category]) -> dict[str, Category]:
    file = Path(path).expanduser()
    entries = read_yaml(file).get("categories") or {}
    if not isinstance(entries, dict):
        raise DataError(f"{file}: categories: expected `ID: {{name: ..., description: ...}}` for each.")
    problems: list[str] = []
    categories: dict[str, Category] = {}
    for id, entry in entries.items():
        if not isinstance(id, str) or not _ID.fullmatch(id) or id in (*shipped, HELPFUL):
            expected = f"letters, digits, '.', '_' and '-', and none of {', '.join((*shipped, HELPFUL))}"
            problems.append(f"categories.{id}: expected an id of {expected}")
        elif not isinstance(entry, dict) or set(entry) != {"name", "description"}:
            problems.append(f"categories.{id}: expected the keys name and description")
        elif not all(isinstance(text, str) and text.strip() for text in entry.values()):
            problems.append(f"categories.{id}: name and description have to be texts")
        else:
            categories[id] = Category(id, **entry)
    if problems:
        raise DataError(listed_problems(file, problems))
    return categories
