import builtins
from typing import Any

import pytest

from equipoise.data.errors import EquipoiseError
from equipoise.eval.suites.capability import _evaluated, read_results, run_tasks

# As lm-eval 0.4.13 returns them (lm_eval/result_schema.py).
RESULTS: dict[str, Any] = {
    "results": {
        "arc_easy": {
            "name": "arc_easy",
            "alias": "arc_easy",
            "sample_len": 50,
            "acc,none": 0.6,
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1},
    },
    "n-samples": {
        "arc_easy": {"original": 2376, "effective": 50},
        "gsm8k": {"original": 1319, "effective": 50},
    },
    "versions": {"arc_easy": 1.0, "gsm8k": 3.0},
    "n-shot": {"arc_easy": 0, "gsm8k": 5},
    "higher_is_better": {"arc_easy": {"acc": True, "acc_norm": True}, "gsm8k": {"exact_match": True}},
    "lm_eval_version": "0.4.13",
}


def test_every_metric_becomes_an_entry_with_its_interval() -> None:
    acc, norm, gsm = read_results(RESULTS)
    assert (acc["task"], acc["metric"], acc["filter"], acc["value"]) == ("arc_easy", "acc", "none", 0.6)
    assert acc["low"] == pytest.approx(0.6 - 1.959964 * 0.05, abs=1e-6)
    assert acc["high"] == pytest.approx(0.6 + 1.959964 * 0.05, abs=1e-6)
    assert (acc["n"], acc["version"], acc["num_fewshot"], acc["higher_is_better"]) == (50, 1.0, 0, True)
    assert (norm["metric"], norm["stderr"], norm["low"], norm["high"]) == ("acc_norm", None, None, None)
    assert (gsm["task"], gsm["filter"], gsm["num_fewshot"]) == ("gsm8k", "strict-match", 5)
    assert acc["lm_eval_version"] == "0.4.13"


def test_it_is_asked_with_the_chat_template_limit_and_seeds() -> None:
    asked: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked.update(options)
        return RESULTS

    assert _evaluated(simple_evaluate, "model", ("gsm8k",), 3, 50, 7) is RESULTS
    assert asked["tasks"] == ["gsm8k"]
    assert (asked["model"], asked["num_fewshot"], asked["limit"]) == ("model", 3, 50)
    assert asked["apply_chat_template"] is True
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    assert {asked[name] for name in seeds} == {7}


def test_every_argument_is_one_that_lm_eval_has() -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval (extra lm_eval) is not installed")
    import inspect

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        assert options.keys() <= inspect.signature(lm_eval.simple_evaluate).parameters.keys()
        return {"results": {}}

    _evaluated(simple_evaluate, "model", ("gsm8k",), None, None, 0)


def test_a_rank_that_is_given_no_results_has_none() -> None:
    assert read_results(_evaluated(lambda **_: None, "model", ("gsm8k",), None, None, 0)) == []


def test_an_unknown_task_is_named() -> None:
    def simple_evaluate(**_: Any) -> dict[str, Any]:
        raise ValueError("Tasks not found: gsm9k")

    with pytest.raises(EquipoiseError, match=r"lm-eval cannot run gsm9k: ValueError: Tasks not found"):
        _evaluated(simple_evaluate, "model", ("gsm9k",), None, None, 0)


def test_without_lm_eval_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EquipoiseError, match=r"pip install 'equipoise\[lm_eval\]'"):
        run_tasks(None, None, ["gsm8k"])
