from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.train.trainers.rollout import (
    Episode,
    GumbelSampling,
    TransformersSampler,
    VLLMSampler,
    collate,
    ended,
    merged_weights,
)

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
CPU = torch.device("cpu")


def with_adapters(model: LlamaForCausalLM) -> Any:
    """Two adapters that both change something; `policy` is active."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, config, adapter_name="policy")
    peft.add_adapter("cost", config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    peft.set_adapter("policy")
    return peft.eval()


# ---- tensors --------------------------------------------------------------------------------------------------------


def test_a_batch_by_hand() -> None:
    episodes = [
        Episode(4, 0, [5, 6], [7, 8, 2], True),
        Episode(5, 1, [9], [], False),
        Episode(6, 1, [9, 10, 11], [12], False),
    ]
    batch = collate(episodes, 0, CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 2], [9, 0, 0, 0, 0], [9, 10, 11, 12, 0]]
    assert batch.attention_mask.sum(1).tolist() == [5, 1, 4]
    assert batch.answer_index.tolist() == [1, 2, 3, 12]  # the token before each
    assert batch.answer_targets.tolist() == [7, 8, 2, 12]
    assert batch.mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    by_answer = batch.by_answer(values)
    assert by_answer.tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    (by_answer[0].sum() + 5 * by_answer[2].sum()).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 1, 1, 5]


def test_whether_an_answer_ended_itself() -> None:
    assert ended([4, 2], {2})
    assert not ended([2, 4], {2})
    assert not ended([], {2})


# ---- transformers ---------------------------------------------------------------------------------------------------


def sample(
    model: Any, tokenizer: Any, prompts: list[list[int]], slots: list[int], **options: Any
) -> list[list[int]]:
    keys: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 2, "seed": 0}
    answers = TransformersSampler(tokenizer, **(keys | options)).sample(model, prompts, slots)
    return [answer for answer in answers if answer is not None]


def test_an_answer_depends_on_its_slot_and_not_on_its_neighbours(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    together = sample(tiny_model, tiny_tokenizer, PROMPTS, [0, 1, 2], batch_size=3)
    alone = [sample(tiny_model, tiny_tokenizer, [p], [i])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert sample(tiny_model, tiny_tokenizer, PROMPTS[:1], [7]) != alone[:1]
    assert sample(tiny_model, tiny_tokenizer, PROMPTS[:1], [0], seed=1) != alone[:1]


def test_the_random_state_of_the_process_is_left_alone(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tiny_model.train()
    sample(tiny_model, tiny_tokenizer, PROMPTS, [0, 1, 2])
    assert torch.equal(torch.get_rng_state(), before)
    assert tiny_model.training


def test_first_tokens_have_the_models_distribution(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    num = 3000
    answers = sample(
        tiny_model, tiny_tokenizer, [PROMPTS[0]] * num, list(range(num)), max_new_tokens=1, batch_size=500
    )
    counts = torch.bincount(torch.tensor([a[0] for a in answers]), minlength=259).double()
    with torch.no_grad():
        expected = num * tiny_model(torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(-1)
    common = expected >= 5
    assert int(common.sum()) > 50
    # Pearson's statistic over the common tokens; its mean is their number, its deviation the root of twice that.
    statistic = float(((counts - expected) ** 2 / expected)[common].sum())
    degrees = int(common.sum())
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


def test_an_answer_keeps_its_end_token_and_nothing_behind(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():  # the end token becomes likely
        tiny_model.lm_head.weight[2] = 0.3 * tiny_model.model.embed_tokens.weight[5:14].mean(0).sign()
    answers = sample(
        tiny_model, tiny_tokenizer, PROMPTS * 10, list(range(30)), max_new_tokens=20, batch_size=30
    )
    finished = [a for a in answers if ended(a, {2})]
    assert finished
    assert all(2 not in a[:-1] for a in answers)
    assert all(len(a) == 20 for a in answers if not ended(a, {2}))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_answer_without_a_distribution_to_draw_from_is_none(
    bad: float, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = sample(tiny_model, tiny_tokenizer, PROMPTS, [0, 1, 2])
    assert not any(10 in row for row in [*whole, PROMPTS[0], PROMPTS[2]])
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight[10] = bad  # of the second prompt
    sampler = TransformersSampler(tiny_tokenizer, max_new_tokens=6, batch_size=3, seed=0)
    assert sampler.sample(tiny_model, PROMPTS, [0, 1, 2]) == [whole[0], None, whole[2]]


def test_tokens_that_are_ruled_out_are_no_fault() -> None:
    drawn = GumbelSampling(0, [0, 1, 2], CPU)
    drawn(torch.empty(3, 0), torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf], [1.0, torch.nan]]))
    drawn(torch.empty(3, 0), torch.zeros(3, 2))
    assert drawn.finite.tolist() == [True, False, False]


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def test_merged_weights_are_those_that_peft_merges(tiny_model: LlamaForCausalLM) -> None:
    peft = with_adapters(tiny_model)
    before = {name: p.clone() for name, p in peft.named_parameters()}
    sent = {name: weight.clone() for name, weight in merged_weights(peft)}
    assert all(torch.equal(before[name], p) for name, p in peft.named_parameters())
    merged = peft.merge_and_unload()
    expected = dict(merged.named_parameters())
    assert sent.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(sent[name], weight, atol=1e-6, rtol=1e-5)
    assert {name for name, _ in merged_weights(merged)} == expected.keys()


class FakeClient:
    """The part of trl.generation.vllm_client.VLLMClient that is used, with its signatures (TRL 1.16)."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.metadata: list[tuple[str, str, list[int]]] = []
        self.sent: dict[str, Tensor] = {}
        self.request: dict[str, Any] = {}

    def update_named_params(self, metadata: list[tuple[str, str, list[int]]], named_params: Any) -> None:
        self.calls.append("weights")
        self.metadata, self.sent = metadata, dict(named_params)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def generate(self, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
        self.calls.append("generate")
        self.request = options
        return {"prompt_ids": prompts, "completion_ids": [[*p, 2] for p in prompts], "logprobs": None}


def test_the_server_gets_this_steps_weights_and_then_the_prompts(tiny_model: LlamaForCausalLM) -> None:
    client, peft = FakeClient(), with_adapters(tiny_model)
    accelerator: Any = SimpleNamespace(
        is_main_process=True, process_index=0, device=CPU, gather=lambda bad: bad
    )
    sampler = VLLMSampler(client, accelerator, max_new_tokens=6, seed=3)
    assert sampler.sample(peft, PROMPTS, [0, 1, 2]) == [[*p, 2] for p in PROMPTS]
    assert client.calls == ["weights", "reset", "generate"]
    assert [(n, list(w.shape)) for n, w in client.sent.items()] == [(n, s) for n, _, s in client.metadata]
    assert {dtype for _, dtype, _ in client.metadata} == {"float32"}
    assert client.request["max_tokens"] == 6
    assert client.request["temperature"] == 1.0
    first, seed = (
        client.sent["model.layers.0.mlp.up_proj.weight"].clone(),
        client.request["generation_kwargs"],
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B.policy" in name:
                parameter.mul_(2)
    sampler.sample(peft, PROMPTS, [3, 4, 5])
    assert not torch.equal(client.sent["model.layers.0.mlp.up_proj.weight"], first)
    assert client.request["generation_kwargs"] != seed


def test_ranks_get_the_answers_to_their_own_prompts(
    tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = [[20], [21]]
    monkeypatch.setattr("equipoise.train.trainers.rollout.gather_object", lambda mine: [other, *mine])
    answers = {"completion_ids": [[1], [2], [3], [4], [5]]}

    def from_rank_0(objects: list[Any], from_process: int) -> None:
        objects[0] = answers["completion_ids"]

    monkeypatch.setattr("equipoise.train.trainers.rollout.broadcast_object_list", from_rank_0)
    accelerator: Any = SimpleNamespace(
        is_main_process=False, process_index=1, device=CPU, gather=lambda bad: bad
    )
    sampler = VLLMSampler(None, accelerator, max_new_tokens=6, seed=3)
    assert sampler.sample(tiny_model, PROMPTS, [2, 3, 4]) == [[3], [4], [5]]


@pytest.mark.parametrize(("mine", "others"), [(torch.nan, False), (1.0, True)])
def test_weights_that_are_not_finite_on_any_rank_are_not_sent(
    mine: float, others: bool, tiny_model: LlamaForCausalLM
) -> None:
    client = FakeClient()
    accelerator: Any = SimpleNamespace(
        is_main_process=True,
        process_index=0,
        device=CPU,
        gather=lambda bad: torch.cat([bad, torch.tensor([others])]),
    )
    with torch.no_grad():
        tiny_model.lm_head.weight[3, 3] = mine
    sampler = VLLMSampler(client, accelerator, max_new_tokens=6, seed=3)
    assert sampler.sample(tiny_model, PROMPTS, [0, 1, 2]) == [None] * 3
    assert client.calls == []
