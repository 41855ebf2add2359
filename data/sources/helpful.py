"""Sets of helpfulness preferences: UltraFeedback (binarized) and HelpSteer."""

import re
from collections.abc import Mapping
from typing import Any

from equipoise.data.config import DataConfig
from equipoise.data.records import Records
from equipoise.data.schema import HELPFUL, PreferencePair, Turn
from equipoise.data.sources.hub import NUMBER, TEXT, TURNS, WHOLE, HubSet, read_rows
from equipoise.data.splits import normalise_prompt

ULTRAFEEDBACK = {
    "prefs": HubSet(
        repo="HuggingFaceH4/ultrafeedback_binarized",
        revision="3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
        files=("data/train_prefs-*.parquet",),
        columns={
            "prompt": TEXT,
            "chosen": TURNS,
            "rejected": TURNS,
            "score_chosen": NUMBER,
            "score_rejected": NUMBER,
        },
    )
}

_STEER = {
    "prompt": TEXT,
    "response": TEXT,
    "helpfulness": WHOLE,
    "correctness": WHOLE,
    "coherence": WHOLE,
    "complexity": WHOLE,
    "verbosity": WHOLE,
}

HELPSTEER = {
    "2": HubSet("nvidia/HelpSteer2", "3995c6a6787852eabe34ce68229286516aa54313", ("train.jsonl.gz",), _STEER),
    "1": HubSet("nvidia/HelpSteer", "2f91e450b27493b37b4be40e1d040cdfe96136ce", ("train.jsonl.gz",), _STEER),
}

_EXTRA_ID = re.compile(r"<extra_id_1>(User|Assistant)\s*")


def load_ultrafeedback(version: str, config: DataConfig) -> Records:
    """One pair a row, all `helpful`; rows whose answers have the same score say nothing and are left out."""
    records = Records()
    for number, row in enumerate(read_rows(ULTRAFEEDBACK[version], config.mirror, config.num_rows), start=1):
        records.num_read = number
        reason = _ultrafeedback_fault(row)
        if reason:
            records.left_out[reason] += 1
            continue
        records.pairs.append(
            PreferencePair(
                id=f"ultrafeedback_binarized:{number}",
                prompt=_turns(row["chosen"][:-1]),
                chosen=row["chosen"][-1]["content"],
                rejected=row["rejected"][-1]["content"],
                category=HELPFUL,
                source="UltraFeedback binarized",
                meta={"scores": [row["score_chosen"], row["score_rejected"]]},
            )
        )
    return records


def _ultrafeedback_fault(row: Mapping[str, Any]) -> str | None:
    chosen, rejected = row["chosen"] or [], row["rejected"] or []
    if min(len(chosen), len(rejected)) < 2 or not all(
        (turn["content"] or "").strip() for turn in chosen + rejected
    ):
        return "a turn is empty or missing"
    if (
        chosen[-1]["role"] != "assistant"
        or rejected[-1]["role"] != "assistant"
        or chosen[-2]["role"] != "user"
    ):
        return "the conversation does not end with an answer to the user"
    if _turns(chosen[:-1]) != _turns(rejected[:-1]):
        return "the conversations part before the last answer"
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        return "both answers are the same"
    if (
        row["score_chosen"] is None
        or row["score_rejected"] is None
        or row["score_chosen"] <= row["score_rejected"]
    ):
        return "the chosen answer has no higher score"
    return None


def load_helpsteer(version: str, config: DataConfig) -> Records:
    """One pair a prompt, all `helpful`: its most helpful answer over its least helpful one.

    Answers are rated 0 to 4 one by one; of equally helpful ones the more correct counts as better. Prompts whose best
    and worst answer are equally helpful are left out, and so are answers between the two.
    """
    records = Records()
    answers: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_rows(HELPSTEER[version], config.mirror, config.num_rows), start=1):
        records.num_read = number
        if (
            not all((row[name] or "").strip() for name in ("prompt", "response"))
            or row["helpfulness"] is None
        ):
            records.left_out["a text or a rating is empty"] += 1
        else:
            answers.setdefault(normalise_prompt(row["prompt"]), []).append({**row, "number": number})
    for rated in answers.values():
        rated.sort(key=lambda row: (row["helpfulness"], row["correctness"] or 0))
        worst, best = rated[0], rated[-1]
        if len(rated) < 2:
            records.left_out["the only answer to its prompt"] += 1
        elif best["helpfulness"] == worst["helpfulness"]:
            records.left_out["no answer to its prompt is more helpful than another"] += len(rated)
        else:
            if len(rated) > 2:
                records.left_out["neither the best nor the worst answer to its prompt"] += len(rated) - 2
            records.pairs.append(
                PreferencePair(
                    id=f"helpsteer/{version}:{best['number']}",
                    prompt=_steer_turns(best["prompt"]),
                    chosen=best["response"],
                    rejected=worst["response"],
                    category=HELPFUL,
                    source=f"HelpSteer {version}",
                    meta={"helpfulness": [best["helpfulness"], worst["helpfulness"]]},
                )
            )
    return records


def _steer_turns(prompt: str) -> tuple[Turn, ...]:
    """Turns of a prompt in which `<extra_id_1>Assistant` and `<extra_id_1>User` stand between them."""
    first, *parts = _EXTRA_ID.split(prompt)
    turns: list[Turn] = [{"role": "user", "content": first.strip()}]
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": speaker.lower(), "content": said.strip()})
    return tuple(turns)


def _turns(turns: list[dict[str, str]]) -> tuple[Turn, ...]:
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
