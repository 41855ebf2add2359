"""Conversations through a tokenizer's chat template, and what is wrong with the template or too long, with counts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError
from equipoise.data.schema import Turn

NO_PREFIX = "no_prefix"
NO_GENERATION_PROMPT = "no_generation_prompt"
DOUBLED_BOS = "doubled_bos"

FAULTS = {
    NO_PREFIX: "with this chat template the tokens of the prompt are not a prefix of those of prompt + answer, so the "
    "answer cannot be told apart; use a template that renders the prompt alike with and without an answer",
    NO_GENERATION_PROMPT: "this chat template ignores add_generation_prompt and puts a header before the answer, so "
    "the model would be asked without it and trained to say it; use a template that ends a prompt with that header",
    DOUBLED_BOS: "the conversation begins with two beginning-of-sequence tokens; take one of them out of the template",
}
"""What a chat template does wrong, by name, and what to do."""


@dataclass(frozen=True)
class EncodingLimits:
    """Above which share of records left out nothing is trained; a recipe's `data` has them."""

    max_too_long_rate: float = DataConfig.max_too_long_rate
    max_template_fault_rate: float = DataConfig.max_template_fault_rate

    @classmethod
    def of(cls, config: DataConfig) -> "EncodingLimits":
        """Those of a recipe."""
        return cls(config.max_too_long_rate, config.max_template_fault_rate)


@dataclass
class ConversationEncoder:
    """Token ids of prompts and their answers; what cannot be trained on is left out and counted.

    Nothing is truncated: a conversation that is longer than max_length would lose the end of its answer, or all of it.
    """

    tokenizer: Any
    max_length: int
    limits: EncodingLimits = field(default_factory=EncodingLimits)
    num_seen: int = 0
    too_long: list[str] = field(default_factory=list)
    """Ids of records longer than max_length, in order."""
    no_room: list[str] = field(default_factory=list)
    """Those of `too_long` whose prompt alone fills max_length."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Fault -> ids of the records that have it; a record is counted by its first."""

    def encode(
        self, id: str, prompt: Sequence[Turn], answers: Sequence[str]
    ) -> tuple[list[int], list[list[int]]] | None:
        """(token ids of the prompt with the assistant's header, of each answer behind it); None: left out."""
        self.num_seen += 1
        prompt_ids = encode_turns(self.tokenizer, prompt, prompt=True)
        answer_ids = [encode_answer(self.tokenizer, prompt, prompt_ids, answer) for answer in answers]
        fault = self._fault(prompt, prompt_ids, answers, answer_ids)
        if fault is not None:
            self.faults.setdefault(fault, []).append(id)
            return None
        if len(prompt_ids) + max(map(len, answer_ids)) > self.max_length:
            self.too_long.append(id)
            if len(prompt_ids) >= self.max_length:
                self.no_room.append(id)
            return None
        return prompt_ids, answer_ids

    def check(self, what: str) -> None:
        """Raise DataError where more than the allowed share was left out, or everything; `what`: pairs, answers."""
        for fault, ids in self.faults.items():
            if len(ids) > self.limits.max_template_fault_rate * self.num_seen:
                raise DataError(
                    f"{len(ids)} of {self.num_seen} {what}: {FAULTS[fault]} (first: {', '.join(ids[:3])}). Up to "
                    f"data.max_template_fault_rate={self.limits.max_template_fault_rate:g} of them are left out."
                )
        num_long, num_faulty = len(self.too_long), sum(map(len, self.faults.values()))
        if num_long + num_faulty == self.num_seen:
            raise DataError(
                f"none of {self.num_seen} {what} fits into data.max_length={self.max_length} tokens; raise "
                "data.max_length"
            )
        if num_long > self.limits.max_too_long_rate * self.num_seen:
            raise DataError(
                f"{num_long} of {self.num_seen} {what} are longer than data.max_length={self.max_length} tokens "
                f"({len(self.no_room)} leave no room for an answer at all; first: {', '.join(self.too_long[:3])}), "
                f"more than data.max_too_long_rate={self.limits.max_too_long_rate:g}; raise one of them."
            )

    def told(self, what: str) -> list[str]:
        """A line for the terminal for every reason that something was left out."""
        lines = []
        if self.too_long:
            no_room = f", {len(self.no_room)} of them by their prompt alone" if self.no_room else ""
            lines.append(
                f"{len(self.too_long)} of {self.num_seen} {what} are longer than data.max_length={self.max_length} "
                f"tokens and left out{no_room} (first: {', '.join(self.too_long[:3])})"
            )
        lines += [
            f"{len(ids)} of {self.num_seen} {what} left out: {FAULTS[fault]} (first: {', '.join(ids[:3])})"
            for fault, ids in self.faults.items()
        ]
        return lines

    def _fault(
        self,
        prompt: Sequence[Turn],
        prompt_ids: list[int],
        answers: Sequence[str],
        answer_ids: list[list[int]],
    ) -> str | None:
        if not all(answer_ids):
            return NO_PREFIX
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt_ids[:2] == [bos, bos]:
            return DOUBLED_BOS
        plain, asked = (_render(self.tokenizer, prompt, prompt=value) for value in (False, True))
        # Some formats need none: "[INST] question [/INST]" is followed by the answer itself.
        if plain == asked:
            for answer in answers:
                whole = _render(self.tokenizer, [*prompt, _assistant(answer)], prompt=False)
                if not whole[len(plain) :].lstrip().startswith(answer.strip()[:20]):
                    return NO_GENERATION_PROMPT
        return None


def encode_turns(tokenizer: Any, turns: Sequence[Turn], *, prompt: bool) -> list[int]:
    """Token ids of a conversation through the chat template, with the assistant's header for a prompt."""
    encoded = tokenizer.apply_chat_template(
        list(turns), add_generation_prompt=prompt, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def encode_answer(tokenizer: Any, prompt: Sequence[Turn], prompt_ids: list[int], text: str) -> list[int]:
    """Token ids of the answer `text` behind `prompt_ids`; empty where the template changes the prompt's tokens."""
    whole = encode_turns(tokenizer, [*prompt, _assistant(text)], prompt=False)
    return whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else []


def _assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def _render(tokenizer: Any, turns: Sequence[Turn], *, prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(list(turns), add_generation_prompt=prompt, tokenize=False)
    return text
