"""Values and combinations of a recipe that cannot work, found before any model is loaded."""

import difflib
import importlib.util
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.data.crosswalk import find_taxonomy
from equipoise.data.errors import DataError
from equipoise.data.sources import FILE_SOURCES, SHIPPED_PARTS, source_names
from equipoise.data.sources.files import LABELLED_FIELDS, PAIR_FIELDS
from equipoise.data.taxonomy import load_taxonomy
from equipoise.train.recipe import (
    DataConfig,
    GateConfig,
    LossConfig,
    ModelConfig,
    Recipe,
    RecipeError,
    TrackingConfig,
)

LOSSES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "safedpo")
MARGIN_LOSSES = ("sigmoid", "hinge", "robust", "safedpo")
TRACKERS = ("wandb", "tensorboard", "trackio")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")

DATA_FIELDS = sorted(PAIR_FIELDS | LABELLED_FIELDS)

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class Problems:
    """What is wrong with a recipe, by key: a value that several keys refer to is named once, where it stands."""

    raw: Mapping[str, Any]
    """The recipe before `${...}` is resolved."""
    found: dict[str, str] = field(default_factory=dict)
    categories: tuple[str, ...] = load_taxonomy().ids
    """The harm categories that a key may name: the shipped ones, and those of the recipe's own taxonomy."""

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
    from equipoise.eval.judges.loading import judge_problems  # here: statistics take a second to import

    check_folder_name("name", recipe.name, problems)
    problems.expect(bool(recipe.output_dir.strip()), "output_dir", recipe.output_dir, "a folder")
    at_least(0, "seed", recipe.seed, problems)
    positive("beta", recipe.beta, problems)
    positive("lam", recipe.lam, problems)
    check_loss("loss", recipe.loss, problems)
    _check_model(recipe.model, problems)
    _check_data(recipe.data, problems)
    for key, reason in judge_problems(recipe.judge).items():
        problems.add(f"judge.{key}", reason)
    at_least(1, "evaluation.max_new_tokens", recipe.evaluation.max_new_tokens, problems)
    at_least(1, "evaluation.batch_size", recipe.evaluation.batch_size, problems)
    _check_gate(recipe.gate, problems)
    _check_tracking(recipe.tracking, problems)
    _check_shared(recipe, problems)


def _check_tracking(tracking: TrackingConfig, problems: Problems) -> None:
    for name in tracking.trackers:
        problems.one_of("tracking.trackers", name, TRACKERS)
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            problems.add("tracking.trackers", f"{name} is not installed: pip install 'equipoise[{name}]'")
    problems.one_of("tracking.mode", tracking.mode, ("auto", "online", "offline"))
    problems.one_of("tracking.log_model", tracking.log_model, ("reference", "upload", "none"))
    positive("tracking.init_timeout", tracking.init_timeout, problems)
    positive("tracking.finish_timeout", tracking.finish_timeout, problems)


def _check_shared(recipe: Recipe, problems: Problems) -> None:
    """beta, lam and loss at the top do something only where a stage refers to them."""
    for key, default in (("beta", Recipe.beta), ("lam", Recipe.lam), ("loss", LossConfig())):
        given = getattr(recipe, key)
        read = any(getattr(stage, key, None) == given for stage in recipe.stages.values())
        if given != default and not read:
            problems.add(key, f"no stage of this recipe refers to ${{{key}}}, so it would change nothing")


def check_loss(path: str, loss: LossConfig, problems: Problems) -> None:
    """Note what cannot work in a preference loss."""
    problems.one_of(f"{path}.name", loss.name, LOSSES)
    for name, weight in loss.mix.items():
        if name == "sft":
            problems.add(f"{path}.mix.sft", f"the SFT term has a key of its own: {path}.sft_coef={weight:g}")
        elif name == "sigmoid_norm":
            problems.add(
                f"{path}.mix.{name}", f"TRL's sigmoid_norm is sigmoid with {path}.length_normalised=true"
            )
        elif name not in LOSSES:
            problems.unknown(f"{path}.mix.{name}", name, LOSSES)
        else:
            at_least(0, f"{path}.mix.{name}", weight, problems)
    if not any(weight > 0 for weight in loss.weights.values()):
        problems.add(f"{path}.mix", "every loss has the weight 0; at least one must be above 0")
    smoothing = loss.label_smoothing
    problems.expect(0 <= smoothing < 0.5, f"{path}.label_smoothing", smoothing, "a share in [0, 0.5)")
    if smoothing and not loss.weights.get("robust"):
        reason = f"found {smoothing!r}, but only the loss 'robust' reads it; expected 0 for {loss.name!r}"
        problems.add(f"{path}.label_smoothing", reason)
    at_least(0, f"{path}.sft_coef", loss.sft_coef, problems)
    at_least(0, f"{path}.delta", loss.delta, problems)
    problems.one_of(f"{path}.unlabelled", loss.unlabelled, ("error", "drop"))
    for key, value in (("delta", loss.delta), ("unlabelled", loss.unlabelled)):
        if value != getattr(LossConfig, key) and not loss.weights.get("safedpo"):
            reason = f"found {value!r}, but only the loss 'safedpo' reads it; {loss.name!r} would not change"
            problems.add(f"{path}.{key}", reason)


def _check_model(model: ModelConfig, problems: Problems) -> None:
    problems.expect(bool(model.id.strip()), "model.id", model.id, "smollm2_135m, a hub id or a folder")
    problems.one_of("model.dtype", model.dtype, ("bfloat16", "float32", "native"))
    problems.one_of("model.attn_implementation", model.attn_implementation, ATTENTION)
    problems.one_of("model.reference", model.reference, ("auto", "adapter_off", "frozen_copy"))
    if model.reference == "adapter_off" and not model.lora.enabled:
        problems.add("model.reference", "found 'adapter_off', but model.lora.enabled=false has no adapter")
    _check_quantization(model, problems)
    at_least(1, "model.lora.r", model.lora.r, problems)
    at_least(1, "model.lora.alpha", model.lora.alpha, problems)
    problems.expect(
        0 <= model.lora.dropout < 1, "model.lora.dropout", model.lora.dropout, "a share in [0, 1)"
    )
    modules = model.lora.target_modules
    named = isinstance(modules, list) and modules and all(isinstance(module, str) for module in modules)
    if not named and not (isinstance(modules, str) and modules):
        expected = "'all-linear', a pattern, or a list of module names"
        problems.expect(False, "model.lora.target_modules", modules, expected)


def _check_quantization(model: ModelConfig, problems: Problems) -> None:
    key, value = "model.quantization", model.quantization
    problems.one_of(key, value, ("none", "nf4"))
    if value == "none":
        return
    if not model.lora.enabled:
        problems.add(
            key, f"found {value!r}, but 4-bit weights cannot be trained; expected model.lora.enabled=true"
        )
    elif model.reference == "frozen_copy":
        problems.add(
            key, f"found {value!r}, whose reference is the model without its adapter: model.reference=auto"
        )
    elif importlib.util.find_spec("bitsandbytes") is None:
        problems.add(key, f"found {value!r}, which needs bitsandbytes: pip install 'equipoise[quantization]'")


def _check_data(data: DataConfig, problems: Problems) -> None:
    _check_source(data, problems)
    _check_taxonomy(data, problems)
    for name in data.fields:
        problems.one_of("data.fields", name, DATA_FIELDS)
    if data.mirror is not None and not Path(data.mirror).expanduser().is_dir():
        problems.add("data.mirror", f"found {data.mirror!r}, which is no folder")
    problems.one_of("data.preference", data.preference, ("safe", "helpful", "both"))
    for key in ("both_safe", "both_unsafe", "unsafe_chosen"):
        problems.one_of(f"data.{key}", getattr(data, key), ("keep", "drop", "mark"))
    fraction = data.held_out_fraction
    problems.expect(0 <= fraction < 1, "data.held_out_fraction", fraction, "a share in [0, 1)")
    if fraction and data.source == "samples":
        reason = (
            f"found {fraction!r}, but the samples have their own held-out prompts; it is for other sources"
        )
        problems.add("data.held_out_fraction", reason)
    at_least(8, "data.max_length", data.max_length, problems)
    _check_preparation(data, problems)
    for rate in ("max_too_long_rate", "max_template_fault_rate", "max_suite_overlap"):
        share_of_one(f"data.{rate}", getattr(data, rate), problems)
    for key in ("num_rows", "max_prompts_per_category"):
        number = getattr(data, key)
        if number is not None:
            at_least(1, f"data.{key}", number, problems)


def _check_preparation(data: DataConfig, problems: Problems) -> None:
    """Cleansing and categories: actions, thresholds, and keys that nothing reads."""
    cleaning = data.cleaning
    for key, reason in cleaning.problems().items():
        problems.add(f"data.cleaning.{key}", reason)
    problems.one_of("data.categorise", data.categorise, ("none", "classifier", "judge"))
    share_of_one("data.min_confidence", data.min_confidence, problems)
    given = data.categorise_from
    if given is not None and data.categorise != "classifier":
        problems.add("data.categorise_from", f"found {given!r}, but data.categorise={data.categorise}")
    elif given is not None and not Path(given).expanduser().is_file():
        problems.add("data.categorise_from", f"found {given!r}, which is no file")
    if data.source == "samples" and (cleaning.enabled or data.categorise != "none"):
        key = "cleaning.enabled" if cleaning.enabled else "categorise"
        problems.add(
            f"data.{key}", "the shipped samples are clean and have categories; it is for other sources"
        )


def _check_source(data: DataConfig, problems: Problems) -> None:
    """The source, the parts of a mixture, and the path where one of them reads the user's files."""
    parts = list(data.mixture) if data.source == "mixture" else [data.source]
    problems.one_of("data.source", data.source, ("samples", "mixture", *source_names()))
    if data.source == "mixture" and not data.mixture:
        problems.add(
            "data.mixture", "has to be given with data.source=mixture: data.mixture={NAME: SHARE, ...}"
        )
    elif data.source != "mixture" and data.mixture:
        problems.add(
            "data.mixture", f"found parts, but data.source={data.source} reads none; expected mixture"
        )
    for name, share in data.mixture.items():
        positive(f"data.mixture.{name}", share, problems)
        if name not in (possible := (*SHIPPED_PARTS, *source_names())):
            problems.unknown(f"data.mixture.{name}", name, possible)
    reads_files = [name for name in parts if name in FILE_SOURCES]
    if reads_files and data.path is None:
        problems.add("data.path", f"has to be given with data.source={reads_files[0]}: data.path=FILE")
    elif reads_files and data.path is not None and not Path(data.path).expanduser().exists():
        problems.add("data.path", f"found {data.path!r}, which is no file and no folder")
    elif data.path is not None and not reads_files:
        problems.add("data.path", f"found {data.path!r}, but data.source={data.source} reads no file")
    if len(reads_files) > 1:
        problems.add(
            "data.mixture",
            f"found {' and '.join(reads_files)}, but there is one data.path; expected one of them",
        )
    for key in ("fields", "taxonomy"):
        if getattr(data, key) and not reads_files:
            reason = f"found {getattr(data, key)!r}, but data.source={data.source} reads no file of yours"
            problems.add(f"data.{key}", reason)


def _check_taxonomy(data: DataConfig, problems: Problems) -> None:
    """Note a taxonomy that cannot be read, with what is wrong in it; its categories may be named from here on."""
    try:
        problems.categories = find_taxonomy(data.taxonomy).ids
    except DataError as error:
        problems.add("data.taxonomy", str(error))


def _check_gate(gate: GateConfig, problems: Problems) -> None:
    """The rules' own values are checked where they are filled in, by `GateRules`."""
    at_least(0, "gate.every", gate.every, problems)
    problems.one_of("gate.where", gate.where, ("in_process", "subprocess", "vllm"))
    positive("gate.timeout", gate.timeout, problems)
    if gate.devices is not None and gate.where == "in_process":
        reason = f"found {gate.devices!r}, but gate.where=in_process evaluates on the ranks' own devices"
        problems.add("gate.devices", reason)
    if gate.engine_options and gate.where != "vllm":
        reason = f"found {', '.join(gate.engine_options)}, but gate.where={gate.where} starts no vLLM"
        problems.add("gate.engine_options", reason)
    for category in gate.rules.get("category_limits", {}):
        if category not in problems.categories:
            problems.unknown(f"gate.rules.category_limits.{category}", category, problems.categories)


def check_path(
    path: str, switch: str, needs_path: str, value: str, file: str | None, problems: Problems
) -> None:
    """A file is given where `switch` says so, exists, and is not given where nothing would read it."""
    if value == needs_path and file is None:
        problems.add(f"{path}.path", f"has to be given with {path}.{switch}={needs_path}: {path}.path=FILE")
    elif value == needs_path and file is not None and not Path(file).expanduser().is_file():
        problems.add(f"{path}.path", f"found {file!r}, which is no file")
    elif value != needs_path and file is not None:
        problems.add(f"{path}.path", f"found {file!r}, but {path}.{switch}={value} reads no file")


def check_folder_name(key: str, name: str, problems: Problems) -> None:
    """Note a `name` that no folder should have."""
    expected = "letters, digits, '.', '_' and '-' (it names a folder)"
    problems.expect(bool(_FOLDER_NAME.fullmatch(name)), key, name, expected)


def positive(key: str, value: float, problems: Problems) -> None:
    """Note a number that is not above 0."""
    problems.expect(value > 0 and math.isfinite(value), key, value, "a number above 0")


def at_least(least: float, key: str, value: float, problems: Problems) -> None:
    """Note a number below `least`."""
    problems.expect(value >= least and math.isfinite(value), key, value, f"at least {least}")


def share_of_one(key: str, value: float, problems: Problems) -> None:
    """Note a number outside [0, 1]."""
    problems.expect(0 <= value <= 1, key, value, "a share in [0, 1]")
