"""Crosswalks: what other people's harm labels mean in the canonical categories.

One YAML a taxonomy under `crosswalks/`; its form is in `data/README.md`. A label may map to several categories and
several labels to one; what a label was called is kept by whoever maps it (`PreferencePair.meta["labels"]`).
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from equipoise.data.errors import DataError
from equipoise.data.taxonomy import OTHER, Taxonomy, listed_problems, load_taxonomy, read_yaml

FOLDER = Path(__file__).with_name("crosswalks")

HARMLESS = "none"
"""In place of categories: the label says that there is no harm."""

_CODE = re.compile(r"([A-Z]\d+): (.+)")


@dataclass(frozen=True, slots=True)
class Crosswalk:
    """The labels of one taxonomy, each with the canonical categories it means, most fitting first."""

    name: str
    taxonomy: Taxonomy
    """The canonical categories, and a user's own."""
    categories: Mapping[str, tuple[str, ...]]
    """Native label, as its authors spell it -> canonical ids; empty: the label says that there is no harm."""
    spellings: Mapping[str, str]
    """Normalised spelling, code or alias -> native label."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The native labels in the order of the file: where a record carries several, the first decides."""
        return tuple(self.categories)

    def knows(self, text: str) -> bool:
        """Whether `text` spells one of the labels."""
        return _normalised(text) in self.spellings

    def label(self, text: str) -> str:
        """The native label that `text` spells, whatever its case and punctuation, by name, code or alias.

        Raises `DataError` for a label that the taxonomy doesn't have.
        """
        known = self.spellings.get(_normalised(text))
        if known is None:
            close = difflib.get_close_matches(text, self.labels, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(
                f"Label {text!r} is unknown to the crosswalk {self.name}; {hint}known are {'; '.join(self.labels)}."
            )
        return known

    def map(self, label: str) -> tuple[str, ...]:
        """The canonical categories of a label, most fitting first; `DataError` as for `label`."""
        return self.categories[self.label(label)]

    def category(self, labels: Iterable[str]) -> str | None:
        """The one category of a record that carries `labels`; None where none of them speaks of harm.

        That of the label that stands first in the file among those that name a hazard; `OTHER` where none does.
        """
        found = {self.label(label) for label in labels}
        ordered = [
            self.categories[label][0] for label in self.labels if label in found and self.categories[label]
        ]
        return next((category for category in ordered if category != OTHER), OTHER if ordered else None)

    def labels_of(self, category: str) -> tuple[str, ...]:
        """The native labels that may mean `category`."""
        return tuple(label for label, categories in self.categories.items() if category in categories)


def crosswalk_names() -> tuple[str, ...]:
    """The shipped crosswalks."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@cache
def find_crosswalk(name_or_path: str) -> Crosswalk:
    """A shipped crosswalk by its name, or a user's own by the path of its YAML (`data.taxonomy`)."""
    if name_or_path in crosswalk_names():
        return crosswalk(name_or_path)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        shipped = ", ".join(crosswalk_names())
        raise DataError(f"{name_or_path!r} is neither a file nor a crosswalk that is shipped: {shipped}.")
    return read_crosswalk(path, load_taxonomy(name_or_path))


def find_taxonomy(name_or_path: str | None) -> Taxonomy:
    """The categories of a run: the shipped ones, and those of the user's YAML where `data.taxonomy` is one."""
    return load_taxonomy() if name_or_path is None else find_crosswalk(name_or_path).taxonomy


@cache
def crosswalk(name: str) -> Crosswalk:
    """The shipped crosswalk `name`: `pku_saferlhf`, `beavertails`, `llama_guard`, ..."""
    if name not in crosswalk_names():
        raise DataError(f"There is no crosswalk {name!r}; shipped are {', '.join(crosswalk_names())}.")
    return read_crosswalk(FOLDER / f"{name}.yaml", load_taxonomy())


def read_crosswalk(path: Path, taxonomy: Taxonomy) -> Crosswalk:
    """The crosswalk in a YAML with `labels`, `aliases`, and a user's own `categories`, which `taxonomy` has already.

    Raises `DataError` with every entry that cannot be used.
    """
    content = read_yaml(path)
    for key in content.keys() - {"labels", "aliases", "categories"}:
        raise DataError(f"{path}: unknown key {key!r}; possible: labels, aliases, categories.")
    labels, aliases = content.get("labels") or {}, content.get("aliases") or {}
    if (
        not isinstance(labels, dict)
        or not isinstance(aliases, dict)
        or not (labels or content.get("categories"))
    ):
        raise DataError(f"{path}: expected `labels:` with `LABEL: [CATEGORY, ...]`, and `aliases:` if any.")
    problems: list[str] = []
    categories: dict[str, tuple[str, ...]] = {}
    for label, value in labels.items():
        if value == HARMLESS:
            categories[str(label)] = ()
        elif isinstance(value, list) and value and all(id in taxonomy for id in value):
            categories[str(label)] = tuple(value)
        else:
            expected = f"a list of categories out of {', '.join(taxonomy.ids)}, or the word {HARMLESS}"
            problems.append(f"labels.{label}: found {value!r}, expected {expected}")
    spellings: dict[str, str] = {}
    for label in categories:
        code = _CODE.fullmatch(label)
        for spelling in (label, *(code.groups() if code else ())):
            first = spellings.setdefault(_normalised(spelling), label)
            if first != label:
                problems.append(f"labels.{label}: spelled like {first!r}")
    for alias, label in aliases.items():
        if label not in categories:
            problems.append(f"aliases.{alias}: found {label!r}, expected one of the labels above")
        elif spellings.setdefault(_normalised(str(alias)), label) != label:
            problems.append(
                f"aliases.{alias}: is a spelling of {spellings[_normalised(str(alias))]!r} already"
            )
    if problems:
        raise DataError(listed_problems(path, problems))
    return Crosswalk(path.stem, taxonomy, categories, spellings)


def _normalised(text: str) -> str:
    """Labels that differ in case, spaces or punctuation alone are one."""
    return " ".join(re.findall(r"\w+", text.casefold().replace("_", " ")))
