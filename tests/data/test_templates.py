from dataclasses import dataclass

import pytest
from transformers import PreTrainedTokenizerFast

from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError
from equipoise.data.templates import (
    DOUBLED_BOS,
    NO_GENERATION_PROMPT,
    NO_PREFIX,
    ConversationEncoder,
    EncodingLimits,
    encode_turns,
)

PROMPT = ({"role": "user", "content": "hm?"},)

HEADER_WITHOUT_BEING_ASKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
INSTRUCT = (
    "{% for m in messages %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] }}"
    "{% endfor %}"
)
OTHERWISE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}assistant thinks:{% endif %}"
)
TWICE = (
    "<|endoftext|><|endoftext|>{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Encoded:
    encoder: ConversationEncoder
    results: list[tuple[list[int], list[list[int]]] | None]


def encode(
    tokenizer: PreTrainedTokenizerFast,
    *,
    template: str | None = None,
    answers: tuple[str, ...] = ("yes", "no"),
    max_length: int = 512,
    limits: EncodingLimits | None = None,
) -> Encoded:
    """Each of `answers` as a record of its own, "0", "1" ..."""
    if template is not None:
        tokenizer.chat_template = template
    encoder = ConversationEncoder(tokenizer, max_length, limits or EncodingLimits())
    return Encoded(encoder, [encoder.encode(str(i), PROMPT, (text,)) for i, text in enumerate(answers)])


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (HEADER_WITHOUT_BEING_ASKED, NO_GENERATION_PROMPT),
        (OTHERWISE, NO_PREFIX),
        (TWICE, DOUBLED_BOS),
    ],
)
def test_a_faulty_template_is_found_counted_and_refused(
    template: str, fault: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.bos_token = "<|endoftext|>"
    found = encode(tiny_tokenizer, template=template)
    assert found.results == [None, None]
    assert found.encoder.faults == {fault: ["0", "1"]}
    with pytest.raises(DataError, match=r"^2 of 2 pairs: .*template.*\(first: 0, 1\)"):
        found.encoder.check("pairs")
    assert found.encoder.told("pairs")[0].startswith("2 of 2 pairs left out: ")


def test_a_format_whose_answers_follow_the_prompt_needs_no_generation_prompt(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    found = encode(tiny_tokenizer, template=INSTRUCT)
    found.encoder.check("pairs")
    assert found.results[0] is not None
    assert tiny_tokenizer.decode(found.results[0][1][0]) == " yes"


def test_a_sound_template_has_no_fault(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    found = encode(tiny_tokenizer)
    found.encoder.check("pairs")
    assert (found.encoder.faults, found.encoder.told("pairs"), found.encoder.num_seen) == ({}, [], 2)


def test_what_does_not_fit_is_counted_and_refused_above_the_stated_share(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    room = len(encode_turns(tiny_tokenizer, PROMPT, prompt=True)) + len("yes") + 2  # end of turn, newline
    answers = ("yes", "no", "y" * 9)
    limits = EncodingLimits(max_too_long_rate=1 / 3)
    fits = encode(tiny_tokenizer, answers=answers, max_length=room, limits=limits).encoder
    fits.check("pairs")
    assert (fits.too_long, fits.no_room) == (["2"], [])
    over = encode(tiny_tokenizer, answers=answers, max_length=room - 1, limits=limits).encoder
    with pytest.raises(
        DataError,
        match=rf"2 of 3 pairs are longer than data\.max_length={room - 1} tokens \(0 leave no room.*"
        r"more than data\.max_too_long_rate=0\.333",
    ):
        over.check("pairs")
    nothing = encode(tiny_tokenizer, max_length=8).encoder
    assert nothing.no_room == ["0", "1"]
    assert "left out, 2 of them by their prompt alone" in nothing.told("pairs")[0]
    with pytest.raises(DataError, match="none of 2 pairs fits"):
        nothing.check("pairs")


def test_faults_up_to_the_stated_share_are_left_out(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    # A template that swallows one answer.
    template = HEADER_WITHOUT_BEING_ASKED.replace(
        "{% for m in messages %}", "{% for m in messages if m['content'] != 'no' %}"
    )
    asked = template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    limits = EncodingLimits(max_template_fault_rate=0.5)
    found = encode(tiny_tokenizer, template=asked, limits=limits)
    found.encoder.check("pairs")
    assert found.encoder.faults == {NO_PREFIX: ["1"]}
    assert [result is None for result in found.results] == [False, True]
    with pytest.raises(DataError, match=r"1 of 2 pairs: .*max_template_fault_rate=0 "):
        encode(tiny_tokenizer, template=asked).encoder.check("pairs")


def test_the_limits_are_those_of_the_recipe() -> None:
    config = DataConfig(max_too_long_rate=0.2, max_template_fault_rate=0.1)
    assert EncodingLimits.of(config) == EncodingLimits(0.2, 0.1)
