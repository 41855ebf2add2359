"""From a command line in Hydra's override grammar to the points of a sweep: one run of train.py each."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException

from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside
from equipoise.train.cli import compose
from equipoise.train.locks import locked_folder
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.loading import load_recipe

SEED = "seed"
"""Swept like any other key, but points that differ in it alone are repetitions of one setting."""
OF_THE_SWEEP = ("name", "output_dir")
"""Keys that name the sweep's folder; its points get their own."""
GROUP = "tracking.group"
"""Dashboards show the points together, under the sweep's name where it was given no group."""
_MAX_NAME = 100
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class SweepError(EquipoiseError):
    """A sweep that cannot be run as it was asked for."""


@dataclass(frozen=True)
class Point:
    """One run: a setting and a seed."""

    setting: str
    """Name of its folder: the swept keys but `seed`, with their values."""
    swept: Mapping[str, str] = field(compare=False)
    """Swept key -> this point's value, `seed` left out."""
    seed: int
    arguments: tuple[str, ...]
    """For train.py."""
    folder: Path
    """Of the run: `<output>/<name>/points/<setting>/seed<seed>`."""
    recipe: Recipe = field(compare=False, repr=False)
    """As composed, but for the name and the output folder."""

    def __str__(self) -> str:
        return f"{self.setting}/seed{self.seed}"

    @property
    def done(self) -> bool:
        """Whether the run has ended with a verdict; summary.json is written behind all reports."""
        return (self.folder / "summary.json").exists()

    @property
    def log(self) -> Path:
        """What its processes print, all attempts."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def failure(self) -> Path:
        """Exit code and the log's tail of the last attempt, where it failed."""
        return self.folder.with_name(f"{self.folder.name}.failed.json")


@dataclass(frozen=True)
class Sweep:
    """What a command line asks for."""

    folder: Path
    """`<output>/<name>`."""
    fixed: tuple[str, ...]
    """Overrides that all points share, as they were given."""
    swept: tuple[str, ...]
    """Keys with several values, `seed` left out."""
    seeds: tuple[int, ...]
    points: tuple[Point, ...]
    """In Hydra's order: the last key changes fastest."""

    @contextmanager
    def claimed(self, searched: Mapping[str, Any] | None = None, to_run: bool = True) -> Iterator[None]:
        """Inside the `with` the folder is this sweep's, and where points are run (`to_run`) nobody else runs any in it.

        Raises FolderInUseError, and SweepError where the folder was made for another sweep (more values of the swept
        keys and more seeds are welcome, another fixed override is not) or, with nothing to run, for none.
        """
        advice = "Wait for it to end; --report-only shows what there is, and name=... begins another sweep."
        with locked_folder(self.folder, advice) if to_run else nullcontext():
            self._claim(searched, to_run)
            yield

    def _claim(self, searched: Mapping[str, Any] | None, to_run: bool) -> None:
        path = self.folder / "sweep.json"
        mine = json.loads(
            json.dumps({"fixed": sorted(self.fixed), "swept": sorted(self.swept), "search": searched})
        )
        if not path.exists():
            if not to_run:
                raise SweepError(
                    f"{self.folder} holds no sweep to report on: look at name=... and output_dir=..."
                )
            write_aside(path, json.dumps(mine, indent=1) + "\n")
            return
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            f"{key} was {theirs.get(key)}, is {mine[key]}" for key in mine if theirs.get(key) != mine[key]
        ]
        if differing:
            raise SweepError(
                f"{self.folder} holds another sweep: {'; '.join(differing)}. Give this one another name (name=...), "
                "or remove that folder."
            )


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides as Hydra reads them; raises SweepError where it cannot."""
    Plugins.instance()
    loader = ConfigLoaderImpl(config_search_path=create_config_search_path("pkg://equipoise.recipes"))
    try:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    except HydraException as error:
        raise SweepError(f"Hydra cannot read the overrides: {error}") from error
    for override in parsed:
        if override.key_or_group.partition("/")[0].partition(".")[0] == "hydra":
            raise SweepError(
                f"{override.input_line}: the sweep itself is Hydra's outer part; see --launcher, --jobs and --optuna"
            )
    return parsed


def expand(overrides: Sequence[Override]) -> list[list[str]]:
    """Every combination of choices, ranges and globs, as Hydra's own sweeper has them; raises SweepError."""
    for override in overrides:
        if override.is_interval_sweep():
            raise SweepError(
                f"{override.input_line}: an interval has no points of its own; give choices or a range, or search it "
                "with --optuna NUM_TRIALS"
            )
    try:
        (batch,) = BasicSweeper.split_arguments(list(overrides), max_batch_size=None)
    except HydraException as error:
        raise SweepError(str(error)) from error
    return batch


def plan(overrides: Sequence[str], config_dir: str | None = None) -> Sweep:
    """The sweep of a command line, with every point's recipe composed and checked.

    Raises SweepError, or RecipeError for a point that train.py would refuse; nothing has been run or written then.
    """
    parsed = parse(overrides)
    swept = [override.get_key_element() for override in parsed if override.is_sweep_override()]
    return assemble(parsed, swept, expand(parsed), config_dir)


def assemble(
    parsed: Sequence[Override], swept: Sequence[str], batch: Sequence[Sequence[str]], config_dir: str | None
) -> Sweep:
    """The sweep of `batch`, the points' overrides; `swept` are the keys whose values name a point."""
    own = {override.get_key_element(): override for override in parsed}
    for key in OF_THE_SWEEP:
        if key in swept:
            raise SweepError(f"{key}: belongs to the whole sweep and takes one value")
    swept = [key for key in swept if key != SEED]
    given = {key: _text(own[key].value()) for key in OF_THE_SWEEP if key in own}
    points: dict[Point, None] = {}
    folder = Path()
    for one in batch:
        values = dict(override.partition("=")[::2] for override in one)
        setting = {key: values[key] for key in swept}
        kept = [override for override in one if override.partition("=")[0] not in OF_THE_SWEEP]
        recipe = _recipe(tuple(kept), config_dir)
        folder = Path(given.get("output_dir", recipe.output_dir)).expanduser().resolve()
        folder /= given.get("name", recipe.name)
        name = setting_name(setting)
        arguments = [*kept, f"name={name}", f"output_dir={_quoted(folder / 'points')}"]
        if GROUP not in {key.lstrip("+") for key in own}:
            arguments.append(f"{GROUP}={_quoted(folder.name)}")
        point = Point(
            setting=name,
            swept=setting,
            seed=recipe.seed,
            arguments=(*(["--config-dir", config_dir] if config_dir else []), *arguments),
            folder=folder / "points" / name / f"seed{recipe.seed}",
            recipe=recipe,
        )
        points[point] = None
    fixed = [
        override.input_line or override.get_key_element()
        for key, override in own.items()
        if key not in (*swept, *OF_THE_SWEEP, SEED)
    ]
    return Sweep(
        folder=folder,
        fixed=tuple(fixed),
        swept=tuple(swept),
        seeds=tuple(dict.fromkeys(point.seed for point in points)),
        points=tuple(points),
    )


def setting_name(setting: Mapping[str, str]) -> str:
    """A folder's name for swept keys and their values: `beta-0.05_lam-4`; two settings never share one."""
    exact = "_".join(f"{key.lstrip('+~')}-{value}" for key, value in setting.items()) or "point"
    name = _NOT_IN_NAMES.sub("-", exact).lstrip("._-")
    if name == exact and len(name) <= _MAX_NAME:
        return name
    return f"{name[:_MAX_NAME]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _text(value: object) -> str:
    return value.text if isinstance(value, QuotedString) else str(value)


def _quoted(value: Path | str) -> str:
    return QuotedString(text=str(value), quote=Quote.single).with_quotes()


@functools.cache  # a search composes its points again in every round
def _recipe(overrides: tuple[str, ...], config_dir: str | None) -> Recipe:
    arguments = [*(["--config-dir", config_dir] if config_dir else []), *overrides]
    try:
        composed = compose(arguments)
        if composed is None:
            raise SweepError(f"{' '.join(overrides)}: nothing that could be run")
        recipe = load_recipe(composed)
    except RecipeError as error:
        raise SweepError(f"train.py would refuse the point {' '.join(overrides)}: {error}") from error
    if recipe.dry_run:
        raise SweepError("dry_run=true: a sweep has nothing to show for it; try one point with train.py")
    if not recipe.evaluation.baseline:
        raise SweepError(
            "evaluation.baseline=false: points are held against the starting model; it is judged once for all of them"
        )
    if not any(stage.evaluate for stage in recipe.stages.values()):
        raise SweepError(
            "no stage of this recipe is judged; set stages.NAME.evaluate=true for the one that counts"
        )
    return recipe
