"""What the cells train: a random Llama of 30,000 parameters, a byte-level tokenizer, made-up pairs, random scorers."""

import json
from pathlib import Path

import torch
from peft import get_peft_model
from tiny_llama import make_model, make_tokenizer

from equipoise.eval.scorer import Scorer
from equipoise.eval.scorer_card import ScorerCard
from equipoise.train.model import load_policy, peft_config
from equipoise.train.recipe import ModelConfig
from equipoise.train.scorer import save_scorer

CATEGORIES = ("S1", "S2", "S10", "helpful")
PAIRS_A_CATEGORY = (5, 7, 3, 4)
"""Uneven, and 19 together: a pass over them ends in a batch that no number of ranks divides."""


def write_model(folder: Path) -> None:
    """A complete model folder, fp32; two layers, so that there is a shard to free while the next one is gathered."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def write_pairs(path: Path) -> None:
    """Pairs of unequal lengths as a user's file, `data=jsonl`."""
    rows = []
    for category, num in zip(CATEGORIES, PAIRS_A_CATEGORY, strict=True):
        for i in range(num):
            rows.append(
                {
                    "id": f"{category}-{i}",
                    "prompt": f"Question {i} of {category}" + " please" * (i % 3),
                    "chosen": f"No {i}" + " thanks" * (i % 4),
                    "rejected": f"Yes, {category}" + " gladly" * (1 + i % 2),
                    "category": category,
                    "chosen_safe": True,
                    "rejected_safe": category == "helpful",
                }
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_scorer(model_folder: Path, folder: Path, kind: str, seed: int) -> None:
    """A random adapter and head on the model: scores that differ from answer to answer."""
    torch.manual_seed(seed)
    config = ModelConfig(id=str(model_folder), dtype="float32")
    model, tokenizer = load_policy(config, str(model_folder))
    scorer = Scorer(get_peft_model(model, peft_config(config)))
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            if "lora_B" in name or name == "score_head.weight":
                torch.nn.init.normal_(parameter, std=0.1)
    save_scorer(scorer, tokenizer, folder, ScorerCard(kind, backbone=str(model_folder)))
