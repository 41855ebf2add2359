"""Evaluate a model state, gate it, and promote it or not; the run's memory of verdicts."""

import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from equipoise.data.taxonomy import load_taxonomy
from equipoise.eval.category_report import CategoryReport, ReportError
from equipoise.eval.evaluator import EvaluationSettings, evaluate
from equipoise.eval.gate import GateResult, GateRules, GateVerdict, gate
from equipoise.eval.generation.engine import GenerationSettings
from equipoise.eval.generation.tsdi import TokenBias
from equipoise.eval.judges.base import Judge
from equipoise.eval.report import write_report
from equipoise.train.model import default_device, load_policy, merged, save_folder, save_policy
from equipoise.train.provenance import provenance
from equipoise.train.recipe import Recipe
from equipoise.train.stages.context import StageContext

BASE, ALIGNED, TSDI = "base", "aligned", "tsdi"
"""Names of model states, in reports and metrics."""

TOKEN_BIAS_FILE = "token_bias.safetensors"


@dataclass
class Gatekeeper:
    """Judges states as they come; `reports` and `verdicts` are in order of evaluation, the last of a name counts."""

    context: StageContext
    judge: Judge | None
    """None where the recipe has nothing judged."""
    rules: GateRules
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
            PartialState().wait_for_everyone()
        self.reports[state] = report
        context.unsafe_counts = {c: (rate.count, rate.n) for c, rate in report.unsafe_rate.items()}
        if new:
            context.log(_metrics(report), 0, label)
        if state == BASE:
            self._write_html(state, label)
        return report

    def _record(self, verdict: dict[str, Any]) -> None:
        """Append to gate.jsonl, but for a verdict that an interrupted run has written already."""
        path = self.context.run_dir / "gate.jsonl"
        line = json.dumps(verdict, ensure_ascii=False)
        if not path.exists() or line not in path.read_text(encoding="utf-8").splitlines():
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _write_html(self, state: str, label: str) -> None:
        if not PartialState().is_main_process:
            return
        context = self.context
        write_report(
            context.run_dir / "eval" / label / "report.html",
            {name: self.reports[name] for name in (BASE, state) if name in self.reports},
            {state: self.verdicts[state]} if state in self.verdicts else {},
            None,
            (context.run_dir / "recipe.yaml").read_text(),
            f"{context.recipe.name}, {label}",
            provenance(context.recipe, context.data),
            category_names={category.id: category.name for category in load_taxonomy()},
        )

    def inside_stage(
        self, name: str, step: int, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Evaluate and gate a model in the middle of its training (`gate.every`); a PASS is promoted."""
        label = f"{name}-{step}"
        # Judged as it would ship: merged, from a folder. (A merged copy is also more than twice as fast to decode.)
        folder = self.context.stage_dir(name) / f"step-{step}"
        if PartialState().is_main_process:
            save_policy(merged(copy.deepcopy(model)), tokenizer, folder)
        PartialState().wait_for_everyone()
        self.evaluate(ALIGNED, label, str(folder))
        self.decide(ALIGNED, label, str(folder))
        if PartialState().is_main_process:
            shutil.rmtree(folder)

    def decide(
        self, state: str, label: str, model_folder: str, token_bias_file: Path | None = None
    ) -> GateResult:
        """Gate the state's report against the base; a PASS is copied to `promoted/`."""
        result = gate(self.reports[state], self.reports.get(BASE), self.rules)
        self.verdicts[state] = result
        self._write_html(state, label)
        passed = result.verdict is GateVerdict.PASS
        if PartialState().is_main_process:
            if passed:
                promote(Path(model_folder), token_bias_file, self.context.run_dir / "promoted")
            self._record({"label": label, "promoted": passed, **result.to_dict()})
        PartialState().wait_for_everyone()
        return result


def evaluation_settings(recipe: Recipe) -> EvaluationSettings:
    """The evaluator's settings from the recipe's."""
    return EvaluationSettings(
        generation=GenerationSettings(
            max_new_tokens=recipe.evaluation.max_new_tokens, batch_size=recipe.evaluation.batch_size
        ),
        max_prompts_per_category=recipe.data.max_prompts_per_category,
    )


def promote(model_folder: Path, token_bias_file: Path | None, target: Path) -> None:
    """Copy a model folder (and the token bias it is decoded with) to `target`, aside and renamed."""

    def write(aside: Path) -> None:
        shutil.copytree(model_folder, aside, dirs_exist_ok=True)
        if token_bias_file is not None:
            shutil.copy(token_bias_file, aside / TOKEN_BIAS_FILE)

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
