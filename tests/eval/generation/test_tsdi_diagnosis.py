import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.data.schema import Turn
from equipoise.eval.generation.engine import GenerationSettings, generate
from equipoise.eval.generation.tsdi import TokenBias, TSDISettings
from equipoise.eval.generation.tsdi_diagnosis import ALPHAS, Forks, find_forks

PROMPTS: list[tuple[Turn, ...]] = [({"role": "user", "content": "hello" * n},) for n in (1, 2, 3, 4, 5)]


def shifted(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy that answers otherwise."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(-1)
    return other


def with_bias(model: LlamaForCausalLM, vector: torch.Tensor) -> LlamaForCausalLM:
    """A copy whose logits are those of `model` plus `vector`, everywhere: all of its shift is token bias."""
    other = copy.deepcopy(model)
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    head.bias = nn.Parameter(vector.clone())
    other.lm_head = head
    return other


def token_bias(table: torch.Tensor, **settings: object) -> TokenBias:
    return TokenBias(table, torch.full_like(table, 1.0), TSDISettings(num_positions=len(table), **settings))  # type: ignore[arg-type]


def test_margins_are_the_formula_token_by_token(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    aligned = shifted(tiny_model)
    table = torch.randn(3, 259, generator=torch.Generator().manual_seed(1))
    profile = (1.0, 0.5, 0.0)
    bias = token_bias(table, alpha=profile)
    found = find_forks(aligned, tiny_model, tiny_tokenizer, PROMPTS, bias, batch_size=2)
    assert found.num_prompts == 5
    num_forks = 0
    for row, prompt in enumerate(PROMPTS):
        text = tiny_tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_tensors="pt"
        )
        ids = text["input_ids"]
        for position in range(3):
            with torch.no_grad():
                logits = aligned(ids).logits[0, -1].log_softmax(-1)
                before = tiny_model(ids).logits[0, -1].log_softmax(-1)
            said = int(logits.masked_fill(torch.arange(259) == 2, -math.inf).argmax())  # not the answer's end
            would_say = int(before.argmax())
            margins = found.margins[row, position]
            if said == would_say:
                assert margins.isinf().all()
            else:
                num_forks += 1
                slope = profile[position] * (table[position, said] - table[position, would_say])
                expected = logits[said] - logits[would_say] - torch.tensor(ALPHAS) * slope
                torch.testing.assert_close(margins, expected, atol=1e-4, rtol=0)
                reference = before[said] - before[would_say]
                torch.testing.assert_close(
                    found.reference_margins[row, position], reference, atol=1e-4, rtol=0
                )
                assert reference <= 0
            ids = torch.cat([ids, torch.tensor([[said]])], dim=1)
    assert num_forks > 5
    assert found.num_changed == 5
    assert found.kept_rate(0.0)[0] == 1.0


def test_a_shift_that_is_all_bias_is_gone_at_alpha_one(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    vector = torch.zeros(259)
    vector[70] = 30.0  # the same first words, whatever the question
    aligned = with_bias(tiny_model, vector)
    bias = token_bias(vector.expand(3, -1).contiguous())
    found = find_forks(aligned, tiny_model, tiny_tokenizer, PROMPTS, bias)
    assert found.num_changed == 5
    assert found.kept_rate(0.0)[0] == 1.0
    assert found.kept_rate(1.0)[0] == found.kept_rate(2.0)[0] == 0.0
    at_one = found.margins[..., ALPHAS.index(1.0)]
    torch.testing.assert_close(at_one, found.reference_margins, atol=1e-3, rtol=0)
    assert found.bias_share == pytest.approx(1.0, abs=1e-4)
    assert 0 <= found.suggested_alpha < 1


def test_an_opening_that_decoding_leaves_as_it_was_is_kept_throughout(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    aligned = shifted(tiny_model)
    bias = token_bias(torch.randn(3, 259, generator=torch.Generator().manual_seed(2)))
    settings = GenerationSettings(max_new_tokens=3)
    before = generate(aligned, tiny_tokenizer, PROMPTS, settings)
    found = find_forks(aligned, tiny_model, tiny_tokenizer, PROMPTS, bias)
    num_lost = 0
    for alpha in (0.25, 1.0, 2.0):
        after = generate(aligned, tiny_tokenizer, PROMPTS, settings, bias.with_settings(alpha=alpha))
        kept = (found.margins[..., ALPHAS.index(alpha)] > 0).all(-1).tolist()
        assert all(kept[row] for row in range(5) if after[row] == before[row])
        num_lost += kept.count(False)
        assert found.kept_throughout_rate(alpha)[0] == kept.count(True) / 5
    assert num_lost > 0


def test_nothing_changed(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    bias = token_bias(torch.zeros(2, 259))
    found = find_forks(tiny_model, copy.deepcopy(tiny_model), tiny_tokenizer, PROMPTS, bias, alphas=[0.7])
    assert found.alphas == (0.0, 0.7, 1.0)
    assert found.num_changed == 0
    assert found.kept_rate(1.0) == found.kept_throughout_rate(1.0) == (1.0, 0.0, 1.0)
    assert found.bias_share is None
    assert found.suggested_alpha == 1.0


def test_an_adapter_is_compared_with_its_own_base(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    reference = copy.deepcopy(tiny_model)
    torch.manual_seed(1)
    config = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    aligned = get_peft_model(tiny_model, config)
    bias = token_bias(torch.ones(3, 259))
    one = find_forks(aligned, None, tiny_tokenizer, PROMPTS, bias)
    two = find_forks(aligned, reference, tiny_tokenizer, PROMPTS, bias)
    assert one.num_changed > 0
    torch.testing.assert_close(one.margins, two.margins, atol=1e-4, rtol=0)
    torch.testing.assert_close(one.reference_margins, two.reference_margins, atol=1e-4, rtol=0)


def test_rates_by_hand() -> None:
    alphas = (0.0, 0.5, 1.0)
    margins = torch.full((12, 2, 3), math.inf)  # ten prompts fork at the second token, two never
    margins[:10, 1] = torch.tensor([2.0, 1.0, 0.5])
    margins[0, 1] = torch.tensor([1.0, -1.0, -3.0])
    margins[1, 0] = torch.tensor([1.0, 0.5, 0.25])  # and one of them at the first, too,
    margins[1, 1] = torch.tensor([1.0, -0.5, -1.0])  # where it is kept; not so at the second
    found = Forks(alphas, margins, torch.full((12, 2), -1.0))
    assert (found.num_prompts, found.num_changed) == (12, 10)
    assert found.kept_rate(1.0)[0] == pytest.approx(0.9)
    assert found.kept_throughout_rate(1.0)[0] == pytest.approx(0.8)
    assert found.suggested_alpha == 1.0
    # (8 * 1.5 + 4 + 0.75) of (8 * 3 + 2 + 2).
    assert found.bias_share == pytest.approx(16.75 / 28)
    margins[2, 1, 1] = -0.5
    assert Forks(alphas, margins, torch.full((12, 2), -1.0)).suggested_alpha == 0.0
