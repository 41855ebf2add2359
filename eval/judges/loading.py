"""From `judge.*` to a judge: the table of published forms, and the engine that each is asked with.

A new judge is its file, a line in `FORMS`, a YAML in recipes/judge/ and a test.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from equipoise.data.schema import Turn
from equipoise.eval.cache import Cache, CachedEngine, CachedJudge
from equipoise.eval.config import DTYPES, JudgeConfig, ModelChoice
from equipoise.eval.fingerprint import file_fingerprint, model_fingerprint
from equipoise.eval.generation.requests import Engine, Progress
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.judges.base import Judge, JudgeCard, JudgeError, Judgement
from equipoise.eval.judges.bingoguard import BingoGuard
from equipoise.eval.judges.dynaguard import DynaGuard
from equipoise.eval.judges.ensemble import RULES, EnsembleJudge
from equipoise.eval.judges.form import JudgeForm
from equipoise.eval.judges.gpt_oss_safeguard import GptOssSafeguard
from equipoise.eval.judges.granite_guardian import GraniteGuardian
from equipoise.eval.judges.harmbench import HarmBench
from equipoise.eval.judges.llama_guard import LlamaGuard
from equipoise.eval.judges.md_judge import MDJudge1, MDJudge2
from equipoise.eval.judges.model_judge import ModelJudge
from equipoise.eval.judges.pairwise import PairwiseJudge
from equipoise.eval.judges.policy import Policy
from equipoise.eval.judges.qwen3guard import Qwen3Guard
from equipoise.eval.judges.shieldgemma import ShieldGemma
from equipoise.eval.judges.strongreject import StrongReject
from equipoise.eval.judges.wildguard import WildGuard

FORMS: dict[str, type[JudgeForm]] = {
    "md_judge_v0_1": MDJudge1,
    "md_judge_v0_2": MDJudge2,
    "llama_guard": LlamaGuard,
    "gpt_oss_safeguard": GptOssSafeguard,
    "qwen3guard": Qwen3Guard,
    "wildguard": WildGuard,
    "shieldgemma": ShieldGemma,
    "granite_guardian": GraniteGuardian,
    "bingoguard": BingoGuard,
    "dynaguard": DynaGuard,
    "harmbench": HarmBench,
    "strongreject": StrongReject,
    "policy": Policy,
}
"""Published judges, and a policy of one's own, by `judge.name`."""

PAIRWISE = "pairwise"
"""No judge of safety: it compares answers, for suite=win_rate."""

JUDGES = ("embedded", "beaver", "ensemble", PAIRWISE, *FORMS)
"""Every `judge.name`."""

_SHARED = frozenset(
    [
        "name",
        "engine",
        "model",
        "revision",
        "dtype",
        "trust_remote_code",
        "url",
        "key_env",
        "concurrency",
        "batch_size",
        "max_prompt_tokens",
        "engine_options",
    ]
)
_ENSEMBLE = frozenset(("name", "judges", "rule", "unsure"))
_READ: Mapping[str, frozenset[str]] = {
    "embedded": frozenset(("name", "batch_size", "dtype")),
    "beaver": frozenset(("name", "model", "batch_size", "dtype")),
    "ensemble": _ENSEMBLE,
    PAIRWISE: _SHARED | {"max_new_tokens"},
}


def judge_problems(config: JudgeConfig, pairwise: bool = False) -> dict[str, str]:
    """Key of `judge` -> what is wrong with its value; files are read, no model is loaded.

    pairwise: the judge is to compare answers (suite=win_rate).
    """
    if config.name not in JUDGES:
        return {"name": f"found {config.name!r}, possible: {', '.join(JUDGES)}"}
    if pairwise and config.name != PAIRWISE:
        return {"name": f"found {config.name!r}, but win_rate compares answers: judge=pairwise"}
    if not pairwise and config.name == PAIRWISE:
        return {"name": "found 'pairwise', which compares answers (suite=win_rate) and calls none unsafe"}
    found: dict[str, str] = {}
    read = _READ.get(config.name) or _SHARED | {item.name for item in _form_fields(config.name)}
    for key, value in _given(config).items():
        if key not in read:
            found[key] = f"found {value!r}, but the judge {config.name} does not read it"
    if config.dtype not in DTYPES:
        found["dtype"] = f"found {config.dtype!r}, possible: {', '.join(DTYPES)}"
    for key in ("batch_size", "max_prompt_tokens"):
        if getattr(config, key) < 1:
            found[key] = f"found {getattr(config, key)}, expected at least 1"
    if config.name == "ensemble":
        return found | _ensemble_problems(config)
    if config.name == "embedded":
        return found
    if config.model is None:
        found["model"] = "has to be given: hub id or folder of the judge's model, or the server's name for it"
    elif config.name == "beaver" and not Path(config.model).expanduser().is_dir():
        found["model"] = (
            f"found {config.model!r}, expected the folder of a cost model (hf download {config.model})"
        )
    engine = config.engine_config.problems()
    found |= {
        {"name": "engine", "options": "engine_options"}.get(key, key): why for key, why in engine.items()
    }
    if config.name in FORMS:
        try:
            make_form(config)
        except JudgeError as error:
            key, _, reason = str(error).partition(":")
            if key.startswith("judge."):
                found.setdefault(key.removeprefix("judge.").split("=")[0], reason.strip())
            else:  # it names the file instead
                found.setdefault(
                    "severity_prompt_file" if config.prompt_file is None else "prompt_file", str(error)
                )
    return found


def load_judge(config: JudgeConfig, cache: Cache | None = None) -> Judge:
    """The judge of a configuration; its model is loaded when an answer is first to be judged.

    Raises `JudgeError` with every key that cannot work, and `ModelError` where there is no such model.
    """
    problems = judge_problems(config)
    if problems:
        raise JudgeError("\n".join(f"judge.{key}: {reason}" for key, reason in problems.items()))
    if config.name == "embedded":
        return _embedded(config, cache)
    if config.name == "beaver":
        return _beaver(config, cache)
    if config.name == "ensemble":
        members = [load_judge(member, cache) for member in _members(config).values()]
        return EnsembleJudge(members, config.rule, (config.unsure[0], config.unsure[1]))
    form = make_form(config)
    engine, special_tokens = _engine(config, cache)
    where = f"{config.model}" + (f" at {config.revision}" if config.revision else "")
    card = JudgeCard(form.name, False, f"{form.description}; model {where}, {config.engine}", ())
    return ModelJudge(form, engine, card, special_tokens)


def load_pairwise(config: JudgeConfig, cache: Cache | None = None) -> PairwiseJudge:
    """The judge that compares answers; raises as `load_judge`."""
    problems = judge_problems(config, pairwise=True)
    if problems:
        raise JudgeError("\n".join(f"judge.{key}: {reason}" for key, reason in problems.items()))
    engine, special_tokens = _engine(config, cache)
    card = JudgeCard(PAIRWISE, False, f"pairwise, own wording; model {config.model}, {config.engine}", ())
    given = {} if config.max_new_tokens is None else {"max_new_tokens": config.max_new_tokens}
    return PairwiseJudge(engine, card, special_tokens=special_tokens, **given)


def make_form(config: JudgeConfig) -> JudgeForm:
    """The form with the keys that were given; raises `JudgeError` for one that cannot work."""
    given = _given(config)
    arguments = {item.name: given[item.name] for item in _form_fields(config.name) if item.name in given}
    if "criteria" in arguments:
        arguments["criteria"] = tuple(arguments["criteria"])
    return FORMS[config.name](**arguments)


def _form_fields(name: str) -> list[dataclasses.Field[Any]]:
    form = FORMS[name]
    assert dataclasses.is_dataclass(form)
    return [item for item in dataclasses.fields(form) if item.init]


def _given(config: JudgeConfig) -> dict[str, Any]:
    """The keys whose value is not the default."""
    default = JudgeConfig()
    return {
        item.name: value
        for item in dataclasses.fields(config)
        if (value := getattr(config, item.name)) != getattr(default, item.name)
    }


def _members(config: JudgeConfig) -> dict[str, JudgeConfig]:
    return {name: JudgeConfig(**{"name": name, **keys}) for name, keys in config.judges.items()}


def _ensemble_problems(config: JudgeConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    known = {item.name for item in dataclasses.fields(JudgeConfig)}
    for name, keys in config.judges.items():
        unknown = [key for key in keys if key not in known]
        if unknown:
            found[f"judges.{name}.{unknown[0]}"] = f"unknown key; possible: {', '.join(sorted(known))}"
    if found:
        return found
    for name, member in _members(config).items():
        found |= {f"judges.{name}.{key}": reason for key, reason in judge_problems(member).items()}
    if len(config.judges) < 2:
        found["judges"] = f"found {len(config.judges)}, expected two or more, each a name with its keys"
    if config.rule not in RULES:
        found["rule"] = f"found {config.rule!r}, possible: {', '.join(RULES)}"
    if len(config.unsure) != 2 or not 0 <= config.unsure[0] <= config.unsure[1] <= 1:
        found["unsure"] = f"found {config.unsure}, expected two numbers, 0 <= first <= second <= 1"
    return found


def _engine(config: JudgeConfig, cache: Cache | None) -> tuple[Engine, tuple[str, ...]]:
    """Greedy, whoever runs it; and the control tokens of the judge's own tokenizer, where it is at hand."""
    from equipoise.eval.generation.loading import judge_engine

    assert config.model is not None
    choice = ModelChoice(config.model, config.revision, config.dtype, None, config.trust_remote_code)
    settings = GenerationSettings(batch_size=config.batch_size, max_prompt_tokens=config.max_prompt_tokens)
    engine, special_tokens = judge_engine(config.engine_config, choice, settings)
    return (engine if cache is None else CachedEngine(engine, cache)), special_tokens


def _embedded(config: JudgeConfig, cache: Cache | None) -> Judge:
    dtype = "float32" if config.dtype == "float32" else "bfloat16"
    if config.dtype in ("native", "auto"):
        from equipoise.eval.models import native_dtype

        dtype = native_dtype()
    card = Path(__file__).with_name("embedded.json")
    record = json.loads(card.read_text(encoding="utf-8"))
    known = {item.name: record[item.name] for item in dataclasses.fields(JudgeCard)}

    def load() -> Judge:
        from equipoise.eval.judges.embedded import EmbeddedJudge

        return EmbeddedJudge.load(batch_size=config.batch_size, dtype=dtype)  # type: ignore[arg-type]

    judge = LazyJudge(JudgeCard(**known | {"calibration": tuple(known["calibration"])}), load)
    if cache is None:
        return judge
    heads = file_fingerprint(card.with_suffix(".safetensors"))
    return CachedJudge(judge, cache, {"heads": heads, "dtype": dtype})


def _beaver(config: JudgeConfig, cache: Cache | None) -> Judge:
    from equipoise.eval.generation.loading import default_device
    from equipoise.eval.judges.beaver import BeaverJudge, beaver_card
    from equipoise.eval.models import native_dtype
    from equipoise.eval.scorer_card import check_kind, read_card

    assert config.model is not None
    dtype = native_dtype() if config.dtype == "native" else config.dtype
    folder = str(Path(config.model).expanduser())
    check_kind(read_card(folder), "cost", f"The scorer in {folder}")

    def load() -> Judge:
        return BeaverJudge.load(folder, dtype, default_device(), config.batch_size)  # type: ignore[arg-type]

    judge = LazyJudge(beaver_card(f"({folder})"), load)
    if cache is None:
        return judge
    return CachedJudge(judge, cache, {"weights": model_fingerprint(folder), "dtype": dtype})


class LazyJudge:
    """A judge whose model is loaded when an answer is first to be judged."""

    def __init__(self, card: JudgeCard, load: Callable[[], Judge]) -> None:
        self.card = card
        self._load = load

    @cached_property
    def _judge(self) -> Judge:
        return self._load()

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Progress | None = None
    ) -> list[Judgement]:
        """As the judge itself."""
        return self._judge.judge(prompts, responses, progress)
