"""Win rate: which of two models' answers to the same prompts a pairwise judge prefers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from equipoise.data.schema import Exchange, Turn
from equipoise.eval.generation.requests import Progress
from equipoise.eval.judges.pairwise import PairwiseJudge, Preference, duel
from equipoise.eval.statistics.win_rate import WinRate, win_rate


@dataclass(frozen=True, slots=True)
class PairSample:
    """One prompt, both answers and what the judge said of them in both orders."""

    id: str
    category: str
    prompt: tuple[Turn, ...]
    response: str
    """Of the model under test."""
    opponent_response: str
    shown_first: Preference
    """With `response` as the first of the two: FIRST prefers it."""
    shown_second: Preference
    """With `response` as the second: SECOND prefers it."""
    raw: tuple[str, str] = ("", "")
    """The judge's own words."""
    prompt_id: str = ""
    """Pairs of one prompt share it; empty: `id`."""


@dataclass(frozen=True)
class Pairwise:
    """The pairwise comparison of one model state with another; a part of its report."""

    opponent: str
    """Whose answers the model's are held against."""
    judge: Mapping[str, Any]
    """The pairwise judge's card as a dict."""
    samples: tuple[PairSample, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else determines the verdicts: the engine's description."""

    def win_rate(self, confidence: float = 0.95) -> WinRate:
        """The win rate with its intervals; lengths are in characters."""
        return win_rate(
            [duel(sample.shown_first, sample.shown_second) for sample in self.samples],
            [len(sample.response) - len(sample.opponent_response) for sample in self.samples],
            [sample.prompt_id or sample.id for sample in self.samples],
            confidence,
        )

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Pairwise":
        """The inverse of `dataclasses.asdict`, through JSON; KeyError, TypeError or ValueError where it is none."""
        samples = tuple(
            PairSample(
                **{
                    **sample,
                    "prompt": tuple(sample["prompt"]),
                    "shown_first": Preference(sample["shown_first"]),
                    "shown_second": Preference(sample["shown_second"]),
                    "raw": tuple(sample["raw"]),
                }
            )
            for sample in document["samples"]
        )
        return cls(**{**document, "samples": samples})


def compare_answers(
    judge: PairwiseJudge,
    exchanges: Sequence[Exchange],
    responses: Sequence[str],
    opponent_responses: Sequence[str],
    opponent: str,
    progress: Progress | None = None,
) -> Pairwise:
    """Ask the judge for every exchange; `responses[i]` and `opponent_responses[i]` answer `exchanges[i]`.

    Raises as `PairwiseJudge.compare` does.
    """
    prompts = [exchange.prompt for exchange in exchanges]
    judgements = judge.compare(prompts, responses, opponent_responses, progress)
    samples = tuple(
        PairSample(
            id=exchange.id,
            category=exchange.category,
            prompt=exchange.prompt,
            response=response,
            opponent_response=other,
            shown_first=judgement.shown_first,
            shown_second=judgement.shown_second,
            raw=judgement.raw,
        )
        for exchange, response, other, judgement in zip(
            exchanges, responses, opponent_responses, judgements, strict=True
        )
    )
    return Pairwise(opponent, _plain(asdict(judge.card)), samples, _plain(dict(judge.engine.description)))


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give it back, so that a report read from a file equals the one that was written."""
    return json.loads(json.dumps(record, default=str))
