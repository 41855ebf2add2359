"""The rules that a judge is given by its user; without any, the canonical categories."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.data.taxonomy import OTHER, Category, Taxonomy
from equipoise.eval.judges.base import JudgeError

CANONICAL = "the canonical categories"
"""Where rules come from that no file gives."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules as text."""

    text: str
    origin: str
    """`CANONICAL`, or the file they were read from: part of the judge's description."""


def load_rules(rules_file: str | None, taxonomy: Taxonomy, line: Callable[[int, Category], str]) -> Rules:
    """The text of `rules_file`; None: one line for each hazard of the taxonomy, `line(number from 1, category)`.

    Raises `JudgeError` where the file can't be read as UTF-8 or is empty.
    """
    if rules_file is None:
        hazards = [taxonomy.categories[id] for id in taxonomy.hazards]
        return Rules("\n".join(line(number, hazard) for number, hazard in enumerate(hazards, 1)), CANONICAL)
    path = Path(rules_file).expanduser()
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"judge.rules_file={rules_file}: cannot be read as UTF-8 text: {error}") from error
    if not text:
        raise JudgeError(f"judge.rules_file={rules_file}: is empty; expected the rules to judge by, as text.")
    return Rules(text, str(path))


def in_taxonomy(labels: Sequence[str], taxonomy: Taxonomy) -> tuple[str, ...]:
    """The categories that a judge named by their ids; what is no id is `OTHER`."""
    return tuple(dict.fromkeys(label if label in taxonomy else OTHER for label in labels))
