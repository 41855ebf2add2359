from pathlib import Path

import pytest

from equipoise.train import cli

HUB = "hf_" + "a1B2" * 9


@pytest.mark.parametrize(
    ("override", "key", "secret"),
    [
        ("data.mirror=https://user:pa55w0rd-xyz@host/", "data.mirror", "pa55w0rd-xyz"),
        (f"model.id={HUB}", "model.id", HUB),
        (f"tracking.tags=[a,{HUB}]", "tracking.tags", HUB),
        ("judge.url='Bearer abcdef0123456789'", "judge.url", "abcdef0123456789"),
        ("tracking.project=planted-0123456789", "tracking.project", "planted-0123456789"),
        # Not a key of the recipe at all, of the wrong type, or within a key.
        (
            "judge.headers.Authorization='Bearer abcdef0123456789'",
            "judge.headers.Authorization",
            "abcdef0123456789",
        ),
        (f"beta={HUB}", "beta", HUB),
        (f"stages.safe.{HUB}=1", "stages.safe", HUB),
    ],
)
def test_a_recipe_with_a_secret_is_refused_and_the_secret_not_repeated(
    override: str,
    key: str,
    secret: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_TOKEN", "planted-0123456789")
    assert cli.main(["recipe=tsdi", override]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert key in captured.err
    assert secret not in captured.out + captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_key_in_the_environment_is_where_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from equipoise.train.recipe.loading import load_recipe

    monkeypatch.setenv("JUDGE_KEY", "planted-0123456789")
    arguments = ["recipe=tsdi", "judge=llama_guard", "judge.engine=server", "judge.url=http://host/v1"]
    composed = cli.compose([*arguments, "judge.model=m", "judge.key_env=JUDGE_KEY"])
    assert composed is not None
    assert load_recipe(composed).judge.key_env == "JUDGE_KEY"
