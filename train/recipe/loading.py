"""From composed YAML to a `Recipe`: keys and types here, values in `checks.py`, one error for all of it."""

import dataclasses
import functools
from collections.abc import Mapping
from types import NoneType
from typing import Any, TypeVar, cast, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.checks import Problems, check_recipe
from equipoise.train.recipe.measuring_checks import check_measuring
from equipoise.train.recipe.rl import GRPOStageConfig, SafeRLHFStageConfig
from equipoise.train.recipe.sacpo_checks import check_unpaired_is_read
from equipoise.train.recipe.secret_checks import check_secrets
from equipoise.train.recipe.stage_checks import check_stages
from equipoise.train.recipe.stages import (
    CostModelStageConfig,
    KTOStageConfig,
    MergeStageConfig,
    PreferenceStageConfig,
    RewardModelStageConfig,
    SFTStageConfig,
    StageConfig,
    TokenBiasStageConfig,
)

STAGES: dict[str, type[StageConfig]] = {
    "sft": SFTStageConfig,
    "preference": PreferenceStageConfig,
    "kto": KTOStageConfig,
    "merge": MergeStageConfig,
    "reward_model": RewardModelStageConfig,
    "cost_model": CostModelStageConfig,
    "safe_rlhf": SafeRLHFStageConfig,
    "grpo": GRPOStageConfig,
    "token_bias": TokenBiasStageConfig,
}
"""What a stage is, by its `kind`."""

_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
    list[str]: "a list of texts",
    list[float]: "a list of numbers",
    list[int]: "a list of whole numbers",
    dict[str, float]: "names with a number each",
    dict[str, Any]: "names with a value each",
    dict[str, dict[str, Any]]: "names with keys and values each",
}

Config = TypeVar("Config")


def load_recipe(cfg: DictConfig) -> Recipe:
    """The recipe of a composed configuration.

    Raises `RecipeError` that names, for every problem at once, the key, what was found and what was expected.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    problems = Problems(raw=cast(dict[str, Any], OmegaConf.to_container(cfg)))
    given = cast(dict[str, Any], values)
    check_secrets(given, problems)
    problems.raise_if_any()
    recipe = _fill(Recipe, {**given, "stages": {}}, "", problems)
    recipe.stages = _fill_stages(given.get("stages"), problems)
    recipe.gate.rules = _fill_rules(recipe.gate.rules, problems)
    check_recipe(recipe, problems)
    check_measuring(recipe, problems)
    check_stages(recipe, problems)
    check_unpaired_is_read(recipe, problems)
    problems.raise_if_any()
    return recipe


def _fill_rules(rules: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    from equipoise.eval.gate import GateRules  # here: statistics and scipy take a second to import

    fields = {item.name: item for item in dataclasses.fields(GateRules)}
    filled = _fill_fields(GateRules, fields, rules, "gate.rules.", problems)
    try:
        GateRules(**filled)
    except ValueError as error:
        problems.add("gate.rules", str(error))
    return filled


def _fill_stages(stages: object, problems: Problems) -> dict[str, Any]:
    if not isinstance(stages, Mapping) or not stages:
        found = "" if stages is None else f"found {stages!r}, "
        problems.add("stages", f"{found}expected at least one stage, each a name with a kind and its keys")
        return {}
    filled = {}
    for name, values in stages.items():
        path = f"stages.{name}"
        if not isinstance(values, Mapping) or "kind" not in values:
            problems.add(f"{path}.kind", f"has to be given; possible: {', '.join(STAGES)}")
        elif str(values["kind"]) not in STAGES:
            problems.one_of(f"{path}.kind", str(values["kind"]), STAGES)
        else:
            filled[str(name)] = _fill(STAGES[values["kind"]], values, f"{path}.", problems)
    return filled


def _fill(config: type[Config], values: Mapping[str, Any], path: str, problems: Problems) -> Config:
    """An instance of the dataclass `config`; what is absent or wrong keeps its default, what is wrong is noted."""
    fields = {item.name: item for item in dataclasses.fields(config)}  # type: ignore[arg-type]
    filled = _fill_fields(config, fields, values, path, problems)
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in filled:
            problems.add(f"{path}{name}", f"has to be given: {path}{name}=...")
            filled[name] = "unnamed"
    return config(**filled)


def _fill_fields(
    config: type, fields: Mapping[str, Any], values: Mapping[str, Any], path: str, problems: Problems
) -> dict[str, Any]:
    """The usable ones of `values`, by field; the others are noted."""
    filled: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{path}{name}"
        if name not in fields:
            problems.unknown(key, str(name), fields)
        elif value == "???":
            problems.add(key, f"has to be given: {key}=...")
        elif isinstance(nested := fields[name].type, type) and dataclasses.is_dataclass(nested):
            if isinstance(value, Mapping):
                filled[name] = _fill(nested, value, f"{key}.", problems)
            else:
                keys = ", ".join(item.name for item in dataclasses.fields(nested))
                problems.add(key, f"found {value!r}, expected the keys {keys}")
        else:
            try:
                filled[name] = _converted(config, name, value)
            except OmegaConfBaseException:
                problems.expect(False, key, value, _type_name(fields[name].type))
    return filled


def _converted(config: type, name: str, value: object) -> object:
    """`value` as OmegaConf reads it into the field `name` of `config`; raises its error when it does not fit."""
    node = _node(config)
    node[name] = value
    return OmegaConf.to_container(OmegaConf.masked_copy(node, name))[name]  # type: ignore[index, call-overload]


@functools.cache  # making one takes longer than all that is done with it, and no field's value reaches another
def _node(config: type) -> DictConfig:
    return OmegaConf.structured(config)


def _type_name(annotation: Any) -> str:
    parts = [annotation] if annotation in _TYPE_NAMES else get_args(annotation)
    return " or ".join(_TYPE_NAMES[part] for part in parts)
