"""`dry_run=true`: load data and tokenizer, check templates and lengths, say what a run would do and take.

Of the model only its configuration is read, so a 70B model on a cluster is planned on a laptop; `plan.*` says for what.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from equipoise.data.sources import SafetyData
from equipoise.eval.models import load_tokenizer
from equipoise.eval.terminal import console, duration
from equipoise.train.planning.alternatives import alternatives
from equipoise.train.planning.engine import Engine
from equipoise.train.planning.evaluation import BEHIND, Judging
from equipoise.train.planning.machine import HEADROOM, Machine
from equipoise.train.planning.memory import Memory, ModelSize, Training
from equipoise.train.planning.stage_plans import Planning, StagePlan, plan_stage
from equipoise.train.recipe import PlanConfig, Recipe, RecipeError
from equipoise.train.stages.context import Progress

GIB = 2**30


class PlanError(RecipeError):
    """A recipe that does not fit the device that it is planned for."""


def plan(
    recipe: Recipe, data: SafetyData, base_folder: str, say: Callable[[str], None], progress: Progress
) -> None:
    """Print stages, steps, tokens, and estimates of memory and time.

    Raises PlanError where a stage cannot fit, with what would; DataError and RecipeError where training would.
    """
    options: dict[str, Any] = {
        "trust_remote_code": recipe.model.trust_remote_code,
        "revision": recipe.model.revision,
    }
    tokenizer = load_tokenizer(base_folder, **options)
    config = AutoConfig.from_pretrained(base_folder, **options)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    model.tie_weights()
    num_parameters = sum(p.numel() for p in model.parameters())
    engine = planned_engine(recipe.plan)
    machine = planned_machine(recipe, engine)
    training = Training.of(recipe.model, ModelSize.of(config, num_parameters), engine)
    planning = Planning(recipe, data, tokenizer, training, machine, say)
    table = Table(
        "stage", "kind", "steps", "examples", "tokens", "memory", "time", title=f"plan of {recipe.name}"
    )
    rows = {name: plan_stage(name, stage, planning) for name, stage in recipe.stages.items()}
    judging = Judging.of(
        recipe, data, tokenizer, recipe.plan.gpu is not None or torch.cuda.is_available(), say
    )
    num_prompts = len(data.harmful_prompts) + len(data.lookalike_prompts)
    a_state = planning.decoding(num_prompts * recipe.evaluation.max_new_tokens)
    needs: dict[str, Memory] = {}
    judged_for = 0.0
    for name, row in rows.items():
        stage = recipe.stages[name]
        needs[name] = judging.beside(name, row, planning.memory(stage, row))
        time_text = f"about {duration(row.seconds)}" if row.seconds else ""
        memory_text = _gib(needs[name], machine)
        table.add_row(name, stage.kind, row.steps, row.examples, row.tokens, memory_text, time_text)
        if times := judging.times_inside(stage, row):
            phase = f"{BEHIND} in {name}"
            needs[phase] = judging.inside(name, row, training)
            judged_for += times * a_state
            memory_text, time_text = _gib(needs[phase], machine), f"about {duration(times * a_state)}"
            table.add_row(phase, f"{times} states", "", "", "", memory_text, time_text)
            say(f"{phase}: {_parts(needs[phase])}")
    num_states = recipe.evaluation.baseline + sum(bool(stage.evaluate) for stage in recipe.stages.values())
    judged_for += num_states * a_state
    if num_states:
        needs[BEHIND] = judging.behind(training)
        memory_text = "elsewhere" if judging.elsewhere else _gib(needs[BEHIND], machine)
        time_text = f"about {duration(num_states * a_state)}"
        table.add_row(BEHIND, f"{num_states} states", "", "", "", memory_text, time_text)
    console.print(table)
    say(
        f"model: {base_folder}, {num_parameters / 1e6:.0f} M parameters; longest judged prompt "
        f"{judging.longest_prompt} tokens"
    )
    measured = (
        "as its data sheet says" if recipe.plan.gpu else "measured just now, and too little on a busy machine"
    )
    say(
        f"about {duration(sum(row.seconds for row in rows.values()) + judged_for)} in all, {engine}, on {machine.name} "
        f"at {machine.flops / 1e9:,.0f} GFLOP/s ({measured}), of which training reaches {machine.efficiency:.0%}: a "
        "rough guide"
    )
    if host := max(memory.host for memory in needs.values()):
        say(f"offloaded: about {host / GIB:.0f} GiB of the machine's memory for each device")
    _refuse_what_cannot_fit(judging, rows, needs, training, machine)
    say("dry run: nothing was trained, nothing was written")


def planned_engine(plan: PlanConfig) -> Engine:
    """What `plan.engine` and `plan.num_processes` say, else the launch at hand."""
    launched = Engine.launched()
    num = plan.num_processes or launched.num_processes
    if plan.engine is not None:
        return Engine(plan.engine, num, plan.offload)
    if plan.num_processes is not None and launched.name in ("single", "ddp"):
        return Engine("ddp" if num > 1 else "single", num)
    return Engine(launched.name, num, launched.offload)


def planned_machine(recipe: Recipe, engine: Engine) -> Machine:
    """The GPU of the table that `plan.gpu` names, else this machine's device; `plan.memory_gib` says how large."""
    plan = recipe.plan
    if plan.gpu is not None:
        machine = Machine.of_table(plan.gpu, engine)
    else:
        machine = Machine.here(torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32)
    return machine if plan.memory_gib is None else machine.with_memory(plan.memory_gib * GIB)


def _gib(memory: Memory, machine: Machine) -> str:
    return f"about {(memory.total + machine.process) / GIB:.1f} GiB"


def _refuse_what_cannot_fit(
    judging: Judging,
    rows: Mapping[str, StagePlan],
    needs: Mapping[str, Memory],
    training: Training,
    machine: Machine,
) -> None:
    too_large = {name: memory for name, memory in needs.items() if memory.total > machine.room}
    if not too_large:
        return
    lines = [
        f"The recipe does not fit: {machine.name} has {machine.memory / GIB:.1f} GiB a device, of which a plan may "
        f"fill {HEADROOM:.0%}{_less_process(machine)}: {max(machine.room, 0) / GIB:.1f} GiB."
    ]
    lines += [f"  {name}: {_parts(memory)}" for name, memory in too_large.items()]
    inside = {name: f"{BEHIND} in {name}" for name in rows if f"{BEHIND} in {name}" in needs}
    judged: dict[str, Callable[[int], Memory]] = {
        phase: partial(judging.inside, name, rows[name], training)
        for name, phase in inside.items()
        if phase in too_large
    }
    if BEHIND in too_large:
        judged[BEHIND] = partial(judging.behind, training)
    if judged:
        where = "every device" if judging.recipe.gate.where == "in_process" else "the first rank's device"
        ways = [f"  {way}" for way in judging.ways_out(judged, machine.room)]
        lines += [
            f"Judging loads the state's model whole onto {where}.{' What fits:' if ways else ''}",
            *ways,
        ]
    stages = {
        name: _with_judging(judging, name, row, name in inside)
        for name, row in rows.items()
        if name in too_large or inside.get(name) in too_large
    }
    if stages:
        found = alternatives(judging.recipe.stages, stages, training, machine.room)
        lines += [_heading(judged), *(f"  {way}" for way in found)]
        if not found:
            lines[-1] = (
                "Nothing that was tried fits, up to 1,024 devices: take a smaller model, or shorter data.max_length."
            )
        elif any(way.launch for way in found):
            lines.append(
                "Over n times the devices a step has n times the examples: divide gradient_accumulation_steps by n."
            )
    raise PlanError("\n".join(lines))


def _heading(judged: Mapping[str, object]) -> str:
    return f"What fits{', judging as it is' if judged else ''}, the cheapest first:"


def _with_judging(judging: Judging, name: str, row: StagePlan, inside: bool) -> StagePlan:
    """The stage with its judges and, where states are judged inside it, with the larger of both phases."""

    def needs(training: Training, batch_size: int) -> Memory:
        phases = [judging.beside(name, row, row.needs(training, batch_size))]
        if inside:
            phases.append(judging.inside(name, row, training))
        return max(phases, key=lambda memory: memory.total)

    return replace(row, needs=needs)


def _less_process(machine: Machine) -> str:
    return (
        f", less {machine.process / GIB:.1f} GiB that this process takes already" if machine.process else ""
    )


def _parts(memory: Memory) -> str:
    names = ("weights", "states", "gathered", "evaluated", "judge", "activations", "logits", "cache")
    parts = [
        f"{name} {getattr(memory, name) / GIB:.1f}" for name in names if getattr(memory, name) > 0.05 * GIB
    ]
    return f"{memory.total / GIB:.1f} GiB ({', '.join(parts)})"
