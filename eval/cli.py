"""`python -m equipoise.eval [COMMAND] key=value ...`: evaluate a model, compare, gate and calibrate.

    evaluate     (may be left out) model=NAME suite=NAME judge=NAME [out=FOLDER limit=200 cache=FILE tsdi=FOLDER ...]
    compare      a=report.json b=report.json: what changed from a to b, category by category, over the same prompts
    gate         report=report.json [baseline=report.json] [rules=FILE] [rules.KEY=VALUE ...]: may it ship?
    calibrate    judge=NAME data=FILE: how often the judge errs on labelled answers; out=FILE
    report       reports=[STATE=report.json,...] out=FOLDER [examples=none]: HTML and markdown of several states

Groups are suite, judge and engine; every key with its default stands in recipes/evaluation.yaml, its meaning in
eval/config.py. The same command again takes from the cache what was generated and judged before.

Exit codes: 0 done (gate: passed), 3 the gate failed, 4 it could not tell; 2 something has to be mended; 1 a crash;
130 interrupted, and the same command goes on.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.data.errors import DataError, EquipoiseError
from equipoise.eval.config import CommandConfig, JudgeConfig
from equipoise.eval.terminal import Progress, console, say

if TYPE_CHECKING:
    from equipoise.eval.cache import Cache

CRASH, USER_ERROR, INTERRUPTED = 1, 2, 130

GROUPS = ("judge", "suite", "engine")
OWN = ("out", "cache", "tsdi", "limit", "state", "calibration", "baseline", "inspect_log")
"""Keys of `evaluate` that are taken as they are written: paths need no quotes."""


class UsageError(EquipoiseError):
    """A command line that cannot be understood."""


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    first = os.environ.get("RANK", "0") == "0"
    command, rest = (arguments[0], arguments[1:]) if "=" not in arguments[0] else ("evaluate", arguments)
    try:
        if command not in COMMANDS:
            raise UsageError(
                f"{command!r} is no command; possible: {', '.join(COMMANDS)}, or key=value for evaluate."
            )
        return COMMANDS[command](list(rest))
    except EquipoiseError as error:
        if first:
            print(f"equipoise: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if first:
            print("equipoise: interrupted; the same command goes on from its cache.", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # every rank prints: the one that crashed may not be the first
        traceback.print_exc()
        return CRASH


def evaluate(arguments: list[str]) -> int:
    """Evaluate a model, print the table, and write report.json, report.html and report.md."""
    config = configure(arguments)
    from equipoise.eval.run import Evaluation, check

    check(config)
    _join_ranks()
    cache = _cache(config.cache)
    try:
        with Progress() as progress:
            report = Evaluation(config, cache, say, progress).run()
    finally:
        if cache is not None:
            cache.close()
    from equipoise.eval.evaluator import is_main_process

    if is_main_process():
        from equipoise.eval.output import print_report, write_evaluation

        print_report(report)
        for path in write_evaluation(report, config):
            say(f"report: {path}")
    return 0


def compare(arguments: list[str]) -> int:
    """Print what changed from report a to report b."""
    given = _given(arguments, required=("a", "b"), optional=())
    from equipoise.eval.category_report import CategoryReport
    from equipoise.eval.output import print_comparison

    print_comparison(CategoryReport.from_json(given["a"]), CategoryReport.from_json(given["b"]))
    return 0


def gate(arguments: list[str]) -> int:
    """Apply the rules to a report; the exit code is the verdict's."""
    given = _given(arguments, required=("report",), optional=("baseline", "rules"), prefix="rules.")
    from equipoise.eval.category_report import CategoryReport
    from equipoise.eval.gate import gate as apply
    from equipoise.eval.gate_rules import read_rules
    from equipoise.eval.output import print_gate

    rules = read_rules(_rules(given))
    report = CategoryReport.from_json(given["report"])
    baseline = CategoryReport.from_json(given["baseline"]) if "baseline" in given else None
    result = apply(report, baseline, rules)
    print_gate(result)
    return result.exit_code


def calibrate(arguments: list[str]) -> int:
    """Hold a judge against labelled answers, print the table, and write the calibration to `out`."""
    own = _take(arguments, ("data", "out", "cache", "limit", "taxonomy"))
    config = _composed([argument for argument in arguments if _key(argument).split(".")[0] == "judge"])
    strangers = [argument for argument in arguments if _key(argument).split(".")[0] != "judge"]
    if strangers:
        raise UsageError(
            f"{strangers[0]!r}: calibrate takes judge=..., data=FILE, out=FILE, cache=FILE, limit=N."
        )
    if "data" not in own:
        raise UsageError(
            "data has to be given: data=FILE with prompt, response, safe (data/README.md has the schema)."
        )
    from equipoise.eval.judges.calibration import calibrate as measure
    from equipoise.eval.judges.calibration_table import calibration_table
    from equipoise.eval.judges.loading import load_judge
    from equipoise.eval.output import labelled_answers

    limit = None if "limit" not in own else _whole("limit", own["limit"])
    exchanges = labelled_answers(own["data"], own.get("taxonomy"), limit)
    cache = _cache(own.get("cache", "auto"))
    try:
        judge = load_judge(config.judge, cache)
        with Progress() as progress:
            found = measure(judge, exchanges, progress, Path(own["data"]).name, _plain(config.judge))
    finally:
        if cache is not None:
            cache.close()
    console.print(calibration_table(found))
    out = Path(own.get("out", f"calibration-{config.judge.name}.json")).expanduser()
    found.to_json(out)
    say(f"calibration: {out}")
    return 0


def report(arguments: list[str]) -> int:
    """Write one HTML and markdown report of several report.json files."""
    given = _given(arguments, required=("reports",), optional=("out", "title", "examples"))
    from equipoise.eval.output import write_side_by_side
    from equipoise.eval.report.html import Examples

    examples = given.get("examples", Examples.FOLDED)
    if examples not in list(Examples):
        raise UsageError(f"examples: found {examples!r}, possible: {', '.join(Examples)}")
    for path in write_side_by_side(
        given["reports"],
        Path(given.get("out", "outputs/report")),
        given.get("title", "Evaluation"),
        Examples(examples),
    ):
        say(f"report: {path}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "evaluate": evaluate,
    "compare": compare,
    "gate": gate,
    "calibrate": calibrate,
    "report": report,
}


def configure(arguments: Sequence[str]) -> CommandConfig:
    """The configuration of an evaluation; raises EquipoiseError for an unknown key or option, or a wrong type."""
    arguments = list(arguments)
    own = _take(arguments, ("model", *OWN))
    if "model" not in own:
        raise UsageError("model has to be given: model=smollm2_135m, a hub id, or a local folder.")
    config = _composed(arguments, own["model"])
    for key in OWN:
        if key in own:
            value: Any = None if own[key] in ("", "null", "none") else own[key]
            setattr(config, key, _whole(key, value) if key == "limit" and value is not None else value)
    return config


def _composed(overrides: Sequence[str], model: str = "") -> CommandConfig:
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    passed = []
    for override in overrides:
        key = _key(override)
        if "=" not in override or key[:1] in "+~":
            raise UsageError(f"{override!r}: expected key=value.")
        passed.append(override if key in GROUPS else f"++{override}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("equipoise.recipes", version_base="1.3"):
            composed = compose("evaluation", passed)
        composed.model.id = model
        schema = OmegaConf.structured(CommandConfig)
        config = OmegaConf.to_object(OmegaConf.merge(schema, composed))
    except (HydraException, OmegaConfBaseException) as error:
        message = str(error).replace("++", "")
        lines = [line for line in message.splitlines() if line.strip() and "https://" not in line]
        raise UsageError(_readable(lines, error)) from error
    assert isinstance(config, CommandConfig)
    return config


def _readable(lines: Sequence[str], error: Exception) -> str:
    """Hydra's and OmegaConf's messages without their inner names."""
    key = getattr(error, "full_key", None)
    first = lines[0] if lines else type(error).__name__
    if key and "not in" in first:
        return f"{key}: unknown key; eval/config.py lists those there are."
    if key and "Missing mandatory" in first:
        return f"{key} has to be given: {key}=..."
    options = getattr(error, "options", None)
    if options:
        return f"{first} Possible: {', '.join(options)}."
    return f"{key}: {first}" if key and key not in first else first


def _given(
    arguments: Sequence[str], required: Sequence[str], optional: Sequence[str], prefix: str | None = None
) -> dict[str, str]:
    """Arguments as a mapping; raises `UsageError` for one that is missing or unknown."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        known = key in required or key in optional or (prefix is not None and key.startswith(prefix))
        if not equals or not known:
            possible = [*required, *optional, *([f"{prefix}KEY"] if prefix else [])]
            raise UsageError(f"{argument!r}: expected {', '.join(f'{name}=...' for name in possible)}.")
        given[key] = value
    missing = [key for key in required if key not in given]
    if missing:
        raise UsageError(f"{missing[0]} has to be given: {missing[0]}=...")
    return given


def _rules(given: dict[str, str]) -> dict[str, Any]:
    """Rules of a file, and single ones from the command line over them."""
    import yaml

    from equipoise.data.taxonomy import read_yaml

    rules: dict[str, Any] = {}
    if "rules" in given:
        content = read_yaml(Path(given["rules"]).expanduser())
        rules = dict(content["rules"]) if isinstance(content.get("rules"), dict) else content
    for key, value in given.items():
        if key.startswith("rules."):
            parts = key.removeprefix("rules.").split(".")
            inner = rules
            for part in parts[:-1]:
                inner = inner.setdefault(part, {})
            try:
                inner[parts[-1]] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UsageError(f"{key}: found {value!r}, expected a value as in YAML.") from error
    return rules


def _take(arguments: list[str], keys: Sequence[str]) -> dict[str, str]:
    """Move `key=value` of these keys out of the arguments; the last of a key counts."""
    taken = {_key(argument): argument.partition("=")[2] for argument in arguments if _key(argument) in keys}
    arguments[:] = [argument for argument in arguments if _key(argument) not in keys]
    return taken


def _key(argument: str) -> str:
    return argument.partition("=")[0]


def _whole(key: str, value: str) -> int:
    if not value.isdigit():
        raise DataError(f"{key}: found {value!r}, expected a whole number.")
    return int(value)


def _plain(config: JudgeConfig) -> dict[str, Any]:
    from dataclasses import asdict

    return {key: value for key, value in asdict(config).items() if value not in (None, {}, [])}


def _cache(where: str | None) -> "Cache | None":
    """The cache at `where`; `auto`: in equipoise's cache folder; None: none."""
    if where in (None, "", "null", "none"):
        return None
    from equipoise.eval.cache import Cache

    if where == "auto":
        from platformdirs import user_cache_dir

        folder = os.environ.get("EQUIPOISE_CACHE") or user_cache_dir("equipoise")
        return Cache(Path(folder).expanduser() / "evaluation.sqlite")
    return Cache(str(where))


def _join_ranks() -> None:
    """Under torchrun and accelerate launch the ranks share the prompts."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
