"""General capability by EleutherAI's lm-eval (extra `lm_eval`): its tasks, its scores, with an interval each.

Written against `simple_evaluate` of lm-eval 0.4.9 to 0.4.13.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from equipoise.data.errors import EquipoiseError
from equipoise.eval.statistics import z_value


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Run lm-eval's tasks on a model in this process, through its chat template; one entry a task, metric and filter.

    num_fewshot: None: as the task says. limit: of each task, the first so many documents.
    Raises EquipoiseError where lm-eval is not installed, knows no such task, or fails.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise EquipoiseError(
            f"suite=lm_eval needs lm-eval, which cannot be imported ({error}): pip install 'equipoise[lm_eval]'"
        ) from error
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return read_results(_evaluated(simple_evaluate, wrapped, tasks, num_fewshot, limit, seed))


def _evaluated(
    simple_evaluate: Callable[..., Any],
    model: Any,
    tasks: Sequence[str],
    num_fewshot: int | None,
    limit: int | None,
    seed: int,
) -> Mapping[str, Any]:
    try:
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=True,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (KeyError, ValueError, OSError, ImportError) as error:
        raise EquipoiseError(
            f"lm-eval cannot run {', '.join(tasks)}: {type(error).__name__}: {error}. `lm-eval ls tasks` lists what it "
            "knows; most tasks read their documents from the hub."
        ) from error
    if results is None:  # on every rank but the first
        return {"results": {}}
    return results


def read_results(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """lm-eval's results as entries: task, metric, filter, value, stderr, low, high (95 %), n, version, num_fewshot.

    The interval is value ± z · stderr, as lm-eval means its standard errors; None where it gives none.
    """
    z = z_value(0.95)
    entries = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter}")
            known = isinstance(stderr, int | float)
            entries.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filter,
                    "value": value,
                    "stderr": stderr if known else None,
                    "low": value - z * stderr if known else None,
                    "high": value + z * stderr if known else None,
                    "n": results.get("n-samples", {}).get(task, {}).get("effective"),
                    "version": results.get("versions", {}).get(task),
                    "num_fewshot": results.get("n-shot", {}).get(task),
                    "higher_is_better": results.get("higher_is_better", {}).get(task, {}).get(metric),
                    "lm_eval_version": results.get("lm_eval_version"),
                }
            )
    return entries
