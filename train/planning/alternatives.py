"""What would fit where a plan does not: the same stages, worked out again with other keys or another launch.

Tried are, alone and together: smaller forward passes with as many more of them a step (the training stays the same),
activation checkpointing, adapters in place of full fine-tuning, NF4 under them, sharding over more devices, offloading.
The cheapest first: fewer devices before more; on as many, offloading last, for it waits for the CPU; then what trains
the same thing before what does not; then computing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from equipoise.train.planning.engine import SHARDED, Engine
from equipoise.train.planning.memory import Memory, Training
from equipoise.train.planning.stage_plans import StagePlan
from equipoise.train.recipe import LoraConfig
from equipoise.train.recipe.stages import StageConfig, TrainingConfig

MOST_DEVICES = 1024
SHOWN = 6


@dataclass(frozen=True)
class Alternative:
    """A way to run the recipe that fits."""

    changes: tuple[str, ...]
    """What to write on the command line."""
    launch: str
    """How to launch it; empty: as it is launched."""
    memory: Memory
    """Of the stage that takes most."""
    passes: float
    """Computing a step, in units of that of the recipe as it is."""
    cost: tuple[int, bool, int, float, int]
    """What alternatives are ordered by: devices, offloading, how other a training, computing, changed keys."""

    def makes_needless(self, other: "Alternative") -> bool:
        """Whether it is the same training on fewer devices, or on as many without offloading."""
        num, offloads, training, *_ = self.cost
        return not offloads and training == other.cost[2] and (num, offloads) < other.cost[:2]

    def __str__(self) -> str:
        what = " ".join(self.changes) or "the recipe as it is"
        if self.launch:
            what += f", launched as {self.launch}"
        host = f" and {self.memory.host / 2**30:.0f} GiB of the machine's memory" if self.memory.host else ""
        slower = f", {self.passes:.2g} times the computing" if self.passes > 1 else ""
        return f"{what}: {self.memory.total / 2**30:.1f} GiB a device{host}{slower}"


@dataclass(frozen=True)
class _Method:
    """How the model is trained."""

    training: Training
    changes: tuple[str, ...]
    others: int
    """0: what was asked for; more: another training."""


def alternatives(
    stages: Mapping[str, StageConfig], rows: Mapping[str, StagePlan], training: Training, room: float
) -> list[Alternative]:
    """At most `SHOWN` that fit into `room` bytes of a device, the cheapest first; empty where nothing does."""
    found: dict[tuple[str, str, int], list[Alternative]] = {}
    for engine, launch in _engines(training.engine):
        for method in _methods(training):
            key = engine.name, engine.offload, method.others
            if found.get(key) or (method.training.quantised and engine.name in SHARDED):
                continue  # fewer devices do
            as_asked = engine == training.engine and not method.others
            way = replace(method.training, engine=engine)
            found[key] = list(_ways(stages, rows, way, training, method, launch, room, as_asked))
    kept: list[Alternative] = []
    for one in sorted((one for ways in found.values() for one in ways), key=lambda one: one.cost):
        if not any(other.makes_needless(one) for other in kept):
            kept.append(one)
    return kept[:SHOWN]


def _ways(
    stages: Mapping[str, StageConfig],
    rows: Mapping[str, StagePlan],
    training: Training,
    asked: Training,
    method: _Method,
    launch: str,
    room: float,
    as_asked: bool,
) -> Iterator[Alternative]:
    """Of one method under one engine: smaller passes, checkpointing, and both where neither is enough.

    What was asked for shows each that fits; any other method and engine the first that does.
    """
    checkpointed = replace(training, checkpointing=True)
    key = "model.gradient_checkpointing=true"
    tried = [
        (training, False, ()),
        (training, True, ()),
        (checkpointed, False, (key,)),
        (checkpointed, True, (key,)),
    ]
    any_fits = False
    for number, (way, smaller, changes) in enumerate(tried):
        if (as_asked and number == 0) or (any_fits and (not as_asked or number == 3)):
            continue
        if way.checkpointing and way == training and changes:
            continue  # on already
        sizes = {name: _size(stages[name], row, way, room, smaller) for name, row in rows.items()}
        if any(size is None for size in sizes.values()):
            continue
        needs = [row.needs(way, sizes[name] or 1) for name, row in rows.items()]
        any_fits = True
        split = [text for name in rows for text in _split(name, stages[name], sizes[name])]
        passes = _passes(way) / _passes(asked)
        waits = way.engine.offload != "none"
        yield Alternative(
            (*method.changes, *changes, *split),
            launch,
            max(needs, key=lambda memory: memory.total),
            passes,
            cost=(way.engine.num_processes, waits, method.others, passes, len(split)),
        )


def _size(stage: StageConfig, row: StagePlan, training: Training, room: float, smaller: bool) -> int | None:
    """The largest forward pass that fits: the stage's own, or with `smaller` a divisor of it; None where none does."""
    size = stage.per_device_batch_size if isinstance(stage, TrainingConfig) else 1
    sizes = [n for n in range(size, 0, -1) if size % n == 0] if smaller else [size]
    return next((n for n in sizes if row.needs(training, n).total <= room), None)


def _split(name: str, stage: StageConfig, size: int | None) -> list[str]:
    if not isinstance(stage, TrainingConfig) or size is None or size == stage.per_device_batch_size:
        return []
    times = stage.per_device_batch_size // size
    return [
        f"stages.{name}.per_device_batch_size={size}",
        f"stages.{name}.gradient_accumulation_steps={stage.gradient_accumulation_steps * times}",
    ]


def _methods(training: Training) -> Iterator[_Method]:
    """What was asked for, LoRA where it was not, NF4 where it was not."""
    yield _Method(training, (), 0)
    lora, changes = training, tuple[str, ...]()
    if training.rank is None:
        lora = replace(training, rank=LoraConfig.r, frozen_copy=False)
        changes = ("model.lora.enabled=true",)
        yield _Method(lora, changes, 1)
    if not training.quantised:
        quantised = replace(lora, quantised=True, frozen_copy=False)
        yield _Method(quantised, (*changes, "model.quantization=nf4"), len(changes) + 1)


def _engines(asked: Engine) -> Iterator[tuple[Engine, str]]:
    """The launch that was asked for, sharding over its devices and over more, and offloading on its devices."""
    yield asked, ""
    num = asked.num_processes
    if asked.name in ("single", "ddp", "zero1") and num > 1:
        yield _launch("zero2", num)
    sizes = [num] if num > 1 else []
    while num < MOST_DEVICES:
        num *= 2
        sizes.append(num)
    for size in sizes:
        for name in SHARDED:
            if (name, size) != (asked.name, asked.num_processes):
                yield _launch(name, size)
    if asked.offload != "all":
        engine = Engine("zero3", asked.num_processes, "all")
        yield engine, f"recipes/accelerate/zero3_offload.yaml --num_processes {engine.num_processes}"


def _launch(name: str, num: int) -> tuple[Engine, str]:
    return Engine(name, num), f"recipes/accelerate/{name}.yaml --num_processes {num}"


def _passes(training: Training) -> int:
    """Forward passes' worth of a step: forward, backward, weight gradients, what is recomputed."""
    return 2 + (training.rank is None) + training.checkpointing
