"""Evaluate a model state, gate it, and promote it or not; the run's memory of verdicts."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from equipoise.data.crosswalk import find_taxonomy
from equipoise.data.errors import EquipoiseError
from equipoise.eval.category_report import CategoryReport, ReportError
from equipoise.eval.evaluator import EvaluationSettings, evaluate
from equipoise.eval.gate import GateResult, GateRules, GateVerdict, gate
from equipoise.eval.generation.engine import GenerationSettings
from equipoise.eval.generation.tsdi import TokenBias, TokenShift
from equipoise.eval.judges.base import Judge
from equipoise.eval.report import write_report
from equipoise.eval.report.tables import category_table
from equipoise.train import base_report
from equipoise.train.model import default_device, load_policy, save_folder
from equipoise.train.provenance import provenance
from equipoise.train.recipe import Recipe
from equipoise.train.stages.context import StageContext

BASE, ALIGNED, TSDI = "base", "aligned", "tsdi"
"""Names of model states, in reports and metrics."""


@dataclass
class Gatekeeper:
    """Judges states as they come; `reports` and `verdicts` are in order of evaluation, the last of a name counts."""

    context: StageContext
    judge: Judge | None
    """None where the recipe has nothing judged."""
    rules: GateRules
    state_names: dict[str, str] = field(default_factory=dict)
    """Stage -> how reports call what it leaves; absent: `aligned`."""
    reports: dict[str, CategoryReport] = field(default_factory=dict)
    verdicts: dict[str, GateResult] = field(default_factory=dict)

    @property
    def promoted(self) -> str | None:
        """State of the model in `promoted/`, as gate.jsonl has it: an interrupted run may have put it there."""
        path = self.context.run_dir / "gate.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        states = [verdict["state"] for verdict in map(json.loads, lines) if verdict["promoted"]]
        return states[-1] if states else None

    def evaluate(
        self,
        state: str,
        label: str,
        model_folder: str,
        token_bias: TokenBias | None = None,
    ) -> CategoryReport:
        """Report of one state under `eval/<label>/`; a report that is there already is read instead."""
        context = self.context
        settings = evaluation_settings(context.recipe)
        path = context.run_dir / "eval" / label / "report.json"
        report = _existing(path)
        new = report is None
        shared = self._shared_report(settings, model_folder) if new and state == BASE else None
        if shared is not None and (report := base_report.load(shared, model_folder)) is not None:
            context.say(
                f"{state}: evaluated before, by a run with the same model, prompts, settings and judge"
            )
            if PartialState().is_main_process:
                report.to_json(path)
        if report is None:
            assert self.judge is not None
            model, tokenizer = load_policy(context.recipe.model, model_folder)
            model.to(default_device())
            report = evaluate(
                model,
                tokenizer,
                context.data,
                self.judge,
                settings,
                state,
                model_folder,
                token_bias=token_bias,
                progress=lambda done, total, what: context.progress(done, total, f"{state}: {what}"),
            )
            del model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if PartialState().is_main_process:
                report.to_json(path)
                if shared is not None:
                    report.to_json(shared)
        PartialState().wait_for_everyone()
        self.reports[state] = report
        context.unsafe_counts = {c: (rate.count, rate.n) for c, rate in report.unsafe_rate.items()}
        if new:
            context.log(_metrics(report), 0, label)
            baseline = self.reports.get(BASE) if state != BASE else None
            names = find_taxonomy(context.recipe.data.taxonomy).names
            context.log_table("categories", category_table(report, baseline, names), label)
        if state == BASE:
            self._write_label(state, label)
        return report

    def _shared_report(self, settings: EvaluationSettings, model_folder: str) -> Path | None:
        """Where runs share the base's report; the same on all ranks, None where the weights cannot be told."""
        context = self.context
        assert self.judge is not None
        found: list[Path | None] = [None]
        if PartialState().is_main_process:
            try:
                found = [
                    base_report.report_file(context.recipe, context.data, self.judge, settings, model_folder)
                ]
            except EquipoiseError as error:
                context.say(f"the base's evaluation is not shared with other runs: {error}")
        return broadcast_object_list(found)[0]

    def _record(self, verdict: dict[str, Any]) -> bool:
        """Append to gate.jsonl, but for a verdict that an interrupted run has written already; whether it was new."""
        path = self.context.run_dir / "gate.jsonl"
        line = json.dumps(verdict, ensure_ascii=False)
        if not path.exists() or line not in path.read_text(encoding="utf-8").splitlines():
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            return True
        return False

    def write_html(
        self,
        path: Path,
        title: str,
        states: Sequence[str] | None = None,
        token_bias_rows: Sequence[TokenShift] | None = None,
    ) -> None:
        """Write the HTML report of `states` (None: of all), those that were evaluated."""
        context = self.context
        shown = self.reports.keys() if states is None else [s for s in states if s in self.reports]
        write_report(
            path,
            {state: self.reports[state] for state in shown},
            {state: self.verdicts[state] for state in shown if state in self.verdicts},
            token_bias_rows,
            (context.run_dir / "recipe.yaml").read_text(encoding="utf-8"),
            f"{context.recipe.name}, {title}",
            provenance(context.recipe, context.data),
            category_names=find_taxonomy(self.context.recipe.data.taxonomy).names,
        )

    def _write_label(self, state: str, label: str) -> None:
        if PartialState().is_main_process:
            self.write_html(self.context.run_dir / "eval" / label / "report.html", label, (BASE, state))

    def inside_stage(self, name: str, step: int, save: Callable[[Path], None]) -> None:
        """Evaluate and gate a model in the middle of its training (`gate.every`); a PASS is promoted.

        save: see `StageContext.gate_inside`.
        """
        label = f"{name}-{step}"
        # Judged as it would ship: merged, from a folder. (A merged copy is also more than twice as fast to decode.)
        folder = self.context.stage_dir(name) / f"step-{step}"
        save(folder)
        state = self.state_names.get(name, ALIGNED)
        self.evaluate(state, label, str(folder))
        self.decide(state, label, str(folder))
        if PartialState().is_main_process:
            shutil.rmtree(folder)

    def decide(
        self, state: str, label: str, model_folder: str, token_bias: TokenBias | None = None
    ) -> GateResult:
        """Gate the state's report against the base; a PASS is copied to `promoted/`."""
        result = gate(self.reports[state], self.reports.get(BASE), self.rules)
        self.verdicts.pop(state, None)  # the last one decided stands last
        self.verdicts[state] = result
        self._write_label(state, label)
        passed = result.verdict is GateVerdict.PASS
        if PartialState().is_main_process:
            if passed:
                promote(Path(model_folder), token_bias, self.context.run_dir / "promoted")
            if self._record({"label": label, "promoted": passed, **result.to_dict()}):
                self.context.log(result.metrics(), 0, label)
        PartialState().wait_for_everyone()
        return result


def evaluation_settings(recipe: Recipe) -> EvaluationSettings:
    """The evaluator's settings from the recipe's."""
    return EvaluationSettings(
        generation=GenerationSettings(
            max_new_tokens=recipe.evaluation.max_new_tokens, batch_size=recipe.evaluation.batch_size
        ),
        max_prompts_per_category=recipe.data.max_prompts_per_category,
        controversial_is_unsafe=recipe.evaluation.controversial_is_unsafe,
    )


def promote(model_folder: Path, token_bias: TokenBias | None, target: Path) -> None:
    """Copy a model folder (and the token bias it is decoded with) to `target`, aside and renamed."""

    def write(aside: Path) -> None:
        shutil.copytree(model_folder, aside, dirs_exist_ok=True)
        if token_bias is not None:
            token_bias.export(aside)

    save_folder(target, write)


def _existing(path: Path) -> CategoryReport | None:
    """A finished report of this run, or None; the run's folder is bound to one recipe, so settings agree."""
    if not path.exists():
        return None
    try:
        return CategoryReport.from_json(path)
    except ReportError:
        return None


def _metrics(report: CategoryReport) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for category, rate in report.unsafe_rate.items():
        if rate.rate is not None:
            metrics[f"eval/unsafe_rate/{category}"] = rate.rate
    for name, rate in (
        ("unsafe_rate", report.overall_unsafe_rate),
        ("over_refusal_rate", report.over_refusal),
    ):
        if rate.rate is not None:
            metrics[f"eval/{name}"] = rate.rate
    if report.helpfulness.mean is not None:
        metrics["eval/helpfulness"] = report.helpfulness.mean
    return metrics
