"""One evaluation of one model state on given prompts: in this process, or as a file for a process of its own.

    python -m equipoise.eval.job job.json report.json

A training run that evaluates its checkpoints apart starts that: the child reads the job, loads model and judge, says
how far it is on its standard output (a line a call, JSON), everything else on its standard error, and ends when its
standard input is closed, for then nobody waits for the report any more. Exit codes: 0 done, 2 something has to be
mended, 1 a crash.
"""

import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside
from equipoise.data.schema import Exchange
from equipoise.eval.category_report import CategoryReport
from equipoise.eval.config import EngineConfig, JudgeConfig, ModelChoice
from equipoise.eval.evaluator import EvaluationSettings, evaluate_suites, suites_of
from equipoise.eval.generation.loading import LocalModel, remote_engine
from equipoise.eval.generation.requests import Progress
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.judges.base import Judge
from equipoise.eval.suites.base import HELPFULNESS, SuiteData


@dataclass(frozen=True)
class Prompts:
    """The held-out prompts of the three suites, and nothing else of a run's data (`SuiteData`)."""

    harmful_prompts: tuple[Exchange, ...]
    lookalike_prompts: tuple[Exchange, ...]
    helpful_prompts: tuple[Exchange, ...]

    @classmethod
    def of(cls, data: SuiteData) -> "Prompts":
        """Those of `data`, without what their sources say besides."""
        return cls(
            *(
                tuple(replace(exchange, meta={}) for exchange in exchanges)
                for exchanges in (data.harmful_prompts, data.lookalike_prompts, data.helpful_prompts)
            )
        )


@dataclass(frozen=True)
class EvaluationJob:
    """What is evaluated, on what and by whom."""

    model: ModelChoice
    prompts: Prompts
    judge: JudgeConfig
    settings: EvaluationSettings
    state: str
    """How the report calls the model."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """transformers or vllm; the likelihood of reference answers is transformers' in either case."""
    tsdi: str | None = None
    """A token bias (its file or folder) that is taken out when decoding."""

    def run(self, judge: Judge, progress: Progress | None = None) -> CategoryReport:
        """The report, as `evaluate_suites`, on all ranks where torch.distributed is initialised."""
        local = LocalModel(self.model, self.tsdi)
        settings, suites = self.settings, suites_of(self.prompts, self.settings)
        scorer = local.scorer(settings.helpfulness_batch_size, settings.helpfulness_max_length)
        if self.engine.name == "transformers":
            engine = local.engine(settings.generation)
            return evaluate_suites(
                engine, suites, judge, settings, self.state, self.model.id, scorer, progress
            )
        # Likelihoods first, and their model gone before vLLM takes the memory.
        helpful = [suite for suite in suites if suite.name == HELPFULNESS]
        scored = evaluate_suites(None, helpful, None, settings, self.state, self.model.id, scorer, progress)
        del local, scorer
        _free_memory()
        answered = evaluate_suites(
            remote_engine(self.engine, self.model, settings.generation, self.tsdi),
            [suite for suite in suites if suite.name != HELPFULNESS],
            judge,
            settings,
            self.state,
            self.model.id,
            progress=progress,
        )
        return replace(
            answered,
            samples=answered.samples + scored.samples,
            num_left_out=answered.num_left_out | scored.num_left_out,
            seconds=answered.seconds + scored.seconds,
        )

    def save(self, path: Path) -> None:
        """Write it as JSON; aside, then renamed."""
        write_aside(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "EvaluationJob":
        """What `save` wrote."""
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings = values["settings"]
        prompts = {
            suite: tuple(
                Exchange(**exchange | {"prompt": tuple(exchange["prompt"])}) for exchange in exchanges
            )
            for suite, exchanges in values["prompts"].items()
        }
        return cls(
            **values
            | {
                "model": ModelChoice(**values["model"]),
                "prompts": Prompts(**prompts),
                "judge": JudgeConfig(**values["judge"]),
                "settings": EvaluationSettings(
                    **settings | {"generation": GenerationSettings(**settings["generation"])}
                ),
                "engine": EngineConfig(**values["engine"]),
            }
        )


def main(arguments: Sequence[str]) -> int:
    """Run the job in the first file and write its report to the second; returns the exit code."""
    from equipoise.eval.judges.loading import load_judge

    job_file, report_file = arguments
    # Libraries print what they like: the parent's pipe is for progress alone, and no worker may hold it open.
    told = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.register_at_fork(after_in_child=told.close)
    if os.getpgrp() == os.getpid():  # else a shell's script would be killed with it
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        job = EvaluationJob.load(Path(job_file))
        report = job.run(load_judge(job.judge), lambda *call: print(json.dumps(call), file=told, flush=True))
    except EquipoiseError as error:
        print(f"equipoise: {error}", file=sys.stderr)
        return 2
    report.to_json(report_file)
    return 0


def _end_with_parent() -> None:
    """Wait until the parent is gone, then end this process and what it has started (vLLM's workers)."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGKILL)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
