from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from equipoise.train.recipe.loading import STAGES

Problems = Callable[..., dict[str, str]]

STAGE_PROBLEMS: list[tuple[Mapping[str, object], str, str]] = [
    ({"kind": "sfft"}, "kind", "found 'sfft', did you mean 'sft'? possible: sft, preference"),
    ({"kind": None}, "kind", "found 'None', possible"),
    ({"kind": ["preference"]}, "kind", "found \"['preference']\", did you mean"),
    ({"mixture": {"harm": 1}}, "mixture.harm", "unknown key; possible: safety, helpful"),
    ({"mixture": {"safety": 0}}, "mixture", "every share is 0"),
    ({"mixture": {"safety": 1, "helpful": -1}}, "mixture.helpful", "found -1.0, expected at least 0"),
    ({"mixture": {"safety": "x"}}, "mixture", "found {'safety': 'x'}, expected names with a number each"),
    ({"lam": -1}, "lam", "found -1.0, expected a number above 0"),
    ({"loss": {"label_smoothing": 0.1}}, "loss.label_smoothing", "found 0.1, but only the loss 'robust'"),
    ({"loss": {"mix": {"apo": 1}}}, "loss.mix.apo", "unknown key; did you mean 'ipo' or 'safedpo'? possible"),
    ({"loss": {"mix": {"sft": 0.5}}}, "loss.mix.sft", "the SFT term has a key of its own"),
    ({"loss": {"mix": {"sigmoid_norm": 1}}}, "loss.mix.sigmoid_norm", "TRL's sigmoid_norm is sigmoid with"),
    ({"loss": {"mix": {"ipo": -1}}}, "loss.mix.ipo", "found -1.0, expected at least 0"),
    ({"loss": {"mix": {"sigmoid": 0}}}, "loss.mix", "every loss has the weight 0"),
    ({"loss": {"delta": 3}}, "loss.delta", "found 3.0, but only the loss 'safedpo' reads it"),
    ({"loss": {"name": "safedpo", "delta": -1}}, "loss.delta", "found -1.0, expected at least 0"),
    (
        {"loss": {"name": "safedpo", "unlabelled": "keep"}},
        "loss.unlabelled",
        "found 'keep', possible: error, drop",
    ),
    (
        {"loss": {"name": "ipo"}, "category": {"margin": {"enabled": True}}},
        "category.margin.enabled",
        "the loss 'ipo' has no margin; possible: sigmoid, hinge, robust",
    ),
    ({"category": {"weight": {"mode": "grupdro"}}}, "category.weight.mode", "found 'grupdro', did you mean"),
    (
        {"category": {"multiplier": {"target": 1.1}}},
        "category.multiplier.target",
        "found 1.1, expected a share",
    ),
    ({"category": {"ema": 1}}, "category.ema", "found 1.0, expected a decay in [0, 1)"),
    ({"kl": {"estimator": "exact"}}, "kl.estimator", "found 'exact', possible: forward, reverse, k3"),
    ({"kl": {"per_category": {"S15": 1}}}, "kl.per_category.S15", "unknown key; did you mean"),
    ({"kl": {"coef": 1, "on": "helpful"}}, "kl.on", "found 'helpful', but the stage's mixture has no"),
    ({"kl": {"on": "benine"}}, "kl.on", "found 'benine', did you mean 'benign'?"),
    (
        {"kl": {"on": "benign", "per_category": {"S1": 1}}},
        "kl.per_category.S1",
        "stages.safe.kl.on=benign penalises answers to harmless prompts alone; set stages.safe.kl.coef instead",
    ),
    (
        {"token_bias": {"pool": "letters"}},
        "token_bias.pool",
        "found 'letters', possible: vocabulary, words, file",
    ),
    ({"num_steps": 0}, "num_steps", "found 0, expected at least 1"),
    ({"learning_rate": 0}, "learning_rate", "found 0.0, expected a number above 0"),
    ({"lr_scheduler": "cosin"}, "lr_scheduler", "found 'cosin', did you mean 'cosine'?"),
    ({"warmup": 1.5}, "warmup", "found 1.5, expected a share below 1 or a whole number of steps"),
    ({"per_device_batch_size": 0}, "per_device_batch_size", "found 0, expected at least 1"),
    ({"log_every": 0}, "log_every", "found 0, expected at least 1"),
]


@pytest.mark.parametrize(("change", "key", "reason"), STAGE_PROBLEMS)
def test_an_impossible_stage_is_named_with_what_was_expected(
    change: Mapping[str, object], key: str, reason: str, minimal_problems: Problems
) -> None:
    found = minimal_problems(stages={"safe": {"kind": "preference", **change}})
    assert list(found) == [f"stages.safe.{key}"]
    assert found[f"stages.safe.{key}"].startswith(reason), found


@pytest.mark.parametrize(
    ("change", "key", "reason"),
    [
        ({"pool": "file"}, "path", "has to be given with stages.tsdi.pool=file"),
        ({"pool": "file", "path": "/no/such"}, "path", "found '/no/such', which is no file"),
        ({"path": "words.txt"}, "path", "found 'words.txt', but stages.tsdi.pool=vocabulary reads no file"),
        ({"space": "logits"}, "space", "found 'logits', did you mean 'logit'?"),
        ({"plausibility": 1}, "plausibility", "found 1.0, expected a share in [0, 1)"),
        ({"num_positions": 0}, "num_positions", "found 0, expected at least 1"),
        ({"beta": 1}, "beta", "unknown key; possible: kind, start_from"),
    ],
)
def test_an_impossible_token_bias_stage_is_named(
    change: Mapping[str, object], key: str, reason: str, minimal_problems: Problems
) -> None:
    stages = {"safe": {"kind": "preference"}, "tsdi": {"kind": "token_bias", **change}}
    found = minimal_problems(stages=stages)
    assert list(found) == [f"stages.tsdi.{key}"]
    assert found[f"stages.tsdi.{key}"].startswith(reason), found


@pytest.mark.parametrize(
    ("change", "key", "reason"),
    [
        ({"weight": {"mode": "dro"}}, "weight.mode", "found 'dro', possible: none, group_dro"),
        ({"kl": {"coef": -1}}, "kl.coef", "found -1.0, expected at least 0"),
        ({"mixture": {"safety": 0}}, "mixture", "every share is 0"),
        ({"loss": {"name": "ipo"}}, "loss", "unknown key; possible: kind"),
    ],
)
def test_an_impossible_sft_stage_is_named(
    change: Mapping[str, object], key: str, reason: str, minimal_problems: Problems
) -> None:
    found = minimal_problems(stages={"safe": {"kind": "sft", **change}})
    assert list(found) == [f"stages.safe.{key}"]
    assert found[f"stages.safe.{key}"].startswith(reason), found


def test_stages_are_required_and_start_with_training(minimal_problems: Problems) -> None:
    assert minimal_problems(stages={})["stages"].startswith("found {}, expected at least one stage")
    assert minimal_problems(stages="safe")["stages"].startswith("found 'safe', expected at least one stage")
    assert f"possible: {', '.join(STAGES)}" in minimal_problems(stages={"a": {}})["stages.a.kind"]
    found = minimal_problems(stages={"tsdi": {"kind": "token_bias"}})
    assert found == {"stages.tsdi": "a token_bias stage measures the stage before it, so it can't come first"}


def test_an_order_of_stages_that_cannot_work_is_named(tmp_path: Path, minimal_problems: Problems) -> None:
    stages = {
        "first": {"kind": "preference", "start_from": "second"},
        "second": {"kind": "preference", "start_from": "frist"},
        "third": {"kind": "preference", "start_from": "first"},
        "fourth": {"kind": "preference", "start_from": str(tmp_path)},
        "base": {"kind": "preference", "start_from": "base"},
    }
    assert minimal_problems(stages=stages) == {
        "stages.first.start_from": "found 'second', a stage that comes later; possible: base, or a model folder that "
        "exists",
        "stages.second.start_from": "found 'frist', expected base, first, or a model folder that exists",
        "stages.base": "found 'base', which means the starting model; name the stage otherwise",
    }
