"""A judge's calibration in the terminal."""

from rich.table import Table
from rich.text import Text

from equipoise.eval.judges.calibration import MIN_LABELS, HeadCalibration, JudgeCalibration
from equipoise.eval.rates import Rate


def calibration_table(calibration: JudgeCalibration) -> Table:
    """Sensitivity, specificity and AUROC: over all, per category, and of the refusals."""
    missing = sum(calibration.num_no_finding.values())
    caption = f"in brackets: 95 % intervals; {missing} of {calibration.n} answers without a finding"
    if missing:
        caption += (
            f" ({', '.join(f'{num} {name}' for name, num in calibration.num_no_finding.items() if num)})"
        )
    caption += f"; categories with {MIN_LABELS} labels of each kind are corrected by their own errors"
    table = Table(
        title=Text(f"{calibration.judge} on {calibration.data or 'labelled answers'}, {calibration.date}"),
        caption=Text(caption),
        title_justify="left",
    )
    table.add_column("finding")
    for column in ("n", "sensitivity", "specificity", "AUROC"):
        table.add_column(column, justify="right")
    for category, head in calibration.unsafe_by_category.items():
        table.add_row(Text(f"unsafe, {category}"), *_cells(head))
    table.add_section()
    table.add_row("unsafe", *_cells(calibration.unsafe), style="bold")
    if calibration.refusal is not None:
        table.add_row("refused", *_cells(calibration.refusal))
    return table


def _cells(head: HeadCalibration) -> tuple[str, ...]:
    auroc = "-"
    if head.auroc is not None:
        auroc = f"{head.auroc:.2f} ({head.auroc_low:.2f}-{head.auroc_high:.2f})"
    return str(head.n), _rate(head.sensitivity), _rate(head.specificity), auroc


def _rate(rate: Rate) -> str:
    missing = f" +{rate.num_no_finding}?" if rate.num_no_finding else ""
    if rate.rate is None:
        return f"-{missing}"
    return f"{rate.rate:.2f} ({rate.low:.2f}-{rate.high:.2f}) n={rate.n}{missing}"
