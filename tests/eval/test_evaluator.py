import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.data.errors import DataError, EquipoiseError
from equipoise.data.schema import Exchange, Turn
from equipoise.eval.category_report import CategoryReport
from equipoise.eval.evaluator import EvaluationSettings, evaluate, evaluate_suites
from equipoise.eval.generation.engine import GenerationSettings
from equipoise.eval.generation.requests import Finish, Reply, Request
from equipoise.eval.generation.tsdi import TokenBias, TSDISettings
from equipoise.eval.judges.base import JudgeCard, Judgement, Progress, Verdict
from equipoise.eval.suites import helpfulness
from equipoise.eval.suites.base import Suite


@dataclass(frozen=True)
class Suites:
    harmful_prompts: list[Exchange]
    lookalike_prompts: list[Exchange]
    helpful_prompts: list[Exchange]


class ParityJudge:
    """Judges by the length of prompt and answer: arbitrary, but a function of nothing else."""

    card = JudgeCard("parity", True, "Judges by length.", ({"name": "none", "n": 0},))

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Progress | None = None
    ) -> list[Judgement]:
        verdicts = [Verdict.SAFE, Verdict.UNSAFE, Verdict.UNPARSED]
        found = []
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            length = len(prompt[-1]["content"]) + len(response)
            found.append(
                Judgement(verdicts[length % 3], length % 10 / 10, [True, False, None][length // 3 % 3])
            )
            if progress is not None:
                progress(number + 1, len(prompts), "judging")
        return found


def exchange(id: str, category: str, text: str, response: str | None = None) -> Exchange:
    return Exchange(id, ({"role": "user", "content": text},), category, response)


def make_suites() -> Suites:
    return Suites(
        [exchange(f"{c}-{i}", c, f"{c} " + "how " * (1 + i)) for c in ("S1", "S10", "S2") for i in range(3)],
        [exchange(f"look-{i}", "S1", "kill a process " * (i + 1)) for i in range(3)],
        [exchange(f"help-{i}", "helpful", "hi " * (3 - i), "a reference" + " answer" * i) for i in range(3)],
    )


SETTINGS = EvaluationSettings(
    generation=GenerationSettings(max_new_tokens=6, batch_size=4), helpfulness_batch_size=2
)


SAMPLED = {
    "suites": replace(
        make_suites(), lookalike_prompts=[exchange(f"look-{i}", "S1", "kill") for i in range(5)]
    ),
    "settings": replace(SETTINGS, generation=replace(SETTINGS.generation, temperature=1.0), num_samples=2),
}
"""Two answers to every prompt, five prompts alike: which answer is whose must not depend on the ranks."""


def run(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    suites: Suites | None = None,
    **options: object,
) -> CategoryReport:
    arguments = {"settings": SETTINGS, "state": "base", "model_name": "tiny"} | options
    return evaluate(model, tokenizer, suites or make_suites(), ParityJudge(), **arguments)  # type: ignore[arg-type]


def test_every_prompt_is_in_the_report_in_its_order(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    suites = make_suites()
    report = run(tiny_model, tiny_tokenizer, suites)
    asked = suites.harmful_prompts + suites.lookalike_prompts + suites.helpful_prompts
    assert [sample.id for sample in report.samples] == [exchange.id for exchange in asked]
    assert report.categories == ("S1", "S2", "S10")
    assert (report.state, report.model, report.judge["name"]) == ("base", "tiny", "parity")
    assert report.settings["generation"]["max_new_tokens"] == 6
    assert report.num_left_out == {"harmful": 0, "lookalike": 0, "helpfulness": 0}
    assert report.seconds > 0
    for sample in report.of_suite("harmful"):
        (judgement,) = ParityJudge().judge([sample.prompt], [sample.response])
        assert (sample.verdict, sample.refused) == (judgement.verdict, judgement.refused)


def test_results_do_not_depend_on_the_order_of_the_prompts(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    suites = make_suites()
    turned = Suites(
        suites.harmful_prompts[::-1], suites.lookalike_prompts[::-1], suites.helpful_prompts[::-1]
    )
    straight = {
        (sample.suite, sample.id): sample for sample in run(tiny_model, tiny_tokenizer, suites).samples
    }
    for sample in run(tiny_model, tiny_tokenizer, turned).samples:
        expected = straight[sample.suite, sample.id]
        assert replace(sample, score=None) == replace(expected, score=None)
        assert sample.score == pytest.approx(expected.score, abs=1e-5)


def test_a_report_read_from_its_file_equals_the_one_written(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    report = run(tiny_model, tiny_tokenizer)
    report.to_json(tmp_path / "report.json")
    assert CategoryReport.from_json(tmp_path / "report.json") == report


def by_hand(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    given: Exchange,
    shift: torch.Tensor | None = None,
) -> float:
    """Token by token, without a batch; `shift` (L, V) is taken off the first logits."""
    text = tokenizer.apply_chat_template(list(given.prompt), add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(given.response, add_special_tokens=False)["input_ids"]
    total = 0.0
    for position, token in enumerate(answer):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        if shift is not None and position < len(shift):
            logits = logits - shift[position].double()
        total += float(logits[token] - torch.logsumexp(logits, 0))
        ids = [*ids, token]
    return total / len(answer)


def test_helpfulness_equals_the_hand_computation(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    suites = make_suites()
    scores = run(tiny_model, tiny_tokenizer, suites).helpfulness_scores()
    for given in suites.helpful_prompts:
        assert scores[given.id] == pytest.approx(by_hand(tiny_model, tiny_tokenizer, given), abs=1e-5)


@pytest.mark.parametrize(("alpha", "plausibility"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.05)])
def test_the_token_bias_is_taken_off_the_first_positions(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, alpha: float, plausibility: float
) -> None:
    settings = TSDISettings(num_positions=3, alpha=alpha, plausibility=plausibility)
    bias = torch.randn(3, 259, generator=torch.Generator().manual_seed(0))
    token_bias = TokenBias(bias, torch.full_like(bias, 1 / 259), settings)
    suites = make_suites()
    report = run(tiny_model, tiny_tokenizer, suites, token_bias=token_bias, state="tsdi")
    plain = run(tiny_model, tiny_tokenizer, suites)
    for given in suites.helpful_prompts:
        score = report.helpfulness_scores()[given.id]
        assert score != pytest.approx(plain.helpfulness_scores()[given.id], abs=1e-3)
        if plausibility == 0:
            expected = by_hand(tiny_model, tiny_tokenizer, given, shift=alpha * bias)
            assert score == pytest.approx(expected, abs=1e-5)
    assert [sample.response for sample in report.samples] != [sample.response for sample in plain.samples]


def test_limits_take_the_first_of_each_category_and_count_the_rest(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = replace(SETTINGS, max_prompts_per_category=1, max_helpful_prompts=2)
    report = run(tiny_model, tiny_tokenizer, settings=settings)
    assert [sample.id for sample in report.samples] == ["S1-0", "S10-0", "S2-0", "look-0", "help-0", "help-1"]
    assert report.num_left_out == {"harmful": 6, "lookalike": 2, "helpfulness": 1}


def test_what_does_not_fit_is_unscored_and_counted(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    suites = make_suites()
    lengths = [
        len(
            tiny_tokenizer.apply_chat_template(
                list(given.prompt), add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
        + len(tiny_tokenizer(given.response)["input_ids"])
        for given in suites.helpful_prompts
    ]
    limit = sorted(lengths)[1]
    report = run(tiny_model, tiny_tokenizer, settings=replace(SETTINGS, helpfulness_max_length=limit))
    assert (report.helpfulness.n, report.num_unscored) == (2, 1)
    assert [score is None for score in report.helpfulness_scores().values()] == [n > limit for n in lengths]


def test_a_likelihood_that_is_not_finite_is_unscored(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.nn.init.constant_(tiny_model.model.norm.weight, math.nan)
    scores = helpfulness.log_likelihoods(
        tiny_model, tiny_tokenizer, make_suites().helpful_prompts, batch_size=2, max_length=512
    )
    assert scores == [None, None, None]


def test_a_missing_reference_answer_is_named_before_any_work(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    suites = replace(make_suites(), helpful_prompts=[exchange("bare", "helpful", "hi")])
    with pytest.raises(DataError, match="1 helpful prompts have no reference answer in `response`: bare"):
        run(
            tiny_model, tiny_tokenizer, suites, progress=lambda done, total, what: pytest.fail("worked first")
        )


def test_a_repeated_id_is_named_before_any_work(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    suites = replace(make_suites(), harmful_prompts=[exchange("a", "S1", "one"), exchange("a", "S2", "two")])
    with pytest.raises(DataError, match="'a' occurs twice in the harmful suite"):
        run(
            tiny_model, tiny_tokenizer, suites, progress=lambda done, total, what: pytest.fail("worked first")
        )


def test_the_model_goes_back_into_training_mode(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model.train()
    run(tiny_model, tiny_tokenizer)
    assert tiny_model.training


def test_progress_reaches_its_total_at_every_step(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    last: dict[str, tuple[int, int]] = {}
    run(tiny_model, tiny_tokenizer, progress=lambda done, total, what: last.update({what: (done, total)}))
    assert last == {
        "harmful: generating": (9, 9),
        "harmful: judging": (9, 9),
        "lookalike: generating": (3, 3),
        "lookalike: judging": (3, 3),
        "helpfulness: scoring": (3, 3),
    }


@pytest.mark.parametrize(
    "name", ["max_prompts_per_category", "max_helpful_prompts", "helpfulness_batch_size"]
)
def test_impossible_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, found 0"):
        EvaluationSettings(**{name: 0})


@dataclass
class Canned:
    """An engine with an answer, a failure and a prompt that does not fit; `seed` is what it answers."""

    seed: int = 0

    @property
    def description(self) -> dict[str, object]:
        return {"engine": "canned", "seed": self.seed}

    def complete(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        replies = [
            Reply(f"answer {self.seed}", Finish.STOP, 2),
            Reply(None, Finish.FAILED, error="503"),
            Reply(None, Finish.OVERLONG, error="9,000 tokens"),
        ]
        assert all(request.max_new_tokens == 6 for request in requests)
        return [replies[number % 3] for number in range(len(requests))]


def test_a_prompt_without_an_answer_is_no_finding_and_is_not_judged() -> None:
    harmful = Suite("harmful", [exchange(f"h{i}", "S1", "how") for i in range(3)], 5, {"source": "here"})
    judged: list[str] = []

    class Judge(ParityJudge):
        def judge(self, prompts, responses, progress=None):  # type: ignore[no-untyped-def]
            judged.extend(responses)
            return [Judgement(Verdict.SAFE, 0.1, False, 0.2, ("S2",), ("O5",), 0.75, "raw")]

    report = evaluate_suites(Canned(), [harmful], Judge(), SETTINGS, "s", "m")
    assert judged == ["answer 0"]
    answered, failed, overlong = report.samples
    assert (answered.verdict, answered.finish, answered.num_tokens) == (Verdict.SAFE, "stop", 2)
    assert (answered.categories, answered.native_categories) == (("S2",), ("O5",))
    assert (answered.severity, answered.p_refusal, answered.judge_raw) == (0.75, 0.2, "raw")
    assert (failed.verdict, failed.judge_raw) == (Verdict.FAILED, "the model gave no answer: 503")
    assert (overlong.verdict, overlong.finish) == (Verdict.OVERLONG, "overlong")
    rate = report.overall_unsafe_rate
    assert (rate.n, rate.num_failed, rate.num_overlong) == (1, 1, 1)
    assert report.num_left_out == {"harmful": 2}
    assert report.engine == {"engine": "canned", "seed": 0}
    assert report.suites == ({"source": "here"},)


def test_samples_of_one_prompt_share_it_and_are_told_apart_in_the_request(tmp_path: Path) -> None:
    asked: list[Request] = []

    class Numbers(Canned):
        def complete(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
            asked.extend(requests)
            return [Reply(f"answer {request.sample}", Finish.STOP, 2) for request in requests]

    sampled = replace(SETTINGS, generation=replace(SETTINGS.generation, temperature=1.0), num_samples=2)
    same = [exchange("c", "helpful", "hi"), exchange("d", "helpful", "hi"), exchange("e", "helpful", "ho")]
    report = evaluate_suites(Numbers(), [Suite("compliance", same, 3)], ParityJudge(), sampled, "s", "m")
    assert [(s.id, s.prompt_id, s.response) for s in report.samples] == [
        ("c#0", "c", "answer 0"),
        ("c#1", "c", "answer 1"),
        ("d#0", "d", "answer 2"),
        ("d#1", "d", "answer 3"),
        ("e#0", "e", "answer 0"),
        ("e#1", "e", "answer 1"),
    ]
    assert len({request.seed(0) for request in asked}) == 6
    assert report.helpful_compliance.n_effective <= report.helpful_compliance.n
    report.to_json(tmp_path / "r.json")
    assert CategoryReport.from_json(tmp_path / "r.json") == report
    with pytest.raises(ValueError, match="temperature 0 gives the same answer every time"):
        replace(SETTINGS, num_samples=2)


def test_a_suite_without_what_it_needs_is_named_before_any_work() -> None:
    helpful = Suite("helpfulness", [exchange("h", "helpful", "hi", "hello")], 1)
    with pytest.raises(EquipoiseError, match="needs the model in this process"):
        evaluate_suites(Canned(), [helpful], ParityJudge(), SETTINGS, "s", "m")
    harmful = Suite("harmful", [exchange("h", "S1", "how")], 1)
    with pytest.raises(EquipoiseError, match="was given no judge"):
        evaluate_suites(Canned(), [harmful], None, SETTINGS, "s", "m")


@pytest.mark.slow
def test_two_processes_give_the_report_of_one(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_model_folder: Path,
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [*command, __file__, str(tiny_model_folder), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = run(tiny_model, tiny_tokenizer)
    sampled = run(tiny_model, tiny_tokenizer, **SAMPLED)
    assert len({s.response for s in sampled.samples if s.id.startswith("look")}) > 6  # answers of their own
    for rank in (0, 1):
        shared = CategoryReport.from_json(tmp_path / f"rank{rank}.json")
        assert CategoryReport.from_json(tmp_path / f"sampled{rank}.json").samples[:-3] == sampled.samples[:-3]
        assert len(shared.samples) == len(alone.samples)
        for ours, theirs in zip(alone.samples, shared.samples, strict=True):
            assert replace(ours, score=None) == replace(theirs, score=None)
            assert theirs.score == pytest.approx(ours.score, abs=1e-5)


def on_ranks(model_folder: Path, out: Path) -> None:
    """What each rank of the test above runs."""
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    run(model, tokenizer).to_json(out / f"rank{state.process_index}.json")
    run(model, tokenizer, **SAMPLED).to_json(out / f"sampled{state.process_index}.json")
    state.destroy_process_group()


if __name__ == "__main__":
    on_ranks(Path(sys.argv[1]), Path(sys.argv[2]))
