import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from equipoise.data.errors import DataError
from equipoise.data.sources import SafetyData
from equipoise.eval.scorer import Scorer
from equipoise.eval.scorer_card import ScorerCard
from equipoise.train.recipe import DataConfig, EvaluationConfig, LoraConfig, ModelConfig, Recipe
from equipoise.train.recipe.rl import ArithmeticConfig, CostConfig, GRPOStageConfig, MultiplierUpdateConfig
from equipoise.train.recipe.stages import WeightConfig
from equipoise.train.rewards import verifiable
from equipoise.train.scorer import save_scorer
from equipoise.train.stage_tasks import demonstrations, stage_tasks
from equipoise.train.stages import grpo
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.trainers.grpo import VerifiableTrainer
from equipoise.train.training import STATE_FILE, TrainingError


def make_stage(**keys: Any) -> GRPOStageConfig:
    """Three steps of two prompts with four answers each, at a constant learning rate."""
    defaults: dict[str, Any] = {
        "arithmetic": ArithmeticConfig({"addition_1": 0.5, "unanswerable": 0.5}, 8, 4),
        "instruction": "",
        "num_steps": 3,
        "num_generations": 4,
        "per_device_batch_size": 8,
        "max_completion_length": 5,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "warmup": 0.0,
        "evaluate": False,
    }
    return GRPOStageConfig(**(defaults | keys))


@dataclass
class Trained:
    result: StageResult
    metrics: list[dict[str, float]]
    said: list[str]
    folder: Path
    base: Path

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return load_file(Path(self.result.model_folder) / "model.safetensors")

    @property
    def steps(self) -> list[dict[str, float]]:
        return [m for m in self.metrics if "train/reward" in m or "train/num_answers" in m]


TrainGRPO = Callable[..., Trained]


@pytest.fixture
def train_grpo(tmp_path: Path, tiny_model_folder: Path, make_data: Callable[..., SafetyData]) -> TrainGRPO:
    def run(
        stage: GRPOStageConfig,
        run: str = "run",
        lora: bool = True,
        interrupt_at: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Trained:
        metrics: list[dict[str, float]] = []
        said: list[str] = []

        def log(values: Mapping[str, float], step: int, stage: str) -> None:
            if step == interrupt_at:
                raise KeyboardInterrupt
            metrics.append({"step": step, **values})

        model = ModelConfig(id=str(tiny_model_folder), dtype="float32", lora=LoraConfig(enabled=lora))
        context = StageContext(
            recipe=Recipe(
                name=run,
                stages={"rl": stage},
                seed=seed,
                model=model,
                data=DataConfig(max_length=256),
                evaluation=EvaluationConfig(batch_size=8),
            ),
            data=make_data(),
            run_dir=tmp_path / run,
            base_folder=str(tiny_model_folder),
            log=log,
            rewind=lambda stage, step: None,
            say=said.append,
            progress=lambda *call: None,
            **options,
        )
        result = grpo.run_grpo("rl", stage, str(tiny_model_folder), context)
        return Trained(result, metrics, said, context.stage_dir("rl"), tiny_model_folder)

    return run


def test_three_steps_leave_a_model_facts_and_metrics_of_every_category(train_grpo: TrainGRPO) -> None:
    trained = train_grpo(make_stage())
    AutoModelForCausalLM.from_pretrained(trained.result.model_folder)
    assert [m["step"] for m in trained.steps] == [1, 2, 3]
    for step in trained.steps:
        assert step["train/num_answers"] == 8
        by_category = [v for k, v in step.items() if k.startswith("train/num_answers/")]
        assert sum(by_category) == 8
        rates = [step[f"train/{o}_rate"] for o in ("correct", "abstained", "wrong")]
        assert sum(rates) == pytest.approx(1)
        assert step["train/reward"] == pytest.approx(rates[0] - rates[2])
    facts = trained.result.facts
    assert facts["num_steps"] == 3
    assert facts["tasks_before"]["all"]["num_tasks"] == facts["num_held_out"] == 4  # type: ignore[index]
    assert "correct_rate" in facts["tasks_after"]["unanswerable"]  # type: ignore[index]
    before, after = (m for m in trained.metrics if "tasks/score" in m)
    assert (before["step"], after["step"]) == (0, 3)
    assert before["tasks/wrong_rate_low"] <= before["tasks/wrong_rate"] <= before["tasks/wrong_rate_high"]


def reward_by(monkeypatch: pytest.MonkeyPatch, rule: Callable[[str], float | None]) -> None:
    """Make `numeric_answer` reward a completion's text by the test's rule."""

    def rewards(*, completions: Any, **columns: Any) -> list[float | None]:
        return [rule(verifiable.completion_text(completion)) for completion in completions]

    monkeypatch.setattr(grpo, "numeric_answer", rewards)


ONE_REWARD = {"numeric_answer": 1.0}


@pytest.mark.slow
def test_what_is_rewarded_becomes_likelier(train_grpo: TrainGRPO, monkeypatch: pytest.MonkeyPatch) -> None:
    reward_by(monkeypatch, lambda text: float(sum(not c.isalnum() for c in text)))
    stage = make_stage(
        rewards=ONE_REWARD,
        num_steps=16,
        learning_rate=5e-2,
        per_device_batch_size=16,
        num_generations=8,
        beta=0.0,
    )
    rewards = [step["train/reward_numeric_answer"] for step in train_grpo(stage).steps]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 1


def test_advantages_are_trls_normalise_then_sum(
    train_grpo: TrainGRPO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rewards and one of them missing at times: TRL's own advantages, but for its 1e-4 under a group's spread."""
    reward_by(monkeypatch, lambda text: float(len(text)) if len(text) % 3 else None)
    seen: list[tuple[Tensor, Tensor]] = []
    ours = grpo.VerifiableTrainer._generate_and_score_completions
    trls = GRPOTrainer._generate_and_score_completions

    def keeping(self: Any, inputs: Any) -> Any:
        output = trls(self, inputs)
        seen.append((output["advantages"].clone(), torch.empty(0)))
        return output

    def compared(self: Any, inputs: Any) -> Any:
        output = ours(self, inputs)
        seen[-1] = (seen[-1][0], output["advantages"].clone())
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", keeping)
    monkeypatch.setattr(grpo.VerifiableTrainer, "_generate_and_score_completions", compared)
    stage = make_stage(
        rewards={"numeric_answer": 1.0, "answer_format": 0.5}, format_pattern=r".*[a-z].*", num_generations=8
    )
    train_grpo(stage)
    assert len(seen) == 3
    for theirs, mine in seen:
        assert float(mine.abs().max()) > 0.5
        assert torch.allclose(theirs, mine, atol=2e-3)


def test_bad_rewards_and_empty_answers_are_counted_and_teach_nothing(
    train_grpo: TrainGRPO, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10**6))
    kinds = [float("nan"), float("inf"), None, 1.0, 1.0, 1.0, 1.0, 1.0]  # the second group is flat
    reward_by(monkeypatch, lambda text: kinds[next(calls) % 8])
    trained = train_grpo(make_stage(rewards=ONE_REWARD, beta=0.0, num_steps=2))
    for step in trained.steps:
        assert step["train/num_not_finite"] == 2
        assert step["train/num_unscored_numeric_answer"] == 3
        assert (
            step["train/num_flat_groups"] == 2
        )  # the first has one answer left, which nothing compares with
        assert step["train/reward"] == 1
    untouched = AutoModelForCausalLM.from_pretrained(trained.result.model_folder).state_dict()
    base = AutoModelForCausalLM.from_pretrained(trained.base).state_dict()
    assert all(torch.equal(untouched[name], base[name]) for name in base)


@pytest.fixture
def on_a_server(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer that samples on a vLLM server, which answers with an end token and without any token."""
    trainer: Any = object.__new__(VerifiableTrainer)
    trainer.eos_token_ids, trainer.use_vllm, trainer.model = [2, 7], True, tiny_model
    trainer.accelerator = SimpleNamespace(process_index=0, device="cpu", gather=lambda bad: bad)
    trainer.args = SimpleNamespace(output_dir=str(tmp_path / "rl" / "checkpoints"))
    trainer.state, trainer._tokenizer = SimpleNamespace(global_step=4), SimpleNamespace(decode=str)
    trainer._sampled_categories = ["S1", "S2"]
    monkeypatch.setattr(
        GRPOTrainer,
        "_generate_single_turn",
        lambda self, *args, **kwargs: ([[5, 2], []], [[-0.5, -0.1], []]),
    )
    return trainer


def test_an_answer_without_a_token_becomes_its_end(on_a_server: Any) -> None:
    assert on_a_server._generate_single_turn([[1], [1]]) == ([[5, 2], [2]], [[-0.5, -0.1], [None]])


def test_weights_that_are_not_finite_are_not_sent_to_a_server(on_a_server: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda *args: pytest.fail("they were sent"))
    with torch.no_grad():
        on_a_server.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(
        TrainingError, match="stage rl, step 5: the distribution to sample from is not finite"
    ):
        on_a_server._generate_single_turn([[1], [4]])


@pytest.mark.slow
def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(train_grpo: TrainGRPO) -> None:
    stage = make_stage(num_steps=4, save_every=2, weight=WeightConfig(mode="group_dro", eta=1.0))
    whole = train_grpo(stage, run="whole")
    with pytest.raises(KeyboardInterrupt):
        train_grpo(stage, run="parts", interrupt_at=3)
    parts = train_grpo(stage, run="parts")
    assert [s["step"] for s in parts.steps] == [3, 4]
    for name, weight in whole.weights.items():
        assert torch.equal(parts.weights[name], weight), name
    assert parts.steps[-1] == whole.steps[-1]
    assert parts.result.facts["tasks_before"] == whole.result.facts["tasks_before"]
    assert sum("before" in line for line in parts.said) == 0  # not asked again
    state = (parts.folder / STATE_FILE).read_text()
    assert json.loads(state) == json.loads((whole.folder / STATE_FILE).read_text())


def test_category_weights_follow_the_rewards(train_grpo: TrainGRPO, monkeypatch: pytest.MonkeyPatch) -> None:
    def rewards(*, completions: Any, category: Any, **columns: Any) -> list[float | None]:
        return [float(name == "addition_1") + 0.01 * i for i, name in enumerate(category)]

    monkeypatch.setattr(grpo, "numeric_answer", rewards)
    trained = train_grpo(make_stage(rewards=ONE_REWARD, weight=WeightConfig(mode="group_dro", eta=1.0)))
    last = trained.steps[-1]
    assert last["category/weight/unanswerable"] > 1.5 > 0.7 > last["category/weight/addition_1"]


def test_answers_are_used_again_and_ratios_are_clipped(train_grpo: TrainGRPO) -> None:
    stage = make_stage(
        num_steps=4, num_iterations=2, epsilon=1e-4, learning_rate=1e-2, rewards={"answer_format": 1.0}
    )
    stage = replace(stage, format_pattern="(?s).*[a-z].*")
    steps = train_grpo(stage).steps
    assert [s["train/num_tokens"] for s in steps[0::2]] == [s["train/num_tokens"] for s in steps[1::2]]
    assert steps[0]["train/clip_rate"] == 0
    assert any(s["train/clip_rate"] > 0 for s in steps)
    assert steps[-1]["train/kl"] > 0


def test_full_fine_tuning_has_the_starting_model_as_reference(train_grpo: TrainGRPO) -> None:
    trained = train_grpo(make_stage(num_steps=2), lora=False)
    assert trained.steps[0]["train/kl"] == pytest.approx(0, abs=1e-6)
    assert not (trained.folder / "adapter").exists()


def test_what_cannot_be_trained_on_is_said_before_it_starts(train_grpo: TrainGRPO) -> None:
    with pytest.raises(TrainingError, match=r"8 answers .* which num_generations=3 does not divide"):
        train_grpo(make_stage(num_generations=3))
    with pytest.raises(DataError, match="judge_verdict applies to none of 8 tasks"):
        train_grpo(make_stage(rewards={"judge_verdict": 1.0}))
    with pytest.raises(DataError, match=r"24 of 32 tasks have no reward at all \(first: S1-0, S1-1, S1-2\)"):
        train_grpo(make_stage(mixture={"arithmetic": 0.5, "safety": 0.5}))
    with pytest.raises(DataError, match="none of 8 tasks of arithmetic leaves room for 250 tokens"):
        train_grpo(make_stage(max_completion_length=250))


def test_a_judge_rewards_the_datas_prompts(train_grpo: TrainGRPO, make_judge: Any) -> None:
    judge = make_judge(lambda prompt, response: len(response) % 2 == 0)
    stage = make_stage(
        mixture={"arithmetic": 0.5, "safety": 0.25, "helpful": 0.25},
        rewards={"calibrated_abstention": 1.0, "judge_verdict": 1.0},
        per_device_batch_size=16,
    )
    trained = train_grpo(stage, load_judge=lambda: judge)
    assert judge.num_judged > 0
    for step in trained.steps:
        assert step["train/num_unscored_calibrated_abstention"] == 8
        assert step["train/num_unscored_judge_verdict"] == 8
    assert "S1" in {
        k.rsplit("/", 1)[1] for s in trained.steps for k in s if k.startswith("train/reward_judge")
    }


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_shared_rows_train_like_rows_of_their_own(
    train_grpo: TrainGRPO, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    stage = make_stage(num_steps=2, temperature=temperature)
    shared = train_grpo(stage, run="shared")
    monkeypatch.setattr("equipoise.train.training.can_share_prompt", lambda model, tokenizer: False)
    apart = train_grpo(stage, run="apart")
    for mine, theirs in zip(shared.steps, apart.steps, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_warm_up_shows_answers_and_abstentions(make_data: Callable[..., SafetyData]) -> None:
    stage = make_stage(
        arithmetic=ArithmeticConfig({"addition_2": 0.8, "unanswerable": 0.2}, 100, 0),
        instruction="{penalty} {threshold}",
    )
    tasks = stage_tasks(stage, make_data(), 0)
    shown = demonstrations(tasks, 0.25, seed=0)
    assert len(shown) == 100
    assert all(e.prompt[-1]["content"].endswith("?\n-1 50%") for e in shown)
    declined = {
        c: sum(e.response == "I don't know" for e in shown if e.category == c) for c in tasks.categories
    }
    assert declined["unanswerable"] == 20
    assert 10 <= declined["addition_2"] <= 30
    answers = {task.id: task.answer for task in tasks.training["arithmetic"]}
    assert all(e.response in ("I don't know", answers[e.id]) for e in shown)


def test_a_files_tasks_are_split_and_those_without_answers_are_not_asked(
    tmp_path: Path, make_data: Callable[..., SafetyData]
) -> None:
    file = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"Is {i} even?", "answer": "yes" if i % 2 == 0 else "no"} for i in range(40)]
    lines += [{"prompt": f"Poem {i}"} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, lines)))
    rewards = {"exact_answer": 1.0, "answer_format": 1.0}
    stage = make_stage(
        mixture={"file": 1.0}, path=str(file), held_out_fraction=0.5, rewards=rewards, format_pattern=".+"
    )
    tasks = stage_tasks(stage, make_data(), 0)
    asked = {task.id for task in tasks.held_out}
    assert 0 < len(asked) < 40
    assert all(task.answer for task in tasks.held_out)
    assert not asked & {task.id for task in tasks.training["file"]}


def test_thresholds_are_of_categories_that_occur(make_data: Callable[..., SafetyData]) -> None:
    cost = CostConfig(
        "somewhere", multiplier=MultiplierUpdateConfig(per_category=True, thresholds={"S9": 0.0})
    )
    with pytest.raises(
        DataError, match=r"thresholds.S9: nothing that this stage trains on has this category"
    ):
        stage_tasks(make_stage(cost=cost), make_data(), 0)


def test_a_cost_model_constrains_each_category_by_its_own_multiplier(
    train_grpo: TrainGRPO, tiny_model: Any, tiny_tokenizer: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    scorer = Scorer(tiny_model.base_model, card=ScorerCard("cost"))
    torch.nn.init.normal_(scorer.score_head.weight)
    save_scorer(scorer, tiny_tokenizer, tmp_path / "cost", ScorerCard("cost"))
    multiplier = MultiplierUpdateConfig(
        per_category=True, threshold=-100.0, thresholds={"unanswerable": 100.0}, eta=0.01, max=50.0
    )
    stage = make_stage(cost=CostConfig(str(tmp_path / "cost"), multiplier=multiplier), num_steps=2)
    steps = train_grpo(stage).steps
    # Always above one threshold, always below the other: lambda rises and falls, from 1.
    assert steps[-1]["train/lambda/addition_1"] > 1 > steps[-1]["train/lambda/unanswerable"]
    assert steps[0]["train/lambda/addition_1"] == pytest.approx(
        math.exp(0.01 * (steps[0]["train/cost/addition_1"] + 100)), rel=1e-4
    )
    assert "train/episode_cost/unanswerable" in steps[-1]


def test_a_loss_that_is_not_finite_names_its_answers(
    train_grpo: TrainGRPO, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda *args: loss(*args) * torch.nan)
    with pytest.raises(
        TrainingError, match="stage rl, step 1: the loss is not finite, of 8 of 8 examples"
    ) as stopped:
        train_grpo(make_stage(per_device_batch_size=4, gradient_accumulation_steps=2))
    path = Path(str(stopped.value).split("examples are in ")[1].split(",")[0])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"answer {slot}" for slot in range(8)]
    assert all(row["prompt"] for row in rows)
    assert {"answer", "category", "entropy_sum", "total"} <= rows[0].keys()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_sampled_from(
    bad: float, train_grpo: TrainGRPO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is drawn of nan is cut off at the limit, and the loss of answers that were cut off is masked: 0."""
    finish = VerifiableTrainer._finish_step

    def poison(trainer: Any) -> None:
        finish(trainer)
        with torch.no_grad():
            next(p for p in trainer.model.parameters() if p.requires_grad)[0, 0] = bad

    monkeypatch.setattr(VerifiableTrainer, "_finish_step", poison)
    with pytest.raises(TrainingError) as stopped:
        train_grpo(make_stage(mask_truncated=True))
    message = str(stopped.value)
    assert "stage rl, step 2: the distribution to sample from is not finite, of 8 of 8 examples" in message
    path = Path(message.split("examples are in ")[1].split(",")[0])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"answer {slot}" for slot in range(8)]
    assert all(row["prompt"] and row["answer"] is None and not row["finite"] for row in rows)
    assert {row["category"] for row in rows} == {"addition_1", "unanswerable"}
    assert path.with_suffix(".ids").exists()
