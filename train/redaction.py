"""Keys and tokens: how they are found in a text, and taken out of it.

What leaves a run (recipe.yaml, logs, trackers, reports) may be read by people who may not have its keys.
"""

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

HIDDEN = "***"

_NAME = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?(_|$)(?!(FILE|PATH|DIR)$)", re.IGNORECASE
)
"""Environment variables that hold a secret; `TOKENIZERS_PARALLELISM` and `HF_TOKEN_PATH` do not."""
_MIN_LENGTH = 8
"""A shorter value is no key: it would be taken out of words."""

_IN_URL = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
"""`user:password` or a bare token in front of a host."""
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}"
    r"|wandb_v\d_\w{20,})\b|(?<=\bBearer )[\w.~+/=-]{8,}"
)
"""Tokens of Hugging Face, GitHub, OpenAI and their like, AWS and W&B, as their issuers document them; HTTP's Bearer."""


def secret_values(names: Collection[str] = ()) -> list[str]:
    """Values of the environment variables that are named like secrets, and of those in `names`; the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if (name in names or _NAME.search(name)) and len(value) >= _MIN_LENGTH
    }
    return sorted(found, key=len, reverse=True)


def key_variables(recipe: Any) -> set[str]:
    """The environment variables that the keys `key_env` of a recipe (nested) name."""
    if isinstance(recipe, Mapping):
        named = {value for key, value in recipe.items() if key == "key_env" and isinstance(value, str)}
        return named.union(*map(key_variables, recipe.values()))
    return set().union(*map(key_variables, recipe)) if isinstance(recipe, list | tuple) else set()


def without_secrets(value: Any, secrets: Collection[str]) -> Any:
    """`value`, nested or a text, with `secrets`, what stands for a user in a URL and what looks like a token as ***."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, secrets) for item in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, HIDDEN)
    return _SHAPES.sub(HIDDEN, _IN_URL.sub(HIDDEN, value))
