"""The command line: compose the recipe, check it, run it, and turn what happens into an exit code.

0 the gate passed, 3 it failed, 4 it could not tell; 2 something is the user's to mend; 1 a crash; 130 interrupted;
75 told to end by SIGTERM or SIGUSR1, with a checkpoint to go on from (`preemption.py`).
Nothing heavy is imported before the recipe has been checked.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from equipoise.data.errors import DataError, EquipoiseError, FirstRankError
from equipoise.train.preemption import REQUEUE, Preempted, handled
from equipoise.train.recipe import RecipeError
from equipoise.train.recipe.checks import near_misses
from equipoise.train.recipe.loading import load_recipe
from equipoise.train.redaction import secret_values, without_secrets

CRASH, USER_ERROR, INTERRUPTED = 1, 2, 130

EXIT_CODE_FILE = "EQUIPOISE_EXIT_CODE_FILE"
"""Environment variable: where rank 0, or a rank that fails, writes its exit code; a launcher turns every one into 1."""

_ALIKE_ON_ALL = (RecipeError, DataError)
"""What every rank finds for itself: the first says it."""
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says of a rank that has ended."""


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; returns the exit code."""
    rank = os.environ.get("RANK", "0")
    first = rank == "0"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    speaker = "equipoise" if first else f"equipoise, rank {rank}"
    consequence = False  # of another rank's end
    try:
        with handled():
            code = _run(arguments)
    except EquipoiseError as error:
        code = USER_ERROR
        consequence = isinstance(error, FirstRankError)  # the first has said what it was
        if first or not (consequence or isinstance(error, _ALIKE_ON_ALL)):
            print(f"{speaker}: {without_secrets(str(error), secret_values())}", file=sys.stderr)
    except KeyboardInterrupt:
        code = INTERRUPTED
        if first:
            print("equipoise: interrupted; the same command resumes.", file=sys.stderr)
    except Preempted:
        code = REQUEUE
        if first:
            print(
                "equipoise: told to end; what was done is saved, the same command goes on.", file=sys.stderr
            )
    except SystemExit as exit:  # argparse, about an option that is none
        code = exit.code if isinstance(exit.code, int) else USER_ERROR
    except Exception as error:  # every rank prints: the one that crashed may not be the first
        code = CRASH
        consequence = not alone and any(said in str(error) for said in _GONE)
        if consequence:
            print(f"{speaker}: another rank is gone; what ended it stands in its own lines", file=sys.stderr)
        else:
            text = without_secrets(traceback.format_exc(), secret_values())
            print(text if alone else f"{speaker} crashed:\n{text}", end="", file=sys.stderr)
    if file := os.environ.get(EXIT_CODE_FILE):
        _tell(Path(file), code, first, consequence)
    return code


def leave(code: int) -> NoReturn:
    """End the process. Where a rank has failed among others it ends at once: torch's tidying up may wait for them."""
    if code in (CRASH, USER_ERROR) and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _tell(file: Path, code: int, first: bool, consequence: bool) -> None:
    """Write the run's exit code: rank 0's, unless another rank's failure is why it ends.

    A launcher sends SIGTERM to the ranks that are left; without this the run would seem preempted, and start again.
    """
    failed = code in (CRASH, USER_ERROR)
    if not first and (not failed or consequence):
        return
    if (
        first
        and (consequence or code == REQUEUE)
        and file.exists()
        and file.read_text(encoding="utf-8").strip()
    ):
        return
    file.write_text(f"{code}\n", encoding="utf-8")


def _run(arguments: Sequence[str]) -> int:
    cfg = compose(arguments)
    if cfg is None:  # --help, --cfg and their like have printed what was asked for
        return 0
    recipe = load_recipe(cfg)
    from equipoise.train.run import run  # torch and transformers take seconds; a slip of the pen should not

    return run(recipe)


def compose(arguments: Sequence[str]) -> DictConfig | None:
    """The configuration that Hydra composes, or None where it was asked to print something instead.

    Raises `RecipeError` for no recipe, an unknown option of a group, a bad override, or `--multirun`.
    """
    parsed = get_args_parser().parse_args(list(arguments))
    if parsed.multirun or any(override.startswith("hydra.mode=") for override in parsed.overrides):
        raise RecipeError(
            "A launch runs one recipe: --multirun would use the same processes again. Start one launch a point."
        )
    composed: list[DictConfig] = []
    recipes: list[str] = []

    @hydra.main(version_base="1.3", config_path="pkg://equipoise.recipes", config_name="config")
    def take(cfg: DictConfig) -> None:
        recipes.extend(GlobalHydra.instance().config_loader().get_group_options("recipe"))
        if HydraConfig.get().runtime.choices["recipe"] is not None:
            composed.append(cfg)

    groups = _groups(parsed.config_dir)
    original, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving with 1
    sys.argv = [original[0], *(_settable(a, groups) if a in parsed.overrides else a for a in arguments)]
    try:
        take()
    except MissingConfigException as error:
        raise RecipeError(_missing(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError(_without_hydra(str(error))) from error
    except SystemExit as exit:
        if exit.code:
            raise
    finally:
        sys.argv = original
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    if recipes and not composed:
        raise RecipeError(f"No recipe is named. Add recipe=NAME; possible: {', '.join(recipes)}")
    return composed[0] if composed else None


def _groups(config_dir: str | None) -> set[str]:
    folders = [Path(__file__).parents[1] / "recipes", *([Path(config_dir)] if config_dir else [])]
    return {
        entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir() if entry.is_dir()
    }


def _settable(override: str, groups: set[str]) -> str:
    """`key=value` as Hydra's `++key=value`, so that every key of the dataclasses can be set, written in YAML or not.

    Unknown keys then reach `load_recipe`, whose message knows what they may have meant.
    """
    key = override.partition("=")[0]
    plain = "=" in override and key[:1] not in "+~" and "@" not in key and "/" not in key
    return f"++{override}" if plain and key not in groups and not key.startswith("hydra.") else override


def _missing(error: MissingConfigException) -> str:
    """Hydra's message about an option that no group has, with what was possible and without its search path."""
    if not error.missing_cfg_file or not error.options:
        return str(error)
    group, _, option = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
    hint = near_misses(option, error.options)
    return f"{group}={option}: there is no such option; {hint}possible: {', '.join(error.options)}"


def _without_hydra(message: str) -> str:
    """Hydra's message about a bad override, without the marks of `_settable` and without advice to sweep."""
    lines = [
        line for line in message.splitlines() if "--multirun" not in line and "https://hydra.cc" not in line
    ]
    return "\n".join(lines).replace("'++", "'")
