"""A published judge at work: a form says how to ask and to read, an engine answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from equipoise.data.crosswalk import Crosswalk, find_crosswalk
from equipoise.data.schema import Turn
from equipoise.data.taxonomy import OTHER
from equipoise.eval.generation.requests import Engine, Progress, Reply, Request
from equipoise.eval.judges.base import JudgeCard, JudgeError, Judgement
from equipoise.eval.judges.form import JudgeForm
from equipoise.eval.judges.neutralise import neutralise


@dataclass
class ModelJudge:
    """A `Judge` made of a form and an engine."""

    form: JudgeForm
    engine: Engine
    card: JudgeCard
    special_tokens: tuple[str, ...] = ()
    """Of the judge's own tokenizer, where it is at hand: neutralised beside the known templates."""

    def __post_init__(self) -> None:
        self._crosswalk = find_crosswalk(self.form.crosswalk) if self.form.crosswalk is not None else None

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Progress | None = None
    ) -> list[Judgement]:
        """Judge `responses[i]`, given to the conversation `prompts[i]`; all first calls are one batch, all second ones.

        Raises `JudgeError` where prompts and responses, or the engine's requests and replies, differ in number, and
        whatever the engine raises where it cannot work at all.
        """
        if len(prompts) != len(responses):
            raise JudgeError(f"{len(prompts)} prompts and {len(responses)} responses; expected as many.")
        exchanges = [
            (
                [{**turn, "content": self._harmless(turn["content"])} for turn in prompt],
                self._harmless(response),
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        first = self._complete([self.form.ask(*exchange) for exchange in exchanges], progress)
        further = [
            self.form.ask_again(*exchange, replies)
            for exchange, replies in zip(exchanges, first, strict=True)
        ]
        second = self._complete(further, progress)
        return [
            self._mapped(self.form.read([*replies, *more]))
            for replies, more in zip(first, second, strict=True)
        ]

    def _harmless(self, text: str) -> str:
        return neutralise(text, self.special_tokens)

    def _complete(self, asked: list[list[Request]], progress: Progress | None) -> list[list[Reply]]:
        """All requests of all exchanges in one batch; the replies by exchange."""
        requests = [request for some in asked for request in some]
        if not requests:
            return [[] for _ in asked]
        replies = self.engine.complete(requests, progress)
        if len(replies) != len(requests):
            raise JudgeError(
                f"The engine gave {len(replies)} replies to {len(requests)} requests of {self.form.name}."
            )
        remaining = iter(replies)
        return [[next(remaining) for _ in some] for some in asked]

    def _mapped(self, judgement: Judgement) -> Judgement:
        if self._crosswalk is None:
            return judgement
        return replace(judgement, categories=canonical(judgement.native_categories, self._crosswalk))


def canonical(labels: Sequence[str], walk: Crosswalk) -> tuple[str, ...]:
    """The canonical categories of native labels: the most fitting of each label first, then the others.

    A label that the crosswalk does not know is `OTHER`.
    """
    mapped = [walk.map(label) if walk.knows(label) else (OTHER,) for label in labels]
    ranked = [category for rank in zip_longest(*mapped) for category in rank if category is not None]
    return tuple(dict.fromkeys(ranked))
