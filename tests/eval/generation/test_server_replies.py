import pytest

from equipoise.eval.generation.requests import Finish, Request
from equipoise.eval.generation.server_replies import (
    GarbledError,
    error_message,
    first_token_logprob,
    is_context_error,
    reply_of,
    request_body,
)
from equipoise.eval.generation.settings import GenerationSettings

CHAT = Request(messages=({"role": "user", "content": "Hi"},), max_new_tokens=8, choices=("safe", "unsafe"))
TEXT = Request(text="Hi", choices=("safe", "unsafe"))


def answered(message: dict[str, object], finish: str = "stop", **choice: object) -> dict[str, object]:
    return {
        "choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish, **choice}],
        "usage": {"completion_tokens": 3},
    }


def test_a_chat_body_carries_sampling_seed_and_template_options() -> None:
    request = Request(
        messages=({"role": "user", "content": "Hi"},),
        max_new_tokens=8,
        template_options={"guardian_config": {"risk_name": "harm"}, "reasoning_effort": "low"},
    )
    assert request_body(request, "m", GenerationSettings(temperature=0.5, top_p=0.9, seed=7), 20) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": request.seed(7),
        "reasoning_effort": "low",
        "chat_template_kwargs": {"guardian_config": {"risk_name": "harm"}},
    }


def test_log_probabilities_are_asked_for_only_where_there_are_choices() -> None:
    chat = request_body(CHAT, "m", GenerationSettings(), 5)
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, 5)
    text = request_body(TEXT, "m", GenerationSettings(), 5)
    assert (text["prompt"], text["logprobs"], "messages" in text) == ("Hi", 5, False)


def test_a_chat_completion() -> None:
    top = [
        {"token": "un", "logprob": -0.25},
        {"token": "safe", "logprob": -1.5},
        {"token": "s", "logprob": -9.0},
    ]
    logprobs = {"content": [{"token": "un", "logprob": -0.25, "top_logprobs": top}, {"token": "safe"}]}
    reply = reply_of(answered({"content": "unsafe"}, logprobs=logprobs), CHAT)
    assert (reply.text, reply.finish, reply.num_tokens) == ("unsafe", Finish.STOP, 3)
    assert reply.choice_logprobs == {"safe": -1.5, "unsafe": -0.25}


def test_a_text_completion() -> None:
    choice = {
        "text": " safe",
        "finish_reason": "length",
        "logprobs": {"top_logprobs": [{" safe": -0.1, "!": -4}]},
    }
    reply = reply_of({"choices": [choice]}, TEXT)
    assert (reply.text, reply.finish, reply.num_tokens) == (" safe", Finish.LENGTH, 0)
    assert reply.choice_logprobs == {"safe": -0.1}


def test_choices_are_read_behind_white_space() -> None:
    top = [{"token": "unsafe", "logprob": -0.25}, {"token": "safe", "logprob": -1.5}]
    blank = {
        "token": "\n\n",
        "top_logprobs": [{"token": "\n\n", "logprob": 0.0}, {"token": "safe", "logprob": -9.0}],
    }
    reply = reply_of(
        answered(
            {"content": "\n\nunsafe"}, logprobs={"content": [blank, {"token": "unsafe", "top_logprobs": top}]}
        ),
        CHAT,
    )
    assert reply.choice_logprobs == {"safe": -1.5, "unsafe": -0.25}
    assert reply_of(answered({"content": "\n"}, logprobs={"content": [blank]}), CHAT).choice_logprobs == {}
    choice = {
        "text": "\n safe",
        "finish_reason": "stop",
        "logprobs": {"tokens": ["\n", " safe"], "top_logprobs": [{"\n": 0.0, "safe": -9.0}, {" safe": -0.1}]},
    }
    assert reply_of({"choices": [choice]}, TEXT).choice_logprobs == {"safe": -0.1}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_kept_apart_and_has_no_first_position_of_an_answer(name: str) -> None:
    logprobs = {"content": [{"top_logprobs": [{"token": "safe", "logprob": -0.1}]}]}
    reply = reply_of(answered({"content": "0", name: "It is safe."}, logprobs=logprobs), CHAT)
    assert (reply.text, reply.reasoning, reply.choice_logprobs) == ("0", "It is safe.", {})


def test_reasoning_that_the_server_left_in_the_text_is_told_apart() -> None:
    reply = reply_of(answered({"content": "<think>unsafe?</think>\n\nsafe"}), CHAT)
    assert (reply.text, reply.reasoning) == ("safe", "unsafe?")


def test_null_content_is_no_text_and_a_refusal_is_one() -> None:
    null = reply_of(answered({"content": None, "reasoning": "so long"}, "length"), CHAT)
    assert (null.text, null.finish, null.reasoning) == (None, Finish.LENGTH, "so long")
    assert reply_of(answered({"content": None, "refusal": "No."}), CHAT).text == "No."


def test_an_answer_that_a_filter_withheld_has_failed() -> None:
    reply = reply_of(answered({"content": "I"}, "content_filter"), CHAT)
    assert (reply.text, reply.finish) == (None, Finish.FAILED)


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        "ok",
        {},
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": [{"type": "text"}]}}]},
        {"choices": [{"message": {"content": "safe"}, "logprobs": {"content": [{"top_logprobs": [{}]}]}}]},
    ],
)
def test_what_is_no_completion_is_garbled(payload: object) -> None:
    with pytest.raises(GarbledError):
        reply_of(payload, CHAT)


def test_the_first_token_of_a_choice() -> None:
    assert first_token_logprob("Yes", {"Yes": -2.0, "▁Yes": -1.0, "No": -0.5}) == -1.0
    assert first_token_logprob("unsafe", {"un": -1.0, "uns": -2.0, "safe": -0.1}) == -2.0
    assert first_token_logprob("unsafe", {"u": -1.0, "": -0.1, "safe": -0.2}) is None
    assert first_token_logprob("0", {"0": -0.3, "01": -0.2}) == -0.3


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("This model's maximum context length is 4096 tokens. However, you requested 9000 tokens", "400"),
        ("The decoder prompt (length 9000) is longer than the maximum model length of 4096", "400"),
        ("the request exceeds the available context size, try increasing it", "exceed_context_size_error"),
        ("The input (9000 tokens) is longer than the model's context length (4096 tokens).", ""),
        ("`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 9000", "Validation"),
        ("too much", "context_length_exceeded"),
    ],
)
def test_servers_say_in_different_words_that_a_prompt_does_not_fit(message: str, code: str) -> None:
    assert is_context_error(message, code)


@pytest.mark.parametrize(
    "message", ["temperature must be at most 2", "unknown field 'seed'", "invalid role 'bot'", ""]
)
def test_other_errors_are_not_about_the_context(message: str) -> None:
    assert not is_context_error(message, "400")


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"error": {"message": "no", "code": "c"}}, ("no", "c")),
        ({"object": "error", "message": "no", "code": 400}, ("no", "400")),
        ({"error": "no"}, ("no", "")),
        ({"detail": "no"}, ("no", "")),
        (None, ("", "")),
        ([1], ("", "")),
    ],
)
def test_an_error_in_any_shape(payload: object, expected: tuple[str, str]) -> None:
    assert error_message(payload) == expected
