import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

import equipoise.recipes
from equipoise.train.losses.preference import MARGIN_LOSSES, PREFERENCE_LOSSES
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.checks import LOSSES
from equipoise.train.recipe.checks import MARGIN_LOSSES as CHECKED_MARGIN_LOSSES
from equipoise.train.recipe.loading import load_recipe
from equipoise.train.recipe.stage_checks import SCHEDULERS
from equipoise.train.recipe.stages import PreferenceStageConfig, TokenBiasStageConfig

RECIPES_FOLDER = Path(equipoise.recipes.__path__[0])
RECIPES = sorted(path.stem for path in RECIPES_FOLDER.glob("recipe/*.yaml"))


Minimal = Callable[..., DictConfig]
Problems = Callable[..., dict[str, str]]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("equipoise.recipes", version_base="1.3"):
        return compose("config", list(overrides))


def loaded(*overrides: str) -> Recipe:
    return load_recipe(composed(*overrides))


def problems(*overrides: str) -> dict[str, str]:
    """Key -> reason, as the error lists them."""
    with pytest.raises(RecipeError) as caught:
        loaded(*overrides)
    heading, *lines = str(caught.value).splitlines()
    found = dict(line.strip().split(": ", 1) for line in lines)
    assert heading == f"The recipe has {len(found)} problem{'s'[: len(found) > 1]}:"
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_loads(recipe: str) -> None:
    assert loaded(f"recipe={recipe}").name == recipe


def test_tsdi_has_three_stages_that_share_beta_and_lambda() -> None:
    stages = loaded("recipe=tsdi", "beta=0.05", "lam=4").stages
    assert list(stages) == ["helpful", "safe", "token_bias"]
    assert isinstance(stages["helpful"], PreferenceStageConfig)
    assert isinstance(stages["token_bias"], TokenBiasStageConfig)
    assert (stages["helpful"].beta, stages["helpful"].lam) == (0.05, 1.0)
    assert (stages["safe"].beta, stages["safe"].lam) == (0.05, 4.0)
    assert stages["helpful"].mixture == {"helpful": 1.0}
    assert stages["safe"].mixture == {"safety": 0.75, "helpful": 0.25}


def test_the_category_recipes_differ_from_dpo_in_their_term_alone() -> None:
    plain = loaded("recipe=dpo").stages["safe"]
    margin = loaded("recipe=category_margin").stages["safe"]
    assert margin.category.margin.enabled
    assert dataclasses.replace(margin, category=plain.category) == plain
    dro = loaded("recipe=category_dro").stages["safe"]
    assert dro.category.weight.mode == "group_dro"
    assert dataclasses.replace(dro, category=plain.category) == plain
    multiplier = loaded("recipe=category_lambda").stages["safe"]
    assert multiplier.category.multiplier.enabled
    assert dataclasses.replace(multiplier, category=plain.category) == plain


@pytest.mark.parametrize("loss", LOSSES)
def test_the_group_loss_reaches_every_preference_stage(loss: str) -> None:
    recipe = loaded("recipe=tsdi", f"loss={loss}", "loss.sft_coef=0.5")
    for name in ("helpful", "safe"):
        assert (recipe.stages[name].loss.name, recipe.stages[name].loss.sft_coef) == (loss, 0.5)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=hub", "model.id=Qwen/Qwen3-8B"),
        ("tracking=wandb", "tracking.mode=offline"),
        ("tracking=tensorboard",),
        ("tracking.trackers=[wandb,trackio]",),
        ("data.max_prompts_per_category=3",),
        ("++stages.safe.kl={coef: 0.1, per_category: {S1: 0.2, helpful: 0}}",),
        ("model.lora.target_modules=[q_proj, v_proj]",),
        ("+gate.rules.category_limits.S4=0.1",),
    ],
)
def test_groups_and_keys_can_be_set(overrides: tuple[str, ...]) -> None:
    loaded("recipe=tsdi", *overrides)


def test_a_users_file_has_to_exist(tmp_path: Path) -> None:
    found = problems("recipe=tsdi", "data=jsonl", f"data.path={tmp_path}/no.jsonl")
    assert found == {"data.path": f"found '{tmp_path}/no.jsonl', which is no file and no folder"}
    (tmp_path / "yes.jsonl").touch()
    loaded("recipe=tsdi", "data=jsonl", f"data.path={tmp_path}/yes.jsonl", "data.held_out_fraction=0.1")


def test_a_mixture_replaces_the_default(minimal: Minimal) -> None:
    stages = {"safe": {"kind": "preference", "mixture": {"helpful": 1}}}
    assert load_recipe(minimal(stages=stages)).stages["safe"].mixture == {"helpful": 1.0}


def test_a_saved_recipe_loads_to_itself() -> None:
    recipe = loaded("recipe=tsdi", "beta=0.2", "lam=4", "loss=robust")
    saved = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe))))
    assert load_recipe(saved) == recipe


@pytest.mark.parametrize(
    "path", sorted(RECIPES_FOLDER.glob("**/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_key_of_the_shipped_yaml_is_commented(path: Path) -> None:
    """On its line; a key that a file repeats (in the next stage) once. The file says what it is for on top."""
    lines = path.read_text().splitlines()
    assert next(line for line in lines if not line.startswith("# @")).startswith("# ")
    assert max(len(line) for line in lines) <= 120
    explained: set[str] = set()
    for line in lines:
        key = re.match(r"\s*([\w]+): *[^\s#|]", line)
        if "#" in line and key:
            explained.add(key[1])
        # `name` and `id` say what the file is; accelerate's own keys are accelerate's to explain.
        assert not key or key[1] in explained | {"name", "id"} or path.parent.name == "accelerate", line


@pytest.mark.parametrize("path", sorted(RECIPES_FOLDER.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == {"cpu": 1, "multi_node": 16}.get(path.stem, 8)


def test_all_problems_are_reported_at_once() -> None:
    found = problems(
        "recipe=tsdi",
        "beta=abc",
        "lam=0",
        "+modle=hub",
        "model.lora.r=0",
        "+stages.safe.lamb=2",
        "gate.rules.alpha=x",
        "+gate.rules.min_sample=3",
    )
    assert set(found) == {
        "beta",
        "lam",
        "modle",
        "model.lora.r",
        "stages.safe.lamb",
        "gate.rules.alpha",
        "gate.rules.min_sample",
    }
    assert found["beta"] == "found 'abc', expected a number"
    assert found["lam"] == "found 0.0, expected a number above 0"
    assert found["modle"].startswith("unknown key; did you mean 'model'? possible: name, stages, seed")
    assert found["stages.safe.lamb"].startswith("unknown key; did you mean 'lam'? possible: kind, start_from")
    assert found["gate.rules.min_sample"].startswith("unknown key; did you mean 'min_samples'?")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("seed", 1.5, "found 1.5, expected a whole number"),
        ("seed", -1, "found -1, expected at least 0"),
        ("seed", None, "found None, expected a whole number"),
        ("dry_run", "perhaps", "found 'perhaps', expected true or false"),
        ("name", "a/b", "found 'a/b', expected letters"),
        ("name", "..", "found '..', expected letters"),
        ("name", [1], "found [1], expected a text"),
        ("beta", float("nan"), "found nan, expected a number above 0"),
        ("beta", True, "found True, expected a number"),
        ("model", "hub", "found 'hub', expected the keys id, revision"),
        ("model.revision", ["a"], "found ['a'], expected a text or null"),
        ("model.dtype", "bfloat61", "found 'bfloat61', did you mean 'bfloat16'"),
        ("model.lora.dropout", 1.0, "found 1.0, expected a share in [0, 1)"),
        ("model.lora.target_modules", [], "found [], expected 'all-linear'"),
        ("data.source", "hub", "found 'hub', possible: samples, mixture, jsonl"),
        ("data.path", "pairs.jsonl", "found 'pairs.jsonl', but data.source=samples reads no file"),
        ("data.held_out_fraction", 0.1, "found 0.1, but the samples have their own held-out prompts"),
        ("data.max_length", 0, "found 0, expected at least 8"),
        ("judge.name", "gpt", "found 'gpt', possible: embedded"),
        ("judge.engine", "server", "found 'server', but the judge embedded does not read it"),
        ("evaluation.max_new_tokens", 0, "found 0, expected at least 1"),
        ("gate.every", -1, "found -1, expected at least 0"),
        ("gate.where", "thread", "found 'thread', possible: in_process, subprocess, vllm"),
        ("gate.timeout", 0, "found 0.0, expected a number above 0"),
        ("gate.devices", "7", "found '7', but gate.where=in_process evaluates on the ranks' own devices"),
        ("gate.engine_options", {"seed": 1}, "found seed, but gate.where=in_process starts no vLLM"),
        ("gate.rules.category_limits.S99", 0.1, "unknown key; did you mean 'S9'"),
        ("tracking.trackers", ["mlflow"], "found 'mlflow', possible: wandb, tensorboard, trackio"),
        ("tracking.log_model", "copy", "found 'copy', possible: reference, upload, none"),
        ("tracking.init_timeout", 0, "found 0.0, expected a number above 0"),
        ("tracking.tags", "a", "found 'a', expected a list of texts"),
        ("loss.label_smoothing", 0.5, "found 0.5, expected a share in [0, 0.5)"),
        ("loss.name", "sigmiod", "found 'sigmiod', did you mean 'sigmoid'?"),
    ],
)
def test_an_impossible_value_is_named_with_what_was_expected(
    key: str, value: object, reason: str, minimal_problems: Problems
) -> None:
    OmegaConf.update(changes := OmegaConf.create({}), key, value)
    found = minimal_problems(**{str(name): item for name, item in changes.items()})
    assert found[key].startswith(reason), found


def test_gate_rules_are_checked_by_the_gate_itself(minimal_problems: Problems) -> None:
    found = minimal_problems(gate={"rules": {"category_limit": 2}})
    assert found == {"gate.rules": "category_limit must be a rate in [0, 1], found 2.0"}


def test_losses_are_mixed_on_the_command_line(minimal: Minimal) -> None:
    weights = (
        loaded("recipe=dpo", "loss=safedpo", "+loss.mix.apo_zero=0.5", "loss.delta=5")
        .stages["safe"]
        .loss.weights
    )
    assert weights == {"safedpo": 1.0, "apo_zero": 0.5}
    assert loaded("recipe=dpo", "+loss.mix={sigmoid: 0.8, ipo: 0.2}").loss.weights == {
        "sigmoid": 0.8,
        "ipo": 0.2,
    }
    mixed = {"kind": "preference", "loss": {"name": "ipo", "mix": {"sigmoid": 1}}}
    margin = {"category": {"margin": {"enabled": True}}}
    load_recipe(minimal(stages={"safe": mixed | margin}))  # sigmoid has a margin, ipo none


def test_a_reference_without_an_adapter_is_impossible(minimal_problems: Problems) -> None:
    found = minimal_problems(model={"reference": "adapter_off", "lora": {"enabled": False}})
    assert found == {"model.reference": "found 'adapter_off', but model.lora.enabled=false has no adapter"}


def test_what_has_to_be_given_is_named() -> None:
    with pytest.raises(RecipeError, match="name: has to be given: name=") as caught:
        load_recipe(OmegaConf.create({"stages": {"safe": {"kind": "preference"}}}))
    assert "1 problem:" in str(caught.value)
    assert problems("recipe=tsdi", "model=hub") == {"model.id": "has to be given: model.id=..."}
    found = problems("recipe=tsdi", "data=jsonl")
    assert found["data.path"].startswith("has to be given: data.path=")


@pytest.mark.parametrize("override", ["lam=4", "loss=ipo"])
def test_a_shared_key_that_no_stage_reads_is_a_problem(override: str, minimal_problems: Problems) -> None:
    key, value = override.split("=")
    changes: dict[str, Any] = {key: {"name": value} if key == "loss" else float(value)}
    reason = f"no stage of this recipe refers to ${{{key}}}, so it would change nothing"
    assert minimal_problems(**changes) == {key: reason}


def test_a_wrong_value_that_two_stages_share_is_one_problem() -> None:
    assert list(problems("recipe=tsdi", "beta=-1")) == ["beta"]
    assert list(problems("recipe=tsdi", "loss.sft_coef=-1")) == ["loss.sft_coef"]


def test_an_interpolation_that_leads_nowhere_is_named(minimal: Minimal) -> None:
    with pytest.raises(RecipeError, match=r"beta: Interpolation key 'betta' not found"):
        load_recipe(minimal(beta="${betta}"))


def test_the_checks_know_the_losses_and_schedulers_that_exist() -> None:
    """The checks name them without importing torch."""
    from transformers.trainer_utils import SchedulerType

    assert tuple(PREFERENCE_LOSSES) == LOSSES
    assert MARGIN_LOSSES == CHECKED_MARGIN_LOSSES
    assert set(SCHEDULERS) <= {item.value for item in SchedulerType}
