"""The engine at its boundary: a double of the parts of `vllm` that it calls, as vLLM's sources have them."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from equipoise.eval.generation import vllm_processor
from equipoise.eval.generation.requests import EngineError, Finish, Request
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.generation.vllm_engine import VLLMEngine


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    seed: int | None
    max_tokens: int
    logprobs: int | None = None


class LLM:
    """Keeps what it was given and answers as `answer` says."""

    made: list["LLM"]
    answer: Callable[[list[int], SamplingParams], SimpleNamespace]
    tokenizer: PreTrainedTokenizerFast

    def __init__(self, model: str, **options: Any) -> None:
        self.model, self.options = model, options
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=64))
        self.calls: list[tuple[list[Any], list[SamplingParams]]] = []
        self.made.append(self)

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        return self.tokenizer

    def generate(
        self, prompts: Sequence[Any], sampling_params: Sequence[SamplingParams], *, use_tqdm: bool = True
    ) -> list[SimpleNamespace]:
        assert len(prompts) == len(sampling_params)
        assert not use_tqdm
        self.calls.append((list(prompts), list(sampling_params)))
        return [
            SimpleNamespace(outputs=[type(self).answer(prompt["prompt_token_ids"], params)])
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]


def output(text: str, finish: str = "stop", tokens: int = 3, logprobs: Any = None) -> SimpleNamespace:
    return SimpleNamespace(text=text, finish_reason=finish, token_ids=[20] * tokens, logprobs=logprobs)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast) -> type[LLM]:
    llm = type(
        "LLM",
        (LLM,),
        {"made": [], "tokenizer": tiny_tokenizer, "answer": lambda row, _: output(str(len(row)))},
    )
    module = ModuleType("vllm")
    module.__dict__.update(LLM=llm, SamplingParams=SamplingParams, __version__="0.0-double")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return llm


def asked(text: str, **more: Any) -> Request:
    return Request(messages=({"role": "user", "content": text},), **{"max_new_tokens": 5, **more})


def test_all_requests_go_in_one_call_with_their_own_limits(
    fake: type[LLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = VLLMEngine("m", GenerationSettings(temperature=0.7, top_p=0.9, seed=5), {"dtype": "bfloat16"})
    seen: list[tuple[int, int, str]] = []
    requests = [asked("a"), Request(text="abc", max_new_tokens=9)]
    replies = engine.complete(requests, lambda *step: seen.append(step))
    (llm,) = fake.made
    ((prompts, params),) = llm.calls
    templated = tiny_tokenizer.apply_chat_template(
        list(requests[0].messages or ()), add_generation_prompt=True
    )
    assert prompts == [
        {"prompt_token_ids": templated["input_ids"]},
        {"prompt_token_ids": tiny_tokenizer("abc")["input_ids"]},
    ]
    first, second = (request.seed(5) for request in requests)
    assert first != second
    assert params == [SamplingParams(0.7, 0.9, first, 5), SamplingParams(0.7, 0.9, second, 9)]
    assert [reply.text for reply in replies] == [str(len(templated["input_ids"])), "3"]
    assert [reply.num_tokens for reply in replies] == [2, 2]
    assert seen == [(2, 2, "answers")]
    assert (llm.model, llm.options) == ("m", {"seed": 5, "dtype": "bfloat16"})
    assert engine.description["vllm"] == "0.0-double"


def test_choices_ask_for_log_probabilities_and_read_the_first_position_behind_white_space(
    fake: type[LLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    safe, newline = (
        tiny_tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("safe", "\n")
    )
    first = {safe: SimpleNamespace(logprob=-0.5)}
    said = output("\nsafe", logprobs=[{safe: SimpleNamespace(logprob=-9.0)}, first, {}])
    said.token_ids = [newline, safe, 2]
    fake.answer = lambda _row, _params: said  # type: ignore[method-assign, assignment]
    engine = VLLMEngine("m", GenerationSettings())
    (reply,) = engine.complete([asked("a", choices=("safe", "unsafe"))])
    assert fake.made[0].calls[0][1][0].logprobs == 20
    assert reply.choice_logprobs == {"safe": -0.5}


@pytest.mark.parametrize(
    ("finish", "expected"), [("stop", Finish.STOP), ("length", Finish.LENGTH), ("abort", Finish.FAILED)]
)
def test_how_an_answer_ended(fake: type[LLM], finish: str, expected: Finish) -> None:
    fake.answer = lambda _row, _params: output("x", finish)  # type: ignore[method-assign, assignment]
    (reply,) = VLLMEngine("m", GenerationSettings()).complete([asked("a")])
    assert reply.finish == expected
    assert (reply.text is None) == (expected == Finish.FAILED)


def test_thinking_is_kept_apart(fake: type[LLM]) -> None:
    fake.answer = lambda _row, _params: output("<think>Hm.</think>Yes")  # type: ignore[method-assign, assignment]
    (reply,) = VLLMEngine("m", GenerationSettings()).complete([asked("a")])
    assert (reply.text, reply.reasoning) == ("Yes", "Hm.")


def test_what_does_not_fit_is_not_asked(fake: type[LLM]) -> None:
    engine = VLLMEngine("m", GenerationSettings())
    replies = engine.complete([asked("a" * 60), asked("b")])
    assert [reply.finish for reply in replies] == [Finish.OVERLONG, Finish.STOP]
    assert len(fake.made[0].calls[0][0]) == 1
    assert engine.complete([]) == []
    assert [reply.finish for reply in engine.complete([asked("a" * 60)])] == [Finish.OVERLONG]
    assert len(fake.made[0].calls) == 1


@pytest.mark.parametrize(("newest", "name"), [(True, "TSDIProcessorV2"), (False, "TSDIProcessor")])
def test_a_token_bias_is_taken_out_by_the_processor_of_the_model_runner(
    fake: type[LLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, newest: bool, name: str
) -> None:
    file = tmp_path / "token_bias.safetensors"
    file.write_bytes(b"")
    monkeypatch.setattr(vllm_processor, "V2LogitsProcessor", type("V2", (), {}) if newest else object)
    engine = VLLMEngine("m", GenerationSettings(), {"additional_config": {"x": 1}}, file)
    assert fake.made[0].options == {
        "seed": 0,
        "logits_processors": [f"equipoise.eval.generation.vllm_processor:{name}"],
        "additional_config": {"x": 1, "token_bias": str(file)},
    }
    assert engine.description["tsdi"] == str(file)
    with pytest.raises(EngineError, match="no token bias at"):
        VLLMEngine("m", GenerationSettings(), token_bias=tmp_path / "other")


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"equipoise\[vllm\]"):
        VLLMEngine("m", GenerationSettings())
