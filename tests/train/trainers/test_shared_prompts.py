import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessorList

from equipoise.train.trainers.completion_head import add_completion_head
from equipoise.train.trainers.rollout import GumbelSampling
from equipoise.train.trainers.shared_prompts import grouped, pays, sample_shared, shared_log_probs

# Two prompts, padded on the left, and their answers, padded on the right; the last answer is masked out.
IDS = torch.tensor(
    [
        [0, 10, 11, 20, 21, 2],
        [12, 13, 14, 22, 2, 0],
        [0, 10, 11, 23, 2, 0],
        [0, 10, 11, 24, 25, 26],
    ]
)
MASK = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]])


def test_equal_prompts_are_one_block() -> None:
    blocks, rows = grouped(IDS, MASK, 3)
    assert blocks == [([10, 11], [[20, 21, 2], [23, 2]]), ([12, 13, 14], [[22, 2]])]
    assert rows == [[0, 2], [1]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_shared_rows_give_what_rows_of_their_own_do(tiny_model: LlamaForCausalLM, temperature: float) -> None:
    add_completion_head(tiny_model)
    blocks, rows = grouped(IDS, MASK, 3)
    log_probs, entropies = shared_log_probs(
        tiny_model, tiny_model, blocks, rows, (4, 3), 0, entropy=True, temperature=temperature
    )
    expected = torch.zeros(4, 3)
    expected_entropy = torch.zeros(4, 3)
    for row in range(3):
        ids = IDS[row][MASK[row] == 1]
        log_p = (tiny_model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
        num = int(MASK[row, 3:].sum())
        for place in range(num):
            at = len(ids) - num + place - 1
            expected[row, place] = log_p[at, ids[at + 1]]
            expected_entropy[row, place] = -(log_p[at].exp() * log_p[at]).sum()
    assert torch.allclose(log_probs, expected, atol=1e-5)
    assert entropies is not None
    assert torch.allclose(entropies, expected_entropy, atol=1e-5)
    log_probs[0].sum().backward()  # an answer's gradient does not depend on who shares its row
    shared = tiny_model.model.layers[0].mlp.up_proj.weight.grad.clone()
    tiny_model.zero_grad()
    ids = IDS[0][MASK[0] == 1]
    log_p = (tiny_model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
    log_p[[1, 2, 3], ids[2:]].sum().backward()
    assert torch.allclose(shared, tiny_model.model.layers[0].mlp.up_proj.weight.grad, atol=1e-5)


def test_long_answers_keep_rows_of_their_own() -> None:
    short = [([0] * 50, [[0] * 5] * 8)]  # 90 tokens instead of 440
    assert pays(short, 8 * 55)
    long = [([0] * 50, [[0] * 200] * 8)]  # 1650 instead of 2000
    assert not pays(long, 8 * 250)
    assert not pays([([0] * 4000, [[0] * 50] * 8)], 8 * 4050)  # too wide a row
    assert not pays([], 100)


def test_sampling_from_one_cache_a_prompt_is_sampling_from_the_prompts(tiny_model: LlamaForCausalLM) -> None:
    short, long = [40, 41], [50, 51, 52, 53, 54]
    prompts = [short, short, long, long, short]
    sampling = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": [2], "do_sample": True, "top_k": 0}
    config = GenerationConfig(**sampling)
    torch.manual_seed(0)
    shared = sample_shared(tiny_model, prompts, config)
    torch.manual_seed(0)
    ids = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    apart = tiny_model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, 5:]
    assert torch.equal(shared, apart)
    assert len({tuple(row) for row in shared.tolist()}) == 5
    one = sample_shared(tiny_model, [[40], [40]], config)  # nothing to keep of a prompt of one token
    assert one.shape == (2, 6)


def test_every_answer_has_noise_of_its_own(tiny_model: LlamaForCausalLM) -> None:
    """What two ranks sample of four answers is what one process samples, whatever else stands in the batch."""
    prompts = [[40, 41], [40, 41], [50, 51, 52], [50, 51, 52]]
    config = GenerationConfig(max_new_tokens=6, pad_token_id=0, eos_token_id=[2], do_sample=False)

    def sampled(rows: list[int]) -> list[list[int]]:
        noise = GumbelSampling(7, rows, torch.device("cpu"))
        options = {"logits_processor": LogitsProcessorList([noise])}
        return sample_shared(tiny_model, [prompts[row] for row in rows], config, **options).tolist()

    whole = sampled([0, 1, 2, 3])
    assert sampled([0, 1]) + sampled([2, 3]) == whole
    assert whole[0] != whole[1]
