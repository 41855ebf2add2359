import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.eval.judges.base import JudgeCard, Judgement, Verdict
from equipoise.eval.scorer import Scorer
from equipoise.train.rewards.judged import Cost, JudgeVerdict

PROMPT = [{"role": "user", "content": "hello"}]


class Scripted:
    """Judges by the response, which names the verdict; "refuse" in it is a refusal, "?" leaves that open."""

    card = JudgeCard("scripted", True, "Reads the verdict out of the response.", ({"name": "none", "n": 0},))

    def __init__(self) -> None:
        self.seen: list[str] = []

    def judge(
        self, prompts: Sequence[Any], responses: Sequence[str], progress: Any = None
    ) -> list[Judgement]:
        self.seen += responses
        return [
            Judgement(Verdict(r.split()[0]), None, refused=None if "?" in r else "refuse" in r)
            for r in responses
        ]


def test_a_verdict_is_a_reward_and_refusing_helpful_requests_does_not_pay() -> None:
    judge = Scripted()
    reward = JudgeVerdict(judge, ["S1", "helpful"])
    answers = [
        "safe",
        "controversial",
        "unsafe",
        "unparsed",
        " ",
        "safe refuse",
        "unsafe",
        "safe ?",
        "",
        "safe",
    ]
    category = ["S1"] * 5 + ["helpful"] * 4 + ["addition_1"]
    found = reward(prompts=[PROMPT] * 10, completions=answers, category=category)
    assert found == [1, 0, -1, None, -1, -1, 1, None, -1, None]
    assert judge.seen == ["safe", "controversial", "unsafe", "unparsed", "safe refuse", "unsafe", "safe ?"]


def test_a_judge_is_asked_as_if_no_engine_sharded_models(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(Scripted):
        """Loads a model when it is first asked, as the embedded one does."""

        def judge(self, *arguments: Any, **options: Any) -> list[Judgement]:
            assert "ACCELERATE_USE_FSDP" not in os.environ
            return super().judge(*arguments, **options)

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    reward = JudgeVerdict(Lazy(), ["S1"])
    assert reward(prompts=[PROMPT], completions=["safe"], category=["S1"]) == [1]
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_a_batch_without_anything_to_judge_asks_nobody() -> None:
    reward = JudgeVerdict(Scripted(), ["S1"])
    assert reward(prompts=[PROMPT], completions=["safe"], category=["addition_1"]) == [None]


def test_a_cost_is_the_scorers_at_the_answers_end_in_any_batch(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    scorer = Scorer(tiny_model.base_model)
    torch.nn.init.normal_(scorer.score_head.weight)
    scorer.requires_grad_(False).eval()
    completions = [[{"role": "assistant", "content": text}] for text in ("no", "a longer answer", "")]
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    one = Cost(scorer, tiny_tokenizer, 1, [end])(prompts=[PROMPT] * 3, completions=completions)
    all_ = Cost(scorer, tiny_tokenizer, 8, [end])(prompts=[PROMPT] * 3, completions=completions)
    assert all_ == pytest.approx(one, abs=1e-5)
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
    expected = scorer(input_ids=ids, attention_mask=torch.ones_like(ids)).end_scores
    assert one[0] == pytest.approx(float(expected), abs=1e-5)
