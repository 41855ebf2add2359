"""One evaluation as it was configured: engine, suites, judge, report. Who calls it prints and writes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from equipoise.data.errors import EquipoiseError
from equipoise.eval.cache import Cache, CachedEngine, CachedScorer
from equipoise.eval.category_report import CategoryReport
from equipoise.eval.config import CommandConfig
from equipoise.eval.evaluator import EvaluationSettings, evaluate_suites, is_main_process
from equipoise.eval.generation.loading import LocalModel, remote_engine
from equipoise.eval.generation.requests import Engine, Progress
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.judges.base import JudgeError
from equipoise.eval.judges.calibration import JudgeCalibration
from equipoise.eval.judges.loading import judge_problems, load_judge, load_pairwise
from equipoise.eval.models import Notify
from equipoise.eval.suites.base import ASKS, COMPLIANCE, HELPFULNESS, ReferenceScorer, Suite
from equipoise.eval.suites.capability import run_tasks
from equipoise.eval.suites.sources import load_suite
from equipoise.eval.suites.win_rate import Pairwise, compare_answers

REFERENCE = "reference"
"""The opponent whose answers are those of the data."""


class ConfigError(EquipoiseError):
    """A configuration that cannot work."""


def check(config: CommandConfig) -> None:
    """Raise `ConfigError` with every key that cannot work; nothing is loaded but the texts that a judge names."""
    name = config.suite.name
    found = {f"model.{key}": why for key, why in config.model.problems().items()}
    found |= {f"engine.{key}": why for key, why in config.engine.problems().items()}
    found |= {f"suite.{key}": why for key, why in config.suite.problems().items()}
    if name in ("likelihood", "lm_eval", "gate") and config.engine.name != "transformers":
        found["engine.name"] = (
            f"found {config.engine.name!r}, but suite={name} needs the model in this process"
        )
    if config.tsdi is not None and config.engine.name == "server":
        found["tsdi"] = "a server decodes by itself; give `vllm serve` equipoise's logits processor"
    elif config.tsdi is not None and name == "lm_eval":
        found["tsdi"] = "lm-eval decodes by itself, without TSDI"
    if name not in ("likelihood", "lm_eval"):
        problems = judge_problems(config.judge, pairwise=name == "win_rate")
        found |= {f"judge.{key}": why for key, why in problems.items()}
    if config.num_samples > 1 and name in ("win_rate", "likelihood", "lm_eval"):
        found["num_samples"] = f"found {config.num_samples}, but suite={name} takes one answer to a prompt"
    for key in ("calibration", "baseline"):
        value = getattr(config, key)
        if value is not None and not Path(value).expanduser().is_file():
            found[key] = f"found {value!r}, which is no file"
    found |= _output_problems(config)
    if config.limit is not None and config.limit < 1:
        found["limit"] = f"found {config.limit}, expected at least 1"
    try:
        settings(config)
    except (TypeError, ValueError) as error:
        found["generation"] = str(error)
    if found:
        raise ConfigError("\n".join(f"{key}: {reason}" for key, reason in found.items()))


def _output_problems(config: CommandConfig) -> dict[str, str]:
    """Found before anything is generated: an evaluation takes hours, and its report is written last."""
    from equipoise.eval.report.html import Examples  # here: plots take a second to import
    from equipoise.eval.report.inspect_log import SUFFIXES

    found: dict[str, str] = {}
    if config.examples not in list(Examples):
        found["examples"] = f"found {config.examples!r}, possible: {', '.join(Examples)}"
    log = config.inspect_log
    if log is not None and Path(log).suffix not in SUFFIXES:
        found["inspect_log"] = f"found {log!r}, expected a file that ends in {' or '.join(SUFFIXES)}"
    elif log is not None and find_spec("inspect_ai") is None:
        found["inspect_log"] = (
            "inspect_ai is not installed here; in an environment that has it, python -m "
            "equipoise.eval.report.inspect_log report.json FILE makes the log of a report"
        )
    return found


def settings(config: CommandConfig) -> EvaluationSettings:
    """The evaluator's settings; raises TypeError and ValueError for those that cannot work."""
    return EvaluationSettings(
        generation=GenerationSettings(**config.generation),
        num_samples=config.num_samples,
        controversial_is_unsafe=config.controversial_is_unsafe,
    )


@dataclass
class Evaluation:
    """Runs one configuration, which `check` has passed."""

    config: CommandConfig
    cache: Cache | None = None
    notify: Notify | None = None
    progress: Progress | None = None

    def run(self) -> CategoryReport:
        """The report; on every rank where torch.distributed is initialised, and the same on all."""
        config = self.config
        suites = [self._suite(name) for name in ASKS[config.suite.name]]
        local = (
            LocalModel(config.model, config.tsdi, self.notify)
            if config.engine.name == "transformers"
            else None
        )
        if config.suite.name == "lm_eval":
            assert local is not None
            return self._capability(local)
        compares = config.suite.name == "win_rate"
        # Whatever can be wrong with a file is found out before anything is generated.
        judge = (
            None if compares or config.suite.name == "likelihood" else load_judge(config.judge, self.cache)
        )
        calibration = None if judge is None else self._calibration(judge.card.name)
        theirs = self._opponent_answers(suites[0]) if compares else {}
        scorer = self._scorer(local) if any(suite.name == HELPFULNESS for suite in suites) else None
        report = evaluate_suites(
            self._engine(local),
            suites,
            judge,
            settings(config),
            config.state,
            config.model.id,
            scorer,
            self.progress,
        )
        if compares and is_main_process():
            return replace(report, pairwise=self._compared(report, suites[0], theirs))
        return replace(report, calibration=calibration)

    def _suite(self, name: str) -> Suite:
        keys = self.config.suite
        return load_suite(
            name,
            keys.source,
            keys.path,
            keys.fields,
            keys.taxonomy,
            keys.mirror,
            self.config.limit,
            keys.revision,
        )

    def _engine(self, local: LocalModel | None) -> Engine:
        decoding = settings(self.config).generation
        engine: Engine = (
            local.engine(decoding)
            if local is not None
            else remote_engine(self.config.engine, self.config.model, decoding, self.config.tsdi)
        )
        return engine if self.cache is None else CachedEngine(engine, self.cache)

    def _scorer(self, local: LocalModel | None) -> ReferenceScorer:
        assert local is not None, "checked with the configuration"
        chosen = settings(self.config)
        scorer = local.scorer(chosen.helpfulness_batch_size, chosen.helpfulness_max_length)
        return scorer if self.cache is None else CachedScorer(scorer, self.cache)

    def _calibration(self, judge: str) -> JudgeCalibration | None:
        if self.config.calibration is None:
            return None
        calibration = JudgeCalibration.from_json(Path(self.config.calibration).expanduser())
        if calibration.judge != judge:
            raise JudgeError(
                f"{self.config.calibration} is about the judge {calibration.judge!r}, but {judge!r} judges here; "
                "calibrate that one."
            )
        return calibration

    def _compared(self, report: CategoryReport, suite: Suite, theirs: Mapping[str, str]) -> Pairwise:
        """Prompts that the model gave no answer to are not compared; the report has them as no finding."""
        samples = [sample for sample in report.of_suite(COMPLIANCE) if sample.finish in ("stop", "length")]
        asked = {exchange.id: exchange for exchange in suite.exchanges}
        ids = [sample.prompt_id or sample.id for sample in samples]
        assert self.config.suite.opponent is not None, "checked with the configuration"
        return compare_answers(
            load_pairwise(self.config.judge, self.cache),
            [asked[id] for id in ids],
            [sample.response for sample in samples],
            [theirs[id] for id in ids],
            self.config.suite.opponent,
            self.progress,
        )

    def _capability(self, local: LocalModel) -> CategoryReport:
        config = self.config
        model, tokenizer = local.loaded
        chosen = settings(config)
        entries = run_tasks(
            model,
            tokenizer,
            config.suite.tasks,
            config.suite.num_fewshot,
            config.limit,
            chosen.generation.batch_size,
            chosen.generation.seed,
        )
        report = evaluate_suites(None, [], None, chosen, config.state, config.model.id)
        return replace(report, engine=dict(local.description), capability=tuple(entries))

    def _opponent_answers(self, suite: Suite) -> dict[str, str]:
        """By prompt id; raises `ConfigError` where an answer to one of the prompts is missing."""
        opponent = self.config.suite.opponent
        assert opponent is not None, "checked with the configuration"
        if opponent == REFERENCE:
            answers = {exchange.id: exchange.response for exchange in suite.exchanges if exchange.response}
        else:
            path = Path(opponent).expanduser()
            if not path.is_file():
                raise ConfigError(
                    f"suite.opponent={opponent}: expected {REFERENCE!r}, or the report.json of an evaluation with "
                    "suite=compliance or suite=win_rate."
                )
            asked = {exchange.id: exchange.prompt for exchange in suite.exchanges}
            answers = {
                sample.id: sample.response
                for sample in CategoryReport.from_json(path).of_suite(COMPLIANCE)
                if asked.get(sample.id) == sample.prompt and sample.finish in ("stop", "length")
            }
        missing = [exchange.id for exchange in suite.exchanges if exchange.id not in answers]
        if missing:
            raise ConfigError(
                f"suite.opponent={opponent}: {len(missing)} of {len(suite.exchanges)} prompts have no answer there, "
                f"first {missing[0]!r}; both models have to be asked the same."
            )
        return answers
