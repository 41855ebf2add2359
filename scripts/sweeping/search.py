"""Many-objective search with Optuna: helpfulness up, the worst category's unsafe rate down.

Optuna proposes settings (ask), the sweep runs their points, one a seed, and hands back the means over seeds (tell). The
study is a journal beside the points: the same command goes on with the trials that were running, and stops when
`--optuna` trials are complete.
"""

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.core.override_parser.types import (
    ChoiceSweep,
    FloatRange,
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
)
from sweeping.points import SEED, Point, Sweep, SweepError, assemble, expand, parse

from equipoise.eval.report.content import worst_category
from equipoise.eval.terminal import say

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

STUDY = "sweep"
DIRECTIONS = ("maximize", "minimize")
"""Of helpfulness and of the worst category's unsafe rate."""


def search(options: argparse.Namespace) -> Sweep:
    """Run trials until `options.optuna` are complete; returns the sweep of all that have run. Raises SweepError."""
    if importlib.util.find_spec("optuna") is None:
        raise SweepError("--optuna: optuna is not installed; pip install 'equipoise[sweep]'")
    from optuna.trial import TrialState
    from sweeping.command import run_points

    parsed = parse(options.overrides)
    space = search_space(parsed)
    seeds = [override for override in parsed if override.get_key_element() == SEED]
    fixed = [override for override in parsed if override.get_key_element() not in (*space, SEED)]
    first = _sweep_of(parsed, fixed, seeds, [{name: _middle(d) for name, d in space.items()}], options)
    claim = {"space": {name: repr(d) for name, d in space.items()}, "sampler": options.sampler}
    with first.claimed(claim, to_run=not options.report_only):
        study = _study(first, options)
        if not options.report_only:
            _forget_torn(study, space)
        while not options.report_only:
            complete = study.get_trials(states=(TrialState.COMPLETE,))
            left = options.optuna - len(complete)
            if left <= 0:
                break
            # Trials of an interrupted call first; their points go on from their checkpoints.
            trials: list[Any] = list(study.get_trials(states=(TrialState.RUNNING,)))[
                : min(options.jobs, left)
            ]
            trials += [study.ask(space) for _ in range(min(options.jobs, left) - len(trials))]
            sweep = _sweep_of(parsed, fixed, seeds, [trial.params for trial in trials], options)
            run_points(sweep, options, whole=_sweep_of(parsed, fixed, seeds, _tried(study, space), options))
            num_failed = 0
            for trial in trials:
                values = _objectives(sweep, _setting(sweep, trial.params))
                if values is None:
                    num_failed += 1
                    study.tell(trial.number, state=TrialState.FAIL)
                else:
                    study.tell(trial.number, values)
            if num_failed == len(trials):
                say("every trial of this round failed; the search stops here, and the same command goes on")
                break
    tried = _tried(study, space)
    return _sweep_of(parsed, fixed, seeds, tried, options) if tried else first


def _tried(study: "Study", space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings that were asked for."""
    return [trial.params for trial in study.get_trials() if trial.params.keys() == space.keys()]


def _forget_torn(study: "Study", space: Mapping[str, Any]) -> None:
    """A call that was killed while it asked leaves a trial without all values: it would run as another recipe."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if trial.params.keys() != space.keys():
            study.tell(trial.number, state=TrialState.FAIL)


def search_space(overrides: Sequence[Override]) -> "dict[str, BaseDistribution]":
    """Key -> what Optuna draws from: choices, ranges and intervals; `tag(log, ...)` for logarithmic ones.

    `seed` is no dimension: every setting is run with all of its values. Raises SweepError where nothing is swept.
    """
    space = {
        override.get_key_element(): _distribution(override)
        for override in overrides
        if override.is_sweep_override() and override.get_key_element() != SEED
    }
    if not space:
        raise SweepError(
            "--optuna: nothing to search; give choice(...), range(...) or interval(...) for some key"
        )
    return space


def _distribution(override: Override) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    try:
        if isinstance(value, ChoiceSweep):
            return CategoricalDistribution([_plain(choice) for choice in override.sweep_iterator()])
        if isinstance(value, RangeSweep):
            numbers = value.range()
            if value.shuffle:
                raise SweepError(f"{override.input_line}: Optuna draws by itself; leave out shuffle")
            if isinstance(numbers, FloatRange):
                found = list(numbers)
                return FloatDistribution(found[0], found[-1], step=float(value.step))
            return IntDistribution(numbers[0], numbers[-1], step=numbers.step)
        if isinstance(value, IntervalSweep):
            log = "log" in value.tags
            if isinstance(value.start, int) and isinstance(value.end, int) and "int" in value.tags:
                return IntDistribution(value.start, value.end, log=log)
            return FloatDistribution(float(value.start or 0), float(value.end or 0), log=log)
    except (ValueError, IndexError) as error:
        raise SweepError(f"{override.input_line}: nothing that Optuna can draw from: {error}") from error
    raise SweepError(f"{override.input_line}: expected choice(...), range(...) or interval(...)")


def _plain(choice: Any) -> Any:
    """A choice as Optuna stores it; lists and mappings as Hydra spells them."""
    if isinstance(choice, QuotedString):
        return choice.with_quotes()
    if choice is None or isinstance(choice, bool | int | float | str):
        return choice
    return Override._get_value_element_as_str(choice)


def _study(sweep: Sweep, options: argparse.Namespace) -> "Study":
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(sweep.folder / "study.journal")))
    study = optuna.create_study(
        storage=storage, study_name=STUDY, directions=list(DIRECTIONS), load_if_exists=True
    )
    seed = len(study.get_trials())  # a call that goes on must not draw what the one before has drawn
    if options.sampler == "nsga2":
        # A generation is what selection works on: too large a one for the trials there are is a random search.
        population = max(4, min(50, options.optuna // 4))
        study.sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
    else:
        startup = min(10, max(options.optuna // 3, 1))
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    return study


def _sweep_of(
    parsed: Sequence[Override],
    fixed: Sequence[Override],
    seeds: Sequence[Override],
    params: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
) -> Sweep:
    """The sweep over these settings, each with every seed."""
    batch = [
        [*one, *(f"{key}={_spelt(value)}" for key, value in setting.items())]
        for setting in params
        for one in expand([*fixed, *seeds])
    ]
    return assemble(parsed, list(params[0]), batch, options.config_dir)


def _setting(sweep: Sweep, params: Mapping[str, Any]) -> list[Point]:
    spelt = {key: _spelt(value) for key, value in params.items()}
    return [point for point in sweep.points if dict(point.swept) == spelt]


def _spelt(value: Any) -> str:
    """A value as an override has it; six digits of a drawn number are enough, and name its folder."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _middle(distribution: "BaseDistribution") -> Any:
    """Some value of a distribution, to check the recipe with before anything is asked."""
    choices = getattr(distribution, "choices", None)
    return choices[0] if choices is not None else distribution.low  # type: ignore[attr-defined]


def _objectives(sweep: Sweep, points: Sequence[Point]) -> tuple[float, float] | None:
    """Mean helpfulness and mean unsafe rate of the worst category over a setting's seeds; None where one is missing."""
    from sweeping.results import read_outcome

    if not points or not all(point.done for point in points):
        return None
    reports = [read_outcome(point).report for point in points]
    helpful = [report.helpfulness.mean for report in reports]
    worst = [worst_category(report)[1].rate for report in reports]
    if any(value is None for value in (*helpful, *worst)):
        return None
    return float(np.mean(helpful)), float(np.mean(worst))  # type: ignore[arg-type]
