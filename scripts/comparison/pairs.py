"""The pairs that every method trains on, and the prompts that every method is judged on: one split for all seeds."""

import json
from dataclasses import replace
from pathlib import Path

from equipoise.data.config import DataConfig
from equipoise.data.files import write_aside
from equipoise.data.sources import SafetyData, load_data, load_samples

SPLIT_SEED = 0
"""Of the held-out prompts; a run splits by its own seed, and seeds could not be compared prompt by prompt."""


def prepare(config: DataConfig) -> SafetyData:
    """What is trained and judged on. The shipped helpful pairs stand in where the data has none.

    (With safety pairs alone a model learns to refuse whatever it is asked.) Raises DataError.
    """
    data = load_data(config, SPLIT_SEED)
    return data if data.helpful_pairs else replace(data, helpful_pairs=load_samples().helpful_pairs)


def write_training(data: SafetyData, path: Path) -> None:
    """The training pairs as JSON lines that `data=jsonl` reads."""
    lines = [
        json.dumps(
            {
                "id": pair.id,
                "prompt": list(pair.prompt),
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "category": pair.category,
                "chosen_safe": pair.chosen_safe,
                "rejected_safe": pair.rejected_safe,
                "source": pair.source or None,
                "meta": pair.meta,
            },
            ensure_ascii=False,
        )
        for pair in data.safety_pairs + data.helpful_pairs
    ]
    write_aside(path, "".join(line + "\n" for line in lines))


def training_config(config: DataConfig, path: Path) -> DataConfig:
    """`config` with the written pairs in place of what they came from."""
    return DataConfig(
        source="jsonl",
        path=str(path),
        max_length=config.max_length,
        max_prompts_per_category=config.max_prompts_per_category,
    )
