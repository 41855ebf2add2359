"""The starting model's evaluation on disk: made once, reused by every run that would find the same.

A sweep asks its base the same prompts in every point. The file's name is everything that determines the report:
weights, dtype, device, engine, prompts, settings, judge and library versions. Decoding is greedy, judges are
deterministic.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from equipoise.eval.cache import digest
from equipoise.eval.category_report import CategoryReport, ReportError
from equipoise.eval.fingerprint import model_fingerprint
from equipoise.eval.job import EvaluationJob
from equipoise.eval.judges.base import JudgeCard
from equipoise.eval.models import default_cache_dir
from equipoise.train.model import default_device


def report_file(job: EvaluationJob, judge: JudgeCard) -> Path:
    """Where the report that `job` would make lives.

    Reads all weights of a local model, about a second for a gigabyte. Raises EquipoiseError where the commit of a hub
    id cannot be found out.
    """
    determines: Mapping[str, Any] = {
        "weights": model_fingerprint(job.model.id, job.model.revision),
        "dtype": job.model.dtype,
        "attn_implementation": job.model.attn_implementation,
        "device": default_device().type,
        "engine": job.engine,
        "prompts": job.prompts,
        "settings": job.settings,
        "judge": [judge, job.judge],
        "versions": {package: version(package) for package in ("equipoise", "torch", "transformers")},
    }
    return default_cache_dir() / "base_reports" / f"{digest(determines)}.json"


def load(path: Path, model_folder: str) -> CategoryReport | None:
    """The report there, named after this run's model folder; None where there is no usable file."""
    if not path.exists():
        return None
    try:
        return replace(CategoryReport.from_json(path), model=model_folder)
    except ReportError:
        return None  # damaged, or of an older schema: made anew
