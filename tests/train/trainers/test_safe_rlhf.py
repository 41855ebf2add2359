"""The trainer on a task whose answer is known: one prompt, one token, rewards and costs of every token given.

At the fixed point of PPO-Lagrangian the policy is pi_ref(v) exp((r(v) - lambda c(v)) / kappa), normalised, with
kappa = (1 + lambda) kl / 2, and E[c] = d. This is the KKT point of: maximise E[r] - kappa KL(pi || pi_ref) subject to
E[c] <= d.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from scipy.optimize import minimize
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.eval.scorer import Scorer
from equipoise.train.losses.lagrange import ALL, Multipliers
from equipoise.train.recipe.rl import MultiplierUpdateConfig, RolloutConfig, SafeRLHFStageConfig
from equipoise.train.trainers.rollout import RolloutBatch, Sampler, TransformersSampler
from equipoise.train.trainers.safe_rlhf import Answers, Draws, SafeRLHFTrainer
from equipoise.train.trainers.safe_rlhf_models import SafeRLHFModels
from equipoise.train.training import TrainingError

NUM_TOKENS, END = 8, 1
PROMPTS = {"S1": [2, 3], "S2": [4, 5, 6]}
REWARD = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.3, 0.1])
COST = torch.tensor([-1.0, -0.8, -0.5, -0.2, 0.6, 1.0, 0.0, 0.3])


def small_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=END,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def of_last_token(table: Tensor) -> Callable[[RolloutBatch], Tensor]:
    return lambda batch: table[torch.tensor([episode.answer_ids[-1] for episode in batch.episodes])]


REWARDS, COSTS = of_last_token(REWARD), of_last_token(COST)


def stage(**keys: Any) -> SafeRLHFStageConfig:
    defaults: dict[str, Any] = {
        "advantage": "gae",
        "num_steps": 3,
        "per_device_batch_size": 16,
        "learning_rate": 2e-2,
        "critic_learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "warmup": 0.0,
        "kl": 0.6,
        "multiplier": MultiplierUpdateConfig(eta=0.5),
        "rollout": RolloutConfig(max_new_tokens=1, batch_size=512),
    }
    return SafeRLHFStageConfig(**(defaults | keys))


@dataclass
class Run:
    trainer: SafeRLHFTrainer
    metrics: list[dict[str, float]]

    @property
    def policy(self) -> Any:
        return self.trainer.models.policy

    def series(self, name: str) -> list[float]:
        return [m[f"train/{name}"] for m in self.metrics]


def train(
    config: SafeRLHFStageConfig,
    reward: Callable[[RolloutBatch], Tensor] = REWARDS,
    cost: Callable[[RolloutBatch], Tensor] | None = COSTS,
    thresholds: Mapping[str, float] | None = None,
    names: tuple[str, ...] = ("S1",),
    ptx: Answers | None = None,
    sampler: Sampler | None = None,
    folder: Path = Path("unused"),
) -> Run:
    """The real trainer on models of 2,000 parameters, full fine-tuning, the reference a frozen copy."""
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=END, decode=str)
    critics = {}
    if config.advantage == "gae":
        critics = {kind: Scorer(small_model(1)) for kind in (("reward", "cost") if cost else ("reward",))}
    models = SafeRLHFModels(
        small_model(0),
        tokenizer,
        shared=False,
        reference=small_model(0).requires_grad_(False),
        critics=critics,
    )
    assert config.num_steps is not None
    num = config.per_device_batch_size * config.gradient_accumulation_steps // config.num_generations
    categories = [i % len(names) for i in range(num * config.num_steps)]
    multiplier = config.multiplier
    metrics: list[dict[str, float]] = []
    trainer = SafeRLHFTrainer(
        models=models,
        stage=config,
        accelerator=Accelerator(cpu=True),
        sampler=sampler or TransformersSampler(tokenizer, 1, config.rollout.batch_size, seed=0),
        draws=Draws([PROMPTS[names[c]] for c in categories], categories, names),
        ends={END},
        reward=reward,
        cost=cost,
        multipliers=Multipliers(
            thresholds or {ALL: multiplier.threshold},
            initial=multiplier.initial,
            maximum=multiplier.max,
            window=multiplier.window,
        )
        if cost
        else None,
        ptx=ptx,
        folder=folder,
        seed=0,
        log=lambda values, step: metrics.append(dict(values)),
        progress=lambda done, total: None,
        step_end=lambda step: None,
    )
    trainer.train()
    return Run(trainer, metrics)


def probabilities(model: LlamaForCausalLM, prompt: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)


# ---- the known answer -----------------------------------------------------------------------------------------------


def fixed_point(reference: Tensor, threshold: float, kl: float) -> tuple[Tensor, float]:
    """(policy, lambda) with E[c] = threshold, by bisection: E[c] falls with lambda."""

    def policy(multiplier: float) -> Tensor:
        return torch.softmax(reference.log() + (REWARD - multiplier * COST) / ((1 + multiplier) * kl / 2), -1)

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(policy(middle) @ COST.double()) > threshold else (low, middle)
    return policy(low), low


def test_the_fixed_point_solves_the_constrained_problem() -> None:
    """Against scipy's SLSQP, which knows nothing of multipliers; its own is in the slope of the optimum."""
    reference = probabilities(small_model(0), PROMPTS["S1"])
    expected, multiplier = fixed_point(reference, -0.35, kl=0.6)
    kappa = (1 + multiplier) * 0.3
    r, c, q = (t.double().numpy() for t in (REWARD, COST, reference))

    def optimum(threshold: float) -> Any:
        def loss(p: Any) -> float:
            p = torch.as_tensor(p).clamp(min=1e-12)
            return float(-(p @ torch.as_tensor(r)) + kappa * (p * (p.log() - torch.as_tensor(q).log())).sum())

        constraints = [
            {"type": "eq", "fun": lambda p: p.sum() - 1},
            {"type": "ineq", "fun": lambda p: threshold - p @ c},
        ]
        return minimize(loss, q, bounds=[(0, 1)] * len(q), constraints=constraints, tol=1e-12)

    found = optimum(-0.35)
    assert found.success
    torch.testing.assert_close(torch.as_tensor(found.x), expected, atol=1e-4, rtol=0)
    slope = (optimum(-0.36).fun - optimum(-0.34).fun) / 0.02
    assert slope == pytest.approx(multiplier, abs=5e-3)


@pytest.mark.slow
def test_one_multiplier_reaches_the_known_optimum() -> None:
    threshold = -0.35
    run = train(
        stage(
            num_steps=130,
            per_device_batch_size=96,
            learning_rate=3e-2,
            lr_scheduler="linear",
            multiplier=MultiplierUpdateConfig(threshold=threshold, eta=0.5, window=96),
        )
    )
    reference = probabilities(small_model(0), PROMPTS["S1"])
    expected, multiplier = fixed_point(reference, threshold, kl=0.6)
    assert multiplier == pytest.approx(0.577, abs=1e-3)  # neither 0 nor where it starts
    found = probabilities(run.policy, PROMPTS["S1"])
    late = run.series("lambda")[-60:]
    assert sum(late) / len(late) == pytest.approx(multiplier, abs=0.08)
    assert float(found @ COST.double()) == pytest.approx(threshold, abs=0.05)
    assert float(found @ REWARD.double()) == pytest.approx(float(expected @ REWARD.double()), abs=0.03)
    assert float((found - expected).abs().sum()) / 2 < 0.06  # total variation
    unconstrained = torch.softmax(reference.log() + REWARD / 0.3, -1)
    assert float(unconstrained @ COST.double()) > threshold + 0.5  # the constraint had to hold it back


@pytest.mark.slow
def test_every_category_meets_a_threshold_of_its_own() -> None:
    thresholds = {"S1": -0.35, "S2": -0.55}
    run = train(
        stage(
            advantage="rloo",
            num_generations=8,
            num_steps=130,
            per_device_batch_size=128,
            learning_rate=2e-2,
            lr_scheduler="linear",
            multiplier=MultiplierUpdateConfig(per_category=True, eta=0.5, window=64),
        ),
        thresholds=thresholds,
        names=("S1", "S2"),
    )
    for category, threshold in thresholds.items():
        reference = probabilities(small_model(0), PROMPTS[category])
        expected, multiplier = fixed_point(reference, threshold, kl=0.6)
        found = probabilities(run.policy, PROMPTS[category])
        late = run.series(f"lambda/{category}")[-60:]
        assert sum(late) / len(late) == pytest.approx(multiplier, rel=0.15)
        assert float(found @ COST.double()) == pytest.approx(threshold, abs=0.06)
        assert float(found @ REWARD.double()) == pytest.approx(float(expected @ REWARD.double()), abs=0.04)
    assert run.series("lambda/S2")[-1] > 1.3 * run.series("lambda/S1")[-1]


@pytest.mark.parametrize("epochs", [1, 3])
def test_with_lambda_fixed_at_zero_it_is_ppo(epochs: int) -> None:
    """The same updates bit by bit, whatever the costs; the cost critic learns on its own."""
    ppo = train(stage(update_epochs=epochs), cost=None)
    held = train(stage(update_epochs=epochs, multiplier=MultiplierUpdateConfig(initial=0.0)))
    mine, theirs = held.trainer.models.state_dict(), ppo.trainer.models.state_dict()
    assert {name for name in mine if not name.startswith("cost_critic:")} == theirs.keys()
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())
    assert held.series("lambda") == [0.0, 0.0, 0.0]
    assert held.series("reward") == ppo.series("reward")
    free = train(stage(update_epochs=epochs))
    other = free.trainer.models.state_dict()
    assert any(not torch.equal(other[name], theirs[name]) for name in theirs if name.startswith("policy:"))
    assert max(free.series("clip_fraction")) == 0 if epochs == 1 else max(free.series("clip_fraction")) > 0


# ---- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_accumulated_microbatches_are_one_batch(advantage: str) -> None:
    keys: dict[str, Any] = {"advantage": advantage, "num_generations": 4 if advantage != "gae" else 1}
    ptx = Answers([([2, 3], [4, 1]), ([4], [6])])
    whole = train(stage(**keys, per_device_batch_size=16), ptx=ptx)
    parts = train(stage(**keys, per_device_batch_size=2, gradient_accumulation_steps=8), ptx=ptx)
    for a, b in zip(whole.metrics, parts.metrics, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    for name, weight in whole.trainer.models.state_dict().items():
        torch.testing.assert_close(parts.trainer.models.state_dict()[name], weight, atol=2e-4, rtol=0)


def test_scores_that_are_not_finite_are_left_out_and_counted() -> None:
    """The answers left are weighted as if they were all there is."""
    broken = REWARD.clone()
    broken[3], broken[4] = torch.nan, torch.inf
    run = train(stage(num_steps=4), reward=of_last_token(broken))
    num_left_out = sum(run.series("num_non_finite"))
    assert 0 < num_left_out < 64
    assert run.trainer.counts["num_non_finite"] == num_left_out
    assert run.trainer.counts["num_episodes"] == 64
    assert all(torch.isfinite(weight).all() for weight in run.trainer.models.state_dict().values())
    assert all(value <= 1 for value in run.series("reward"))
    assert sum(len(window) for window in run.trainer.multipliers.costs) == 64 - num_left_out  # type: ignore[union-attr]


def test_a_scorer_that_gives_nothing_finite_stops_the_run() -> None:
    with pytest.raises(TrainingError, match=r"step 1: none of 16 answers .* not finite"):
        train(stage(), cost=lambda batch: torch.full((len(batch.episodes),), torch.nan))


def written(error: str) -> list[dict[str, Any]]:
    path = Path(re.search(r"examples are in (\S+\.jsonl)", error)[1])  # type: ignore[index]
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_gradient_that_is_not_finite_names_its_answers(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"the gradient of the policy is not finite, of \d+ of 16 examples"
    ) as stopped:
        train(stage(learning_rate=1e30), folder=tmp_path / "safe" / "checkpoints")
    rows = written(str(stopped.value))
    assert len(rows) == 16
    assert {"id", "category", "prompt", "answer", "reward", "cost"} <= rows[0].keys()


class Poisoned(TransformersSampler):
    """The weights of the second step are not numbers."""

    def sample(self, model: Any, prompts: Any, slots: Any) -> list[list[int] | None]:
        if slots[0]:
            with torch.no_grad():
                next(model.parameters())[PROMPTS["S1"][-1]] = torch.nan
        return super().sample(model, prompts, slots)


def test_weights_that_are_not_finite_are_not_sampled_from(tmp_path: Path) -> None:
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=END)
    sampler, folder = Poisoned(tokenizer, 1, 512, 0), tmp_path / "safe" / "checkpoints"
    with pytest.raises(
        TrainingError, match=r"step 2: the distribution to sample from is not finite, of 8 of 16 examples"
    ) as stopped:
        train(stage(), names=("S1", "S2"), sampler=sampler, folder=folder)
    rows = written(str(stopped.value))
    assert [row["id"] for row in rows] == [f"answer {slot}" for slot in range(16, 32)]
    assert {(row["category"], row["prompt"], row["answer"] is None, row["finite"]) for row in rows} == {
        ("S1", str(PROMPTS["S1"]), True, False),
        ("S2", str(PROMPTS["S2"]), False, True),
    }


class Silent:
    """Says nothing (not even an end token) to every other prompt."""

    def sample(self, model: Any, prompts: Any, slots: Any) -> list[list[int] | None]:
        return [[] if slot % 2 else [3] for slot in slots]


def test_answers_without_a_token_are_left_out_and_counted() -> None:
    def reward(batch: RolloutBatch) -> Tensor:
        return torch.ones(len(batch.episodes))

    run = train(stage(num_steps=2), reward=reward, cost=reward, sampler=Silent())
    assert run.series("num_empty") == [8, 8]
    assert run.series("num_non_finite") == [8, 8]
    assert run.series("length") == [1.0, 1.0]
    only_empty = SimpleNamespace(sample=lambda model, prompts, slots: [[] for _ in slots])
    with pytest.raises(TrainingError, match="no token"):
        train(stage(), reward=reward, cost=reward, sampler=only_empty)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_groups_of_equal_scores_teach_nothing_and_are_counted(advantage: str) -> None:
    def same(batch: RolloutBatch) -> Tensor:
        return torch.full((len(batch.episodes),), 0.7)

    keys: dict[str, Any] = {"advantage": advantage, "num_generations": 4, "kl": 0.0, "weight_decay": 0.0}
    run = train(stage(**keys), reward=same, cost=same)
    before, after = small_model(0).state_dict(), run.policy.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert run.series("num_flat_groups") == [4, 4, 4]
    assert run.trainer.counts["num_flat_groups"] == 12
    lively = train(stage(**keys))
    assert any(not torch.equal(lively.policy.state_dict()[name], weight) for name, weight in before.items())


def test_grpo_is_pulled_to_the_reference_by_its_loss() -> None:
    keys: dict[str, Any] = {"advantage": "grpo", "num_generations": 8, "per_device_batch_size": 64}
    drifted, held = train(stage(**keys, kl=0.0, num_steps=6)), train(stage(**keys, kl=2.0, num_steps=6))
    prompt = PROMPTS["S1"]
    reference = probabilities(small_model(0), prompt)

    def distance(run: Run) -> float:
        policy = probabilities(run.policy, prompt)
        return float((policy * (policy / reference).log()).sum())

    assert 0 < distance(held) < 0.7 * distance(drifted)


def test_the_ptx_loss_teaches_the_given_answers() -> None:
    answer = [4, 6, END]
    ptx = Answers([([2, 3], answer)])

    def log_prob(model: LlamaForCausalLM) -> float:
        ids = torch.tensor([[2, 3, *answer]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, 1:-1].log_softmax(-1)
        return float(log_probs.gather(1, torch.tensor(answer)[:, None]).sum())

    run = train(stage(num_steps=6), ptx=ptx)
    assert run.series("ptx_loss")[0] == pytest.approx(-log_prob(small_model(0)) / 3, rel=1e-4)
    assert run.series("ptx_loss")[-1] < run.series("ptx_loss")[0]
    assert log_prob(run.policy) > log_prob(train(stage(num_steps=6)).policy)


def test_what_an_answer_that_was_cut_off_pays() -> None:
    free, fined = train(stage()), train(stage(missing_end_penalty=0.5))
    cut_off = 1 - fined.series("finished_rate")[0]
    assert 0 < cut_off < 1
    assert fined.series("reward")[0] == pytest.approx(free.series("reward")[0] - 0.5 * cut_off, rel=1e-6)


def test_metrics_are_exact_in_a_category() -> None:
    run = train(stage(num_steps=1), names=("S1", "S2"))
    metrics = run.metrics[0]
    assert metrics["train/num_episodes/S1"] == metrics["train/num_episodes/S2"] == 8
    for name in ("reward", "cost", "kl", "length", "finished_rate", "actor_loss", "clip_fraction"):
        mean = (metrics[f"train/{name}/S1"] + metrics[f"train/{name}/S2"]) / 2
        assert metrics[f"train/{name}"] == pytest.approx(mean, abs=1e-9)


def test_multipliers_wait_as_long_as_the_recipe_says() -> None:
    run = train(stage(num_steps=4, multiplier=MultiplierUpdateConfig(delay=2)))
    assert run.series("lambda")[:2] == [1.0, 1.0]
    assert run.series("lambda")[2] != 1.0
