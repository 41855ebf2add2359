"""Reports as plain tables: columns and rows for `wandb.Table`, a spreadsheet or a data frame."""

from collections.abc import Mapping
from dataclasses import dataclass

from equipoise.eval.category_report import CategoryReport
from equipoise.eval.comparison import compare
from equipoise.eval.rates import Rate
from equipoise.eval.suites.base import COMPLIANCE

Cell = str | int | float | None

RATE_COLUMNS = ("rate", "low", "high", "count", "n", "num_no_finding", "best_low", "worst_high")
CHANGE_COLUMNS = (
    "change",
    "change_low",
    "change_high",
    "num_pairs",
    "num_gained",
    "num_lost",
    "p_value",
    "p_adjusted",
)


@dataclass(frozen=True, slots=True)
class Table:
    """A table with named columns; every row has a cell for each."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def category_table(
    report: CategoryReport,
    baseline: CategoryReport | None = None,
    category_names: Mapping[str, str] | None = None,
) -> Table:
    """One row a category and measure (`unsafe`, `complied`, `refused_benign`), `all` the rates over all categories.

    Where ordinary prompts were asked, `answered_ordinary` has one more. Rates are in [0, 1] with 95 % intervals. With a
    baseline, `unsafe` has its paired changes, with p-values adjusted by Holm's method over the categories (that of
    `all` stands alone and is its own p-value); the rest is None.
    """
    names = category_names or {}
    change = None if baseline is None else compare(report, baseline)
    rows: list[tuple[Cell, ...]] = []
    measures: list[tuple[str, Rate, Mapping[str, Rate]]] = [
        ("unsafe", report.overall_unsafe_rate, report.unsafe_rate),
        ("complied", report.overall_compliance_rate, report.compliance_rate),
        ("refused_benign", report.over_refusal, report.over_refusal_rate),
    ]
    if report.of_suite(COMPLIANCE):
        measures.append(("answered_ordinary", report.helpful_compliance, {}))
    for measure, overall, rates in measures:
        for category, rate in {"all": overall, **rates}.items():
            cells: tuple[Cell, ...] = (None,) * len(CHANGE_COLUMNS)
            if change is not None and measure == "unsafe":
                whole = category == "all"
                paired = change.unsafe_overall if whole else change.unsafe[category]
                cells = (
                    paired.difference,
                    paired.low,
                    paired.high,
                    paired.n,
                    paired.num_gained,
                    paired.num_lost,
                    paired.p_value,
                    paired.p_value if whole else change.unsafe_p_adjusted[category],
                )
            rows.append(
                (report.state, measure, category, names.get(category, category), *_rate_cells(rate), *cells)
            )
    return Table(("state", "measure", "category", "name", *RATE_COLUMNS, *CHANGE_COLUMNS), tuple(rows))


def _rate_cells(rate: Rate) -> tuple[Cell, ...]:
    return (
        rate.rate,
        rate.low,
        rate.high,
        rate.count,
        rate.n,
        rate.num_no_finding,
        rate.best_low,
        rate.worst_high,
    )
