"""Checks of the keys of `measuring.py`."""

from equipoise.train.recipe import Recipe
from equipoise.train.recipe.checks import Problems, at_least, positive
from equipoise.train.recipe.measuring import DiagnosticsConfig, PlanConfig, ProfileConfig

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
OFFLOADS = {
    "none": ENGINES,
    "optimizer": ("zero1", "zero2", "zero3"),
    "all": ("zero3", "fsdp2"),
}
"""What may be offloaded, and by which engines."""


def check_measuring(recipe: Recipe, problems: Problems) -> None:
    """Note what cannot work in `plan`, `diagnostics` and `profile`."""
    _check_plan(recipe.plan, recipe, problems)
    _check_diagnostics(recipe.diagnostics, problems)
    _check_profile(recipe.profile, problems)


def _check_plan(plan: PlanConfig, recipe: Recipe, problems: Problems) -> None:
    if plan != PlanConfig() and not recipe.dry_run:
        problems.add("plan", "found keys that only dry_run=true reads")
    if plan.gpu is not None:
        problems.one_of("plan.gpu", plan.gpu, ("a100", "h100"))
    if plan.memory_gib is not None:
        positive("plan.memory_gib", plan.memory_gib, problems)
    if plan.num_processes is not None:
        at_least(1, "plan.num_processes", plan.num_processes, problems)
    problems.one_of("plan.offload", plan.offload, OFFLOADS)
    if plan.engine is None:
        if plan.offload != "none":
            problems.add(
                "plan.offload", f"found {plan.offload!r}, but there is no plan.engine that would read it"
            )
        return
    problems.one_of("plan.engine", plan.engine, ENGINES)
    able = OFFLOADS.get(plan.offload, ENGINES)
    if plan.engine in ENGINES and plan.engine not in able:
        problems.add(
            "plan.offload", f"found {plan.offload!r}, which {plan.engine} cannot; {', '.join(able)} can"
        )
    if plan.engine == "single" and (plan.num_processes or 1) > 1:
        problems.add("plan.engine", f"found 'single', but plan.num_processes={plan.num_processes}")


def _check_diagnostics(diagnostics: DiagnosticsConfig, problems: Problems) -> None:
    at_least(20, "diagnostics.window", diagnostics.window, problems)
    at_least(0, "diagnostics.spike_z", diagnostics.spike_z, problems)
    at_least(0, "diagnostics.falling_nats", diagnostics.falling_nats, problems)


def _check_profile(profile: ProfileConfig, problems: Problems) -> None:
    steps = profile.steps
    fits = not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1])
    problems.expect(fits, "profile.steps", steps, "[] or [first, last] with 1 <= first <= last")
