"""What every stage is given: the recipe, the data, the run's folder, and where to report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from equipoise.data.sources import SafetyData
from equipoise.eval.generation.tsdi import TokenBias
from equipoise.train.recipe import Recipe

Progress = Callable[[int, int, str], None]


@dataclass
class StageContext:
    """One run's surroundings; the same on all ranks, but that only rank 0 writes."""

    recipe: Recipe
    data: SafetyData
    run_dir: Path
    base_folder: str
    """The starting model, as `load_model` takes it."""
    log: Callable[[Mapping[str, float], int, str], None]
    """(metrics, step, stage)."""
    rewind: Callable[[str, int], None]
    """(stage, step): what was logged of the stage behind the step is about to be done again."""
    say: Callable[[str], None]
    progress: Progress
    gate_inside: Callable[[str, int, Any, PreTrainedTokenizerBase], None] | None = None
    """(stage, step, model, tokenizer): judge and gate in the middle of a stage, every `gate.every` steps."""
    unsafe_counts: dict[str, tuple[int, int]] | None = None
    """Category -> (unsafe, judged) in the last evaluation; None before the first."""

    def stage_dir(self, name: str) -> Path:
        """Folder of a stage: `model/` (when it trains), its own files, and `done.json` when it has ended."""
        return self.run_dir / "stages" / name


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind."""

    model_folder: str
    """The policy after it; a stage that trains nothing passes on the one it got."""
    seconds: float
    facts: dict[str, object]
    """For summary.json: steps, pairs, cache hit ..."""
    token_bias: TokenBias | None = None
