"""Sets of answers that somebody judged one by one: BeaverTails, WildGuardMix, Aegis 2.0, Do-Not-Answer.

Their answers are labelled exchanges (what judges are fitted on, and unpaired training), and make pairs where one prompt
has a better and a worse answer (`pairing.py`).
"""

from collections.abc import Mapping
from typing import Any

from equipoise.data.config import DataConfig
from equipoise.data.crosswalk import crosswalk
from equipoise.data.records import Records
from equipoise.data.schema import HELPFUL, Exchange, LabelledExchange
from equipoise.data.sources.hub import FLAG, MAPPING, TEXT, WHOLE, HubSet, read_rows
from equipoise.data.sources.pairing import adopt_categories, pair_up, settle
from equipoise.data.taxonomy import OTHER

_BEAVERTAILS = {"prompt": TEXT, "response": TEXT, "category": MAPPING, "is_safe": FLAG}
_BEAVERTAILS_REVISION = "8401fe609d288129cc684a9b3be6a93e41cfe678"

BEAVERTAILS = {
    "30k": HubSet(
        "PKU-Alignment/BeaverTails", _BEAVERTAILS_REVISION, ("round0/30k/train.jsonl.gz",), _BEAVERTAILS
    ),
    "330k": HubSet(
        "PKU-Alignment/BeaverTails", _BEAVERTAILS_REVISION, ("round0/330k/train.jsonl.xz",), _BEAVERTAILS
    ),
}

WILDGUARDMIX = {
    "train": HubSet(
        repo="allenai/wildguardmix",
        revision="d29c47f41c8b51348b5c8e8c81c039b3132b66d1",
        files=("train/wildguard_train.parquet",),
        columns={
            "prompt": TEXT,
            "adversarial": FLAG,
            "response": TEXT,
            "prompt_harm_label": TEXT,
            "response_refusal_label": TEXT,
            "response_harm_label": TEXT,
            "subcategory": TEXT,
        },
    )
}

AEGIS2 = {
    "train": HubSet(
        repo="nvidia/Aegis-AI-Content-Safety-Dataset-2.0",
        revision="d86bb8bedff51d25ac834ab7838f1cc61acb7a2c",
        files=("train.json", "refusals_train.json"),
        columns={
            "prompt": TEXT,
            "response": TEXT,
            "prompt_label": TEXT,
            "response_label": TEXT,
            "response_label_source": TEXT,
            "violated_categories": TEXT,
        },
    )
}

ANSWERERS = ("GPT4", "ChatGPT", "Claude", "ChatGLM2", "llama2-7b-chat", "vicuna-7b")
"""The models whose answers Do-Not-Answer has."""

DO_NOT_ANSWER = {
    "train": HubSet(
        repo="LibrAI/do-not-answer",
        revision="74e74f2e4507ef256fe536f78a776f4a1ff67955",
        files=("data/train-*.parquet",),
        columns={
            "question": TEXT,
            "types_of_harm": TEXT,
            **{f"{model}_response": TEXT for model in ANSWERERS},
            **{f"{model}_harmful": WHOLE for model in ANSWERERS},
        },
    )
}


def load_beavertails(version: str, config: DataConfig) -> Records:
    """Answers with their harms; the same answer judged by several annotators becomes one, by majority."""
    records = Records()
    for number, row in enumerate(read_rows(BEAVERTAILS[version], config.mirror, config.num_rows), start=1):
        records.num_read = number
        if _empty(row, "prompt", "response") or row["is_safe"] is None:
            records.left_out["a text or a label is empty"] += 1
            continue
        labels = [label for label, present in (row["category"] or {}).items() if present]
        records.labelled.append(
            _exchange(
                id=f"beavertails/{version}:{number}",
                prompt=row["prompt"],
                response=row["response"],
                category=crosswalk("beavertails").category(labels) or OTHER,
                labels=labels,
                safe=row["is_safe"],
                source=f"BeaverTails {version}",
            )
        )
    settle(records)
    records.labelled = adopt_categories(records.labelled)
    pair_up(records)
    return records


def load_wildguardmix(version: str, config: DataConfig) -> Records:
    """Prompts, harmful or not, and answers with refusal and harm labels; harmless prompts are `helpful`."""
    records = Records()
    for number, row in enumerate(read_rows(WILDGUARDMIX[version], config.mirror, config.num_rows), start=1):
        records.num_read = number
        if _empty(row, "prompt") or row["prompt_harm_label"] not in ("harmful", "unharmful"):
            records.left_out["the prompt or its label is empty"] += 1
            continue
        harmless = row["prompt_harm_label"] == "unharmful"
        labels = [row["subcategory"]] if row["subcategory"] else []
        category = HELPFUL if harmless else crosswalk("wildguard").category(labels) or OTHER
        id = f"wildguardmix:{number}"
        if not _empty(row, "response"):
            records.labelled.append(
                _exchange(
                    id=id,
                    prompt=row["prompt"],
                    response=row["response"],
                    category=category,
                    labels=labels,
                    safe=_as_flag(row["response_harm_label"], "unharmful", "harmful"),
                    refusal=_as_flag(row["response_refusal_label"], "refusal", "compliance"),
                    source="WildGuardMix",
                )
            )
        else:
            records.prompts.append(_prompt(id, row["prompt"], category, labels, "WildGuardMix"))
    settle(records)
    pair_up(records)
    return records


def load_aegis2(version: str, config: DataConfig) -> Records:
    """Prompts and answers with safe or unsafe for each; a prompt that was judged safe is `helpful`.

    Redacted prompts (of the Suicide Detection set) and rows without a verdict are left out.
    """
    records = Records()
    for number, row in enumerate(read_rows(AEGIS2[version], config.mirror, config.num_rows), start=1):
        records.num_read = number
        if row["prompt"] == "REDACTED":
            records.left_out["the prompt is redacted"] += 1
            continue
        if _empty(row, "prompt") or row["prompt_label"] not in ("safe", "unsafe"):
            records.left_out["the prompt or its label is empty"] += 1
            continue
        labels = [label.strip() for label in (row["violated_categories"] or "").split(",") if label.strip()]
        harmless = row["prompt_label"] == "safe" and row["response_label"] != "unsafe"
        category = HELPFUL if harmless else crosswalk("aegis2").category(labels) or OTHER
        id = f"aegis2:{number}"
        if not _empty(row, "response"):
            records.labelled.append(
                _exchange(
                    id=id,
                    prompt=row["prompt"],
                    response=row["response"],
                    category=category,
                    labels=labels,
                    safe=_as_flag(row["response_label"], "safe", "unsafe"),
                    refusal=True if row["response_label_source"] == "refusal_data_augmentation" else None,
                    source="Aegis 2.0",
                )
            )
        else:
            records.prompts.append(_prompt(id, row["prompt"], category, labels, "Aegis 2.0"))
    settle(records)
    pair_up(records)
    return records


def load_do_not_answer(version: str, config: DataConfig) -> Records:
    """Questions no model should follow, each with the answers of six models; refusals are not labelled."""
    records = Records()
    for number, row in enumerate(read_rows(DO_NOT_ANSWER[version], config.mirror, config.num_rows), start=1):
        records.num_read = number
        if _empty(row, "question"):
            records.left_out["the question is empty"] += 1
            continue
        labels = [row["types_of_harm"]] if row["types_of_harm"] else []
        category = crosswalk("do_not_answer").category(labels) or OTHER
        answered = False
        for model in ANSWERERS:
            if not _empty(row, f"{model}_response"):
                answered = True
                harmful = row[f"{model}_harmful"]
                records.labelled.append(
                    _exchange(
                        id=f"do_not_answer:{number}:{model}",
                        prompt=row["question"],
                        response=row[f"{model}_response"],
                        category=category,
                        labels=labels,
                        safe=None if harmful is None else not harmful,
                        source=f"Do-Not-Answer, {model}",
                    )
                )
        if not answered:
            records.prompts.append(
                _prompt(f"do_not_answer:{number}", row["question"], category, labels, "Do-Not-Answer")
            )
    settle(records)
    pair_up(records)
    return records


def _exchange(
    *,
    id: str,
    prompt: str,
    response: str,
    category: str,
    labels: list[str],
    safe: bool | None,
    source: str,
    refusal: bool | None = None,
) -> LabelledExchange:
    turns = ({"role": "user", "content": prompt},)
    return LabelledExchange(id, turns, response, category, safe, refusal, source, _meta(labels))


def _prompt(id: str, prompt: str, category: str, labels: list[str], source: str) -> Exchange:
    turns = ({"role": "user", "content": prompt},)
    return Exchange(id, turns, category, source=source, meta=_meta(labels))


def _meta(labels: list[str]) -> dict[str, object]:
    return {"labels": labels} if labels else {}


def _empty(row: Mapping[str, Any], *names: str) -> bool:
    return any(not (row[name] or "").strip() for name in names)


def _as_flag(value: str | None, true: str, false: str) -> bool | None:
    return {true: True, false: False}.get(value or "")
