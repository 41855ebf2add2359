"""`python -m equipoise.data COMMAND data=NAME [data.key=value ...]`: look at data, and prepare it into files.

    inspect      categories, lengths, labels and a report; nothing else is written
    clean        every rule of data.cleaning; the records that are left, and those dropped with their reason
    categorise   a category for what is in OTHER
    split        training and held-out records by normalised prompt, without what overlaps the suites

Groups and keys are those of a recipe; `out=FOLDER` (outputs/data) and `seed=0` besides.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from equipoise.data.categorise import fit_classifier
from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError, EquipoiseError
from equipoise.data.parquet_files import write_parquet
from equipoise.data.preparation import Preparation, prepare
from equipoise.data.records import Records
from equipoise.data.report import category_rows, label_rows, write_preparation
from equipoise.data.schema import LabelledExchange, PreferencePair
from equipoise.data.sources import load_data, load_records, load_samples

COMMANDS = ("inspect", "clean", "categorise", "split")

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def main(arguments: Sequence[str]) -> int:
    """Run a command; 0, or 2 where something is the user's to mend."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        command, *overrides = arguments
        if command not in COMMANDS:
            raise DataError(f"{command!r} is no command; possible: {', '.join(COMMANDS)}.")
        run(command, overrides)
    except EquipoiseError as error:
        print(f"equipoise: {error}", file=sys.stderr)
        return 2
    return 0


def run(command: str, overrides: Sequence[str]) -> None:
    """Compose the data's keys, do what `command` says, print tables, and write into `out`; raises EquipoiseError."""
    config, out, seed = configure(overrides)
    if command == "clean":
        config.cleaning.enabled = True
    elif command == "categorise" and config.categorise == "none":
        config.categorise = "classifier"
    if command == "split":
        _split(config, seed, out)
        return
    for name, records in _records(config, seed).items():
        folder = out / name.replace("/", "-")
        preparation = _prepared(records, config)
        _show(name, records, preparation)
        report = write_preparation(folder, name, preparation)
        console.print(f"report: {report}", markup=False, soft_wrap=True)
        if command != "inspect":
            _write(folder, {"pairs": records.pairs, "labelled": records.labelled})


def configure(overrides: Sequence[str]) -> tuple[DataConfig, Path, int]:
    """The data's keys as a recipe would have them, the folder of `out` and `seed`; raises EquipoiseError."""
    own = {"out": "outputs/data", "seed": "0"}
    passed = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in own:
            own[key] = value
        elif key == "data" or key.startswith("data."):
            passed.append(override if key == "data" else f"++{override}")
        else:
            raise DataError(f"{override!r}: expected data=NAME, data.key=value, out=FOLDER or seed=NUMBER.")
    if not own["seed"].isdigit():
        raise DataError(f"seed: found {own['seed']!r}, expected a whole number.")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("equipoise.recipes", version_base="1.3"):
            composed = compose("data", passed)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), composed.data))
    except (HydraException, OmegaConfBaseException) as error:
        raise DataError(str(error).replace("++", "").splitlines()[0]) from error
    assert isinstance(config, DataConfig)
    problems = [f"data.cleaning.{key}: {reason}" for key, reason in config.cleaning.problems().items()]
    if problems:
        raise DataError("\n".join(problems))
    return config, Path(own["out"]).expanduser(), int(own["seed"])


def _records(config: DataConfig, seed: int) -> dict[str, Records]:
    """The records of the source, or of each part of the mixture."""
    if config.source != "samples":
        return {name: load_records(name, config) for name in config.mixture or (config.source,)}
    shipped = load_samples()
    pairs = [*shipped.safety_pairs, *shipped.helpful_pairs]
    return {
        "samples": Records(
            pairs=pairs, labelled=shipped.labelled, num_read=len(pairs) + len(shipped.labelled)
        )
    }


def _prepared(records: Records, config: DataConfig) -> Preparation:
    classifier = None
    if config.categorise == "classifier":
        shipped = load_samples()
        own: list[PreferencePair | LabelledExchange] = [*shipped.safety_pairs, *shipped.helpful_pairs]
        classifier = fit_classifier(config, [*own, *shipped.labelled])
    return prepare(records, config, classifier=classifier)


def _split(config: DataConfig, seed: int, out: Path) -> None:
    if config.source == "samples":
        raise DataError("The shipped samples have held-out prompts of their own; split is for other sources.")
    if not config.held_out_fraction:
        config.held_out_fraction = 0.1
    data = load_data(config, seed)
    console.print(data.summary(), markup=False, soft_wrap=True)
    shipped = load_samples()
    held_out = {
        "harmful": data.harmful_prompts[len(shipped.harmful_prompts) :],
        "helpful": data.helpful_prompts[len(shipped.helpful_prompts) :],
    }
    training = [*data.safety_pairs, *data.helpful_pairs]
    table = Table("category", "training pairs", "held-out prompts")
    for row in category_rows(training, training):
        asked = sum(prompt.category == row.category for prompts in held_out.values() for prompt in prompts)
        table.add_row(row.category, str(row.after), str(asked))
    console.print(table)
    labelled = [] if data.labelled == shipped.labelled else data.labelled
    files: dict[str, Sequence[Any]] = {"training_pairs": training, "training_labelled": labelled}
    _write(out, files | {f"held_out_{name}_prompts": prompts for name, prompts in held_out.items()})


def _show(name: str, records: Records, preparation: Preparation) -> None:
    table = Table(
        "category", "read", "kept", "prompts", "median prompt", "median answer", "longest", title=name
    )
    for row in category_rows(preparation.before, preparation.after):
        table.add_row(
            row.category,
            *(f"{value:,}" for value in (row.before, row.after, row.num_prompts)),
            *(f"{value:,.0f}" for value in (row.median_prompt, row.median_answer, row.longest)),
        )
    console.print(table)
    for labels in label_rows(preparation.after):
        console.print(f"{labels.number:,} ({labels.share:.1%}): {labels.what}", markup=False)
    if preparation.classifier is not None:
        console.print(
            f"classifier: {preparation.classifier.accuracy:.1%} of labelled prompts right, cross-validated"
        )
    for reason, number in [*records.left_out.items(), *records.notes.items()]:
        console.print(f"{number:,}: {reason}", markup=False, soft_wrap=True)


def _write(folder: Path, files: Mapping[str, Sequence[Any]]) -> None:
    for name, records in files.items():
        if records:
            path = write_parquet(folder / f"{name}.parquet", records)
            console.print(f"{len(records):,} records: {path}", markup=False, soft_wrap=True)
