"""Pairs for reward and cost models: which, which answer is the better one, and which are held out."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL, PreferencePair
from equipoise.data.sources import SafetyData, normalise_prompt
from equipoise.eval.scorer import cut_behind_end
from equipoise.train.recipe.stages import CostModelStageConfig, ScorerStageConfig


def scorer_pairs(
    stage: ScorerStageConfig, data: SafetyData
) -> tuple[list[PreferencePair], dict[str, object]]:
    """The pairs of the stage's mixture, and what was done to them, for its facts.

    Of a cost model's pairs the chosen answer is the less harmful one: a pair whose labels say otherwise is swapped, one
    of a harm category without labels is left out. Raises DataError when no pair remains.
    """
    subsets = {"safety": data.safety_pairs, "helpful": data.helpful_pairs}
    pairs = [pair for name, share in stage.mixture.items() if share > 0 for pair in subsets[name]]
    if not isinstance(stage, CostModelStageConfig):
        return pairs, {}
    unlabelled = [
        pair for pair in pairs if pair.category != HELPFUL and None in (pair.chosen_safe, pair.rejected_safe)
    ]
    left_out = {id(pair) for pair in unlabelled}
    labelled = [pair for pair in pairs if id(pair) not in left_out]
    if not any(pair.category != HELPFUL for pair in labelled):
        raise DataError(
            f"A cost model learns from answers that are labelled safe or unsafe, and none of {len(unlabelled)} safety "
            "pairs has both labels. Add chosen_safe and rejected_safe (true or false) to them."
        )
    wrong = [pair.chosen_safe is False and pair.rejected_safe is True for pair in labelled]
    pairs = [_swapped(pair) if swap else pair for pair, swap in zip(labelled, wrong, strict=True)]
    return pairs, {"num_unlabelled": len(unlabelled), "num_swapped": sum(wrong)}


def _swapped(pair: PreferencePair) -> PreferencePair:
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_safe=pair.rejected_safe,
        rejected_safe=pair.chosen_safe,
    )


def split_by_prompt(
    pairs: Sequence[PreferencePair], fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(training pairs, held-out pairs) with no prompt in both, however it is written.

    Of each category's prompts about `fraction` is held out, at least one and never all; which ones depends on seed and
    prompt alone. A prompt that several categories share is held out in all of them.
    """
    prompts: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        prompts[pair.category].add(normalise_prompt(pair.prompt))
    held_out: set[str] = set()
    for of_category in prompts.values():
        num = min(max(1, round(fraction * len(of_category))), len(of_category) - 1) if fraction else 0
        held_out |= set(sorted(of_category, key=lambda prompt: _digest(prompt, seed))[:num])
    held = [normalise_prompt(pair.prompt) in held_out for pair in pairs]
    return (
        [pair for pair, out in zip(pairs, held, strict=True) if not out],
        [pair for pair, out in zip(pairs, held, strict=True) if out],
    )


def _digest(prompt: str, seed: int) -> bytes:
    return hashlib.blake2b(f"held out\n{seed}\n{prompt}".encode(), digest_size=16).digest()


def scorer_rows(stage: ScorerStageConfig, dataset: Dataset, ends: set[int]) -> Dataset:
    """`encode_pairs`' rows with answers that end where a generated one does (`ends`), and the columns of
    `scorer_trainer.LABELS`."""
    is_cost = isinstance(stage, CostModelStageConfig)

    def row(example: dict[str, Any]) -> dict[str, Any]:
        helpful = example["category"] == HELPFUL
        signs = {
            f"{answer}_sign": _sign(example[f"{answer}_safe"], helpful) for answer in ("chosen", "rejected")
        }
        cut = {name: cut_behind_end(example[name], ends) for name in ("chosen_ids", "rejected_ids")}
        kept = {name: example[name] for name in ("prompt_ids", "category", "pair")}
        return kept | cut | signs | {"ordered": int(not (is_cost and helpful))}

    return Dataset.from_list([row(example) for example in dataset])


def _sign(safe: bool | None, helpful: bool) -> int:
    """+1 unsafe, -1 safe, 0 unknown; without a label an answer to a prompt that carries no hazard is safe."""
    if safe is None:
        return -1 if helpful else 0
    return -1 if safe else 1
