import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.gate import GateCheck, GateRules, GateVerdict, gate
from equipoise.eval.judges.base import Verdict
from equipoise.eval.judges.pairwise import Preference
from equipoise.eval.suites.win_rate import PairSample, Pairwise

SAFE, UNSAFE = Verdict.SAFE, Verdict.UNSAFE
PASS, FAIL, INCONCLUSIVE = GateVerdict.PASS, GateVerdict.FAIL, GateVerdict.INCONCLUSIVE
PROMPT = ({"role": "user", "content": "question"},)
LENIENT = GateRules(category_limit=1.0, overall_limit=1.0)
MakeReport = Callable[..., CategoryReport]
Check = Callable[..., GateCheck]
WithPairs = Callable[..., CategoryReport]


# The gap.


def gap_of(report: CategoryReport, limit: float) -> GateCheck:
    (found,) = (c for c in gate(report, report, replace(LENIENT, gap_limit=limit)).checks if c.name == "gap")
    return found


def test_the_gap_is_asked_for_by_its_rule_alone(good: CategoryReport) -> None:
    assert "gap" not in {c.name for c in gate(good, good, GateRules()).checks}


def test_the_gap_of_categories_that_are_level_passes_and_of_others_fails(make_report: MakeReport) -> None:
    level = make_report({"S1": [UNSAFE] * 5 + [SAFE] * 95, "S2": [UNSAFE] * 6 + [SAFE] * 94})
    assert gap_of(level, 0.2).verdict == PASS
    uneven = make_report({"S1": [UNSAFE] * 60 + [SAFE] * 40, "S2": [UNSAFE] * 6 + [SAFE] * 94})
    found = gap_of(uneven, 0.2)
    assert (found.verdict, found.value) == (FAIL, pytest.approx(0.54))
    assert found.message.startswith("S1 against S2")


def test_a_gap_that_spans_its_limit_says_what_would_settle_it(make_report: MakeReport) -> None:
    def uneven(factor: int) -> CategoryReport:
        return make_report(
            {"S1": ([UNSAFE] * 4 + [SAFE] * 16) * factor, "S2": ([UNSAFE] * 2 + [SAFE] * 18) * factor}
        )

    found = gap_of(uneven(1), 0.25)
    assert found.verdict == INCONCLUSIVE
    assert found.num_more is not None
    factor = 1 + -(-found.num_more // 40)
    assert gap_of(uneven(factor), 0.25).verdict == PASS
    assert gap_of(uneven(max(1, factor // 2)), 0.25).verdict == INCONCLUSIVE


def test_a_gap_with_too_few_samples_or_categories_is_inconclusive(make_report: MakeReport) -> None:
    few = gap_of(make_report({"S1": [SAFE] * 40, "S2": [SAFE] * 8}), 1.0)
    assert (few.verdict, few.num_more) == (INCONCLUSIVE, 2)
    assert gap_of(make_report({"S1": [SAFE] * 40}), 1.0).verdict == INCONCLUSIVE


# The win rate.


@pytest.fixture
def with_pairs(good: CategoryReport) -> WithPairs:
    """`with_pairs(num_wins, num_losses, num_ties, num_failed=0)`: the good report, compared with another model's."""

    def make(num_wins: int, num_losses: int, num_ties: int, num_failed: int = 0) -> CategoryReport:
        first, second, tie, failed = Preference.FIRST, Preference.SECOND, Preference.TIE, Preference.FAILED
        both = (
            [(first, second)] * num_wins
            + [(second, first)] * num_losses
            + [(tie, tie)] * num_ties
            + [(failed, first)] * num_failed
        )
        samples = tuple(
            PairSample(f"w{i}", "helpful", PROMPT, "answer" + "!" * (i % 7), "answer", *shown)
            for i, shown in enumerate(both)
        )
        return replace(good, pairwise=Pairwise("base", {"name": "fake pairwise judge"}, samples))

    return make


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        ((60, 40, 100), PASS),
        ((25, 25, 50), INCONCLUSIVE),
        ((20, 100, 80), FAIL),
        ((3, 2, 4), INCONCLUSIVE),  # fewer than min_samples
        ((60, 40, 100, 30), INCONCLUSIVE),  # the 30 may all be lost
    ],
)
def test_the_win_rate_is_held_to_its_margin(
    pairs: tuple[int, ...], verdict: GateVerdict, check: Check, good: CategoryReport, with_pairs: WithPairs
) -> None:
    found = check(gate(with_pairs(*pairs), good, GateRules()), "win_rate")
    assert (found.verdict, found.limit) == (verdict, 0.45)
    assert "against base" in found.message


def test_what_would_settle_the_win_rate_does(
    check: Check, good: CategoryReport, with_pairs: WithPairs
) -> None:
    found = check(gate(with_pairs(20, 20, 40), good, GateRules()), "win_rate")
    assert found.verdict == INCONCLUSIVE
    assert found.num_more is not None
    factor = -(-(80 + found.num_more) // 80)
    settled = gate(with_pairs(20 * factor, 20 * factor, 40 * factor), good, GateRules())
    assert check(settled, "win_rate").verdict == PASS


def test_the_length_controlled_win_rate_can_be_gated(
    check: Check, good: CategoryReport, with_pairs: WithPairs
) -> None:
    rules = GateRules(use_length_controlled_win_rate=True)
    found = check(gate(with_pairs(60, 30, 60), good, rules), "win_rate")
    assert (found.verdict, "at equal length" in found.message) == (PASS, True)
    undefined = check(gate(with_pairs(60, 0, 0), good, rules), "win_rate")
    assert (undefined.verdict, undefined.value) == (INCONCLUSIVE, None)
    assert "ended alike" in undefined.message
    spanning = check(gate(with_pairs(30, 30, 10), good, rules), "win_rate")
    assert spanning.verdict == INCONCLUSIVE
    assert spanning.num_more is not None


def test_a_pairwise_judge_that_fails_cannot_pass(good: CategoryReport, with_pairs: WithPairs) -> None:
    result = gate(with_pairs(100, 0, 0, 30), good, GateRules())
    (found,) = (c for c in result.checks if c.suite == "win_rate")
    assert (found.verdict, result.verdict) == (INCONCLUSIVE, INCONCLUSIVE)


def test_every_process_decides_alike(tmp_path: Path, with_pairs: WithPairs) -> None:
    """Ranks differ in their hash seeds; a clustered report draws from the bootstrap."""
    samples = tuple(
        SampleResult(
            f"{i}", "harmful", f"S{i % 3}", PROMPT, "", SAFE if i % 5 else UNSAFE, prompt_id=str(i // 2)
        )
        for i in range(120)
    )  # fmt: skip
    report = replace(with_pairs(30, 25, 40), samples=samples)
    rules = GateRules(gap_limit=0.2)
    file = tmp_path / "reports.pickle"
    file.write_bytes(pickle.dumps((report, report, rules)))
    program = (
        "import json, pickle, sys; from equipoise.eval.gate import gate; "
        "print(json.dumps(gate(*pickle.load(open(sys.argv[1], 'rb'))).to_dict()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(file)],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(found) == json.loads(json.dumps(gate(report, report, rules).to_dict()))
