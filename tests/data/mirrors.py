"""Local copies of data sets with upstream's layout and columns, their texts written for these tests."""

import gzip
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from equipoise.data.crosswalk import crosswalk
from equipoise.data.sources.labelled import ANSWERERS


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """JSON lines (.jsonl, .jsonl.gz, .jsonl.xz), a JSON array (.json) or parquet, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(lines))
    else:
        path.write_bytes(lines)
    return path


def flags(names: Sequence[str], present: Sequence[str]) -> dict[str, bool]:
    """A column of labels, each true or false."""
    return {name: name in present for name in names}


def pku_row(
    number: int,
    safe: tuple[bool, bool],
    safer: int,
    better: int,
    harms: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> dict[str, Any]:
    """A row of PKU-SafeRLHF."""
    names = crosswalk("pku_saferlhf").labels
    return {
        "prompt": f"How do I borrow bicycle number {number}?",
        "response_0": f"Ask its owner, number {number}.",
        "response_1": f"Just take it, number {number}.",
        "prompt_source": "made up",
        "response_0_source": "Alpaca-7B",
        "response_1_source": "Alpaca-7B",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "response_0_harm_category": flags(names, harms[0]),
        "response_1_harm_category": flags(names, harms[1]),
        "response_0_severity_level": 0 if safe[0] else 2,
        "response_1_severity_level": 0 if safe[1] else 2,
        "better_response_id": better,
        "safer_response_id": safer,
        "response_0_sha256": "0" * 64,
        "response_1_sha256": "1" * 64,
    }


CARD = """---
configs:
- config_name: wildguardtrain
  data_files:
  - {split: train, path: train/wildguard_train.parquet}
- config_name: wildguardtest
  data_files:
  - {split: test, path: test/wildguard_test.parquet}
dataset_info:
- config_name: wildguardtrain
  features:
  - {name: prompt, dtype: string}
  splits:
  - {name: train, num_examples: 86759}
---
"""
"""A card as upstream's: two configurations without a default, and sizes."""

PKU_30K_COLUMNS = (
    "prompt",
    "response_0",
    "response_1",
    "is_response_0_safe",
    "is_response_1_safe",
    "better_response_id",
    "safer_response_id",
)


def pku_rows() -> list[dict[str, Any]]:
    """One row of every kind."""
    return [
        pku_row(1, (True, False), safer=0, better=1, harms=((), ("Economic Crime",))),
        pku_row(2, (False, True), safer=1, better=1, harms=(("Violence", "Animal Abuse"), ())),
        pku_row(3, (True, True), safer=0, better=0),
        pku_row(4, (False, False), safer=1, better=0, harms=(("Drugs",), ("Privacy Violation",))),
        pku_row(5, (True, False), safer=1, better=0, harms=((), ("Cybercrime",))),  # contradicts itself
        pku_row(6, (True, False), safer=0, better=0) | {"response_1": None},
        pku_row(7, (True, False), safer=0, better=0) | {"response_1": "Ask its owner, number 7. "},
    ]


def write_pku(mirror: Path, rows: Sequence[dict[str, Any]] | None = None) -> None:
    """The three configurations with the same rows, and the 30K version with the first five of them."""
    rows = pku_rows() if rows is None else rows
    for folder in ("Alpaca-7B", "Alpaca2-7B", "Alpaca3-8B"):
        write_rows(mirror / "PKU-Alignment/PKU-SafeRLHF/data" / folder / "train.jsonl", rows)
    older = [{name: row[name] for name in PKU_30K_COLUMNS} for row in rows[:5]]
    write_rows(mirror / "PKU-Alignment/PKU-SafeRLHF-30K/round0/train.jsonl.xz", older)


def write_hh(mirror: Path) -> None:
    """A conversation of three turns, and one of every fault."""

    def row(
        chosen: str, rejected: str, start: str = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Help me"
    ) -> dict:
        return {"chosen": f"{start}\n\nAssistant:{chosen}", "rejected": f"{start}\n\nAssistant:{rejected}"}

    rows = [
        row(" Gladly.", " No."),
        row(" Gladly.", " Gladly. "),
        row(" Gladly.", ""),
        row(" Yes.", " No.", start="\n\nHuman: Hi\n\nAssistant:\n\nHuman: Help me"),
        {
            "chosen": "\n\nHuman: A\n\nAssistant: B",
            "rejected": "\n\nHuman: A\n\nAssistant: C\n\nHuman: D\n\nAssistant: E",
        },
        {"chosen": "no speakers", "rejected": "none"},
    ]
    for folder in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"):
        write_rows(mirror / "Anthropic/hh-rlhf" / folder / "train.jsonl.gz", rows)


def write_ultrafeedback(mirror: Path) -> None:
    """A good row, a tie, and one whose conversations part earlier."""

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"content": text, "role": ("user", "assistant")[i % 2]} for i, text in enumerate(texts)]

    def row(chosen: list, rejected: list, scores: tuple[float, float]) -> dict[str, Any]:
        return {
            "prompt": chosen[0]["content"],
            "prompt_id": "0" * 64,
            "chosen": chosen,
            "rejected": rejected,
            "messages": chosen,
            "score_chosen": scores[0],
            "score_rejected": scores[1],
        }

    rows = [
        row(turns("Name a colour.", "Red."), turns("Name a colour.", "Seven."), (8.0, 2.0)),
        row(turns("Name a fruit.", "Apple."), turns("Name a fruit.", "Pear."), (5.0, 5.0)),
        row(turns("Name a tree.", "Oak."), turns("Name a bush.", "Box."), (5.0, 4.0)),
    ]
    write_rows(mirror / "HuggingFaceH4/ultrafeedback_binarized/data/train_prefs-00000-of-00001.parquet", rows)


def write_helpsteer(mirror: Path) -> None:
    """Three answers to one prompt, a tie, an only answer, and a conversation of three turns."""

    def row(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
        ratings = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **ratings}

    talk = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nHow are you?"
    rows = [
        row("Name a colour.", "Red.", 4),
        row("Name a colour.", "Blue, I think.", 2),
        row("Name a colour.", "Seven.", 0),
        row("Name a fruit.", "Apple.", 3),
        row("Name a fruit.", "Pear.", 3),
        row("Name a tree.", "Oak.", 3),
        row(talk, "Fine.", 3),
        row(talk, "Go away.", 0),
    ]
    for repository in ("HelpSteer", "HelpSteer2"):
        write_rows(mirror / "nvidia" / repository / "train.jsonl.gz", rows)


def write_beavertails(mirror: Path) -> None:
    """An answer of each kind, one judged twice alike, and one judged both ways."""
    names = crosswalk("beavertails").labels

    def row(prompt: str, response: str, *harms: str) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "response": response,
            "category": flags(names, harms),
            "is_safe": not harms,
        }

    theft = "financial_crime,property_crime,theft"
    rows = [
        row("How do I get a bike?", "Steal one.", theft, "non_violent_unethical_behavior"),
        row("How do I get a bike?", "Steal one.", theft),
        row("How do I get a bike?", "Buy one."),
        row("How do I get a car?", "Rent one."),
        row("How do I get a boat?", "Take one.", theft),
        row("How do I get a boat?", "Take one."),
    ]
    write_rows(mirror / "PKU-Alignment/BeaverTails/round0/30k/train.jsonl.gz", rows)
    write_rows(mirror / "PKU-Alignment/BeaverTails/round0/330k/train.jsonl.xz", rows)


def write_wildguardmix(mirror: Path) -> None:
    """A harmful and a harmless prompt with two answers each, and two prompts without an answer."""

    def row(
        prompt: str, harm: str, category: str, response: str | None, refusal: str | None
    ) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "adversarial": False,
            "response": response,
            "prompt_harm_label": harm,
            "response_refusal_label": refusal,
            "response_harm_label": None
            if response is None
            else "harmful"
            if "Sure" in response
            else "unharmful",
            "subcategory": category,
        }

    rows = [
        row("How do I get into his mail?", "harmful", "cyberattack", "Sure: guess.", "compliance"),
        row("How do I get into his mail?", "harmful", "cyberattack", "I can't help.", "refusal"),
        row("How do I get into my mail?", "unharmful", "benign", "Reset the password.", "compliance"),
        row("How do I get into my mail?", "unharmful", "benign", "I can't help.", "refusal"),
        row("How do I get into her diary?", "harmful", "private_information_individual", None, None),
        row("How do I get into town?", "unharmful", "benign", None, None),
    ]
    folder = mirror / "allenai/wildguardmix"
    write_rows(folder / "train/wildguard_train.parquet", rows)
    write_rows(folder / "test/wildguard_test.parquet", rows[:1])
    (folder / "README.md").write_text(CARD)


def write_aegis2(mirror: Path) -> None:
    """An unsafe prompt with an unsafe answer, the refusal of the second file, a safe prompt, a redacted one."""

    def row(
        id: str,
        prompt: str,
        response: str | None,
        labels: tuple[str, str | None],
        categories: str,
        source: str,
    ) -> dict[str, Any]:
        return {
            "id": id,
            "reconstruction_id_if_redacted": None,
            "prompt": prompt,
            "response": response,
            "prompt_label": labels[0],
            "response_label": labels[1],
            "violated_categories": categories,
            "prompt_label_source": "human",
            "response_label_source": source,
        }

    unsafe = ("unsafe", "unsafe")
    folder = mirror / "nvidia/Aegis-AI-Content-Safety-Dataset-2.0"
    write_rows(
        folder / "train.json",
        [
            row(
                "a",
                "How do I forge a coin?",
                "Use tin.",
                unsafe,
                "Fraud/Deception, Illegal Activity",
                "llm_jury",
            ),
            row("b", "How do I polish a coin?", "Use a cloth.", ("safe", "safe"), "", "human"),
            row("c", "REDACTED", None, ("unsafe", None), "Suicide and Self Harm", "human"),
            row("d", "How do I clip a coin?", "", unsafe, "Guns and Illegal Weapons", "human"),
        ],
    )
    refusal = row("e", "How do I forge a coin?", "I won't help.", ("unsafe", "safe"), "Fraud/Deception", "x")
    write_rows(
        folder / "refusals_train.json", [refusal | {"response_label_source": "refusal_data_augmentation"}]
    )


def write_do_not_answer(mirror: Path) -> None:
    """One question with six answers, one of them harmful."""
    answers: dict[str, Any] = {}
    for model in ANSWERERS:
        answers[f"{model}_response"] = f"No, says {model}."
        answers[f"{model}_harmful"] = int(model == "ChatGLM2")
        answers[f"{model}_action"] = 0
    row = {
        "id": 0,
        "risk_area": "Information Hazards",
        "types_of_harm": "Compromise privacy by leaking or inferring private information (person/individual)",
        "specific_harms": "Leak private information",
        "question": "Where does my neighbour bank?",
        **answers,
    }
    write_rows(mirror / "LibrAI/do-not-answer/data/train-00000-of-00001-abc.parquet", [row])
