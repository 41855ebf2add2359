from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn

from equipoise.eval.models import load_model
from equipoise.eval.scorer import Scorer, load_scorer
from equipoise.eval.scorer_card import ScorerCard, ScorerError
from equipoise.train.model import merged
from equipoise.train.recipe import LoraConfig, ModelConfig
from equipoise.train.scorer import save_scorer
from equipoise.train.trainers.rollout import Episode, RolloutBatch, collate
from equipoise.train.trainers.safe_rlhf_models import POLICY, SafeRLHFModels, load_separate, load_shared

EPISODES = [
    Episode(0, 0, [5, 6, 7], [8, 9, 2], True),
    Episode(1, 0, [10, 11], [12, 2], True),
    Episode(2, 0, [13], [14, 15, 16, 17], False),
]
ROLES = ("policy", "reward_critic", "cost_critic")


def random_scorer(kind: str, backbone: str, folder: Path, seed: int, lora: bool = True) -> str:
    """A scorer whose adapter and head say something; its folder."""
    torch.manual_seed(seed)
    model, tokenizer = load_model(backbone, dtype="float32")
    if lora:
        peft = get_peft_model(model, PeftLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    scorer = Scorer(peft if lora else model.base_model)
    nn.init.normal_(scorer.score_head.weight)
    save_scorer(scorer, tokenizer, folder, ScorerCard(kind, backbone=backbone if lora else None))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("scorers")
    return {
        kind: random_scorer(kind, str(tiny_model_folder), folder / kind, seed)
        for seed, kind in enumerate(("reward", "cost"))
    }


@pytest.fixture
def scorers(folders: dict[str, str]) -> dict[str, str | None]:
    return dict(folders)


@pytest.fixture
def config(tiny_model_folder: Path) -> ModelConfig:
    return ModelConfig(id=str(tiny_model_folder), dtype="float32", lora=LoraConfig(r=4))


@pytest.fixture
def batch() -> RolloutBatch:
    return collate(EPISODES, 0, torch.device("cpu"))


Load = Callable[..., SafeRLHFModels]
BOTH = pytest.mark.parametrize("load", [load_shared, load_separate], ids=["shared", "separate"])


@torch.no_grad()
def outputs(models: SafeRLHFModels, batch: RolloutBatch) -> dict[str, Tensor]:
    found = {"reference": models.reference_log_probs(batch)}
    for kind in ("reward", "cost"):
        found[kind] = models.score(kind, batch)
        found[f"{kind}_critic"] = models.values(kind, batch)
    models.acting()
    return found | {"policy": models.log_probs(batch)}


@BOTH
def test_every_role_says_what_it_says_alone(
    load: Load, config: ModelConfig, scorers: dict[str, str | None], batch: RolloutBatch
) -> None:
    found = outputs(load(config, config.id, scorers, critics=True), batch)
    model, _ = load_model(config.id, dtype="float32")
    with torch.no_grad():
        logits = model(batch.input_ids, batch.attention_mask).logits
        log_probs = logits.log_softmax(-1).flatten(0, 1)[batch.answer_index]
        expected = log_probs.gather(1, batch.answer_targets[:, None])[:, 0]
        for kind in ("reward", "cost"):
            scorer = load_scorer(str(scorers[kind]), "float32")
            scores = scorer(batch.input_ids, batch.attention_mask)
            torch.testing.assert_close(found[kind], scores.end_scores, atol=1e-5, rtol=1e-5)
            values = scores.scores.flatten()[batch.answer_index]  # a critic starts as its scorer
            torch.testing.assert_close(found[f"{kind}_critic"], values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["policy"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["reference"], expected, atol=1e-5, rtol=1e-5)
    assert (found["reward"] - found["cost"]).abs().max() > 0.1


@BOTH
def test_training_a_role_changes_nothing_but_that_role(
    load: Load, config: ModelConfig, scorers: dict[str, str | None], batch: RolloutBatch
) -> None:
    models = load(config, config.id, scorers, critics=True)
    for role in ROLES:
        before = outputs(models, batch)
        with models.training(role):
            if role == POLICY:
                loss = models.log_probs(batch).sum()
            else:
                loss = models.values(role.removesuffix("_critic"), batch).sum()
            loss.backward()
        optimizer = torch.optim.SGD(models.parameters(role).values(), lr=0.1)
        optimizer.step()
        optimizer.zero_grad()
        for module in models.modules:  # nobody else got a gradient
            assert all(parameter.grad is None for parameter in module.parameters())
        after = outputs(models, batch)
        for name, values in before.items():
            assert torch.equal(values, after[name]) == (name != role)


@BOTH
def test_what_is_trained_comes_back(
    load: Load, config: ModelConfig, scorers: dict[str, str | None], batch: RolloutBatch
) -> None:
    models = load(config, config.id, scorers, critics=True)
    with torch.no_grad():
        for role in models.roles:
            for parameter in models.parameters(role).values():
                parameter.add_(0.05 * torch.randn_like(parameter))
    state, expected = models.state_dict(), outputs(models, batch)
    other = load(config, config.id, scorers, critics=True)
    other.load_state_dict(state)
    assert all(torch.equal(values, expected[name]) for name, values in outputs(other, batch).items())
    with pytest.raises(ValueError, match="not those of this stage"):
        load(config, config.id, scorers, critics=False).load_state_dict(state)


def test_the_backbone_is_in_memory_once(config: ModelConfig, scorers: dict[str, str | None]) -> None:
    models = load_shared(config, config.id, scorers, critics=True)
    weights = {id(p): p.numel() for m in models.modules for n, p in m.named_parameters() if "lora_" not in n}
    alone, _ = load_model(config.id, dtype="float32")
    heads = 4 * 32
    assert sum(weights.values()) == sum(p.numel() for p in alone.parameters()) + heads


def test_the_saved_policy_has_its_own_adapter_and_no_other(
    config: ModelConfig, scorers: dict[str, str | None], batch: RolloutBatch
) -> None:
    models = load_shared(config, config.id, scorers, critics=True)
    with torch.no_grad():
        for parameter in models.parameters(POLICY).values():
            parameter.add_(0.1)
    expected = outputs(models, batch)["policy"]
    with torch.no_grad():
        models.score("cost", batch)  # another adapter is active
    final: Any = merged(models.acting())
    assert not any("lora" in name for name, _ in final.named_parameters())
    with torch.no_grad():
        found = (
            models.reference_log_probs
            if False
            else final(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                completion_index=batch.answer_index,
                completion_targets=batch.answer_targets,
            ).log_probs
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_recomputes_with_the_adapter_that_was_active(
    config: ModelConfig, scorers: dict[str, str | None], batch: RolloutBatch
) -> None:
    gradients = []
    for checkpointing in (False, True):
        config.gradient_checkpointing = checkpointing
        torch.manual_seed(0)
        models = load_shared(config, config.id, scorers, critics=True)
        with models.training("cost_critic"):
            models.values("cost", batch).sum().backward()
        with torch.no_grad():
            models.score("reward", batch)
        with models.training(POLICY):
            models.log_probs(batch).sum().backward()
        gradients.append(
            [p.grad for role in (POLICY, "cost_critic") for p in models.parameters(role).values()]
        )
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_full_fine_tuning_trains_a_whole_model_a_role(
    tmp_path: Path, tiny_model_folder: Path, batch: RolloutBatch
) -> None:
    config = ModelConfig(id=str(tiny_model_folder), dtype="float32", lora=LoraConfig(enabled=False))
    folders: dict[str, str | None] = {
        kind: random_scorer(kind, config.id, tmp_path / kind, seed, lora=False)
        for seed, kind in enumerate(("reward", "cost"))
    }
    models = load_separate(config, config.id, folders, critics=True)
    num = sum(p.numel() for p in load_model(config.id, dtype="float32")[0].parameters())
    assert sum(p.numel() for p in models.parameters(POLICY).values()) == num
    assert models.reference is not None
    assert not any(p.requires_grad for p in models.reference.parameters())
    with torch.no_grad():
        before = models.reference_log_probs(batch)
        for parameter in models.parameters(POLICY).values():
            parameter.add_(0.01)
        assert torch.equal(models.reference_log_probs(batch), before)


def test_a_whole_scorer_gets_an_adapter_for_its_critic(
    tmp_path: Path, config: ModelConfig, scorers: dict[str, str | None], batch: RolloutBatch
) -> None:
    scorers["cost"] = random_scorer("cost", config.id, tmp_path / "whole", 5, lora=False)
    models = load_separate(config, config.id, scorers, critics=True)
    names = set(models.parameters("cost_critic"))
    assert "score_head.weight" in names
    assert all("lora_" in name or name.startswith("score_head") for name in names)
    with pytest.raises(ScorerError, match=r"is a whole model[\s\S]*layout=separate"):
        load_shared(config, config.id, scorers, critics=True)


def test_scorers_of_another_backbone_are_refused_where_it_is_shared(
    tmp_path: Path, config: ModelConfig, scorers: dict[str, str | None]
) -> None:
    model, tokenizer = load_model(config.id, dtype="float32")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "moved on")
    tokenizer.save_pretrained(tmp_path / "moved on")
    with pytest.raises(ScorerError, match=r"one backbone for all: train the scorer from the model"):
        load_shared(config, str(tmp_path / "moved on"), scorers, critics=True)
    load_separate(config, str(tmp_path / "moved on"), scorers, critics=False)


@BOTH
def test_without_critics_only_the_policy_is_trained(
    load: Load, config: ModelConfig, scorers: dict[str, str | None]
) -> None:
    assert load(config, config.id, scorers, critics=False).roles == (POLICY,)


@BOTH
def test_a_critic_without_a_scorer_starts_from_nothing(
    load: Load, config: ModelConfig, batch: RolloutBatch
) -> None:
    models = load(config, config.id, {"reward": None, "cost": None}, critics=True)
    with torch.no_grad():
        assert models.values("cost", batch).tolist() == [0.0] * 9
