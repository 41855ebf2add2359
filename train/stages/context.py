"""What every stage is given: the recipe, the data, the run's folder, and where to report."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from equipoise.data.sources import SafetyData
from equipoise.eval.generation.tsdi import TokenBias
from equipoise.eval.judges.base import Judge
from equipoise.eval.report.content import ReportContent
from equipoise.train.recipe import Recipe

Progress = Callable[[int, int, str], None]

BASE = "base"
"""What `start_from` calls the run's starting model."""


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
    gate_inside: Callable[[str, int, Callable[[Path], None]], None] | None = None
    """(stage, step, save): judge and gate in the middle of a stage, every `gate.every` steps, what `save` writes.

    save: (folder), writes the policy as it would ship; collective, as the whole call is."""
    unsafe_counts: dict[str, tuple[int, int]] | None = None
    """Category -> (unsafe, judged) in the last evaluation; None before the first."""
    load_judge: Callable[[], Judge] | None = None
    """The recipe's judge, for rewards that are its verdicts."""
    log_speed: Callable[[Mapping[str, float], int, str], None] | None = None
    """(measured speeds, step, stage); None: nobody asks how fast it goes."""

    log_evaluation: Callable[[ReportContent, str], None] = lambda content, label: None
    """(the states to show, the new one last; its label): for dashboards."""
    log_promoted: Callable[[Path, Sequence[str], Mapping[str, object]], None] = lambda *promoted: None
    """(model folder, aliases, verdict): for dashboards."""

    finished: dict[str, "StageResult"] = field(default_factory=dict)
    """What the stages before this one left, by name."""

    def policy_folder(self, source: str | None, before: str) -> str:
        """The model folder that `start_from` names; `before` is what the stage before left. Checked with the recipe."""
        if source is None:
            return before
        if source == BASE:
            return self.base_folder
        return (
            self.finished[source].model_folder if source in self.finished else str(Path(source).expanduser())
        )

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
    """Measured by the stage, to be taken off in decoding."""
    scorer_folder: str | None = None
    """A reward or cost model that the stage trained; the policy is then as before."""
    variants: dict[str, str] = field(default_factory=dict)
    """Further policies to be judged, name -> model folder."""

    def to_json(self) -> str:
        """Everything but the token bias, which has a file of its own."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "token_bias"}
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, token_bias: TokenBias | None) -> "StageResult":
        """What `to_json` wrote."""
        return cls(token_bias=token_bias, **json.loads(text))
