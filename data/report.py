"""What a data set holds and what was done to it: `data_report.html`, and the dropped records with their reasons."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from equipoise.data.cleaning import answers_of, to_row
from equipoise.data.files import write_aside
from equipoise.data.preparation import Preparation
from equipoise.data.schema import HELPFUL, LabelledExchange, PreferencePair
from equipoise.data.taxonomy import OTHER, load_taxonomy

STYLE = Path(__file__).with_name("report.css")

REPORT_FILE, DROPPED_FILE = "data_report.html", "dropped.jsonl"

NUM_EXAMPLES = 5
"""Of each rule, and of each category."""
MAX_SHOWN = 600
"""Characters of a text that the report shows."""

Record = PreferencePair | LabelledExchange


@dataclass(frozen=True)
class CategoryRow:
    """One line of the table of categories."""

    category: str
    before: int
    after: int
    num_prompts: int
    """Different records' median and longest texts are in characters."""
    median_prompt: float
    median_answer: float
    longest: int
    """Characters of the longest record, prompt and longer answer."""


@dataclass(frozen=True)
class LabelRow:
    """How many records carry these labels; of pairs the chosen answer's first."""

    what: str
    number: int
    share: float


def category_rows(before: Sequence[Record], after: Sequence[Record]) -> list[CategoryRow]:
    """Counts and lengths of every category, hazards first; lengths are those of `after`."""
    counted = Counter(record.category for record in before)
    of: dict[str, list[Record]] = defaultdict(list)
    for record in after:
        of[record.category].append(record)
    return [
        _category_row(name, counted[name], of[name]) for name in sorted({*counted, *of}, key=category_order)
    ]


def label_rows(records: Sequence[Record]) -> list[LabelRow]:
    """How labels of safety agree with the preference, or how answers are labelled."""
    counts = Counter(_labels(record) for record in records)
    return [LabelRow(what, number, number / len(records)) for what, number in counts.most_common()]


def category_order(category: str) -> tuple[int, int, str]:
    """S2 before S10, then a user's own, then OTHER, then what is no hazard."""
    number = category.removeprefix("S")
    rank = {OTHER: 2, HELPFUL: 3}.get(category, 0 if number.isdigit() else 1)
    return rank, int(number) if number.isdigit() else 0, category


def write_preparation(folder: Path, name: str, preparation: Preparation) -> Path:
    """Write `data_report.html` and `dropped.jsonl` (with `dropped_by` and `reason`); returns the report's path."""
    rows = [
        {**to_row(finding.record), "dropped_by": finding.rule, "reason": finding.detail}
        for finding in preparation.findings
        if finding.dropped
    ]
    write_aside(folder / DROPPED_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    path = folder / REPORT_FILE
    write_aside(path, render(name, preparation))
    return path


def render(name: str, preparation: Preparation) -> str:
    """The report as one HTML page: no scripts, no requests, every text escaped and folded away."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shortened"] = _shortened
    names = load_taxonomy().names
    rows = category_rows(preparation.before, preparation.after)
    found: dict[str, list[Any]] = defaultdict(list)
    for finding in preparation.findings:
        found[finding.rule].append(finding)
    examples: dict[str, list[Record]] = defaultdict(list)
    for record in preparation.after:
        if len(examples[record.category]) < NUM_EXAMPLES:
            examples[record.category].append(record)
    return environment.get_template("data_report.html.jinja").render(
        name=name,
        style=STYLE.read_text(encoding="utf-8"),
        preparation=preparation,
        rows=rows,
        most=max((row.before for row in rows), default=1),
        labels=label_rows(preparation.after) if preparation.after else [],
        found=found,
        num_examples=NUM_EXAMPLES,
        examples={category: examples[category] for category in sorted(examples, key=category_order)},
        answers_of=answers_of,
        category_name=lambda id: f"{id} {names[id]}" if id in names and id != OTHER else id,
    )


def _category_row(category: str, before: int, records: Sequence[Record]) -> CategoryRow:
    prompts = [sum(len(turn["content"]) for turn in record.prompt) for record in records]
    answers = [len(answer) for record in records for answer in answers_of(record)]
    whole = [p + max(map(len, answers_of(r))) for p, r in zip(prompts, records, strict=True)]
    return CategoryRow(
        category,
        before,
        len(records),
        len({tuple(turn["content"] for turn in record.prompt) for record in records}),
        statistics.median(prompts) if prompts else 0.0,
        statistics.median(answers) if answers else 0.0,
        max(whole, default=0),
    )


def _labels(record: Record) -> str:
    words = {True: "safe", False: "unsafe", None: "not labelled"}
    if isinstance(record, LabelledExchange):
        return f"answer {words[record.safe]}"
    if record.chosen_safe is None and record.rejected_safe is None:
        return "neither answer labelled"
    verdict = ""
    if record.chosen_safe is True and record.rejected_safe is False:
        verdict = " (agrees with the preference)"
    elif record.chosen_safe is False and record.rejected_safe is True:
        verdict = " (contradicts the preference)"
    return f"chosen {words[record.chosen_safe]}, rejected {words[record.rejected_safe]}{verdict}"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} … ({len(text):,} characters)"
