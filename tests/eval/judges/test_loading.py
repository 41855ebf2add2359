from pathlib import Path

import pytest
import yaml

from equipoise.eval.cache import Cache, CachedEngine, CachedJudge
from equipoise.eval.config import JudgeConfig
from equipoise.eval.generation.server_engine import ServerEngine
from equipoise.eval.judges.base import JudgeError
from equipoise.eval.judges.ensemble import EnsembleJudge
from equipoise.eval.judges.loading import FORMS, JUDGES, judge_problems, load_judge, load_pairwise, make_form
from equipoise.eval.judges.model_judge import ModelJudge

RECIPES = Path(__file__).parents[3] / "recipes" / "judge"


def served(name: str, **keys: object) -> JudgeConfig:
    """A judge behind a server: nothing is loaded, nobody is asked."""
    return JudgeConfig(name=name, engine="server", url="http://localhost:1/v1", model="judge", **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_a_judge(name: str) -> None:
    judge = load_judge(served(name))
    assert isinstance(judge, ModelJudge)
    assert isinstance(judge.engine, ServerEngine)
    assert judge.card.name == judge.form.name == name
    assert not judge.card.stand_in
    assert "judge" in judge.card.description


def test_every_judge_has_its_file_and_every_file_its_judge() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(JUDGES)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_file_works_once_its_model_is_named(path: Path) -> None:
    keys = yaml.safe_load(path.read_text())
    assert keys["name"] == path.stem
    if "model" in keys:
        keys["model"] = keys["model"] or str(path.parent)
    assert judge_problems(JudgeConfig(**keys), pairwise=path.stem == "pairwise") == {}


@pytest.mark.parametrize(
    ("config", "key", "reason"),
    [
        (JudgeConfig(name="llama_gard"), "name", "found 'llama_gard', possible: embedded"),
        (JudgeConfig(name="llama_guard"), "model", "has to be given"),
        (
            JudgeConfig(name="embedded", model="x"),
            "model",
            "found 'x', but the judge embedded does not read it",
        ),
        (
            served("wildguard", threshold=0.4),
            "threshold",
            "found 0.4, but the judge wildguard does not read it",
        ),
        (served("wildguard", prompt_file="/no/such/file"), "prompt_file", "cannot be read"),
        (served("policy", rules_file="/no/such/file"), "rules_file", "cannot be read"),
        (served("llama_guard", version="5"), "version", "Llama Guard comes as"),
        (served("strongreject", threshold=2.0), "threshold", "expected above 0 and at most 1"),
        (served("gpt_oss_safeguard", reasoning_effort="huge"), "reasoning_effort", "expected low"),
        (JudgeConfig(name="policy", engine="server", model="m"), "url", "has to be given with a server"),
        (served("policy", key_env="EQUIPOISE_NO_SUCH_KEY"), "key_env", "EQUIPOISE_NO_SUCH_KEY is not set"),
        (JudgeConfig(name="policy", engine="srever", model="m"), "engine", "found 'srever', possible"),
        (JudgeConfig(name="policy", model="m", dtype="float8"), "dtype", "found 'float8', possible"),
        (served("policy", batch_size=0), "batch_size", "found 0, expected at least 1"),
        (JudgeConfig(name="beaver", model="/no/such/folder"), "model", "expected the folder of a cost model"),
        (JudgeConfig(name="ensemble"), "judges", "found 0, expected two or more"),
        (JudgeConfig(name="ensemble", judges={"a": {"nam": "b"}}), "judges.a.nam", "unknown key"),
        (
            JudgeConfig(name="ensemble", judges={"embedded": {}, "policy": {}}),
            "judges.policy.model",
            "has to be given",
        ),
        (JudgeConfig(name="ensemble", rule="any"), "rule", "found 'any', possible: majority"),
        (JudgeConfig(name="ensemble", unsure=[0.9, 0.1]), "unsure", "expected two numbers"),
        (JudgeConfig(name="pairwise", model="m"), "name", "calls none unsafe"),
    ],
)
def test_what_cannot_work_is_named_before_anything_is_loaded(
    config: JudgeConfig, key: str, reason: str
) -> None:
    found = judge_problems(config)
    assert reason in found[key], found
    with pytest.raises(JudgeError, match=f"judge.{key}: "):
        load_judge(config)


def test_a_prompt_file_without_a_placeholder_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Judge {prompt}.")
    found = judge_problems(served("wildguard", prompt_file=str(tmp_path / "prompt.txt")))
    assert "found no {response}" in found["prompt_file"]


def test_the_key_of_a_server_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    assert judge_problems(served("policy", key_env="MY_KEY")) == {}


def test_keys_reach_the_form(tmp_path: Path) -> None:
    (tmp_path / "rules.txt").write_text("Never sell tea.")
    form = make_form(
        served("gpt_oss_safeguard", rules_file=str(tmp_path / "rules.txt"), reasoning_effort="high")
    )
    (request,) = form.ask([{"role": "user", "content": "q"}], "a")
    assert request.messages is not None
    assert "Never sell tea." in request.messages[0]["content"]
    assert request.template_options["reasoning_effort"] == "high"
    assert "reasoning high" in form.description
    assert "rules.txt" in form.description


def test_an_ensemble_of_served_judges() -> None:
    served_keys = {"engine": "server", "url": "http://localhost:1/v1", "model": "m"}
    config = JudgeConfig(
        name="ensemble",
        rule="any_unsafe",
        judges={"qwen3guard": served_keys, "second": {**served_keys, "name": "llama_guard"}},
    )
    judge = load_judge(config)
    assert isinstance(judge, EnsembleJudge)
    assert [member.card.name for member in judge.judges] == ["qwen3guard", "llama_guard"]
    assert judge.rule == "any_unsafe"


def test_with_a_cache_replies_are_kept_where_there_is_an_engine_and_judgements_where_there_is_none(
    tmp_path: Path,
) -> None:
    with Cache(tmp_path / "cache.sqlite") as cache:
        judge = load_judge(served("llama_guard"), cache)
        assert isinstance(judge, ModelJudge)
        assert isinstance(judge.engine, CachedEngine)
        embedded = load_judge(JudgeConfig(dtype="float32"), cache)
        assert isinstance(embedded, CachedJudge)
        assert embedded.card.stand_in
        assert embedded.card.calibration


def test_the_pairwise_judge_compares() -> None:
    judge = load_pairwise(served("pairwise", max_new_tokens=99))
    assert judge.max_new_tokens == 99
    with pytest.raises(JudgeError, match="win_rate compares answers: judge=pairwise"):
        load_pairwise(JudgeConfig())
