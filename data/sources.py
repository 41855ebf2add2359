"""Where the records come from: the shipped samples, or a user's own preference pairs.

`load_data` is what a run calls; the schema of the files is in `data/README.md`.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from equipoise.data.errors import DataError
from equipoise.data.jsonl import Line, read_records
from equipoise.data.schema import HELPFUL, Exchange, LabelledExchange, PreferencePair, Turn
from equipoise.data.taxonomy import OTHER

SAMPLES = Path(__file__).with_name("samples")

_PAIR_FIELDS = frozenset(
    {"id", "prompt", "chosen", "rejected", "category", "chosen_safe", "rejected_safe", "source"}
)


@dataclass(frozen=True)
class SafetyData:
    """Everything a run trains on and is judged on."""

    safety_pairs: list[PreferencePair]
    helpful_pairs: list[PreferencePair]
    harmful_prompts: list[Exchange]
    """Held out; the unsafe rate is measured on the answers to these."""
    lookalike_prompts: list[Exchange]
    """Benign prompts that merely look dangerous; over-refusal is measured on these."""
    helpful_prompts: list[Exchange]
    """Held out, each with a reference answer in `response`."""
    labelled: list[LabelledExchange]
    counts: dict[str, int] = field(default_factory=dict)
    """What became of a user's file: pairs `read`, in `other`, `held_out`, and `dropped_in_suites`."""

    def summary(self) -> str:
        """One line for the terminal: how many of what, and what was left out."""
        text = (
            f"{len(self.safety_pairs)} safety pairs and {len(self.helpful_pairs)} helpful pairs; judged on "
            f"{len(self.harmful_prompts)} harmful, {len(self.lookalike_prompts)} look-alike and "
            f"{len(self.helpful_prompts)} helpful prompts"
        )
        if not self.counts:
            return text
        return (
            f"{text} (of {self.counts['read']} pairs read: {self.counts['other']} in category OTHER, "
            f"{self.counts['held_out']} held out, {self.counts['dropped_in_suites']} dropped because a shipped suite "
            "asks the same)"
        )


def load_data(source: str, path: str | None, held_out_fraction: float, seed: int) -> SafetyData:
    """The data of a run.

    source: `samples`, or `jsonl` for the user's own pairs at `path`. These replace the shipped training pairs; the
    shipped suites stay. Pairs whose prompt occurs in a suite are dropped, and about `held_out_fraction` of the
    prompts are kept out of training and added to the suites: hazards to the harmful prompts, `helpful` to the
    helpful ones with the chosen answer as reference. All of it is counted in `counts`.

    Raises `DataError`.
    """
    samples = load_samples()
    if source == "samples":
        return samples
    if source != "jsonl":
        raise DataError(f"data.source is {source!r}; possible: samples, jsonl.")
    if path is None:
        raise DataError("data.source is jsonl but data.path names no file; add data.path=FILE.")
    pairs = load_jsonl_pairs(path)
    suites = samples.harmful_prompts + samples.lookalike_prompts + samples.helpful_prompts
    in_suites = {normalise_prompt(exchange.prompt) for exchange in suites}
    fresh = [pair for pair in pairs if normalise_prompt(pair.prompt) not in in_suites]
    held_out = [pair for pair in fresh if _unit_hash(pair.prompt, seed) < held_out_fraction]
    training = [pair for pair in fresh if _unit_hash(pair.prompt, seed) >= held_out_fraction]
    if not training:
        raise DataError(
            f"{path} leaves no pair to train on: of {len(pairs)}, {len(pairs) - len(fresh)} have a prompt of a "
            f"shipped suite and {len(held_out)} are held out (data.held_out_fraction={held_out_fraction:g})."
        )
    asked = _one_a_prompt(held_out)
    return replace(
        samples,
        safety_pairs=[pair for pair in training if pair.category != HELPFUL],
        helpful_pairs=[pair for pair in training if pair.category == HELPFUL],
        harmful_prompts=samples.harmful_prompts
        + [_held_out_exchange(pair, None) for pair in asked if pair.category != HELPFUL],
        helpful_prompts=samples.helpful_prompts
        + [_held_out_exchange(pair, pair.chosen) for pair in asked if pair.category == HELPFUL],
        counts={
            "read": len(pairs),
            "other": sum(pair.category == OTHER for pair in pairs),
            "held_out": len(held_out),
            "dropped_in_suites": len(pairs) - len(fresh),
        },
    )


def load_samples() -> SafetyData:
    """The shipped records, written for this project."""
    return SafetyData(
        safety_pairs=load_jsonl_pairs(SAMPLES / "safety_pairs.jsonl"),
        helpful_pairs=load_jsonl_pairs(SAMPLES / "helpful_pairs.jsonl"),
        harmful_prompts=read_records(SAMPLES / "harmful_prompts.jsonl", _exchange),
        lookalike_prompts=read_records(SAMPLES / "lookalike_prompts.jsonl", _exchange),
        helpful_prompts=read_records(SAMPLES / "helpful_prompts.jsonl", _exchange),
        labelled=read_records(SAMPLES / "labelled_exchanges.jsonl", _labelled_exchange),
    )


def load_jsonl_pairs(path: str | Path) -> list[PreferencePair]:
    """Preference pairs, one JSON object a line; a pair without `id` gets `FILE:LINE`.

    Raises `DataError` with every problem of the file.
    """
    path = Path(path).expanduser()

    def parse(line: Line) -> PreferencePair:
        pair = PreferencePair(
            id=line.optional_text("id", f"{path.stem}:{line.number}"),
            prompt=line.prompt(),
            chosen=line.text("chosen"),
            rejected=line.text("rejected"),
            category=line.category(),
            chosen_safe=line.flag("chosen_safe"),
            rejected_safe=line.flag("rejected_safe"),
            source=line.optional_text("source"),
            meta=line.meta(_PAIR_FIELDS),
        )
        if pair.chosen and pair.chosen.strip() == pair.rejected.strip():
            line.problem("rejected", "is the same as chosen")
        return pair

    return read_records(path, parse)


def normalise_prompt(prompt: str | Sequence[Turn]) -> str:
    """The form by which prompts are compared: two that differ in case, punctuation or spacing are one.

    NFKC, casefolded, apostrophes removed, other punctuation and control characters as spaces. Turns keep
    their order; roles don't count. A prompt of nothing but punctuation keeps it.
    """
    text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
    text = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\u2019", "")
    words = "".join(" " if unicodedata.category(char)[0] in "PZC" else char for char in text).split()
    return " ".join(words or text.split())


def _exchange(line: Line) -> Exchange:
    return Exchange(
        id=line.text("id"),
        prompt=line.prompt(),
        category=line.category(),
        response=line.optional_text("response") or None,
        source=line.optional_text("source"),
    )


def _labelled_exchange(line: Line) -> LabelledExchange:
    return LabelledExchange(
        id=line.text("id"),
        prompt=line.prompt(),
        response=line.text("response"),
        category=line.category(),
        safe=line.flag("safe"),
        refusal=line.flag("refusal"),
        source=line.optional_text("source"),
    )


def _held_out_exchange(pair: PreferencePair, reference: str | None) -> Exchange:
    return Exchange(pair.id, pair.prompt, pair.category, response=reference, source=pair.source)


def _one_a_prompt(pairs: list[PreferencePair]) -> list[PreferencePair]:
    """The first pair of every prompt: a suite asks a question once."""
    first: dict[str, PreferencePair] = {}
    for pair in pairs:
        first.setdefault(normalise_prompt(pair.prompt), pair)
    return list(first.values())


def _unit_hash(prompt: Sequence[Turn], seed: int) -> float:
    """A number in [0, 1) that depends on prompt and seed alone: the split survives a reordered or longer file."""
    key = f"{seed}\n{normalise_prompt(prompt)}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) / 2**64
