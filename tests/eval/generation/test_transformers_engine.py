from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from equipoise.eval.generation import transformers_engine
from equipoise.eval.generation.encoding import encode_request
from equipoise.eval.generation.requests import EngineError, Finish, Reply, Request
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.generation.slots import decode_in_slots, decodes_in_slots
from equipoise.eval.generation.transformers_engine import TransformersEngine
from equipoise.eval.generation.tsdi import TokenBias, TSDISettings

TEXTS = ("a", "What is the time, please?", "bb", "One more question of middling length", "ccc", "What is it?")


def asked(*texts: str, **more: Any) -> list[Request]:
    return [
        Request(messages=({"role": "user", "content": text},), **{"max_new_tokens": 12, **more})
        for text in texts
    ]


def engine_of(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    token_bias: TokenBias | None = None,
    **settings: Any,
) -> TransformersEngine:
    return TransformersEngine(model, tokenizer, GenerationSettings(**settings), token_bias)


def in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines made from here on decode through the model's own `generate`."""
    monkeypatch.setattr(transformers_engine, "decodes_in_slots", lambda base: False)


def ending(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make some answers end early: a token that many of them contain becomes an end token."""
    rows = [encode_request(tokenizer, request).row for request in asked(*TEXTS)]
    with torch.inference_mode():
        tokens = dict(
            decode_in_slots(model, rows, [12] * len(rows), {2}, 8, lambda logits, *_: logits.argmax(-1))
        )
    model.generation_config.eos_token_id = [2, tokens[1][5], tokens[3][2]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_slots_answer_as_generate_does_with_limits_of_their_own(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    ending(tiny_model, tiny_tokenizer)
    requests = [
        *asked(*TEXTS[:3]),
        *asked(*TEXTS[3:], max_new_tokens=5, choices=("safe", "Yes")),
        Request(text="no template", max_new_tokens=20),
    ]
    slots = engine_of(tiny_model, tiny_tokenizer, batch_size=batch_size)
    assert decodes_in_slots(slots.base)
    replies = slots.complete(requests)
    in_batches(monkeypatch)
    expected = engine_of(tiny_model, tiny_tokenizer, batch_size=4).complete(requests)
    assert [(reply.text, reply.finish, reply.num_tokens) for reply in replies] == [
        (reply.text, reply.finish, reply.num_tokens) for reply in expected
    ]
    assert {reply.finish for reply in replies} == {Finish.STOP, Finish.LENGTH}
    for reply, other in zip(replies, expected, strict=True):
        assert reply.choice_logprobs == pytest.approx(other.choice_logprobs, abs=1e-4)
    assert [sorted(reply.choice_logprobs) for reply in replies] == [[]] * 3 + [["Yes", "safe"]] * 3 + [[]]


def test_choices_are_the_models_own_log_probabilities_whatever_decoding_does(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked("a", choices=("safe", "unsafe", ""))
    row = tiny_tokenizer.apply_chat_template(list(request[0].messages or ()), add_generation_prompt=True)[
        "input_ids"
    ]
    with torch.no_grad():
        logprobs = tiny_model(torch.tensor([row])).logits[0, -1].log_softmax(-1)
    firsts = {
        text: tiny_tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("safe", "unsafe")
    }
    expected = {text: logprobs[token].item() for text, token in firsts.items()}
    bias = random_bias()
    for fallback in (False, True):
        if fallback:
            in_batches(monkeypatch)
        for engine in (
            engine_of(tiny_model, tiny_tokenizer),
            engine_of(tiny_model, tiny_tokenizer, temperature=0.3, top_p=0.5),
            engine_of(tiny_model, tiny_tokenizer, bias),
        ):
            (reply,) = engine.complete(request)
            assert reply.choice_logprobs == pytest.approx(expected, abs=1e-4)


def test_choices_are_read_behind_white_space(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    newline, letter, safe = (
        tiny_tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("\n", "x", "safe")
    )
    bias = torch.zeros(3, 259)
    for position, token in enumerate((newline, newline, letter)):
        bias[position, token] = -100.0  # it is taken out, so that the answer begins with these
    told = TokenBias(
        bias, torch.full_like(bias, 1 / 259), TSDISettings(num_positions=3, num_prompts=1, plausibility=0.0)
    )
    requests = [*asked("a", choices=("safe",)), *asked("bb", max_new_tokens=2, choices=("safe",))]
    row = encode_request(tiny_tokenizer, requests[0]).row
    with torch.no_grad():
        logprobs = tiny_model(torch.tensor([[*row, newline, newline]])).logits[0, -1].log_softmax(-1)
    for fallback in (False, True):
        if fallback:
            in_batches(monkeypatch)
        begun, blank = engine_of(tiny_model, tiny_tokenizer, told).complete(requests)
        assert (begun.text or "").startswith("\n\nx")
        assert begun.choice_logprobs == pytest.approx({"safe": logprobs[safe].item()}, abs=1e-4)
        assert (blank.text, blank.choice_logprobs) == ("\n\n", {})


def random_bias(scale: float = 3.0) -> TokenBias:
    torch.manual_seed(3)
    bias = scale * torch.randn(4, 259)
    return TokenBias(
        bias, torch.full_like(bias, 1 / 259), TSDISettings(num_positions=4, num_prompts=1, plausibility=0.1)
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_tsdi_corrects_each_row_at_its_own_position(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    ending(tiny_model, tiny_tokenizer)
    replies = engine_of(tiny_model, tiny_tokenizer, random_bias(), batch_size=batch_size).complete(
        asked(*TEXTS)
    )
    plain = engine_of(tiny_model, tiny_tokenizer).complete(asked(*TEXTS))
    assert [reply.text for reply in replies] != [reply.text for reply in plain]
    in_batches(monkeypatch)
    expected = engine_of(tiny_model, tiny_tokenizer, random_bias()).complete(asked(*TEXTS))
    assert [reply.text for reply in replies] == [reply.text for reply in expected]


def test_a_slot_is_taken_over_as_soon_as_its_answer_ends(tiny_model: LlamaForCausalLM) -> None:
    widths: list[int] = []

    def choose(logits: Tensor, indices: list[int], answered: list[int]) -> Tensor:
        widths.append(len(indices))
        return logits.argmax(-1)

    rows = [[1, 9, 10 + index] for index in range(6)]
    with torch.inference_mode():
        answers = dict(decode_in_slots(tiny_model, rows, [8, 2, 2, 2, 2, 2], set(), 2, choose))
    assert sorted(answers) == list(range(6))
    assert [len(answers[index]) for index in range(6)] == [8, 2, 2, 2, 2, 2]
    # One row of 8 and five of 2 in two slots: 10 steps. A batch that waits for its longest would need 8 + 2 + 2.
    assert widths == [2] * 8 + [1] * 2


@pytest.mark.parametrize(
    ("num_prompts", "max_prompt_tokens", "expected"),
    [
        (7, 200, 7),  # 8 slots a prompt of batch_size 1
        (9, 200, 5),  # 9 in 8 slots: 5 and 4 rather than 8 and 1
        (17, 200, 6),
        (9, 37, 1),  # no shorter than the longest allowed: as many as batch_size
    ],
)
def test_slots_share_the_prompts_evenly(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    num_prompts: int,
    max_prompt_tokens: int,
    expected: int,
) -> None:
    given: list[int] = []

    def decode(*arguments: Any) -> Iterator[tuple[int, list[int]]]:
        given.append(arguments[4])
        yield from decode_in_slots(*arguments)

    requests = asked(*["a"] * num_prompts, max_new_tokens=2)
    engine = engine_of(tiny_model, tiny_tokenizer, batch_size=1, max_prompt_tokens=max_prompt_tokens)
    assert engine.num_prompt_tokens(requests[0]) <= 25
    engine.complete(requests[:1])  # probed
    monkeypatch.setattr(transformers_engine, "decode_in_slots", decode)
    assert len(engine.complete(requests)) == num_prompts
    assert given == [expected]


def test_a_model_with_a_sliding_window_is_left_to_generate(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, sliding_window=8,
        bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    assert not decodes_in_slots(model)
    one = [engine_of(model, tiny_tokenizer, batch_size=1).complete([request])[0] for request in asked(*TEXTS)]
    assert engine_of(model, tiny_tokenizer).complete(asked(*TEXTS)) == one


def test_a_model_that_does_not_follow_the_mask_is_found_out(tiny_model: LlamaForCausalLM) -> None:
    forward = tiny_model.forward

    def own_positions(**arguments: Any) -> Any:
        arguments.pop("position_ids", None)
        return forward(**arguments)

    with torch.inference_mode():
        assert decodes_in_slots(tiny_model)
        tiny_model.forward = own_positions
        assert not decodes_in_slots(tiny_model)


def test_what_does_not_fit_and_what_the_template_refuses_is_said_and_the_rest_answered(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.chat_template += (
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    )
    requests = [*asked("x" * 200, "no", "a"), *asked("b", max_new_tokens=500)]
    replies = engine_of(tiny_model, tiny_tokenizer, max_prompt_tokens=100).complete(requests)
    assert [reply.finish for reply in replies] == [
        Finish.OVERLONG,
        Finish.FAILED,
        Finish.LENGTH,
        Finish.OVERLONG,
    ]
    assert "max_prompt_tokens=100" in replies[0].error
    assert "not this" in replies[1].error
    assert "context of 512 less max_new_tokens=500" in replies[3].error
    assert [reply.text is None for reply in replies] == [True, True, False, True]
    tiny_tokenizer.chat_template = None
    with pytest.raises(EngineError, match="has no chat template"):
        engine_of(tiny_model, tiny_tokenizer).complete(asked("a"))
    assert engine_of(tiny_model, tiny_tokenizer).complete([]) == []


def out_of_memory_above(
    size: int, decode: Callable[..., Iterator[tuple[int, list[int]]]]
) -> Callable[..., Iterator[tuple[int, list[int]]]]:
    def limited(
        base: Any, rows: Sequence[list[int]], limits: Any, ends: Any, num_slots: int, choose: Any
    ) -> Any:
        if num_slots > size:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"
            )
        yield from decode(base, rows, limits, ends, num_slots, choose)

    return limited


def test_a_batch_out_of_memory_is_halved(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = engine_of(tiny_model, tiny_tokenizer).complete(asked(*TEXTS))
    monkeypatch.setattr(transformers_engine, "decode_in_slots", out_of_memory_above(2, decode_in_slots))
    assert engine_of(tiny_model, tiny_tokenizer, batch_size=8).complete(asked(*TEXTS)) == expected
    assert "3 prompts at a time" in caplog.text


def test_what_alone_runs_out_of_memory_has_failed_and_only_that(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = engine_of(tiny_model, tiny_tokenizer).complete(asked(*TEXTS))
    forward = tiny_model.forward

    def picky(**arguments: Any) -> Any:
        if arguments["position_ids"] is not None and arguments["position_ids"].max() >= 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return forward(**arguments)

    engine = engine_of(tiny_model, tiny_tokenizer, batch_size=4)
    engine.complete(asked("a"))
    tiny_model.forward = picky
    replies = engine.complete(asked(*TEXTS))
    failed = [index for index, reply in enumerate(replies) if reply.finish == Finish.FAILED]
    assert failed == [1, 3]  # the two longest prompts
    assert replies[1] == Reply(
        None, Finish.FAILED, error="out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    assert [reply for index, reply in enumerate(replies) if index not in failed] == [
        reply for index, reply in enumerate(expected) if index not in failed
    ]
    assert "2 of 6 requests failed" in caplog.text


def test_an_error_of_another_kind_is_not_swallowed(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Iterator[tuple[int, list[int]]]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(transformers_engine, "decode_in_slots", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        engine_of(tiny_model, tiny_tokenizer).complete(asked("a"))


def test_the_description_changes_with_whatever_changes_replies(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = engine_of(tiny_model, tiny_tokenizer)
    before = engine.description
    assert engine_of(tiny_model, tiny_tokenizer).description == before
    assert engine_of(tiny_model, tiny_tokenizer, seed=1).description != before
    assert engine_of(tiny_model, tiny_tokenizer, random_bias()).description != before
    assert (
        engine_of(tiny_model, tiny_tokenizer, random_bias(2.0)).description
        != engine_of(tiny_model, tiny_tokenizer, random_bias()).description
    )
    with torch.no_grad():
        tiny_model.lm_head.weight[7, 7] += 1e-3
    assert engine.description != before
