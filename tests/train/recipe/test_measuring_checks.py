from typing import Any

import pytest

from equipoise.train.recipe import Recipe
from equipoise.train.recipe.checks import Problems
from equipoise.train.recipe.measuring import DiagnosticsConfig, PlanConfig, ProfileConfig
from equipoise.train.recipe.measuring_checks import check_measuring


def problems(dry_run: bool = True, **keys: Any) -> dict[str, str]:
    found = Problems(raw={})
    check_measuring(Recipe(name="test", stages={}, dry_run=dry_run, **keys), found)
    return found.found


@pytest.mark.parametrize(
    "plan",
    [
        PlanConfig(),
        PlanConfig(gpu="h100", num_processes=8, engine="fsdp2", offload="all", memory_gib=40),
        PlanConfig(num_processes=2, engine="zero1", offload="optimizer"),
    ],
)
def test_what_can_be_planned(plan: PlanConfig) -> None:
    assert problems(plan=plan) == {}


@pytest.mark.parametrize(
    ("plan", "key", "reason"),
    [
        (PlanConfig(gpu="h200"), "plan.gpu", "possible: a100, h100"),
        (PlanConfig(memory_gib=0), "plan.memory_gib", "a number above 0"),
        (PlanConfig(num_processes=0), "plan.num_processes", "at least 1"),
        (PlanConfig(engine="zero"), "plan.engine", "did you mean"),
        (PlanConfig(engine="single", num_processes=2), "plan.engine", "plan.num_processes=2"),
        (PlanConfig(offload="all"), "plan.offload", "no plan.engine that would read it"),
        (PlanConfig(engine="zero2", offload="all"), "plan.offload", "which zero2 cannot; zero3, fsdp2 can"),
        (PlanConfig(engine="ddp", offload="optimizer"), "plan.offload", "zero1, zero2, zero3 can"),
    ],
)
def test_what_cannot(plan: PlanConfig, key: str, reason: str) -> None:
    assert reason in problems(plan=plan)[key]


def test_a_plan_that_nobody_asks_for() -> None:
    assert problems(dry_run=False) == {}
    assert problems(dry_run=False, plan=PlanConfig(gpu="a100")) == {
        "plan": "found keys that only dry_run=true reads"
    }


def test_diagnostics_and_profiles() -> None:
    assert (
        problems(profile=ProfileConfig([3, 3]), diagnostics=DiagnosticsConfig(spike_z=0, falling_nats=0))
        == {}
    )
    assert "at least 20" in problems(diagnostics=DiagnosticsConfig(window=5))["diagnostics.window"]
    for steps in ([5], [0, 2], [4, 3], [1, 2, 3]):
        assert "1 <= first <= last" in problems(profile=ProfileConfig(steps))["profile.steps"]
