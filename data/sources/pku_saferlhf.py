"""PKU-SafeRLHF: two answers to a prompt, which one is safer, which one helps more, and which harms each does."""

from collections.abc import Mapping
from typing import Any

from equipoise.data.config import DataConfig
from equipoise.data.crosswalk import crosswalk
from equipoise.data.records import Records
from equipoise.data.schema import HELPFUL, PreferencePair, Turn
from equipoise.data.sources.hub import FLAG, MAPPING, TEXT, WHOLE, HubSet, read_rows
from equipoise.data.taxonomy import OTHER

_COLUMNS = {
    "prompt": TEXT,
    "response_0": TEXT,
    "response_1": TEXT,
    "is_response_0_safe": FLAG,
    "is_response_1_safe": FLAG,
    "better_response_id": WHOLE,
    "safer_response_id": WHOLE,
}
_LABELLED = {
    **_COLUMNS,
    "response_0_harm_category": MAPPING,
    "response_1_harm_category": MAPPING,
    "response_0_severity_level": WHOLE,
    "response_1_severity_level": WHOLE,
}


def _current(*folders: str) -> HubSet:
    return HubSet(
        repo="PKU-Alignment/PKU-SafeRLHF",
        revision="d79b19b2043c4b168d8d64c61ef4ba4ed1ffe2c0",
        files=tuple(f"data/{folder}/train.jsonl" for folder in folders),
        columns=_LABELLED,
    )


VERSIONS = {
    "all": _current("Alpaca-7B", "Alpaca2-7B", "Alpaca3-8B"),
    "alpaca-7b": _current("Alpaca-7B"),
    "alpaca2-7b": _current("Alpaca2-7B"),
    "alpaca3-8b": _current("Alpaca3-8B"),
    # Neither categories nor severities; its two commits are of 2023, and none is published by its full hash.
    "30k": HubSet("PKU-Alignment/PKU-SafeRLHF-30K", "main", ("round0/train.jsonl.*",), _COLUMNS),
}


def load(version: str, config: DataConfig) -> Records:
    """The pairs of both orders, as `config.preference` says.

    A safety pair prefers the safer answer; its category is that of the harms of the rejected answer, or of the chosen
    one where the rejected has none, and `OTHER` where neither has. A helpful pair prefers the answer that helps more
    whatever it says, and is of the category `helpful`. Pairs whose safer answer is the only unsafe one contradict
    themselves and are left out.
    """
    records = Records()
    for number, row in enumerate(read_rows(VERSIONS[version], config.mirror, config.num_rows), start=1):
        records.num_read = number
        if any(row[name] is None for name in _COLUMNS) or not all(
            row[name].strip() for name in ("prompt", "response_0", "response_1")
        ):
            records.left_out["a text or a label is empty"] += 1
        elif row["response_0"].strip() == row["response_1"].strip():
            records.left_out["both answers are the same"] += 1
        else:
            id = f"pku_saferlhf/{version}:{number}"
            if config.preference in ("safe", "both"):
                _add_safety_pair(records, row, id, config)
            if config.preference in ("helpful", "both"):
                _add_helpful_pair(records, row, id, config)
    return records


def _add_safety_pair(records: Records, row: Mapping[str, Any], id: str, config: DataConfig) -> None:
    chosen, rejected = row["safer_response_id"], 1 - row["safer_response_id"]
    chosen_safe, rejected_safe = row[f"is_response_{chosen}_safe"], row[f"is_response_{rejected}_safe"]
    if not chosen_safe and rejected_safe:
        records.left_out["the answer called safer is the only unsafe one"] += 1
        return
    meta: dict[str, object] = {}
    if chosen_safe == rejected_safe:
        what, rule = ("both_safe", config.both_safe) if chosen_safe else ("both_unsafe", config.both_unsafe)
        _apply(records, rule, what, meta)
        if rule == "drop":
            return
    labels = _labels(row, rejected) or _labels(row, chosen)
    category = crosswalk("pku_saferlhf").category(labels) or OTHER
    if labels:
        meta["labels"] = labels
    if "response_0_severity_level" in row:
        meta["severity"] = [row[f"response_{i}_severity_level"] for i in (chosen, rejected)]
    records.pairs.append(_pair(row, f"{id}:safe", chosen, category, meta))


def _add_helpful_pair(records: Records, row: Mapping[str, Any], id: str, config: DataConfig) -> None:
    chosen = row["better_response_id"]
    meta: dict[str, object] = {}
    if not row[f"is_response_{chosen}_safe"]:
        _apply(records, config.unsafe_chosen, "unsafe_chosen", meta)
        if config.unsafe_chosen == "drop":
            return
    records.pairs.append(_pair(row, f"{id}:helpful", chosen, HELPFUL, meta))


def _apply(records: Records, rule: str, what: str, meta: dict[str, object]) -> None:
    """Count what the recipe says of such pairs; note it in `meta` where it says so."""
    if rule == "drop":
        records.left_out[f"{what}={rule}"] += 1
    else:
        records.notes[f"{what}={rule}"] += 1
    if rule == "mark":
        meta[what] = True


def _pair(
    row: Mapping[str, Any], id: str, chosen: int, category: str, meta: dict[str, object]
) -> PreferencePair:
    turn: Turn = {"role": "user", "content": row["prompt"]}
    return PreferencePair(
        id=id,
        prompt=(turn,),
        chosen=row[f"response_{chosen}"],
        rejected=row[f"response_{1 - chosen}"],
        category=category,
        chosen_safe=row[f"is_response_{chosen}_safe"],
        rejected_safe=row[f"is_response_{1 - chosen}_safe"],
        source="PKU-SafeRLHF",
        meta=meta,
    )


def _labels(row: Mapping[str, Any], answer: int) -> list[str]:
    """The harms of an answer; none in the 30K version, which has no such columns."""
    return [
        label for label, present in (row.get(f"response_{answer}_harm_category") or {}).items() if present
    ]
