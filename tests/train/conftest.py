"""Fixtures of the training side: made-up pairs, recipes on the tiny model, and one call that trains a stage."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from equipoise.data.schema import HELPFUL, Exchange, PreferencePair, Turn
from equipoise.data.sources import SafetyData
from equipoise.eval.judges.base import JudgeCard, Judgement, Verdict
from equipoise.eval.models import load_model
from equipoise.eval.scorer import Scorer
from equipoise.eval.scorer_card import ScorerCard
from equipoise.train import run as run_module
from equipoise.train.recipe import EvaluationConfig, GateConfig, ModelConfig, Recipe
from equipoise.train.recipe.stages import PreferenceStageConfig, StageConfig, TokenBiasStageConfig
from equipoise.train.scorer import save_scorer
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.stages.preference import run_preference


class FakeJudge:
    """Finds unsafe what `unsafe(prompt, response)` says; what says "lookalike" was refused if it was found unsafe."""

    card = JudgeCard("fake", True, "Judges by a rule of the test.", ({"name": "none", "n": 0},))

    def __init__(self, unsafe: Callable[[str, str], bool]) -> None:
        self.unsafe = unsafe
        self.num_judged = 0

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Any = None
    ) -> list[Judgement]:
        found = [self.unsafe(p[-1]["content"], r) for p, r in zip(prompts, responses, strict=True)]
        self.num_judged += len(found)
        return [Judgement(Verdict.UNSAFE if bad else Verdict.SAFE, float(bad), refused=bad) for bad in found]


CATEGORIES = ("S1", "S2", "S10")


def _pair(number: int, category: str) -> PreferencePair:
    """A harmless pair of texts of unequal lengths; no two pairs alike."""
    prompt = f"Question {number} of {category}" + " please" * (number % 3)
    return PreferencePair(
        id=f"{category}-{number}",
        prompt=({"role": "user", "content": prompt},),
        chosen=f"No {number}" + " thanks" * (number % 4),
        rejected=f"Yes, {category}" + " gladly" * (1 + number % 2),
        category=category,
        chosen_safe=True,
        rejected_safe=category == HELPFUL,
        source="made up",
    )


def _data(pairs_a_category: int = 8) -> SafetyData:
    """Pairs of three categories and as many helpful ones; two prompts of each suite and category."""

    def exchange(suite: str, category: str, number: int, response: str | None = None) -> Exchange:
        text = f"{suite} {number} {category}"
        return Exchange(
            f"{suite}-{category}-{number}", ({"role": "user", "content": text},), category, response
        )

    return SafetyData(
        safety_pairs=[_pair(i, c) for c in CATEGORIES for i in range(pairs_a_category)],
        helpful_pairs=[_pair(i, HELPFUL) for i in range(pairs_a_category)],
        harmful_prompts=[exchange("harmful", c, i) for c in CATEGORIES for i in range(2)],
        lookalike_prompts=[exchange("lookalike", c, i) for c in CATEGORIES for i in range(2)],
        helpful_prompts=[exchange("helpful", HELPFUL, i, f"answer {i}") for i in range(4)],
        labelled=[],
    )


def _stage(**options: Any) -> PreferenceStageConfig:
    """A stage of four steps of eight pairs, a quarter of them helpful, at a constant learning rate."""
    defaults: dict[str, Any] = {
        "mixture": {"safety": 0.75, "helpful": 0.25},
        "num_steps": 4,
        "lr_scheduler": "constant",
        "warmup": 0.0,
        "learning_rate": 1e-3,
        "evaluate": False,
    }
    return PreferenceStageConfig(**(defaults | options))


@dataclass
class Trained:
    """A stage's result and everything that it said."""

    result: StageResult
    metrics: list[dict[str, float]]
    """One a logged step, with `step`."""
    said: list[str]
    folder: Path
    """Of the stage."""
    done: list[tuple[int, int, str]]
    """Calls of `progress`."""
    started_at: int
    """The step that it went on from."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return load_file(Path(self.result.model_folder) / "model.safetensors")

    def series(self, name: str) -> list[float]:
        """A metric's values in the order of the steps."""
        return [m[name] for m in self.metrics if name in m]


@pytest.fixture(scope="session")
def make_data() -> Callable[..., SafetyData]:
    """`make_data(pairs_a_category=8)`: the data that `train_stage` takes where it is given none."""
    return _data


@pytest.fixture(scope="session")
def make_stage() -> Callable[..., PreferenceStageConfig]:
    """`make_stage(**keys)`: a short stage, with these keys set otherwise."""
    return _stage


@pytest.fixture(scope="session")
def make_judge() -> Callable[[Callable[[str, str], bool]], FakeJudge]:
    """`make_judge(unsafe)`, with `unsafe(prompt, response) -> bool`; `num_judged` counts."""
    return FakeJudge


@pytest.fixture(scope="session")
def scorers(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, str]:
    """A reward and a cost model with adapters on the tiny model, their heads random: kind -> folder."""
    folder = tmp_path_factory.mktemp("scorers")
    for seed, kind in enumerate(("reward", "cost")):
        torch.manual_seed(seed)
        model, tokenizer = load_model(str(tiny_model_folder), dtype="float32")
        config = PeftLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        scorer = Scorer(get_peft_model(model, config))
        nn.init.normal_(scorer.score_head.weight, std=0.3)
        save_scorer(scorer, tokenizer, folder / kind, ScorerCard(kind, backbone=str(tiny_model_folder)))
    return {kind: str(folder / kind) for kind in ("reward", "cost")}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EQUIPOISE_CACHE", str(folder))
    return folder


TrainStage = Callable[..., Trained]


@pytest.fixture
def train_stage(tmp_path: Path, tiny_model_folder: Path, cache: Path) -> TrainStage:
    """`train_stage(stage, run=..., runner=run_preference, model={...}, data=..., interrupt_at=step)`, fp32 with LoRA.

    What else is given goes into the stage's context (`unsafe_counts=...`).
    """

    def train(
        stage: StageConfig,
        run: str = "run",
        runner: Callable[[str, Any, str, StageContext], StageResult] = run_preference,
        model: Mapping[str, Any] | None = None,
        data: SafetyData | None = None,
        interrupt_at: int | None = None,
        **context_options: Any,
    ) -> Trained:
        config = ModelConfig(id=str(tiny_model_folder), **({"dtype": "float32"} | dict(model or {})))
        metrics: list[dict[str, float]] = []
        said: list[str] = []
        done: list[tuple[int, int, str]] = []
        starts: list[int] = []

        def log(values: Mapping[str, float], step: int, stage: str) -> None:
            if step == interrupt_at:
                raise KeyboardInterrupt
            metrics.append({"step": step, **values})

        context = StageContext(
            recipe=Recipe(name="test", stages={"safe": stage}, model=config),
            data=data or _data(),
            run_dir=tmp_path / run,
            base_folder=str(tiny_model_folder),
            log=log,
            rewind=lambda stage, step: starts.append(step),
            say=said.append,
            progress=lambda *call: done.append(call),
            **context_options,
        )
        result = runner("safe", stage, str(tiny_model_folder), context)
        return Trained(result, metrics, said, context.stage_dir("safe"), done, starts[0])

    return train


# ---- whole runs -----------------------------------------------------------------------------------------------------


def _run_recipe(folder: Path, model: Path) -> Recipe:
    return Recipe(
        name="test",
        output_dir=str(folder),
        stages={
            "helpful": _stage(mixture={"helpful": 1.0}, num_steps=2),
            "safe": _stage(num_steps=2, evaluate=True),
            "token_bias": TokenBiasStageConfig(num_prompts=4, num_positions=2, prompt_tokens=4),
        },
        model=ModelConfig(id=str(model), dtype="float32"),
        evaluation=EvaluationConfig(max_new_tokens=3),
        gate=GateConfig(
            # With an alpha like this two prompts a category are enough to say something.
            rules={
                "category_limit": 1.0,
                "overall_limit": 1.0,
                "alpha": 0.9,
                "over_refusal_margin": 1.0,
                "helpfulness_margin": 100.0,
                "min_samples": 1,
            }
        ),
    )


@pytest.fixture(scope="session")
def make_run_recipe(tiny_model_folder: Path) -> Callable[[Path], Recipe]:
    """`make_run_recipe(output_dir)`: helpful, safe, token bias, as the recipe tsdi has them, two steps each."""
    return lambda folder: _run_recipe(folder, tiny_model_folder)


@pytest.fixture
def recipe(tmp_path: Path, make_run_recipe: Callable[[Path], Recipe]) -> Recipe:
    """One of the test's own."""
    return make_run_recipe(tmp_path / "outputs")


@dataclass
class Surroundings:
    """What a run is given here instead of the shipped data and the embedded judge; both may be set anew."""

    data: SafetyData
    judge: Any


def _surround(patch: pytest.MonkeyPatch) -> Surroundings:
    around = Surroundings(_data(), FakeJudge(lambda prompt, response: False))
    patch.setattr(run_module, "load_data", lambda *_: copy.deepcopy(around.data))
    patch.setattr(run_module, "load_judge", lambda recipe: around.judge)
    return around


@pytest.fixture(scope="session")
def surround() -> Callable[[pytest.MonkeyPatch], Surroundings]:
    """`surround(patch)`: see `Surroundings`; nothing is unsafe."""
    return _surround


@pytest.fixture
def surroundings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Surroundings:
    """Of the test's own, and a cache as well."""
    return _surround(monkeypatch)


@pytest.fixture
def quick_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTML without plots: they take a second each, and have tests of their own."""
    monkeypatch.setattr(
        "equipoise.train.gatekeeper.write_report", lambda path, *_, **__: path.write_text("<html>")
    )
