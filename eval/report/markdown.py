"""The summary of a report as GitHub-flavoured markdown, made to be read in a pull request."""

import re
from collections.abc import Iterable, Sequence

from equipoise.eval.category_report import CategoryReport
from equipoise.eval.rates import Rate
from equipoise.eval.report.content import ReportContent
from equipoise.eval.report.formats import (
    DASH,
    case_range,
    number,
    number_range,
    one_line,
    p_text,
    percent,
    percent_range,
    points,
    points_range,
)
from equipoise.eval.statistics import PairedChange

MAX_REASONS = 8
"""Lines that say why a state did not pass."""

_SPECIAL = re.compile(r"([\\`*_{}\[\]()|~$])|([<>&])|(@|#)(?=\w)|(://|(?<=www)\.)")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def escaped(text: str) -> str:
    """`text` as one line of markdown that shows it as it is: no markup, table cell, mention, reference or link."""

    def replacement(match: re.Match[str]) -> str:
        punctuation, markup, mention, link = match.groups()
        if punctuation:
            return f"\\{punctuation}"
        if markup:
            return _ENTITIES[markup]
        if mention:  # @somebody and #12 would notify people and link to issues
            return f"{mention}<!-- -->"
        return f":<!-- -->{link[1:]}" if link == "://" else f"<!-- -->{link}"

    return _SPECIAL.sub(replacement, one_line(text))


def markdown(content: ReportContent) -> str:
    """Verdicts and why, the checkpoints, and the candidate's categories against the baseline."""
    parts = [f"# {escaped(content.title)}", *_verdicts(content)]
    parts += [f"> **Not comparable as they stand:** {escaped(obstacle)}." for obstacle in content.obstacles]
    parts += ["## Checkpoints", _checkpoints(content), *_judges(content)]
    candidate = list(content.reports)[-1]
    if candidate in content.changes:
        before, after = escaped(content.baseline_state), escaped(candidate)
        parts += [f"## Unsafe answers, {after} against {before}", _changes(content, candidate)]
        parts.append(
            "Change in percentage points over the same prompts, exact two-sided test; the categories' p-values are "
            "adjusted by Holm's method, the last row's is not. Bold: p ≤ 0.05."
        )
    else:
        report = content.reports[candidate]
        rows = [
            [escaped(content.category_name(category)), rate_text(rate)]
            for category, rate in report.unsafe_rate.items()
        ]
        parts += [f"## Unsafe answers, {escaped(candidate)}", _table(["category", "unsafe"], rows)]
    parts.append(
        "Brackets are 95 % intervals, in per cent for rates. `+k?` are answers without a finding of the judge: never "
        "counted as safe; behind them the rate if none and if all of them counted."
    )
    return "\n\n".join(parts) + "\n"


def rate_text(rate: Rate | None) -> str:
    """`33 % [14, 61] 4/12`, and what is without a finding behind it."""
    if rate is None or rate.n + rate.num_no_finding == 0:
        return DASH
    text = f"{percent(rate.rate)} {percent_range(rate.low, rate.high)} {rate.count}/{rate.n}"
    if rate.num_no_finding:
        text += f" +{rate.num_no_finding}? ({case_range(rate)})"
    if rate.corrected is not None:
        text += f"; corrected {percent(rate.corrected.rate)} "
        text += percent_range(rate.corrected.low, rate.corrected.high)
    return text


def _verdicts(content: ReportContent) -> list[str]:
    parts = []
    for state, result in content.gate_results.items():
        parts.append(f"**{result.verdict.value}**: {escaped(state)} ({len(result.checks)} checks)")
        reasons = content.decisive_checks(state)
        lines = [f"- {verdict}: {escaped(reason)}" for verdict, reason in reasons[:MAX_REASONS]]
        if len(reasons) > MAX_REASONS:
            lines.append(f"- and {len(reasons) - MAX_REASONS} more")
        if lines:
            parts.append("\n".join(lines))
    return parts


def _checkpoints(content: ReportContent) -> str:
    header = ["checkpoint", "gate", "unsafe", "worst category", "refused benign"]
    header += [*(["answered ordinary"] if content.with_ordinary else []), "helpfulness, nats"]
    with_wins = any(report.win_rate is not None for report in content.reports.values())
    rows = []
    for state, report in content.reports.items():
        category, worst = content.worst[state]
        name = f" {escaped(content.category_name(category))}" if category is not None else ""
        verdict = content.gate_results[state].verdict.value if state in content.gate_results else DASH
        rows.append(
            [
                escaped(state),
                verdict,
                rate_text(report.overall_unsafe_rate),
                f"{percent(worst.rate)} {percent_range(worst.low, worst.high)}{name}",
                rate_text(report.over_refusal),
                *([rate_text(report.helpful_compliance)] if content.with_ordinary else []),
                _helpfulness(report),
                *([_win_rate(report)] if with_wins else []),
            ]
        )
    return _table([*header, *(["win rate"] if with_wins else [])], rows)


def _helpfulness(report: CategoryReport) -> str:
    mean = report.helpfulness
    unscored = f" +{report.num_unscored}?" if report.num_unscored else ""
    return f"{number(mean.mean)} {number_range(mean.low, mean.high)} n={mean.n}{unscored}"


def _win_rate(report: CategoryReport) -> str:
    wins = report.win_rate
    if wins is None or report.pairwise is None:
        return DASH
    controlled = wins.length_controlled
    text = f"{percent(wins.rate)} {percent_range(wins.low, wins.high)} n={wins.n}"
    if wins.num_no_finding:
        text += f" +{wins.num_no_finding}?"
    if controlled.rate is not None:
        text += (
            f"; at equal length {percent(controlled.rate)} {percent_range(controlled.low, controlled.high)}"
        )
    return f"{text} against {escaped(report.pairwise.opponent)}"


def _changes(content: ReportContent, state: str) -> str:
    report, change = content.reports[state], content.changes[state]
    baseline = content.baseline
    rows = [
        _change_row(
            content.category_name(category),
            baseline.unsafe_rate.get(category),
            rate,
            change.unsafe[category],
            change.unsafe_p_adjusted[category],
        )
        for category, rate in report.unsafe_rate.items()
    ]
    overall = change.unsafe_overall
    rows.append(
        _change_row(
            "All categories",
            baseline.overall_unsafe_rate,
            report.overall_unsafe_rate,
            overall,
            overall.p_value,
        )
    )
    return _table(
        ["category", escaped(content.baseline_state), escaped(state), "change, pp", "pairs", "p"], rows
    )


def _change_row(
    name: str, before: Rate | None, after: Rate | None, change: PairedChange, p_value: float
) -> list[str]:
    text = f"{points(change.difference)} {points_range(change.low, change.high)}"
    p = f"**{p_text(p_value)}**" if p_value <= 0.05 else p_text(p_value)
    return [escaped(name), rate_text(before), rate_text(after), text, str(change.n), p]


def _judges(content: ReportContent) -> list[str]:
    """One line a judge: what it is worth."""
    lines: dict[str, None] = {}
    for report in content.reports.values():
        name = escaped(str(report.judge.get("name")))
        stand_in = ", a stand-in for a real judge" if report.judge.get("stand_in") else ""
        known = "never held against labelled answers"
        if (calibration := report.calibration) is not None:
            head = calibration.unsafe
            known = (
                f"on {escaped(calibration.data or 'labelled answers')} sensitivity {rate_text(head.sensitivity)}, "
                f"specificity {rate_text(head.specificity)}"
            )
        elif entries := [entry for entry in report.judge.get("calibration", ()) if _says_something(entry)]:
            known = "; ".join(
                f"on {escaped(str(entry.get('name')))} (n={entry.get('n')}) sensitivity "
                f"{number(entry.get('sensitivity'), 2)}, specificity {number(entry.get('specificity'), 2)}"
                for entry in entries[:3]
            )
        lines[f"Judge: {name}{stand_in}; {known}."] = None
    return list(lines)


def _says_something(entry: dict[str, object]) -> bool:
    """Measured on answers it was not fitted on, unsafe and safe ones."""
    return (
        not entry.get("fitted_on")
        and entry.get("head", "unsafe") == "unsafe"
        and entry.get("sensitivity") is not None
        and entry.get("specificity") is not None
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows whose cells are escaped already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
