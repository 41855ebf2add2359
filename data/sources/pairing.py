"""Pairs out of answers that were judged one by one: to one prompt, what is better over what is worse."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from equipoise.data.records import Records
from equipoise.data.schema import HELPFUL, LabelledExchange, PreferencePair
from equipoise.data.splits import normalise_prompt
from equipoise.data.taxonomy import OTHER


def settle(records: Records) -> None:
    """Make one of labelled exchanges with the same prompt and response, by the majority of their safety labels.

    Answers that as many call safe as unsafe contradict themselves and are left out. The others keep the label that
    most of them have, and the category of the first that says so.
    """
    groups: dict[tuple[str, str], list[LabelledExchange]] = {}
    for exchange in records.labelled:
        key = (normalise_prompt(exchange.prompt), exchange.response.strip())
        groups.setdefault(key, []).append(exchange)
    settled: list[LabelledExchange] = []
    for group in groups.values():
        votes = Counter(exchange.safe for exchange in group)
        if len(group) > 1 and votes[True] == votes[False] > 0:
            records.left_out["judged safe as often as unsafe"] += len(group)
            continue
        verdict = max(votes, key=lambda safe: (votes[safe], safe is not None))
        settled.append(next(exchange for exchange in group if exchange.safe is verdict))
        if len(group) > 1:
            records.left_out["the same prompt and answer again"] += len(group) - 1
    records.labelled = settled


def adopt_categories(exchanges: Iterable[LabelledExchange]) -> list[LabelledExchange]:
    """Give safe answers of category `OTHER` the category of an unsafe answer to the same prompt, where there is one.

    For sets that label the harm of an answer: a safe answer has none, but its prompt asks for one.
    """
    listed = list(exchanges)
    asked: dict[str, LabelledExchange] = {}
    for exchange in listed:
        if exchange.safe is False and exchange.category not in (OTHER, HELPFUL):
            asked.setdefault(normalise_prompt(exchange.prompt), exchange)
    adopted: list[LabelledExchange] = []
    for exchange in listed:
        unsafe = asked.get(normalise_prompt(exchange.prompt))
        if unsafe is not None and exchange.safe and exchange.category == OTHER:
            exchange = replace(exchange, category=unsafe.category)
        adopted.append(exchange)
    return adopted


def pair_up(records: Records) -> None:
    """Add the pairs that the labelled exchanges make, each answer in one pair at most.

    Harmful prompts: a safe answer over an unsafe one; the pair's category is that of the unsafe answer. Harmless
    prompts (`helpful`): an answer that is no refusal over one that is. Answers that find no partner stay labelled
    exchanges, and are counted in `notes`.
    """
    groups: dict[tuple[str, bool], list[LabelledExchange]] = {}
    for exchange in records.labelled:
        groups.setdefault((normalise_prompt(exchange.prompt), exchange.category == HELPFUL), []).append(
            exchange
        )
    num_paired = 0
    for (_, harmless), group in groups.items():
        if harmless:
            better = [
                exchange for exchange in group if exchange.refusal is False and exchange.safe is not False
            ]
            worse = [exchange for exchange in group if exchange.refusal is True]
        else:
            better = [exchange for exchange in group if exchange.safe is True]
            worse = [exchange for exchange in group if exchange.safe is False]
        for chosen, rejected in zip(better, worse, strict=False):
            num_paired += 2
            records.pairs.append(
                PreferencePair(
                    id=f"{chosen.id}+{rejected.id}",
                    prompt=chosen.prompt,
                    chosen=chosen.response,
                    rejected=rejected.response,
                    category=rejected.category,
                    chosen_safe=chosen.safe,
                    rejected_safe=rejected.safe,
                    source=chosen.source,
                    meta=rejected.meta,
                )
            )
    unpaired = len(records.labelled) - num_paired
    if unpaired:
        records.notes["answers without a partner to make a pair"] += unpaired
