import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import LlamaForCausalLM

from equipoise.train.pairs import PairCollator, model_inputs
from equipoise.train.recipe.stages import KLConfig
from equipoise.train.trainers.completion_head import CompletionOutput, add_completion_head
from equipoise.train.trainers.kl_penalty import KLPenalty, Reference

NAMES = ("S1", "S2", "helpful")


def kappa(**config: Any) -> list[float] | None:
    """Of pairs in the categories S1, S2, helpful, S1."""
    penalty = KLPenalty(KLConfig(**config), NAMES, reference=None)  # type: ignore[arg-type]
    found = penalty.kappa(torch.tensor([0, 1, 2, 0]))
    return None if found is None else [round(value, 6) for value in found.tolist()]


def test_each_category_has_its_kappa() -> None:
    assert kappa() is None
    assert kappa(per_category={"S1": 0.0}) is None
    assert kappa(coef=0.5) == [0.5, 0.5, 0.5, 0.5]
    assert kappa(coef=0.5, on="helpful") == [0, 0, 0.5, 0]
    assert kappa(coef=0.5, per_category={"S1": 2.0, "S2": 0.0}) == [2, 0, 0.5, 2]
    assert kappa(per_category={"helpful": 1.0}) == [0, 0, 1, 0]


def example(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "pair": 0}


def logits_of(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Of an answer's tokens, in a row of their own, through the model's own head."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("estimator", ["forward", "reverse", "k3"])
def test_the_mean_kl_a_token_of_each_chosen_answer(estimator: str, tiny_model: Any) -> None:
    """Against torch.distributions on all logits, for answers of unequal lengths in shared rows."""
    reference = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    pairs = [([5, 6, 7], [8, 9, 10, 11], [12]), ([30, 31], [32], [33, 34, 35])]
    batch = PairCollator(pad_token_id=0)([example(*pair) for pair in pairs])
    expected = []
    for prompt, chosen, _ in pairs:
        policy, ref = (Categorical(logits=logits_of(m, prompt, chosen)) for m in (tiny_model, reference))
        if estimator == "k3":
            r = ref.log_prob(torch.tensor(chosen)) - policy.log_prob(torch.tensor(chosen))
            expected.append((r.exp() - r - 1).mean())
        else:
            order = (policy, ref) if estimator == "forward" else (ref, policy)
            expected.append(kl_divergence(*order).mean())
    for model in (tiny_model, reference):
        add_completion_head(model)
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer = SimpleNamespace(model=tiny_model, ref_model=reference, accelerator=accelerator)
    penalty = KLPenalty(KLConfig(coef=1.0, estimator=estimator), NAMES, Reference(trainer))  # type: ignore[arg-type]
    outputs: CompletionOutput = tiny_model(**model_inputs(batch))
    found = penalty.of_answers(tiny_model, batch, outputs, every=2)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert bool((found > 0.01).all())


def test_what_is_trained_is_seen_to_be_while_the_adapter_is_off(tiny_model: LlamaForCausalLM) -> None:
    """FSDP takes the dtype of gradients from what it sees trained in its first pass, which is the reference's."""
    policy = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"]))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    reference = Reference(SimpleNamespace(accelerator=accelerator, model=policy, ref_model=None))  # type: ignore[arg-type]
    layer = next(module for module in policy.modules() if isinstance(module, LoraLayer))
    with reference.active():
        assert layer.disable_adapters
        assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained != set()
    assert not layer.disable_adapters
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
