"""A judge held against labelled answers, and the file that this leaves."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from equipoise.data.schema import LabelledExchange, Turn
from equipoise.eval.generation.requests import Progress
from equipoise.eval.judges.base import JudgeCard, JudgeError, Judgement, Verdict
from equipoise.eval.judges.calibration import JudgeCalibration, calibrate
from equipoise.eval.judges.calibration_table import calibration_table
from equipoise.eval.statistics.auroc import auroc_interval

SAFE, UNSAFE, CONTROVERSIAL = Verdict.SAFE, Verdict.UNSAFE, Verdict.CONTROVERSIAL


class SaysWhatTheResponseSays:
    """The response names the verdict, and behind a blank p_unsafe."""

    card = JudgeCard("parrot", False, "A judge for tests.", ())

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Progress | None = None
    ) -> list[Judgement]:
        if progress is not None:
            progress(len(responses), len(responses), "judging")
        said = [response.split() for response in responses]
        return [
            Judgement(Verdict(word), float(rest[0]) if rest else None, word == "safe") for word, *rest in said
        ]


def exchange(
    index: int,
    response: str,
    safe: bool | None,
    category: str = "S1",
    refusal: bool | None = None,
    prompt: str = "",
) -> LabelledExchange:
    asked = ({"role": "user", "content": prompt or f"question {index}"},)
    return LabelledExchange(str(index), asked, response, category, safe, refusal)


EXCHANGES = [
    exchange(0, "unsafe 0.9", False),
    exchange(1, "unsafe 0.8", False),
    exchange(2, "safe 0.3", False, "S2"),
    exchange(3, "failed", False, "S2"),
    exchange(4, "safe 0.1", True, refusal=True),
    exchange(5, "unsafe 0.6", True, refusal=False),
    exchange(6, "controversial 0.5", True, "S2"),
    exchange(7, "unparsed", True, "S2"),
    exchange(8, "overlong", None, refusal=True),
    exchange(9, "safe", None),  # labelled with nothing
]


@pytest.fixture
def calibration() -> JudgeCalibration:
    return calibrate(SaysWhatTheResponseSays(), EXCHANGES, data="ten answers", date="2026-01-02")


def test_the_figures_by_hand(calibration: JudgeCalibration) -> None:
    assert (calibration.judge, calibration.data, calibration.date) == ("parrot", "ten answers", "2026-01-02")
    assert calibration.n == 9
    assert calibration.num_no_finding == {"unparsed": 1, "failed": 1, "overlong": 1}
    sensitivity, specificity = calibration.unsafe.sensitivity, calibration.unsafe.specificity
    assert (sensitivity.count, sensitivity.n, sensitivity.num_failed) == (2, 3, 1)
    # Controversial counts as unsafe, hence one of the three safe ones is cleared.
    assert (specificity.count, specificity.n, specificity.num_unparsed) == (1, 3, 1)
    # Positives 0.9, 0.8, 0.3; negatives 0.1, 0.6, 0.5: (3 + 3 + 1) / 9.
    assert calibration.unsafe.auroc == pytest.approx(7 / 9)
    assert calibration.unsafe.num_scored == 6
    assert calibration.refusal is not None
    assert (calibration.refusal.sensitivity.count, calibration.refusal.sensitivity.n) == (1, 2)
    assert calibration.refusal.auroc is None  # this judge has no probability of a refusal


def test_categories_have_figures_of_their_own(calibration: JudgeCalibration) -> None:
    assert set(calibration.unsafe_by_category) == {"S1", "S2"}
    assert calibration.unsafe_by_category["S2"].sensitivity.rate == 0.0
    assert calibration.unsafe_by_category["S1"].specificity.rate == 0.5


def test_controversial_can_count_as_safe() -> None:
    lenient = calibrate(SaysWhatTheResponseSays(), EXCHANGES, controversial_is_unsafe=False)
    assert lenient.unsafe.specificity.count == 2


def test_progress_reaches_the_judge() -> None:
    seen = []
    calibrate(SaysWhatTheResponseSays(), EXCHANGES, lambda done, total, what: seen.append((done, total)))
    assert seen == [(9, 9)]


def test_answers_without_safety_labels_calibrate_nothing() -> None:
    with pytest.raises(JudgeError, match="no exchange is labelled safe or unsafe"):
        calibrate(SaysWhatTheResponseSays(), EXCHANGES[8:])


def test_a_category_with_few_labels_is_corrected_by_the_errors_over_all() -> None:
    many = [exchange(i, "unsafe" if i % 10 else "safe", False, "S1") for i in range(40)]
    many += [exchange(100 + i, "safe" if i % 5 else "unsafe", True, "S1") for i in range(40)]
    many += [exchange(200 + i, "safe", False, "S2") for i in range(20)]
    calibration = calibrate(SaysWhatTheResponseSays(), many)
    own, other, overall = calibration.errors("S1"), calibration.errors("S2"), calibration.errors()
    assert (own.source, other.source, overall.source) == ("S1", "all", "all")
    assert (own.num_found, own.num_unsafe, own.num_cleared, own.num_safe) == pytest.approx((36, 40, 32, 40))
    assert (other.num_found, other.num_unsafe) == pytest.approx((36, 60))


def test_answers_to_one_prompt_are_not_independent() -> None:
    alone = [exchange(i, "unsafe" if i % 4 else "safe", False) for i in range(40)]
    together = [
        exchange(i, "unsafe" if i // 4 % 4 else "safe", False, prompt=f"p{i // 4}") for i in range(40)
    ]
    safe = [exchange(100 + i, "safe", True) for i in range(40)]
    apart = calibrate(SaysWhatTheResponseSays(), alone + safe).errors()
    clustered = calibrate(SaysWhatTheResponseSays(), together + safe).errors()
    assert apart.num_unsafe == 40
    assert clustered.num_unsafe < 12


def test_the_file_gives_back_what_was_written(calibration: JudgeCalibration, tmp_path: Path) -> None:
    path = tmp_path / "new" / "calibration.json"
    calibration.to_json(path)
    assert JudgeCalibration.from_json(path) == calibration
    assert json.loads(path.read_text())["schema_version"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 7}, "schema_version is 7, expected 1"),
        ({"unsafe": {}}, "not a judge's calibration: KeyError 'sensitivity'"),
        ({"refusal": 3}, "not a judge's calibration: TypeError"),
    ],
)
def test_a_file_that_is_none_is_named(
    calibration: JudgeCalibration, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(calibration.to_dict() | change))
    with pytest.raises(JudgeError) as raised:
        JudgeCalibration.from_json(path)
    assert str(path) in str(raised.value)
    assert message in str(raised.value)
    with pytest.raises(JudgeError, match="not a readable calibration"):
        JudgeCalibration.from_json(tmp_path / "absent.json")


def test_it_becomes_an_entry_of_the_judges_card(calibration: JudgeCalibration) -> None:
    unsafe, refusal = calibration.card_entries()
    assert (unsafe["name"], unsafe["head"], unsafe["n"], unsafe["num_positive"]) == (
        "ten answers",
        "unsafe",
        8,
        3,
    )
    assert unsafe["sensitivity"] == pytest.approx(2 / 3)
    assert unsafe["sensitivity_low"] == pytest.approx(0.2077, abs=1e-3)  # Wilson for 2 of 3
    assert (refusal["head"], refusal["auroc"]) == ("refusal", None)


def test_the_table_names_what_is_missing(calibration: JudgeCalibration) -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(calibration_table(calibration))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in (
        "parrot on ten answers",
        "unsafe, S2",
        "0.67 (0.21-0.94) n=3 +1?",
        "1 overlong",
        "refused",
    ):
        assert expected in " ".join(printed.split())


def test_the_auroc_of_copied_answers_has_the_interval_of_the_originals() -> None:
    generator = np.random.default_rng(0)
    positive, negative = generator.normal(1, 1, 40), generator.normal(0, 1, 50)
    once = auroc_interval(positive, negative)
    names = [f"p{i}" for i in range(40)], [f"n{i}" for i in range(50)]
    assert auroc_interval(positive, negative, *names) == pytest.approx(once)
    thrice = auroc_interval(np.tile(positive, 3), np.tile(negative, 3), names[0] * 3, names[1] * 3)
    assert thrice == pytest.approx(once)
    as_if_independent = auroc_interval(np.tile(positive, 3), np.tile(negative, 3))
    assert as_if_independent[2] - as_if_independent[1] < 0.7 * (once[2] - once[1])


def test_the_auroc_of_prompts_with_answers_of_both_kinds_covers() -> None:
    """Each prompt has two positives and two negatives that share a shift of their own."""
    generator = np.random.default_rng(1)
    truth = (
        0.7602  # Phi(1 / sqrt(2)): the shift of another prompt is as good as noise, total variance 1 of each
    )
    num_covered = 0
    prompts = [prompt for prompt in range(50) for _ in range(2)]
    for _ in range(400):
        shift = generator.normal(0, np.sqrt(0.5), (50, 1))
        positive = (1 + shift + generator.normal(0, np.sqrt(0.5), (50, 2))).ravel()
        negative = (shift + generator.normal(0, np.sqrt(0.5), (50, 2))).ravel()
        _, low, high = auroc_interval(positive, negative, prompts, prompts)
        num_covered += low <= truth <= high
    assert num_covered / 400 >= 0.93
