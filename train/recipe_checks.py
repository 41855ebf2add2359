"""Values and combinations of a recipe that cannot work, found before any model is loaded."""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.data.schema import HELPFUL
from equipoise.data.taxonomy import load_taxonomy
from equipoise.train.recipe import (
    CategoryConfig,
    DataConfig,
    GateConfig,
    KLConfig,
    LossConfig,
    ModelConfig,
    PreferenceStageConfig,
    Recipe,
    RecipeError,
    TokenBiasPenaltyConfig,
    TokenBiasStageConfig,
)

SUBSETS = ("safety", "helpful")
LOSSES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero")
MARGIN_LOSSES = ("sigmoid", "hinge", "robust")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class Problems:
    """What is wrong with a recipe, by key: a value that several keys refer to is named once, where it stands."""

    raw: Mapping[str, Any]
    """The recipe before `${...}` is resolved."""
    found: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, reason: str) -> None:
        """Note a reason against `key`, a dotted path; the first reason of a key stands."""
        self.found.setdefault(self._origin(key), reason)

    def expect(self, condition: bool, key: str, value: object, expected: str) -> None:
        """Note that `key` holds `value` where `expected` was needed, unless `condition`."""
        if not condition:
            self.add(key, f"found {value!r}, expected {expected}")

    def one_of(self, key: str, value: str, possible: Collection[str]) -> None:
        """Note a `value` that is not `possible`, with what looks like it."""
        if value not in possible:
            hint = near_misses(value, possible)
            self.add(key, f"found {value!r}, {hint}possible: {', '.join(possible)}")

    def unknown(self, key: str, name: str, possible: Collection[str]) -> None:
        """Note a key that nobody reads."""
        self.add(key, f"unknown key; {near_misses(name, possible)}possible: {', '.join(possible)}")

    def raise_if_any(self) -> None:
        """Raise `RecipeError` with one line a problem."""
        if self.found:
            lines = "\n".join(f"  {key}: {reason}" for key, reason in self.found.items())
            num = len(self.found)
            raise RecipeError(f"The recipe has {num} problem{'s'[: num > 1]}:\n{lines}")

    def _origin(self, key: str) -> str:
        """Where the value of `key` is written: `stages.safe.beta` that says `${beta}` is `beta`."""
        node: Any = self.raw
        parts = key.split(".")
        for depth, part in enumerate(parts, start=1):
            node = node.get(part) if isinstance(node, Mapping) else None
            if isinstance(node, str) and (reference := _REFERENCE.fullmatch(node)):
                return self._origin(".".join([reference[1], *parts[depth:]]))
        return key


def near_misses(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? ` where something known looks like `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(repr(match) for match in close)}? " if close else ""


def check_recipe(recipe: Recipe, problems: Problems) -> None:
    """Note every value of `recipe` that cannot work."""
    _check_folder_name("name", recipe.name, problems)
    problems.expect(bool(recipe.output_dir.strip()), "output_dir", recipe.output_dir, "a folder")
    _at_least(0, "seed", recipe.seed, problems)
    _positive("beta", recipe.beta, problems)
    _positive("lam", recipe.lam, problems)
    _check_loss("loss", recipe.loss, problems)
    _check_model(recipe.model, problems)
    _check_data(recipe.data, problems)
    problems.one_of("judge.name", recipe.judge.name, ("embedded",))
    _at_least(1, "judge.batch_size", recipe.judge.batch_size, problems)
    _at_least(1, "evaluation.max_new_tokens", recipe.evaluation.max_new_tokens, problems)
    _at_least(1, "evaluation.batch_size", recipe.evaluation.batch_size, problems)
    _check_gate(recipe.gate, problems)
    problems.one_of("tracking.name", recipe.tracking.name, ("none", "wandb"))
    problems.one_of("tracking.mode", recipe.tracking.mode, ("auto", "online", "offline"))
    _check_stages(recipe, problems)


def _check_stages(recipe: Recipe, problems: Problems) -> None:
    for number, (name, stage) in enumerate(recipe.stages.items()):
        path = f"stages.{name}"
        _check_folder_name(path, name, problems)
        if isinstance(stage, PreferenceStageConfig):
            _check_preference_stage(path, stage, problems)
        elif isinstance(stage, TokenBiasStageConfig):
            _check_token_bias_stage(path, stage, problems)
            if number == 0:
                problems.add(path, "a token_bias stage measures the stage before it, so it can't come first")
    trained = [stage for stage in recipe.stages.values() if isinstance(stage, PreferenceStageConfig)]
    shared = {
        "beta": recipe.beta in [Recipe.beta, *(stage.beta for stage in trained)],
        "lam": recipe.lam in [Recipe.lam, *(stage.lam for stage in trained)],
        "loss": recipe.loss in [LossConfig(), *(stage.loss for stage in trained)],
    }
    for key, read in shared.items():
        if not read:
            problems.add(key, f"no stage of this recipe refers to ${{{key}}}, so it would change nothing")


def _check_preference_stage(path: str, stage: PreferenceStageConfig, problems: Problems) -> None:
    for subset, share in stage.mixture.items():
        if subset in SUBSETS:
            _at_least(0, f"{path}.mixture.{subset}", share, problems)
        else:
            problems.unknown(f"{path}.mixture.{subset}", subset, SUBSETS)
    if not any(share > 0 for share in stage.mixture.values()):
        problems.add(f"{path}.mixture", "every share is 0; at least one of safety, helpful must be above 0")
    _positive(f"{path}.beta", stage.beta, problems)
    _positive(f"{path}.lam", stage.lam, problems)
    _check_loss(f"{path}.loss", stage.loss, problems)
    _check_category(f"{path}.category", stage.category, stage.loss, problems)
    _check_kl(f"{path}.kl", stage.kl, stage.mixture, problems)
    _check_penalty(f"{path}.token_bias", stage.token_bias, problems)
    if stage.num_steps is not None:
        _at_least(1, f"{path}.num_steps", stage.num_steps, problems)
    _positive(f"{path}.num_epochs", stage.num_epochs, problems)
    _positive(f"{path}.learning_rate", stage.learning_rate, problems)
    problems.one_of(f"{path}.lr_scheduler", stage.lr_scheduler, SCHEDULERS)
    _at_least(0, f"{path}.warmup", stage.warmup, problems)
    problems.expect(
        stage.warmup < 1 or stage.warmup == int(stage.warmup),
        f"{path}.warmup",
        stage.warmup,
        "a share below 1 or a whole number of steps",
    )
    _at_least(0, f"{path}.weight_decay", stage.weight_decay, problems)
    _at_least(0, f"{path}.max_grad_norm", stage.max_grad_norm, problems)
    _at_least(1, f"{path}.per_device_batch_size", stage.per_device_batch_size, problems)
    _at_least(1, f"{path}.gradient_accumulation_steps", stage.gradient_accumulation_steps, problems)
    _at_least(0, f"{path}.save_every", stage.save_every, problems)
    _at_least(1, f"{path}.log_every", stage.log_every, problems)


def _check_loss(path: str, loss: LossConfig, problems: Problems) -> None:
    problems.one_of(f"{path}.name", loss.name, LOSSES)
    smoothing = loss.label_smoothing
    problems.expect(0 <= smoothing < 0.5, f"{path}.label_smoothing", smoothing, "a share in [0, 0.5)")
    if smoothing and loss.name != "robust":
        reason = f"found {smoothing!r}, but only the loss 'robust' reads it; expected 0 for {loss.name!r}"
        problems.add(f"{path}.label_smoothing", reason)
    _at_least(0, f"{path}.sft_coef", loss.sft_coef, problems)


def _check_category(path: str, category: CategoryConfig, loss: LossConfig, problems: Problems) -> None:
    margin, weight, multiplier = category.margin, category.weight, category.multiplier
    if margin.enabled and loss.name not in MARGIN_LOSSES:
        possible = ", ".join(MARGIN_LOSSES)
        problems.add(f"{path}.margin.enabled", f"the loss {loss.name!r} has no margin; possible: {possible}")
    for name, term in (("margin", margin), ("multiplier", multiplier)):
        _positive(f"{path}.{name}.eta", term.eta, problems)
        _share(f"{path}.{name}.target", term.target, problems)
    _positive(f"{path}.margin.max", margin.max, problems)
    _positive(f"{path}.multiplier.max_log", multiplier.max_log, problems)
    problems.one_of(f"{path}.weight.mode", weight.mode, ("none", "group_dro", "inverse_frequency"))
    _positive(f"{path}.weight.eta", weight.eta, problems)
    _at_least(0, f"{path}.weight.temperature", weight.temperature, problems)
    _at_least(1, f"{path}.update_every", category.update_every, problems)
    problems.expect(0 <= category.ema < 1, f"{path}.ema", category.ema, "a decay in [0, 1)")
    _at_least(0, f"{path}.shrinkage", category.shrinkage, problems)


def _check_kl(path: str, kl: KLConfig, mixture: Mapping[str, float], problems: Problems) -> None:
    _at_least(0, f"{path}.coef", kl.coef, problems)
    problems.one_of(f"{path}.estimator", kl.estimator, ("forward", "reverse", "k3"))
    problems.one_of(f"{path}.on", kl.on, ("chosen", "helpful"))
    categories = (*load_taxonomy().ids, HELPFUL)
    for category, coef in kl.per_category.items():
        if category in categories:
            _at_least(0, f"{path}.per_category.{category}", coef, problems)
        else:
            problems.unknown(f"{path}.per_category.{category}", category, categories)
    active = kl.coef > 0 or any(coef > 0 for coef in kl.per_category.values())
    if active and kl.on == "helpful" and not mixture.get("helpful"):
        problems.add(f"{path}.on", "found 'helpful', but the stage's mixture has no helpful pairs")


def _check_penalty(path: str, penalty: TokenBiasPenaltyConfig, problems: Problems) -> None:
    _at_least(0, f"{path}.coef", penalty.coef, problems)
    _at_least(1, f"{path}.every", penalty.every, problems)
    _at_least(1, f"{path}.num_contexts", penalty.num_contexts, problems)
    _at_least(1, f"{path}.num_positions", penalty.num_positions, problems)
    _at_least(1, f"{path}.prompt_tokens", penalty.prompt_tokens, problems)
    problems.one_of(f"{path}.pool", penalty.pool, ("vocabulary", "words"))


def _check_token_bias_stage(path: str, stage: TokenBiasStageConfig, problems: Problems) -> None:
    _at_least(0, f"{path}.alpha", stage.alpha, problems)
    _at_least(1, f"{path}.num_prompts", stage.num_prompts, problems)
    _at_least(1, f"{path}.num_positions", stage.num_positions, problems)
    _at_least(1, f"{path}.prompt_tokens", stage.prompt_tokens, problems)
    _at_least(1, f"{path}.batch_size", stage.batch_size, problems)
    _at_least(0, f"{path}.seed", stage.seed, problems)
    problems.one_of(f"{path}.space", stage.space, ("log_prob", "logit"))
    problems.one_of(f"{path}.continuation", stage.continuation, ("random", "aligned"))
    problems.expect(
        0 <= stage.plausibility < 1, f"{path}.plausibility", stage.plausibility, "a share in [0, 1)"
    )
    problems.one_of(f"{path}.pool", stage.pool, ("vocabulary", "words", "file"))
    _check_path(path, "pool", "file", stage.pool, stage.path, problems)


def _check_model(model: ModelConfig, problems: Problems) -> None:
    problems.expect(bool(model.id.strip()), "model.id", model.id, "smollm2_135m, a hub id or a folder")
    problems.one_of("model.dtype", model.dtype, ("bfloat16", "float32"))
    problems.one_of("model.attn_implementation", model.attn_implementation, ATTENTION)
    problems.one_of("model.reference", model.reference, ("auto", "adapter_off", "frozen_copy"))
    if model.reference == "adapter_off" and not model.lora.enabled:
        problems.add("model.reference", "found 'adapter_off', but model.lora.enabled=false has no adapter")
    _at_least(1, "model.lora.r", model.lora.r, problems)
    _at_least(1, "model.lora.alpha", model.lora.alpha, problems)
    problems.expect(
        0 <= model.lora.dropout < 1, "model.lora.dropout", model.lora.dropout, "a share in [0, 1)"
    )
    modules = model.lora.target_modules
    named = isinstance(modules, list) and modules and all(isinstance(module, str) for module in modules)
    if not named and not (isinstance(modules, str) and modules):
        expected = "'all-linear', a pattern, or a list of module names"
        problems.expect(False, "model.lora.target_modules", modules, expected)


def _check_data(data: DataConfig, problems: Problems) -> None:
    problems.one_of("data.source", data.source, ("samples", "jsonl"))
    _check_path("data", "source", "jsonl", data.source, data.path, problems)
    fraction = data.held_out_fraction
    problems.expect(0 <= fraction < 1, "data.held_out_fraction", fraction, "a share in [0, 1)")
    if fraction and data.source == "samples":
        reason = f"found {fraction!r}, but the samples have their own held-out prompts; it is for data=jsonl"
        problems.add("data.held_out_fraction", reason)
    _at_least(8, "data.max_length", data.max_length, problems)
    if data.max_prompts_per_category is not None:
        _at_least(1, "data.max_prompts_per_category", data.max_prompts_per_category, problems)


def _check_gate(gate: GateConfig, problems: Problems) -> None:
    """The rules' own values are checked where they are filled in, by `GateRules`."""
    _at_least(0, "gate.every", gate.every, problems)
    hazards = load_taxonomy().ids
    for category in gate.rules.get("category_limits", {}):
        if category not in hazards:
            problems.unknown(f"gate.rules.category_limits.{category}", category, hazards)


def _check_path(
    path: str, switch: str, needs_path: str, value: str, file: str | None, problems: Problems
) -> None:
    """A file is given where `switch` says so, exists, and is not given where nothing would read it."""
    if value == needs_path and file is None:
        problems.add(f"{path}.path", f"has to be given with {path}.{switch}={needs_path}: {path}.path=FILE")
    elif value == needs_path and file is not None and not Path(file).expanduser().is_file():
        problems.add(f"{path}.path", f"found {file!r}, which is no file")
    elif value != needs_path and file is not None:
        problems.add(f"{path}.path", f"found {file!r}, but {path}.{switch}={value} reads no file")


def _check_folder_name(key: str, name: str, problems: Problems) -> None:
    expected = "letters, digits, '.', '_' and '-' (it names a folder)"
    problems.expect(bool(_FOLDER_NAME.fullmatch(name)), key, name, expected)


def _positive(key: str, value: float, problems: Problems) -> None:
    problems.expect(value > 0 and math.isfinite(value), key, value, "a number above 0")


def _at_least(least: float, key: str, value: float, problems: Problems) -> None:
    problems.expect(value >= least and math.isfinite(value), key, value, f"at least {least}")


def _share(key: str, value: float, problems: Problems) -> None:
    problems.expect(0 <= value <= 1, key, value, "a share in [0, 1]")
