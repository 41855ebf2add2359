"""Evaluate a model state, gate it, and promote it or not; the run's memory of verdicts."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState

from equipoise.data.crosswalk import find_taxonomy
from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside
from equipoise.eval.category_report import CategoryReport, ReportError
from equipoise.eval.config import EngineConfig, ModelChoice
from equipoise.eval.evaluator import EvaluationSettings
from equipoise.eval.fingerprint import file_fingerprint, model_fingerprint
from equipoise.eval.gate import GateResult, GateRules, GateVerdict, gate
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.generation.tsdi import TokenBias, TokenShift
from equipoise.eval.generation.tsdi_decoding import TOKEN_BIAS_FILE
from equipoise.eval.job import EvaluationJob, Prompts
from equipoise.eval.judges.base import Judge
from equipoise.eval.report import write_report
from equipoise.eval.report.content import ReportContent
from equipoise.train import base_report
from equipoise.train.evaluation_process import evaluate_apart
from equipoise.train.locks import made_once
from equipoise.train.model import save_folder
from equipoise.train.provenance import provenance
from equipoise.train.ranks import from_first
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.sharding import unsharded
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

    def __post_init__(self) -> None:
        if self.context.recipe.gate.where == "vllm" and find_spec("vllm") is None:
            raise RecipeError(
                "gate.where: found 'vllm', but vLLM is not installed here; pip install 'equipoise[vllm]', or "
                "gate.where=subprocess"
            )

    @property
    def promoted(self) -> str | None:
        """State of the model in `promoted/`, as gate.jsonl has it: an interrupted run may have put it there."""
        verdicts = map(json.loads, self._recorded())
        states = [verdict["state"] for verdict in verdicts if verdict["promoted"]]
        return states[-1] if states else None

    def evaluate(
        self,
        state: str,
        label: str,
        model_folder: str,
        token_bias: TokenBias | None = None,
    ) -> CategoryReport:
        """Report of one state under `eval/<label>/`, the same on all ranks; collective.

        A report that is there already is read instead, if it is about the same weights, token bias and engine.
        Raises EvaluationError where `gate.where` asks for a process of its own, and that gave no report.
        """
        context = self.context
        path = context.run_dir / "eval" / label / "report.json"
        with self._work_folder(label) as work:
            job = self._job(state, model_folder, token_bias, work)
            report = from_first(lambda: _existing(path, job))
            if new := report is None:
                shared = from_first(lambda: self._shared_report(job)) if state == BASE else None
                with made_once(shared, "evaluate the base"):
                    report = from_first(lambda: self._reused(shared, model_folder))
                    made = report is None
                    report = report or self._made(job, label, work)
                    from_first(lambda: _write(report, [path, shared] if made else [path]))
        self.reports[state] = report
        context.unsafe_counts = {c: (rate.count, rate.n) for c, rate in report.unsafe_rate.items()}
        context.log(_metrics(report), 0, label)
        if new:
            shown = {s: r for s, r in self.reports.items() if s in (BASE, state)}
            names = find_taxonomy(context.recipe.data.taxonomy).names
            context.log_evaluation(ReportContent(label, shown, category_names=names), label)
        if state == BASE:
            from_first(lambda: self._write_label(state, label))
        return report

    def _job(self, state: str, model_folder: str, token_bias: TokenBias | None, work: Path) -> EvaluationJob:
        recipe = self.context.recipe
        if token_bias is not None:
            from_first(lambda: token_bias.save(work / TOKEN_BIAS_FILE))
        model = recipe.model
        return EvaluationJob(
            model=ModelChoice(
                model_folder,
                model.revision,
                model.dtype,
                model.attn_implementation,
                model.trust_remote_code,
            ),
            prompts=Prompts.of(self.context.data),
            judge=recipe.judge,
            settings=evaluation_settings(recipe),
            state=state,
            engine=EngineConfig("vllm", options=recipe.gate.engine_options)
            if recipe.gate.where == "vllm"
            else EngineConfig(),
            tsdi=None if token_bias is None else str(work),
        )

    def _made(self, job: EvaluationJob, label: str, work: Path) -> CategoryReport:
        """Evaluate: here, where the ranks share the prompts, or apart, while they wait."""
        context, keys = self.context, self.context.recipe.gate

        def progress(done: int, total: int, what: str) -> None:
            context.progress(done, total, f"{job.state}: {what}")

        if keys.where == "in_process":
            assert self.judge is not None
            with unsharded():
                report = job.run(self.judge, progress)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return report
        log = context.run_dir / "eval" / label / "process.log"
        return from_first(lambda: evaluate_apart(job, work, log, keys.timeout, keys.devices, progress))

    @contextmanager
    def _work_folder(self, label: str) -> Iterator[Path]:
        """A folder for what only the evaluation itself needs, of all ranks."""
        folder = self.context.run_dir / "eval" / label / ".work"

        def fresh() -> None:
            shutil.rmtree(folder, ignore_errors=True)  # of an evaluation that was interrupted
            folder.mkdir(parents=True)

        from_first(fresh)
        try:
            yield folder
        finally:
            if PartialState().is_main_process:
                shutil.rmtree(folder, ignore_errors=True)

    def _shared_report(self, job: EvaluationJob) -> Path | None:
        """Where runs share the base's report; None where the weights cannot be told."""
        assert self.judge is not None
        try:
            return base_report.report_file(job, self.judge.card)
        except EquipoiseError as error:
            self.context.say(f"the base's evaluation is not shared with other runs: {error}")
            return None

    def _reused(self, shared: Path | None, model_folder: str) -> CategoryReport | None:
        report = None if shared is None else base_report.load(shared, model_folder)
        if report is not None:
            self.context.say(
                f"{BASE}: evaluated before, by a run with the same model, prompts, settings and judge"
            )
        return report

    def _recorded(self) -> list[str]:
        """The lines of gate.jsonl, every verdict that this run has given: those of an interrupted part of it, too."""
        path = self.context.run_dir / "gate.jsonl"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

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
        passed = result.verdict is GateVerdict.PASS

        def keep() -> None:
            self._write_label(state, label)
            weights = self.reports[state].engine["weights"]
            line = json.dumps(
                {"label": label, "weights": weights, "promoted": passed, **result.to_dict()},
                ensure_ascii=False,
            )
            recorded = self._recorded()
            if line not in recorded:  # else a run that is resumed decides on its finished stages again
                promoted = self.context.run_dir / "promoted"
                if passed:
                    promote(Path(model_folder), token_bias, promoted)
                    # In front of the line, behind which a resumed run would not log it any more.
                    self.context.log_promoted(promoted, ("promoted", state, label), json.loads(line))
                write_aside(self.context.run_dir / "gate.jsonl", "\n".join([*recorded, line, ""]))
            self.context.log(result.metrics(), 0, label)

        from_first(keep)
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


def _existing(path: Path, job: EvaluationJob) -> CategoryReport | None:
    """A finished report of this run about what `job` asks, or None; settings agree, for a folder has one recipe."""
    if not path.exists():
        return None
    try:
        report = CategoryReport.from_json(path)
    except ReportError:
        return None
    tsdi = None if job.tsdi is None else file_fingerprint(Path(job.tsdi) / TOKEN_BIAS_FILE)
    asked = {
        "engine": job.engine.name,
        "weights": model_fingerprint(job.model.id, job.model.revision),
        "tsdi": tsdi,
    }
    return report if all(report.engine.get(key) == value for key, value in asked.items()) else None


def _write(report: CategoryReport, paths: Sequence[Path | None]) -> None:
    for path in paths:
        if path is not None:
            report.to_json(path)


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
