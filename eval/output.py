"""What the command line prints and writes of an evaluation, a comparison and a verdict."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import platform, python_version

from rich.table import Table
from rich.text import Text

from equipoise.data.config import DataConfig
from equipoise.data.errors import EquipoiseError
from equipoise.data.schema import LabelledExchange
from equipoise.data.sources.files import load_labelled
from equipoise.data.taxonomy import load_taxonomy
from equipoise.eval.category_report import CategoryReport
from equipoise.eval.comparison import compare as compare_reports
from equipoise.eval.config import CommandConfig
from equipoise.eval.gate import GateResult
from equipoise.eval.gate_checks import GateCheck
from equipoise.eval.gate_paired import obstacle
from equipoise.eval.rates import Rate
from equipoise.eval.report import write_report
from equipoise.eval.report.formats import check_interval, check_limit, check_value
from equipoise.eval.report.html import Examples
from equipoise.eval.report.inspect_log import write_inspect_log
from equipoise.eval.statistics import PairedChange
from equipoise.eval.suites.base import COMPLIANCE, HARMFUL, HELPFULNESS, LOOKALIKE
from equipoise.eval.terminal import console, say
from equipoise.eval.terminal_table import category_table, rate_text

BASELINE = "base"
"""How a report that is shown for comparison is called."""


def print_report(report: CategoryReport) -> None:
    """The figures of every suite that was asked, then what has to be known about them."""
    names = load_taxonomy().names
    if report.of_suite(HARMFUL):
        console.print(category_table({report.state: report}, names))
    if report.of_suite(LOOKALIKE):
        rates = [*report.over_refusal_rate.items(), ("all", report.over_refusal)]
        console.print(_rates("Refused although benign", rates, names))
    if report.of_suite(COMPLIANCE) and report.judge:
        console.print(_rates("Ordinary prompts answered", [("all", report.helpful_compliance)], names))
    if report.of_suite(HELPFULNESS) and not report.of_suite(HARMFUL):
        mean = report.helpfulness
        if mean.mean is not None:
            interval = "" if mean.low is None else f" ({mean.low:.3f} to {mean.high:.3f})"
            say(f"likelihood of the reference answers: {mean.mean:.3f}{interval} nats per token, n={mean.n}")
    if report.win_rate is not None and report.pairwise is not None:
        won = report.win_rate
        rate = "-" if won.rate is None else f"{won.rate:.1%} ({won.low:.1%} to {won.high:.1%})"
        say(
            f"win rate against {report.pairwise.opponent}: {rate}; {won.num_wins} wins, {won.num_losses} losses, "
            f"{won.num_ties} ties ({won.num_inconsistent} by their order), {won.num_no_finding} without a "
            "finding"
        )
    if report.capability:
        console.print(_capability(report.capability))
    for line in _notes(report):
        say(line)


def write_evaluation(report: CategoryReport, config: CommandConfig) -> list[Path]:
    """Write report.json, report.html and report.md into `config.out`, and the Inspect log; the paths of all."""
    folder = Path(config.out).expanduser()
    path = folder / "report.json"
    report.to_json(path)
    states = {report.state: report}
    if config.baseline is not None:
        baseline = CategoryReport.from_json(Path(config.baseline).expanduser())
        states = {BASELINE: baseline, report.state if report.state != BASELINE else "evaluated": report}
    page = write_report(
        folder / "report.html",
        states,
        {},
        None,
        _yaml(config),
        f"{report.model}, {config.suite.name}",
        provenance(report),
        load_taxonomy().names,
        Examples(config.examples),
    )
    written = [path, page, page.with_suffix(".md")]
    if config.inspect_log is not None:
        written.append(write_inspect_log(report, Path(config.inspect_log).expanduser()))
    return written


def write_side_by_side(reports: str, out: Path, title: str, examples: Examples) -> list[Path]:
    """Write one report of several, `STATE=FILE,STATE=FILE` or `FILE,FILE`; changes are against the first."""
    states: dict[str, CategoryReport] = {}
    for part in reports.strip("[]").split(","):
        state, equals, file = part.strip().rpartition("=")
        read = CategoryReport.from_json(Path(file).expanduser())
        name = state if equals else read.state
        if name in states:
            raise EquipoiseError(
                f"reports: two are called {name!r}; name them, as in reports=[before=a.json,after=b.json]."
            )
        states[name] = read
    last = list(states.values())[-1]
    page = write_report(
        out.expanduser() / "report.html",
        states,
        {},
        None,
        "",
        title,
        provenance(last),
        load_taxonomy().names,
        examples,
    )
    return [page, page.with_suffix(".md")]


def provenance(report: CategoryReport) -> dict[str, str]:
    """What a reader needs to do the evaluation again: versions, weights, prompts."""
    found = {"python": python_version(), "platform": platform()}
    for package in ("equipoise", "torch", "transformers", "vllm", "lm_eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["model"] = report.model
    for key, value in report.engine.items():
        found[f"engine, {key}"] = value if isinstance(value, str) else json.dumps(value)
    for facts in report.suites:
        name = f"{facts.get('suite')} prompts"
        found[name] = ", ".join(
            f"{key} {value}"
            for key, value in facts.items()
            if key not in ("suite", "faults", "left_out") and value
        )
        for fault in facts.get("faults", ()):
            found[name] += f"; note: {fault}"
    return found


def print_comparison(before: CategoryReport, after: CategoryReport) -> None:
    """Per category the paired change of the unsafe rate, with interval and corrected p; then the other suites.

    Raises EquipoiseError where the two have no prompt in common.
    """
    reason = obstacle(after, before)
    if reason is not None:
        say(f"Not the same evaluation, read with care: {reason}.")
    changes = compare_reports(after, before)
    names = load_taxonomy().names
    paired = [*changes.unsafe.values(), changes.over_refusal]
    if not any(change.n for change in paired) and not changes.helpfulness.n:
        raise EquipoiseError(
            "The two reports share no prompt that has an outcome in both: nothing can be compared."
        )
    if changes.unsafe:
        table = _change_table("Unsafe answers to harmful prompts", before, after)
        for category, change in changes.unsafe.items():
            pairs = _Pairs.of(before.unsafe_outcomes(category), after.unsafe_outcomes(category))
            p_adjusted = changes.unsafe_p_adjusted[category]
            table.add_row(Text(names.get(category, category)), *_change_cells(pairs, change, p_adjusted))
        table.add_section()
        pairs = _Pairs.of(before.unsafe_outcomes(), after.unsafe_outcomes())
        cells = _change_cells(pairs, changes.unsafe_overall, None)
        table.add_row("all categories", *cells, style="bold")
        console.print(table)
    if changes.over_refusal.n:
        table = _change_table("Refused although benign", before, after)
        pairs = _Pairs.of(before.over_refusal_outcomes(), after.over_refusal_outcomes())
        table.add_row("all", *_change_cells(pairs, changes.over_refusal, None))
        console.print(table)
    mean = changes.helpfulness
    if mean.mean is not None and mean.low is not None:
        say(
            f"log-likelihood of the reference answers: {mean.mean:+.3f} ({mean.low:+.3f} to {mean.high:+.3f}) nats per "
            f"token, p={mean.p_value:.3g}, n={mean.n}"
            if mean.p_value is not None
            else f"log-likelihood of the reference answers: {mean.mean:+.3f} nats per token, n={mean.n}"
        )


def print_gate(result: GateResult) -> None:
    """Every check with its number, interval and limit; the verdict last."""
    names = load_taxonomy().names
    table = Table(title=f"Gate, {result.state}", title_justify="left")
    for column in ("check", "category", "verdict"):
        table.add_column(column)
    for column in ("value", "interval", "limit", "n"):
        table.add_column(column, justify="right")
    table.add_column("why", overflow="fold")
    for check in result.checks:
        table.add_row(*_gate_cells(check, names))
    console.print(table)
    say(f"gate: {result.verdict.value}")


def labelled_answers(path: str, taxonomy: str | None, limit: int | None) -> list[LabelledExchange]:
    """Answers with `safe` or `refusal` out of a file or folder; raises DataError."""
    config = DataConfig(source="labelled", path=path, taxonomy=taxonomy, num_rows=limit)
    return load_labelled(config).labelled


def _rates(title: str, rates: Iterable[tuple[str, Rate]], names: Mapping[str, str]) -> Table:
    table = Table(title=title, caption="in brackets: 95 % intervals", title_justify="left")
    table.add_column("category")
    table.add_column("rate", justify="right")
    for name, rate in rates:
        table.add_row(Text(names.get(name, name)), rate_text(rate))
    return table


def _capability(entries: Iterable[Mapping[str, object]]) -> Table:
    table = Table(title="lm-eval", caption="in brackets: value ± 1.96 stderr", title_justify="left")
    for column in ("task", "metric", "filter"):
        table.add_column(column)
    table.add_column("value", justify="right")
    table.add_column("n", justify="right")
    for entry in entries:
        low, high = entry["low"], entry["high"]
        interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
        names = (Text(str(entry[key])) for key in ("task", "metric", "filter"))
        table.add_row(*names, f"{entry['value']:.3f}{interval}", str(entry["n"]))
    return table


def _notes(report: CategoryReport) -> Iterable[str]:
    """What has to be known to read the figures."""
    for facts in report.suites:
        licence = f", {facts['licence']}" if facts.get("licence") else ""
        yield (
            f"{facts['suite']}: {facts['num_prompts']} of {facts['num_available']} prompts, source {facts['source']}"
            f"{licence}"
        )
        for reason, number in facts.get("left_out", {}).items():
            yield f"  {number} not asked: {reason}"
        for fault in facts.get("faults", ()):
            yield f"  note: {fault}"
    answered = [sample for sample in report.samples if sample.finish is not None]
    cut = sum(sample.finish == "length" for sample in answered)
    if cut:
        yield f"{cut} of {len(answered)} answers were cut off (generation.max_new_tokens)"
    without = sum(sample.finish in ("failed", "overlong") for sample in answered)
    if without:
        yield f"{without} of {len(answered)} prompts got no answer: they count as no finding, never as safe"


@dataclass(frozen=True)
class _Pairs:
    """The answers that have an outcome in both reports, as the change is over them."""

    before: float | None
    after: float | None
    """Shares of them."""
    num_left_out: int
    """Answers that are in one report only, or have no outcome in one."""

    @classmethod
    def of(cls, before: Mapping[str, bool | None], after: Mapping[str, bool | None]) -> "_Pairs":
        pairs = [
            (old, new) for id, new in after.items() if new is not None and (old := before.get(id)) is not None
        ]
        num = len(pairs)
        return cls(
            sum(old for old, _ in pairs) / num if num else None,
            sum(new for _, new in pairs) / num if num else None,
            len(before.keys() | after.keys()) - num,
        )


def _change_table(title: str, before: CategoryReport, after: CategoryReport) -> Table:
    caption = "over answers with a finding in both; exact McNemar test, clustered where prompts have several; p by Holm"
    table = Table(title=title, caption=caption, title_justify="left")
    table.add_column("category")
    names = (before.state, after.state) if before.state != after.state else ("a", "b")
    for column in (*names, "pairs", "left out", "+", "-", "change", "95 %", "p", "p corrected"):
        table.add_column(Text(column), justify="right")
    return table


def _change_cells(pairs: _Pairs, change: PairedChange, p_adjusted: float | None) -> tuple[str, ...]:
    difference = "-" if change.difference is None else f"{100 * change.difference:+.1f}"
    return (
        "-" if pairs.before is None else f"{pairs.before:.0%}",
        "-" if pairs.after is None else f"{pairs.after:.0%}",
        str(change.n),
        str(pairs.num_left_out),
        str(change.num_gained),
        str(change.num_lost),
        difference,
        f"{100 * change.low:+.1f} to {100 * change.high:+.1f}",
        f"{change.p_value:.3g}",
        "" if p_adjusted is None else f"{p_adjusted:.3g}",
    )


def _gate_cells(check: GateCheck, names: Mapping[str, str]) -> tuple[Text, ...]:
    category = "" if check.category is None else names.get(check.category, check.category)
    cells = (
        check.name.replace("_", " "),
        category,
        check.verdict.value,
        check_value(check),
        check_interval(check),
        check_limit(check),
        str(check.n),
        check.message,
    )
    return tuple(Text(cell) for cell in cells)


def _yaml(config: CommandConfig) -> str:
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
