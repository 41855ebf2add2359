"""May this checkpoint be promoted? A pure function of a report, its baseline and the rules.

Each check asks for evidence: PASS needs an interval wholly on the good side, FAIL one wholly on the bad side, and
everything between is INCONCLUSIVE. What the judge could not judge counts as bad where a PASS is asked for and as good
where a FAIL is, so that missing findings buy neither. Nothing is drawn at random but from a fixed seed: whoever has
the reports gets the same verdict.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from equipoise.eval.category_report import CategoryReport
from equipoise.eval.gate_checks import (
    GateCheck,
    GateVerdict,
    gap_check,
    limit_check,
    no_finding_check,
    win_rate_check,
)
from equipoise.eval.gate_paired import helpfulness_check, obstacle, over_refusal_check, regression_checks
from equipoise.eval.gate_rules import GateRules, GateRulesError, read_rules
from equipoise.eval.suites.base import HARMFUL, LOOKALIKE

__all__ = [
    "EXIT_CODES",
    "GateCheck",
    "GateResult",
    "GateRules",
    "GateRulesError",
    "GateVerdict",
    "gate",
    "read_rules",
]

EXIT_CODES = {GateVerdict.PASS: 0, GateVerdict.FAIL: 3, GateVerdict.INCONCLUSIVE: 4}


@dataclass(frozen=True, slots=True)
class GateResult:
    """All checks of one model state: what report, tracker, promotion and exit code go by."""

    state: str
    verdict: GateVerdict
    checks: tuple[GateCheck, ...]

    @property
    def exit_code(self) -> int:
        """The process exit code: 0 PASS, 3 FAIL, 4 INCONCLUSIVE."""
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"exit_code": self.exit_code}

    def metrics(self) -> dict[str, float]:
        """For a tracker: the exit code, and how many checks passed, failed and could not tell."""
        counts = dict.fromkeys(GateVerdict, 0) | Counter(check.verdict for check in self.checks)
        return {"gate/exit_code": float(self.exit_code)} | {
            f"gate/num_{verdict.lower()}": float(count) for verdict, count in counts.items()
        }


def gate(report: CategoryReport, baseline: CategoryReport | None, rules: GateRules) -> GateResult:
    """Apply the rules; any FAIL fails, else any INCONCLUSIVE is inconclusive, else PASS.

    Categories are those of the report, the baseline and the rules together: one that was not evaluated can't pass.
    """
    expected = (baseline.categories if baseline is not None else ()) + tuple(rules.category_limits)
    categories = list(dict.fromkeys(report.categories + expected))
    checks = [
        limit_check(report, category, rules.category_limits.get(category, rules.category_limit), rules)
        for category in categories
    ]
    checks.append(limit_check(report, None, rules.overall_limit, rules))
    if rules.gap_limit is not None:
        checks.append(gap_check(report, rules.gap_limit, rules))
    checks += _no_finding_checks(report, rules)
    if report.pairwise is not None:
        checks.append(win_rate_check(report, rules))
    checks += _paired_checks(report, baseline, categories, rules)
    verdicts = {check.verdict for check in checks}
    for verdict in (GateVerdict.FAIL, GateVerdict.INCONCLUSIVE):
        if verdict in verdicts:
            return GateResult(report.state, verdict, tuple(checks))
    return GateResult(report.state, GateVerdict.PASS, tuple(checks))


def _paired_checks(
    report: CategoryReport, baseline: CategoryReport | None, categories: list[str], rules: GateRules
) -> list[GateCheck]:
    if not rules.needs_baseline:
        return []
    reason = (
        "there is no baseline: regression, over-refusal and helpfulness can't be checked"
        if baseline is None
        else obstacle(report, baseline)
    )
    if baseline is None or reason is not None:
        return [GateCheck("comparable", None, GateVerdict.INCONCLUSIVE, reason or "")]
    checks = []
    if rules.regression:
        checks += regression_checks(report, baseline, categories, rules)
    if rules.over_refusal_margin is not None:
        checks.append(over_refusal_check(report, baseline, rules.over_refusal_margin, rules))
    if rules.helpfulness_margin is not None:
        checks.append(helpfulness_check(report, baseline, rules.helpfulness_margin, rules))
    return checks


def _no_finding_checks(report: CategoryReport, rules: GateRules) -> list[GateCheck]:
    """One for each suite that was asked; that one is missing shows in the checks that need it."""
    harmful, lookalikes = report.overall_unsafe_rate, report.over_refusal
    checks = [
        no_finding_check(suite, rate.num_no_finding, total, rules)
        for suite, rate in ((HARMFUL, harmful), (LOOKALIKE, lookalikes))
        if (total := rate.n + rate.num_no_finding)
    ]
    if (found := report.win_rate) is not None:
        checks.append(
            no_finding_check("win_rate", found.num_no_finding, found.n + found.num_no_finding, rules)
        )
    return checks
