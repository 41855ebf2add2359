import pytest

from equipoise.train.redaction import key_variables, secret_values, without_secrets

HUB = "hf_" + "a1B2" * 9
OPENAI = "sk-proj-" + "a1B2" * 6
GITHUB = "ghp_" + "a1B2" * 9
AWS = "AKIA" + "ABCDEFGH12345678"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"login with {HUB}.", "login with ***."),
        (f"--key={OPENAI}", "--key=***"),
        (f"{GITHUB} {AWS}", "*** ***"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("https://user:token@host/path", "https://***@host/path"),
        (f"https://{HUB}@host", "https://***@host"),
        # What only looks like one.
        ("https://host/path@revision", "https://host/path@revision"),
        ("hf_transfer is on; sk-learn; a@b.c", "hf_transfer is on; sk-learn; a@b.c"),
        ("The bearer of bad news", "The bearer of bad news"),
    ],
)
def test_tokens_are_known_by_their_shape(text: str, expected: str) -> None:
    assert without_secrets({"a": [text, 1, None]}, []) == {"a": [expected, 1, None]}


def test_variables_that_are_named_like_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "my_tokens",
        "OPENAIKEY",
    ):
        monkeypatch.setenv(name, f"value-of-{name}")
    for name in ("TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "SSH_KEY_FILE", "KEYBOARD"):
        monkeypatch.setenv(name, f"value-of-{name}")
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.setenv("JUDGE", "value-of-JUDGE")
    found = secret_values({"JUDGE"})
    names = {value.removeprefix("value-of-") for value in found if value.startswith("value-of-")}
    assert names == {
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "my_tokens",
        "OPENAIKEY",
        "JUDGE",
    }
    assert "abc" not in found


def test_a_secret_within_another_leaves_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "12345678")
    monkeypatch.setenv("B_KEY", "1234567890")
    assert without_secrets("1234567890 12345678", secret_values()) == "*** ***"


def test_key_env_names_variables_wherever_it_stands() -> None:
    recipe = {"judge": {"key_env": "A", "members": [{"key_env": "B"}, {"key_env": None}]}, "key_env": "C"}
    assert key_variables(recipe) == {"A", "B", "C"}
