import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.data.schema import Turn
from equipoise.eval.generation.tsdi import TokenBias, TSDISettings
from equipoise.eval.generation.tsdi_decoding import TSDILogitsProcessor
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


def test_forks_are_found_token_by_token(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    aligned = shifted(tiny_model)
    table = torch.randn(3, 259, generator=torch.Generator().manual_seed(1))
    profile = (1.0, 0.5, 0.0)
    bias = token_bias(table, alpha=profile)
    found = find_forks(aligned, tiny_model, tiny_tokenizer, PROMPTS, bias, batch_size=2)
    ending = torch.arange(259) == 2
    for row, prompt in enumerate(PROMPTS):
        text = tiny_tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_tensors="pt"
        )
        ids = text["input_ids"]
        for position in range(3):
            with torch.no_grad():
                logits = aligned(ids).logits[0, -1].log_softmax(-1).masked_fill(ending, -math.inf)
                before = tiny_model(ids).logits[0, -1].log_softmax(-1).masked_fill(ending, -math.inf)
            said, would_say = int(logits.argmax()), int(before.argmax())
            assert (found.said[row, position], found.would_say[row, position]) == (said, would_say)
            correction = profile[position] * table[position]
            decoded = [int((logits - alpha * correction).argmax()) for alpha in ALPHAS]
            assert found.decoded[row, position].tolist() == decoded
            m_0, slope = logits[said] - logits[would_say], correction[said] - correction[would_say]
            expected = torch.stack([m_0, m_0 - slope, before[said] - before[would_say]])
            torch.testing.assert_close(found.margins[row, position], expected, atol=1e-4, rtol=0)
            ids = torch.cat([ids, torch.tensor([[said]])], dim=1)
    assert found.num_prompts == found.num_changed == 5
    assert found.kept_rate(0.0)[0] == 1.0
    assert found.reverted_rate(0.0) == 0.0


def test_a_shift_that_is_all_bias_is_gone_at_alpha_one(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    vector = torch.zeros(259)
    vector[70] = 30.0  # the same first words, whatever the question
    aligned = with_bias(tiny_model, vector)
    bias = token_bias(vector.expand(3, -1).contiguous())
    found = find_forks(aligned, tiny_model, tiny_tokenizer, PROMPTS, bias)
    assert found.num_changed == 5
    assert found.kept_rate(1.0)[0] == found.kept_rate(2.0)[0] == 0.0
    assert found.reverted_rate(1.0) == found.reverted_rate(2.0) == 1.0
    assert found.bias_share == pytest.approx(1.0, abs=1e-4)
    assert 0 <= found.suggested_alpha < 1


@pytest.mark.parametrize("plausibility", [0.0, 0.2])
def test_what_is_kept_is_what_greedy_decoding_says(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, plausibility: float
) -> None:
    aligned = shifted(tiny_model)
    table = torch.randn(1, 259, generator=torch.Generator().manual_seed(2))
    bias = token_bias(table, plausibility=plausibility)
    found = find_forks(aligned, tiny_model, tiny_tokenizer, PROMPTS, bias)
    for alpha in (0.25, 1.0, 2.0):
        processor = TSDILogitsProcessor(alpha * table, 0, plausibility)
        same = 0
        for row, prompt in enumerate(PROMPTS):
            text = tiny_tokenizer.apply_chat_template(
                list(prompt), add_generation_prompt=True, return_tensors="pt"
            )
            processor.prompt_length = text["input_ids"].shape[1]
            answer = aligned.generate(
                **text, logits_processor=[processor], max_new_tokens=1, min_new_tokens=1
            )
            same += int(answer[0, -1] == found.said[row, 0])
        assert found.kept_rate(alpha)[0] == same / 5


def test_nothing_changed(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    bias = token_bias(torch.zeros(2, 259))
    found = find_forks(tiny_model, copy.deepcopy(tiny_model), tiny_tokenizer, PROMPTS, bias, alphas=[0.7])
    assert found.alphas == (0.0, 0.7, 1.0)
    assert found.num_changed == 0
    assert found.kept_rate(1.0) == (1.0, 0.0, 1.0)
    assert found.reverted_rate(1.0) == 0.0
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
    assert torch.equal(one.decoded, two.decoded)


def test_rates_by_hand() -> None:
    """Ten prompts: the first two tokens are the reference's, the third is a fork."""
    said = torch.tensor([[1, 2, 3]]).repeat(10, 1)
    would_say = torch.tensor([[1, 2, 9]]).repeat(10, 1)
    decoded = said[..., None].repeat(1, 1, 3)
    decoded[0, 2, 1:] = 9  # back to the reference's token
    decoded[1, 2, 2] = 5  # a third one
    decoded[2, 0, 2] = 5  # a third one before the fork
    margins = torch.tensor([2.0, 1.5, -2.0]).expand(10, 3, 3)
    found = Forks((0.0, 0.5, 1.0), said, would_say, decoded, margins)
    assert [found.kept_rate(alpha)[0] for alpha in found.alphas] == [1.0, 0.9, 0.7]
    assert [found.reverted_rate(alpha) for alpha in found.alphas] == [0.0, 0.1, 0.1]
    assert found.suggested_alpha == 0.5
    assert found.bias_share == pytest.approx(0.5 / 4)
