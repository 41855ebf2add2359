import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.data.errors import DataError
from equipoise.data.schema import Turn
from equipoise.eval.generation.batches import left_pad
from equipoise.eval.generation.engine import GenerationSettings, generate

# PEFT asks transformers by the old name; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Prompts = list[tuple[Turn, ...]]


def asked(*texts: str) -> Prompts:
    return [({"role": "user", "content": text},) for text in texts]


PROMPTS = asked("a", "What is the time, please?", "bb", "One more question of middling length", "ccc")


def greedy(model: LlamaForCausalLM, ids: list[int], num_tokens: int) -> list[int]:
    """Decode without batch, padding or cache; stops at token 2."""
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < num_tokens:
            token = model(torch.tensor([ids + answer])).logits[0, -1].argmax().item()
            if token == 2:
                break
            answer.append(token)
    return answer


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_answers_are_those_of_plain_greedy_decoding_in_input_order(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    settings = GenerationSettings(max_new_tokens=12, batch_size=batch_size)
    answers = generate(tiny_model, tiny_tokenizer, PROMPTS, settings)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = tiny_tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)["input_ids"]
        expected = greedy(tiny_model, ids, 12)
        assert answer.text == tiny_tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.num_tokens == len(expected)
    assert len({answer.text for answer in answers}) > 1


def test_an_answer_ends_at_the_end_token(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = GenerationSettings(max_new_tokens=4)
    assert [answer.finished for answer in generate(tiny_model, tiny_tokenizer, PROMPTS[:1], settings)] == [
        False
    ]
    first = greedy(
        tiny_model,
        tiny_tokenizer.apply_chat_template(list(PROMPTS[0]), add_generation_prompt=True)["input_ids"],
        4,
    )
    # An end token that only the model's generation config knows counts too.
    tiny_model.generation_config.eos_token_id = [2, first[2]]
    (answer,) = generate(tiny_model, tiny_tokenizer, PROMPTS[:1], settings)
    assert answer.finished
    assert answer.num_tokens == first.index(first[2])
    assert answer.text == tiny_tokenizer.decode(first[: first.index(first[2])])


def test_the_models_own_decoding_defaults_do_not_count(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = GenerationSettings(max_new_tokens=16)
    plain = generate(tiny_model, tiny_tokenizer, PROMPTS, settings)
    own = tiny_model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature, own.no_repeat_ngram_size = 5.0, True, 0.3, 1
    assert generate(tiny_model, tiny_tokenizer, PROMPTS, settings) == plain
    assert tiny_model.generation_config is own


def test_model_and_tokenizer_are_left_as_they_were(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model.train()
    tiny_model.config.use_cache = False
    generate(tiny_model, tiny_tokenizer, PROMPTS, GenerationSettings(max_new_tokens=2))
    assert tiny_model.training
    assert tiny_model.config.use_cache is False
    assert tiny_tokenizer.padding_side == "right"
    ids = torch.tensor([[5, 6, 7]])
    tiny_model(input_ids=ids, labels=ids).loss.backward()  # no inference tensor stays behind


def test_a_lora_model_answers_with_its_adapter(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = GenerationSettings(max_new_tokens=8)
    base = generate(tiny_model, tiny_tokenizer, PROMPTS, settings)
    torch.manual_seed(1)
    lora = get_peft_model(
        tiny_model, LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted = generate(lora, tiny_tokenizer, PROMPTS, settings)
    assert adapted != base
    with lora.disable_adapter():
        assert generate(lora, tiny_tokenizer, PROMPTS, settings) == base
    assert generate(lora.merge_and_unload(), tiny_tokenizer, PROMPTS, settings) == adapted


def test_sampling_depends_on_its_seed_and_leaves_the_random_state_alone(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def sampled(seed: int, **settings: float) -> list[str]:
        chosen = GenerationSettings(max_new_tokens=8, temperature=1.0, seed=seed, **settings)  # type: ignore[arg-type]
        return [answer.text for answer in generate(tiny_model, tiny_tokenizer, PROMPTS, chosen)]

    state = torch.get_rng_state()
    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert torch.equal(torch.get_rng_state(), state)
    # A nucleus of next to nothing is the most probable token.
    greedy_answers = generate(tiny_model, tiny_tokenizer, PROMPTS, GenerationSettings(max_new_tokens=8))
    assert sampled(0, top_p=1e-6) == [answer.text for answer in greedy_answers]


def test_prompts_that_are_too_long_are_counted(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        DataError, match=r"2 of 5 prompts are longer than 40 tokens \(max_prompt_tokens=40\).*: 1, 3\."
    ):
        generate(tiny_model, tiny_tokenizer, PROMPTS, GenerationSettings(max_prompt_tokens=40))
    with pytest.raises(DataError, match="the model's context of 512 less max_new_tokens=500"):
        generate(tiny_model, tiny_tokenizer, PROMPTS, GenerationSettings(max_new_tokens=500))


def test_progress_counts_answers(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[tuple[int, int, str]] = []
    settings = GenerationSettings(max_new_tokens=1, batch_size=2)
    generate(tiny_model, tiny_tokenizer, PROMPTS, settings, progress=lambda *step: seen.append(step))
    assert seen == [(done, 5, "answers") for done in range(1, 6)]
    assert generate(tiny_model, tiny_tokenizer, [], settings) == []


def test_transformers_has_nothing_to_complain_about(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    complaints: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: complaints.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        for temperature in (0.0, 0.7):
            settings = GenerationSettings(max_new_tokens=2, temperature=temperature)
            generate(tiny_model, tiny_tokenizer, PROMPTS, settings)
    finally:
        logger.removeHandler(handler)
    assert complaints == []


def test_left_padding() -> None:
    input_ids, attention_mask = left_pad([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"max_prompt_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GenerationSettings(**wrong)  # type: ignore[arg-type]


def test_a_setting_without_effect_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    GenerationSettings(top_p=0.9)
    assert "no effect" in caplog.text
