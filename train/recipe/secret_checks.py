"""A recipe holds no key, token or password: it is written to recipe.yaml, to trackers and into the report."""

from collections.abc import Mapping
from typing import Any

from equipoise.train.recipe.checks import Problems
from equipoise.train.redaction import key_variables, secret_values, without_secrets


def check_secrets(values: Mapping[str, Any], problems: Problems) -> None:
    """Note every value that holds a secret; none of them is in the message. Before anything else quotes the recipe."""
    secrets = secret_values(key_variables(values))
    _walk(values, "", secrets, problems)


def _walk(value: Any, path: str, secrets: list[str], problems: Problems) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _walk(item, f"{path}.{key}".lstrip("."), secrets, problems)
    elif isinstance(value, list):
        for item in value:
            _walk(item, path, secrets, problems)
    elif isinstance(value, str) and without_secrets(value, secrets) != value:
        problems.add(
            without_secrets(path, secrets),
            "holds a key, token or password, and recipe.yaml, logs and reports would show it. Leave it out and keep "
            "it in an environment variable or a credentials file (HF_TOKEN, ~/.netrc; key_env names a server's)",
        )
