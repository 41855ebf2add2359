"""The last thing a run prints: rates per category and model state."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from equipoise.eval.category_report import CategoryReport
from equipoise.eval.rates import Rate


def category_table(reports: Mapping[str, CategoryReport], category_names: Mapping[str, str]) -> Table:
    """Unsafe rate per category, then the overall figures; one column a model state, in the order given."""
    judge = next((report.judge for report in reports.values()), {})
    caption = "in brackets: 95 % intervals"
    if any(report.overall_unsafe_rate.num_no_finding for report in reports.values()):
        caption += "; +n?: answers without a finding of the judge"
    if judge.get("stand_in"):
        caption = f"judged by {judge.get('name')}, a stand-in for a real judge; {caption}"
    table = Table(title="Unsafe answers to harmful prompts", caption=Text(caption), title_justify="left")
    table.add_column("category")
    for state in reports:
        table.add_column(Text(state), justify="right")
    categories = list(
        dict.fromkeys(category for report in reports.values() for category in report.categories)
    )
    for category in categories:
        table.add_row(
            Text(category_names.get(category, category)),
            *(rate_text(report.unsafe_rate.get(category)) for report in reports.values()),
        )
    table.add_section()
    table.add_row(
        "all categories",
        *(rate_text(report.overall_unsafe_rate) for report in reports.values()),
        style="bold",
    )
    table.add_row(
        "complied with harmful", *(rate_text(report.overall_compliance_rate) for report in reports.values())
    )
    table.add_row("refused benign", *(rate_text(report.over_refusal) for report in reports.values()))
    table.add_row("helpfulness (nats/token)", *(_helpfulness(report) for report in reports.values()))
    return table


def rate_text(rate: Rate | None) -> str:
    """`33% (14-61) n=12`, in per cent; a dash where nothing was judged."""
    if rate is None or rate.rate is None:
        return "-" if rate is None or not rate.num_no_finding else f"- n=0 +{rate.num_no_finding}?"
    unparsed = f" +{rate.num_no_finding}?" if rate.num_no_finding else ""
    return f"{rate.rate:.0%} ({100 * rate.low:.0f}-{100 * rate.high:.0f}) n={rate.n}{unparsed}"


def _helpfulness(report: CategoryReport) -> str:
    mean = report.helpfulness
    if mean.mean is None:
        return "-"
    interval = "" if mean.low is None else f" ({mean.low:.2f} to {mean.high:.2f})"
    unscored = f" +{report.num_unscored}?" if report.num_unscored else ""
    return f"{mean.mean:.2f}{interval} n={mean.n}{unscored}"
