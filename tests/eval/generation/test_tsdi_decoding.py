import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from equipoise.eval.generation import tsdi_decoding
from equipoise.eval.generation.tsdi import TokenBias, TSDISettings
from equipoise.eval.generation.tsdi_decoding import alphas_of, generate, read_token_bias, scaled, take_out

PROMPT = torch.tensor([[1, 70, 80, 90], [1, 75, 85, 95]])

WITHOUT_EQUIPOISE = """
import json, sys
sys.modules["equipoise"] = None  # importing it fails, as where it isn't installed
import torch
from transformers import AutoModelForCausalLM

folder, elsewhere = sys.argv[1:]
ids = torch.tensor(json.loads(sys.stdin.read()))
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6}
named = {"custom_generate": folder, "trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(folder)
replaced = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
other = AutoModelForCausalLM.from_pretrained(elsewhere)
try:
    other.generate(**inputs, **named)
    refused = ""
except ValueError as error:
    refused = str(error)
print(json.dumps({
    "plain": model.generate(**inputs).tolist(),
    "named": model.generate(**inputs, **named).tolist(),
    "off": model.generate(**inputs, **named, alpha=0.0).tolist(),
    "replaced": replaced.generate(**inputs).tolist(),
    "file": other.generate(**inputs, **named, token_bias_file=f"{folder}/token_bias.safetensors").tolist(),
    "refused": refused,
}))
"""


@pytest.fixture
def bias() -> TokenBias:
    table = torch.randn(3, 259, generator=torch.Generator().manual_seed(3)) * 5
    return TokenBias(
        table, torch.full_like(table, 1 / 259), TSDISettings(num_positions=3, alpha=(1.0, 0.5, 2.0))
    )


@pytest.fixture
def folder(bias: TokenBias, tmp_path: Path, tiny_model: LlamaForCausalLM) -> Path:
    tiny_model.save_pretrained(tmp_path / "model")
    bias.export(tmp_path / "model")
    return tmp_path / "model"


def expected_answer(model: LlamaForCausalLM, bias: TokenBias, num_tokens: int = 6) -> list[list[int]]:
    """Greedy, one forward at a time, straight from the formula."""
    ids = PROMPT
    for position in range(num_tokens):
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        logits[:, 2] = -math.inf  # the end of the answer: the test asks for a fixed length
        if position < 3:
            logits = logits - (1.0, 0.5, 2.0)[position] * bias.bias[position]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids.tolist()


@pytest.mark.slow
def test_a_folder_decodes_with_its_token_bias_without_equipoise(
    folder: Path, bias: TokenBias, tiny_model: LlamaForCausalLM, tiny_model_folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EQUIPOISE, str(folder), str(tiny_model_folder)],
        input=json.dumps(PROMPT.tolist()),
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    expected = expected_answer(tiny_model, bias)
    assert answers["plain"] != expected
    assert answers["named"] == answers["replaced"] == answers["file"] == expected
    assert answers["off"] == answers["plain"]
    assert "no token_bias.safetensors" in answers["refused"]
    assert "token_bias_file=PATH" in answers["refused"]


class Forbid(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, :200] = -math.inf
        return scores


def test_generate_keeps_the_callers_processors(folder: Path, bias: TokenBias) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    mine = LogitsProcessorList([Forbid()])
    answer = generate(model, PROMPT, mine, max_new_tokens=4, attention_mask=torch.ones_like(PROMPT))
    assert (answer[:, 4:] >= 200).all()
    assert len(mine) == 1  # the caller's list is as it was


def test_embeddings_in_place_of_ids(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 5, "attention_mask": torch.ones_like(PROMPT)}
    by_ids = generate(model, input_ids=PROMPT, **options)
    by_embeddings = generate(model, inputs_embeds=model.get_input_embeddings()(PROMPT), **options)
    assert by_embeddings.tolist() == by_ids[:, 4:].tolist()


def test_a_file_written_anew_is_read_anew(folder: Path, bias: TokenBias) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 3, "attention_mask": torch.ones_like(PROMPT)}
    corrected = generate(model, PROMPT, **options)
    assert corrected.tolist() != generate(model, PROMPT, alpha=0, **options).tolist()
    bias.with_settings(alpha=0.0).export(folder)
    os.utime(folder / "token_bias.safetensors", ns=(1, 1))  # however coarse the clock is
    assert generate(model, PROMPT, **options).tolist() == model.generate(PROMPT, **options).tolist()


def test_another_vocabulary_and_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    small = torch.zeros(1, 3)
    TokenBias(small, small.clone(), TSDISettings(num_positions=1)).save(tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"small\.safetensors covers 3 tokens, the model at hand 259"):
        generate(model, PROMPT, token_bias_file=tmp_path / "small.safetensors")
    save_file({"bias": small}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no token bias: its format is None"):
        read_token_bias(tmp_path / "other.safetensors")


def test_one_alpha_or_one_for_each_position() -> None:
    assert alphas_of(0.5, 3) == [0.5] * 3
    assert alphas_of([1, 0, 2], 3) == [1.0, 0.0, 2.0]
    assert scaled(torch.ones(2, 2), [1.0, 3.0]).tolist() == [[1.0, 1.0], [3.0, 3.0]]
    for wrong in ([1.0, 2.0], -1.0, [1.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="alpha"):
            alphas_of(wrong, 3)


def test_rows_may_have_corrections_of_their_own() -> None:
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]).log()
    correction = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, 0.0, 0.0]])
    taken = take_out(scores, correction, plausibility=0.4)
    torch.testing.assert_close(taken.softmax(-1), torch.tensor([[0.45, 0.45, 0.1], [0.6, 0.3, 0.1]]))
    assert torch.equal(taken[1], scores[1])


def test_the_exported_file_is_the_one_that_equipoise_decodes_with(folder: Path) -> None:
    exported = (folder / "custom_generate" / "generate.py").read_text(encoding="utf-8")
    assert exported == Path(tsdi_decoding.__file__).read_text(encoding="utf-8")
    assert "equipoise." not in "".join(line for line in exported.splitlines() if "import" in line)


def test_the_engine_decodes_alike(
    folder: Path, bias: TokenBias, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from equipoise.eval.generation.engine import GenerationSettings
    from equipoise.eval.generation.engine import generate as answer

    model = LlamaForCausalLM.from_pretrained(folder)
    prompt = ({"role": "user", "content": "hello"},)
    ids = tiny_tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_tensors="pt")
    alone = generate(model, **ids, max_new_tokens=5)[0, ids["input_ids"].shape[1] :]
    (text,) = answer(model, tiny_tokenizer, [prompt], GenerationSettings(max_new_tokens=5), bias)
    assert tiny_tokenizer.decode(alone, skip_special_tokens=True) == text.text
