from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from equipoise.train.trainers.completion_head import (
    CompletionOutput,
    add_completion_head,
    base_causal_lm,
    lm_head,
)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"vocab_size": 97, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
FAMILIES: list[Any] = [
    pytest.param(Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True), id="tied"),
    pytest.param(
        Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0), id="softcap"
    ),
    pytest.param(CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25), id="scale"),
    pytest.param(GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=4.0), id="inverse scale"),
    pytest.param(PhiForCausalLM, PhiConfig(**SIZES), id="bias"),
    pytest.param(GPT2LMHeadModel, GPT2Config(**GPT2_SIZES), id="learned positions"),
]


def all_log_probs(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float().log_softmax(-1).flatten(0, 1)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_every_kind_of_head_gives_the_models_own_log_probs(
    family: type[PreTrainedModel], config: Any
) -> None:
    torch.manual_seed(0)
    model = family(config).eval()
    if family is PhiForCausalLM:
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.randint(3, 97, (2, 9))
    index, targets = torch.tensor([0, 3, 3, 16]), torch.tensor([5, 96, 4, 4])
    plain = all_log_probs(model, ids)[index, targets]
    plain_gradient = torch.autograd.grad(plain.sum(), model.get_input_embeddings().weight)[0]
    add_completion_head(model)
    output = model(input_ids=ids, completion_index=index, completion_targets=targets)
    assert isinstance(output, CompletionOutput)
    assert output.hidden.shape == (4, 16)
    torch.testing.assert_close(output.log_probs, plain, atol=1e-5, rtol=1e-5)
    gradient = torch.autograd.grad(output.log_probs.sum(), model.get_input_embeddings().weight)[0]
    torch.testing.assert_close(gradient, plain_gradient, atol=1e-4, rtol=1e-4)


def test_what_a_head_is_made_of() -> None:
    softcapped = lm_head(Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)))
    assert (softcapped.scale, softcapped.softcap, softcapped.bias) == (1.0, 3.0, None)
    assert lm_head(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))).scale == 0.25


def test_any_other_call_is_the_models_own(tiny_model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = tiny_model(input_ids=ids, labels=ids)
    written = tiny_model.generate(ids, max_new_tokens=5, do_sample=False)
    add_completion_head(tiny_model)
    after = tiny_model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(tiny_model.generate(ids, max_new_tokens=5, do_sample=False), written)


def test_adding_it_twice_adds_it_once(tiny_model: LlamaForCausalLM) -> None:
    add_completion_head(tiny_model)
    once = tiny_model.forward
    add_completion_head(tiny_model)
    assert tiny_model.forward == once


def test_under_an_adapter(tiny_model: LlamaForCausalLM) -> None:
    ids, index, targets = torch.tensor([[5, 6, 7]]), torch.tensor([0, 1]), torch.tensor([6, 7])
    with torch.no_grad():
        base = all_log_probs(tiny_model, ids)[index, targets]
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert base_causal_lm(model) is tiny_model
    add_completion_head(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
        adapted = model(input_ids=ids, completion_index=index, completion_targets=targets).log_probs
        torch.testing.assert_close(adapted, all_log_probs(model, ids)[index, targets], atol=1e-5, rtol=1e-5)
        assert float((adapted - base).abs().max()) > 0.01
        with model.disable_adapter():
            off = model(input_ids=ids, completion_index=index, completion_targets=targets).log_probs
    torch.testing.assert_close(off, base, atol=1e-6, rtol=1e-6)
    trained = model(input_ids=ids, completion_index=index, completion_targets=targets).log_probs
    trained.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)
