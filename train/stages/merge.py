"""Merge two policies: several shares in one stage, each a model of its own that is judged, one of them passed on."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download

from equipoise.train import merging
from equipoise.train.merging import Adapter, MergeError, Weights
from equipoise.train.model import save_folder
from equipoise.train.ranks import from_first
from equipoise.train.recipe.stages import MergeStageConfig
from equipoise.train.stages.context import StageContext, StageResult

Write = Callable[[float, Path], None]


def run_merge(name: str, stage: MergeStageConfig, policy: str, context: StageContext) -> StageResult:
    """Merge `first` and `second`; raises MergeError, before anything is written, where they do not fit.

    Leaves `<share>/model` for every share of `second` (and `<share>/adapter` where adapters are merged).
    """
    started = time.perf_counter()
    folder = context.stage_dir(name)
    models = {weight: folder / f"{weight:g}" / "model" for weight in stage.second_weights}

    def merge() -> None:
        sources = (context.policy_folder(source, policy) for source in (stage.first, stage.second))
        first, second = (_local(source, context) for source in sources)
        write, num_bytes = (_weights if stage.of == "weights" else _adapters)(first, second, name, context)
        _check_room(folder, num_bytes * len(models))
        for weight, model in models.items():
            context.say(f"{name}: {1 - weight:g} {stage.first} + {weight:g} {stage.second}")
            write(weight, model)

    from_first(merge)  # which takes longer than a collective waits: minutes a share at 70B
    # The one passed on is judged last: the run's verdict is about it.
    in_order = sorted(models, key=lambda weight: (weight == stage.pass_on, weight))
    facts: dict[str, object] = {
        "of": stage.of,
        "second_weights": stage.second_weights,
        "pass_on": stage.pass_on,
    }
    return StageResult(
        str(models[stage.pass_on]),
        time.perf_counter() - started,
        facts,
        variants={f"{weight:g}": str(models[weight]) for weight in in_order},
    )


def _weights(first: Path, second: Path, name: str, context: StageContext) -> tuple[Write, int]:
    """(what writes one share's model, bytes of a model); checks that the models fit."""
    one, two = Weights(first), Weights(second)
    merging.check_weights(one, two, trust_remote_code=context.recipe.model.trust_remote_code)

    def progress(done: int, of: int) -> None:
        context.progress(done, of, name)

    def write(weight: float, model: Path) -> None:
        save_folder(model, lambda aside: merging.merge_weights(one, two, weight, aside, progress))

    return write, sum(one.num_bytes.values())


def _adapters(first: Path, second: Path, name: str, context: StageContext) -> tuple[Write, int]:
    """(what writes one share's adapter and model, bytes of a model); checks that the adapters fit."""
    one, two = Adapter.load(first), Adapter.load(second)
    merging.check_adapters(one, two)
    base = Weights(_local(one.base, context))
    merging.check_on_base(one, base)

    def progress(done: int, of: int) -> None:
        context.progress(done, of, name)

    def write(weight: float, model: Path) -> None:
        shares = ((1 - weight, one), (weight, two))
        save_folder(model.with_name("adapter"), lambda aside: merging.merge_adapters(one, two, weight, aside))
        save_folder(model, lambda aside: merging.add_adapters(base, shares, aside, progress))

    return write, sum(base.num_bytes.values())


def _local(source: str, context: StageContext) -> Path:
    """The folder of a model; the run's starting model may have to be fetched from the hub."""
    revision = context.recipe.model.revision if source == context.base_folder else None
    return _download(source, revision)


def _download(source: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute():
        raise MergeError(f"no folder {source}: the model that the adapters were trained on is gone")
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def _check_room(folder: Path, num_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MergeError(
            f"merging writes {num_bytes / 2**30:.1f} GiB into {folder}, where {free / 2**30:.1f} GiB are free; "
            "fewer second_weights write less"
        )
