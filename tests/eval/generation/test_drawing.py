import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.eval.generation import transformers_engine
from equipoise.eval.generation.drawing import Sampler, random_numbers
from equipoise.eval.generation.requests import Request, numbered
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.generation.transformers_engine import TransformersEngine

PROBABILITIES = [0.1, 0.0, 0.4, 0.5]
LARGEST = 1 - 2**-24


def counts(num: int, **settings: Any) -> Counter[int]:
    """How often each token is drawn by `num` numbers spread evenly over [0, 1)."""
    numbers = [(index + 0.5) / num for index in range(num)]
    sampler = Sampler(GenerationSettings(temperature=settings.pop("temperature", 1.0), **settings))
    logits = torch.tensor([PROBABILITIES]).log().expand(num, -1)
    return Counter(sampler(logits, numbers).tolist())


def test_each_token_is_drawn_as_often_as_it_is_probable() -> None:
    assert counts(1000) == {0: 100, 2: 400, 3: 500}
    # Squared and normalised: 0.01, 0.16 and 0.25 of 0.42.
    assert counts(4200, temperature=0.5) == {0: 100, 2: 1600, 3: 2500}
    # The two most probable tokens reach 0.8.
    assert counts(900, top_p=0.8) == {2: 400, 3: 500}
    # The limit of temperature 0 is the most probable token.
    assert counts(100, temperature=0.01) == {3: 100}


@pytest.mark.parametrize("number", [0.0, LARGEST])
def test_what_has_no_probability_is_never_drawn(number: float) -> None:
    logits = torch.full((1, 100_000), -math.inf)
    logits[0, 17] = logits[0, 70_000] = 3.0
    logits[0, 18:60_000] = -14.0
    assert Sampler(GenerationSettings(temperature=1.0))(logits, [number]).item() == (
        17 if number == 0 else 70_000
    )


def test_the_numbers_of_an_answer_do_not_depend_on_where_it_is_cut_off() -> None:
    longest = random_numbers(3, 1000)
    assert all(random_numbers(3, length) == longest[:length] for length in (1, 8, 15, 16, 17, 64, 999))
    assert random_numbers(4, 8) != longest[:8]
    assert max(longest) < 1
    assert float(torch.tensor(LARGEST, dtype=torch.float32)) == LARGEST


def asked(*texts: str, limit: int = 8) -> list[Request]:
    return [Request(messages=({"role": "user", "content": text},), max_new_tokens=limit) for text in texts]


TEXTS = ["hm", "a longer question than the others are", "why", "and this", "no"]


@pytest.mark.parametrize("in_slots", [True, False])
def test_a_sampled_answer_does_not_depend_on_what_else_is_asked(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    in_slots: bool,
) -> None:
    if not in_slots:
        monkeypatch.setattr(transformers_engine, "decodes_in_slots", lambda base: False)

    def answers(requests: list[Request], batch_size: int, **settings: Any) -> list[str | None]:
        settings = {"temperature": 0.9, "top_p": 0.95, **settings}
        engine = TransformersEngine(
            tiny_model, tiny_tokenizer, GenerationSettings(batch_size=batch_size, **settings)
        )
        return [reply.text for reply in engine.complete(requests)]

    state = torch.get_rng_state()
    together = answers(asked(*TEXTS), 8)
    assert len(set(together)) == len(TEXTS)
    assert answers(asked(*TEXTS), 2) == together
    assert answers(asked(*reversed(TEXTS)), 3) == together[::-1]
    assert [answers(asked(text), 1)[0] for text in TEXTS] == together
    assert answers(asked(*TEXTS), 8, seed=1) != together
    shorter = answers(asked(*TEXTS, limit=3), 8)
    assert shorter != together
    for short, whole in zip(shorter, together, strict=True):
        assert (whole or "").startswith((short or "").rstrip("�"))
    samples = answers(numbered(asked("hm", "hm", "hm")), 8)
    assert samples[0] == together[0]
    assert len(set(samples)) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_both_ways_of_decoding_draw_the_same(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GenerationSettings(temperature=1.3)
    slots = TransformersEngine(tiny_model, tiny_tokenizer, settings).complete(asked(*TEXTS))
    monkeypatch.setattr(transformers_engine, "decodes_in_slots", lambda base: False)
    assert TransformersEngine(tiny_model, tiny_tokenizer, settings).complete(asked(*TEXTS)) == slots


def test_a_seed_follows_from_prompt_and_sample_alone() -> None:
    [request] = asked("hm")
    assert 0 <= request.seed(7) < 2**31
    assert asked("hm", limit=3)[0].seed(7) == request.seed(7)
    others = [*asked("hm!"), Request(text="hm"), *numbered(asked("hm", "hm"))[1:]]
    assert len({request.seed(7), request.seed(8), *(other.seed(7) for other in others)}) == 5
