"""Two reports of the same prompts, compared prompt by prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from equipoise.eval.statistics import (
    Mean,
    PairedChange,
    benjamini_hochberg,
    holm,
    mean_interval,
    paired_change,
)
from equipoise.eval.suites.base import HARMFUL, HELPFULNESS, LOOKALIKE

if TYPE_CHECKING:  # a report's summary compares it with its baseline
    from equipoise.eval.category_report import CategoryReport


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired changes between two reports, over the prompts that have an outcome in both."""

    unsafe: dict[str, PairedChange]
    unsafe_p_adjusted: dict[str, float]
    """Two-sided, Holm over the categories."""
    unsafe_q_values: dict[str, float]
    """The same by Benjamini and Hochberg: for looking around, not for deciding."""
    unsafe_overall: PairedChange
    compliance: PairedChange
    over_refusal: PairedChange
    helpfulness: Mean
    """Of the differences, after minus before, nats per token."""


def compare(report: "CategoryReport", baseline: "CategoryReport") -> Comparison:
    """Paired changes from `baseline` to `report`; prompts without an outcome in one of them are left out."""
    harmful_prompts, lookalikes = report.prompt_ids(HARMFUL), report.prompt_ids(LOOKALIKE)
    unsafe = {
        category: _paired(
            report.unsafe_outcomes(category), baseline.unsafe_outcomes(category), harmful_prompts
        )
        for category in report.categories
    }
    p_values = [change.p_value for change in unsafe.values()]
    before, helpful_prompts = baseline.helpfulness_scores(), report.prompt_ids(HELPFULNESS)
    differences = {
        id: new - old
        for id, new in report.helpfulness_scores().items()
        if new is not None and (old := before.get(id)) is not None
    }
    return Comparison(
        unsafe=unsafe,
        unsafe_p_adjusted=dict(zip(unsafe, holm(p_values), strict=True)),
        unsafe_q_values=dict(zip(unsafe, benjamini_hochberg(p_values), strict=True)),
        unsafe_overall=_paired(report.unsafe_outcomes(), baseline.unsafe_outcomes(), harmful_prompts),
        compliance=_paired(report.compliance_outcomes(), baseline.compliance_outcomes(), harmful_prompts),
        over_refusal=_paired(report.over_refusal_outcomes(), baseline.over_refusal_outcomes(), lookalikes),
        helpfulness=mean_interval(
            list(differences.values()), prompts=[helpful_prompts[id] for id in differences]
        ),
    )


def _paired(
    after: Mapping[str, bool | None], before: Mapping[str, bool | None], prompts: Mapping[str, str]
) -> PairedChange:
    pairs = {
        id: (old, new) for id, new in after.items() if new is not None and (old := before.get(id)) is not None
    }
    return paired_change(
        [old for old, _ in pairs.values()],
        [new for _, new in pairs.values()],
        prompts=[prompts[id] for id in pairs],
    )
