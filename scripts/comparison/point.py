"""One point of a comparison: one method with one seed, trained by a run of its own, then judged."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison.methods import BASE, BASELINE, METHODS
from comparison.pairs import training_config
from omegaconf import DictConfig

from equipoise.data.errors import EquipoiseError
from equipoise.data.sources import SafetyData
from equipoise.eval.evaluator import evaluate
from equipoise.eval.generation.tsdi import TokenBias
from equipoise.eval.generation.tsdi_decoding import TOKEN_BIAS_FILE
from equipoise.eval.judges.embedded import EmbeddedJudge
from equipoise.eval.models import native_dtype, resolve_model
from equipoise.eval.terminal import Progress
from equipoise.train.cli import compose
from equipoise.train.gatekeeper import evaluation_settings
from equipoise.train.model import default_device, load_policy
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.loading import load_recipe
from equipoise.train.run import run

OF_TRAINING = ("stages.safe.", "loss", "beta=", "lam=")
"""Overrides that mean nothing to a method that trains nothing itself."""


@dataclass(frozen=True)
class Point:
    """A method and a seed; the base has none."""

    method: str
    seed: int | None

    def __str__(self) -> str:
        return self.method if self.seed is None else f"{self.method}-seed{self.seed}"

    def report(self, folder: Path) -> Path:
        """Where its report goes; a point with a report is done."""
        return folder / "reports" / f"{self}.json"

    def log(self, folder: Path) -> Path:
        """What its process prints."""
        return folder / "logs" / f"{self}.log"

    def stage(self, folder: Path, name: str) -> Path:
        """The folder of a stage of its run."""
        return folder / "runs" / self.method / f"seed{self.seed}" / "stages" / name

    def reused(self) -> "Point | None":
        """The point whose model it starts from, where it trains nothing itself."""
        reuses = METHODS[self.method].reuses if self.method in METHODS else None
        return Point(reuses, self.seed) if reuses else None

    def model(self, folder: Path) -> Path:
        """What its training leaves: its own, or that of the point whose model it reuses."""
        return (self.reused() or self).stage(folder, "safe") / "model"


def recipe_of(point: Point, folder: Path, num_steps: int, overrides: Sequence[str]) -> Recipe:
    """The recipe of a point; `overrides` is what all of them have in common. Raises RecipeError.

    A run judges nothing: the category terms are moved by in-batch errors alone, so that no method has seen the
    prompts that all are judged on.
    """
    method = METHODS[BASELINE if point.method == BASE else point.method]
    own = [f"stages.safe.num_steps={num_steps}", "stages.safe.evaluate=false"]
    if method.reuses is not None:
        own = [f"stages.token_bias.start_from={point.model(folder)}", "stages.token_bias.evaluate=false"]
        overrides = [override for override in overrides if not override.startswith(OF_TRAINING)]
    own += [f"name={point.method}", f"seed={point.seed or 0}", f"output_dir={folder / 'runs'}"]
    composed = compose([*method.overrides, "evaluation.baseline=false", *overrides, *own])
    if not isinstance(composed, DictConfig):
        raise EquipoiseError(f"{' '.join(overrides)}: nothing that a comparison could run")
    return load_recipe(composed)


def run_point(point: Point, folder: Path, recipe: Recipe, data: SafetyData, training: Path) -> None:
    """Train (unless it is the base) on the pairs at `training`, judge on the suites of `data`, write the report."""
    policy, token_bias = "", None
    if point.method == BASE:
        policy = resolve_model(recipe.model.id, recipe.model.revision)
    else:
        recipe.data = training_config(recipe.data, training)
        run(recipe)
        policy = str(point.model(folder))
        if point.reused() is not None:
            token_bias = TokenBias.load(point.stage(folder, "token_bias") / TOKEN_BIAS_FILE)
    model, tokenizer = load_policy(recipe.model, policy)
    model.to(default_device())
    with Progress() as progress:
        evaluate(
            model,
            tokenizer,
            data,
            EmbeddedJudge.load(batch_size=recipe.judge.batch_size, dtype=native_dtype()),
            evaluation_settings(recipe),
            point.method,
            policy,
            token_bias=token_bias,
            progress=progress,
        ).to_json(point.report(folder))


def remove_models(folder: Path, points: Sequence[Point]) -> None:
    """Delete the trained stages that none of `points` still needs; what was measured stays."""
    trained = [point for point in points if point.seed is not None]
    needed = {point.model(folder) for point in trained if not point.report(folder).exists()}
    for point in trained:
        if point.model(folder) not in needed:
            shutil.rmtree(point.model(folder).parent, ignore_errors=True)
