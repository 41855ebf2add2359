import json
from collections.abc import Sequence
from dataclasses import asdict

import pytest

from equipoise.data.schema import Exchange
from equipoise.eval.generation.requests import Finish, Progress, Reply, Request
from equipoise.eval.judges.base import JudgeCard
from equipoise.eval.judges.pairwise import PairwiseJudge, Preference
from equipoise.eval.suites.win_rate import PairSample, Pairwise, compare_answers


class PrefersLonger:
    """Says A where the first answer is longer, B where the second is."""

    def __init__(self) -> None:
        self.description = {"engine": "fake", "model": "prefers-longer"}

    def complete(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        replies = []
        for request in requests:
            assert request.messages is not None
            first, second = str(request.messages[-1]["content"]).split("[answer B")
            num_first, num_second = first.count("word"), second.count("word")
            said = "A" if num_first > num_second else "B" if num_second > num_first else "TIE"
            replies.append(Reply(said, Finish.STOP))
        return replies


EXCHANGES = [Exchange(f"e{i}", ({"role": "user", "content": f"q{i}"},), "helpful") for i in range(6)]


@pytest.fixture
def compared() -> Pairwise:
    judge = PairwiseJudge(PrefersLonger(), JudgeCard("longer", False, "", ()))
    return compare_answers(
        judge, EXCHANGES, ["word word"] * 4 + ["word", ""], ["word"] * 4 + ["word word", ""], "base"
    )


def test_answers_become_a_win_rate(compared: Pairwise) -> None:
    found = compared.win_rate()
    assert (found.num_wins, found.num_losses, found.num_ties, found.n) == (4, 1, 1, 6)
    assert found.rate == pytest.approx(4.5 / 6)
    assert found.num_inconsistent == 0
    assert compared.opponent == "base"
    assert compared.judge["name"] == "longer"
    assert compared.settings == {"engine": "fake", "model": "prefers-longer"}


def test_lengths_are_those_of_the_answers() -> None:
    # 12 wins of longer answers and 4 losses of shorter ones, and some against it: length explains much of it.
    first, second = Preference.FIRST, Preference.SECOND
    outcomes = [(20, True)] * 12 + [(-20, False)] * 4 + [(20, False)] * 3 + [(-20, True)] * 1
    samples = tuple(
        PairSample(
            str(i),
            "helpful",
            (),
            "x" * (50 + longer),
            "x" * 50,
            *((first, second) if won else (second, first)),
        )
        for i, (longer, won) in enumerate(outcomes)
    )
    found = Pairwise("base", {}, samples).win_rate()
    assert found.rate == pytest.approx(13 / 20)
    assert found.length_controlled.rate is not None
    assert found.length_controlled.rate < 0.6
    assert found.length_controlled.length_effect is not None
    assert found.length_controlled.length_effect > 0


def test_pairs_of_one_prompt_are_counted_as_such() -> None:
    samples = tuple(
        PairSample(f"{i}", "helpful", (), "", "", Preference.FIRST, Preference.SECOND, prompt_id=f"p{i // 3}")
        for i in range(12)
    )
    assert Pairwise("base", {}, samples).win_rate().num_prompts == 4


def test_it_comes_back_from_json(compared: Pairwise) -> None:
    assert Pairwise.from_dict(json.loads(json.dumps(asdict(compared)))) == compared
    document = asdict(compared)
    document["samples"][0]["shown_first"] = "third"
    with pytest.raises(ValueError, match="'third'"):
        Pairwise.from_dict(document)
