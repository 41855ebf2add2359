"""From a request to what the model reads: one way for every engine that has the tokenizer at hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from equipoise.eval.generation.requests import EngineError, Request


class RefusedError(ValueError):
    """A request that the chat template refuses, or that has no tokens."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A request as the model reads it."""

    row: list[int]
    """Tokens of the prompt."""
    limit: int
    """Most tokens of the answer."""
    choices: Mapping[str, int]
    """Choice -> its first token; choices without one are absent."""
    prompt_end: str
    """The last words of the prompt, which may have opened the thinking."""


def encode_request(tokenizer: Any, request: Request) -> Encoded:
    """Through the chat template, or as text with what the tokenizer puts at its beginning.

    Raises:
        RefusedError: this request cannot be encoded.
        EngineError: messages, and the tokenizer has no chat template.
    """
    if request.messages is not None:
        if tokenizer.chat_template is None:
            raise EngineError(
                f"The tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template; take an "
                "instruction-tuned model, or give its tokenizer one."
            )
        options = {"add_generation_prompt": True, **request.template_options}
        try:
            encoded = tokenizer.apply_chat_template(list(request.messages), return_dict=True, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise RefusedError(f"the chat template refuses the messages: {error}") from error
        row = list(encoded["input_ids"])
    else:
        row = list(tokenizer(request.text)["input_ids"])
        closed = bool(row) and row[-1] == tokenizer.eos_token_id
        if closed and not str(request.text).endswith(tokenizer.eos_token):
            row.pop()  # a tokenizer that closes every text would leave nothing to say
    if not row:
        raise RefusedError("the prompt has no tokens")
    choices = {}
    for choice in request.choices:
        tokens = tokenizer(choice, add_special_tokens=False)["input_ids"]
        if tokens and tokens[0] != tokenizer.unk_token_id:
            choices[choice] = tokens[0]
    return Encoded(row, request.max_new_tokens, choices, tokenizer.decode(row[-8:]))
