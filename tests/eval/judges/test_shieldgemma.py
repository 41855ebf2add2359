import math
from pathlib import Path

import pytest

from equipoise.data.crosswalk import crosswalk
from equipoise.eval.generation.requests import Finish, Reply
from equipoise.eval.judges.base import JudgeError, Verdict
from equipoise.eval.judges.shieldgemma import GUIDELINES, ShieldGemma

PROMPT = [{"role": "user", "content": "How?"}]
DANGEROUS, HARASSMENT, HATE, SEXUAL = GUIDELINES


def token(p: float, mass: float = 1.0) -> Reply:
    """One token of which `Yes` and `No` have `mass` of the probability, `Yes` p of that."""
    logprobs = {"Yes": math.log(mass * p), "No": math.log(mass * (1 - p))}
    return Reply("Yes" if p > 0.5 else "No", Finish.LENGTH, num_tokens=1, choice_logprobs=logprobs)


def test_each_guideline_is_a_call() -> None:
    requests = ShieldGemma().ask(PROMPT, "So.")
    assert [request.template_options["guideline"] for request in requests] == list(GUIDELINES.values())
    for request in requests:
        assert request.messages == (
            {"role": "user", "content": "How?"},
            {"role": "assistant", "content": "So."},
        )
        assert (request.max_new_tokens, request.choices) == (1, ("Yes", "No"))
    assert ShieldGemma().description.endswith("own wording")


def test_the_guidelines_are_those_of_the_crosswalk() -> None:
    assert tuple(GUIDELINES) == crosswalk("shieldgemma").labels


def test_it_is_unsafe_if_any_guideline_is_over_its_threshold() -> None:
    judgement = ShieldGemma().read([token(0.1), token(0.6), token(0.2), token(0.9)])
    assert judgement.verdict is Verdict.UNSAFE
    assert judgement.p_unsafe == pytest.approx(0.9)
    assert judgement.native_categories == (SEXUAL, HARASSMENT)


def test_it_is_safe_if_none_is() -> None:
    judgement = ShieldGemma().read([token(0.1), token(0.4), token(0.2), token(0.3)])
    assert judgement.verdict is Verdict.SAFE
    assert judgement.p_unsafe == pytest.approx(0.4)
    assert judgement.native_categories == ()


def test_thresholds_are_one_for_all_or_one_for_each() -> None:
    replies = [token(0.1), token(0.4), token(0.2), token(0.6)]
    assert ShieldGemma(threshold=0.7).read(replies).verdict is Verdict.SAFE
    judgement = ShieldGemma(threshold=0.7, thresholds={HARASSMENT: 0.3}).read(replies)
    assert judgement.native_categories == (HARASSMENT,)


def test_a_violation_counts_though_other_guidelines_were_not_read() -> None:
    failed = Reply(None, Finish.FAILED, error="503")
    judgement = ShieldGemma().read([failed, token(0.8), Reply("Maybe", Finish.LENGTH), token(0.1)])
    assert (judgement.verdict, judgement.native_categories) == (Verdict.UNSAFE, (HARASSMENT,))
    assert judgement.p_unsafe == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (Reply(None, Finish.FAILED, error="503"), Verdict.FAILED),
        (Reply(None, Finish.OVERLONG), Verdict.OVERLONG),
        (Reply(None, Finish.LENGTH), Verdict.OVERLONG),
        (Reply("Maybe", Finish.LENGTH), Verdict.UNPARSED),
        (Reply("no", Finish.STOP), Verdict.UNPARSED),
        (Reply("No way", Finish.STOP), Verdict.UNPARSED),
        (Reply("", Finish.STOP), Verdict.UNPARSED),
        (Reply("No", Finish.LENGTH), Verdict.OVERLONG),  # without probabilities: No, or Nothing
        (token(0.1, mass=0.4), Verdict.UNPARSED),
        (Reply("No", Finish.LENGTH, choice_logprobs={"No": math.log(0.49)}), Verdict.UNPARSED),
        (Reply("No", Finish.LENGTH, choice_logprobs={"Yes": -0.1}), Verdict.UNPARSED),
        (Reply("No", Finish.LENGTH, choice_logprobs={"No": math.nan}), Verdict.UNPARSED),
        (Reply("No", Finish.LENGTH, choice_logprobs={"No": math.inf}), Verdict.UNPARSED),
        (Reply("No", Finish.LENGTH, choice_logprobs={"No": -0.1, "Yes": math.nan}), Verdict.UNPARSED),
        (Reply("No", Finish.LENGTH, choice_logprobs={"No": -3.0, "Yes": -0.1}), Verdict.UNPARSED),
        (Reply("Yes", Finish.LENGTH, choice_logprobs={"No": -0.1, "Yes": -3.0}), Verdict.UNPARSED),
    ],
)
def test_it_is_not_safe_if_a_guideline_was_not_read(reply: Reply, verdict: Verdict) -> None:
    judgement = ShieldGemma().read([token(0.1), reply, token(0.1), token(0.1)])
    assert (judgement.verdict, judgement.p_unsafe, judgement.native_categories) == (verdict, None, ())


def test_without_probabilities_the_words_count() -> None:
    no, yes = Reply("No", Finish.STOP), Reply("Yes", Finish.LENGTH)
    assert ShieldGemma().read([no, no, no, no]).verdict is Verdict.SAFE
    judgement = ShieldGemma().read([no, yes, no, no])
    assert (judgement.verdict, judgement.native_categories) == (Verdict.UNSAFE, (HARASSMENT,))
    assert judgement.p_unsafe is None


def test_one_probability_is_enough_where_the_rest_cannot_change_the_finding() -> None:
    no = Reply("No", Finish.LENGTH, choice_logprobs={"No": math.log(0.8)})  # Yes has 0.2 at most
    yes = Reply("Yes", Finish.LENGTH, choice_logprobs={"Yes": math.log(0.8)})
    assert ShieldGemma(threshold=0.21).read([no] * 4).verdict is Verdict.SAFE
    assert ShieldGemma(threshold=0.19).read([no] * 4).verdict is Verdict.UNPARSED
    assert ShieldGemma(threshold=0.79).read([no, no, no, yes]).native_categories == (SEXUAL,)
    assert ShieldGemma(threshold=0.81).read([no, no, no, yes]).verdict is Verdict.UNPARSED
    assert ShieldGemma(threshold=0.21).read([no] * 4).p_unsafe is None


def test_guidelines_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "guidelines.yaml"
    path.write_text('Cruelty: "\\"No Cruelty\\": The chatbot shall not be cruel."\n', encoding="utf-8")
    form = ShieldGemma(prompt_file=str(path), thresholds={"Cruelty": 0.2})
    (request,) = form.ask(PROMPT, "So.")
    assert request.template_options == {"guideline": '"No Cruelty": The chatbot shall not be cruel.'}
    assert form.read([token(0.3)]).native_categories == ("Cruelty",)
    assert form.description.endswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected `NAME: TEXT` for each guideline"),
        ("Cruelty: [a]", "expected `NAME: TEXT` for each guideline"),
        ("- a", "expected keys with values"),
        ("a: [", "is not YAML"),
    ],
)
def test_guidelines_that_cannot_be_used_say_why(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "guidelines.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(JudgeError, match=message):
        ShieldGemma(prompt_file=str(path))


def test_thresholds_that_cannot_be_used_say_why() -> None:
    with pytest.raises(JudgeError, match=r"judge\.thresholds: unknown guidelines Spam; there are Dangerous"):
        ShieldGemma(thresholds={"Spam": 0.5})
    with pytest.raises(JudgeError, match=r"found 1\.5, expected at least 0 and below 1"):
        ShieldGemma(threshold=1.5)
    with pytest.raises(JudgeError, match=r"judge\.prompt_file=missing.yaml"):
        ShieldGemma(prompt_file="missing.yaml")
