"""Two ranks evaluate and gate a model, here and in a process of its own; what each of them has found goes to a file.

`judge` is the folder of a cost model.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from equipoise.data.errors import EquipoiseError
from equipoise.data.schema import HELPFUL, Exchange
from equipoise.data.sources import SafetyData
from equipoise.eval.config import JudgeConfig
from equipoise.eval.gate import GateRules
from equipoise.eval.judges.loading import load_judge
from equipoise.train.gatekeeper import BASE, Gatekeeper
from equipoise.train.ranks import from_first
from equipoise.train.recipe import EvaluationConfig, GateConfig, ModelConfig, Recipe
from equipoise.train.stages.context import StageContext


def exchanges(suite: str, category: str, num: int) -> list[Exchange]:
    """An odd number, so that the ranks have unequal shares."""
    return [
        Exchange(f"{suite}{i}", ({"role": "user", "content": f"{suite} {i}"},), category, f"answer {i}")
        for i in range(num)
    ]


def gated(model: str, judge: str, out: Path, where: str) -> dict[str, Any]:
    """Report and verdict on the model, evaluated there."""
    recipe = Recipe(
        name="test",
        stages={},
        model=ModelConfig(id=model, dtype="float32"),
        judge=JudgeConfig("beaver", model=judge, dtype="float32"),
        evaluation=EvaluationConfig(max_new_tokens=4, batch_size=2),
        gate=GateConfig(where=where, timeout=120),
    )
    run_dir = out / where
    run_dir.mkdir(exist_ok=True)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump({"name": "test"}))
    context = StageContext(
        recipe=recipe,
        data=SafetyData(
            safety_pairs=[],
            helpful_pairs=[],
            harmful_prompts=exchanges("harmful", "S1", 5),
            lookalike_prompts=exchanges("lookalike", "S1", 3),
            helpful_prompts=exchanges("helpful", HELPFUL, 3),
            labelled=[],
        ),
        run_dir=run_dir,
        base_folder=model,
        log=lambda metrics, step, stage: None,
        rewind=lambda stage, step: None,
        say=lambda text: None,
        progress=lambda *call: None,
    )
    rules = GateRules(
        alpha=0.9, category_limit=0.5, min_samples=1, regression=False, over_refusal_margin=None
    )
    keeper = Gatekeeper(
        context, load_judge(recipe.judge), dataclasses.replace(rules, helpfulness_margin=None)
    )
    report = keeper.evaluate("aligned", "safe-2", model)
    result = keeper.decide("aligned", "safe-2", model)
    assert BASE not in keeper.reports
    return {
        "report": dataclasses.asdict(report),
        "verdict": result.to_dict(),
        "unsafe": context.unsafe_counts,
    }


def failing() -> str:
    """What a rank is told where the first one fails."""

    def make() -> None:
        raise OSError("no space left")

    try:
        from_first(make)
    except (OSError, EquipoiseError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(model: str, judge: str, out: Path) -> None:
    """Write what this rank has found to `out/rank<N>.json`."""
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    found: dict[str, Any] = {where: gated(model, judge, out, where) for where in ("in_process", "subprocess")}
    found["failing"] = failing()
    (out / f"rank{state.process_index}.json").write_text(json.dumps(found))
