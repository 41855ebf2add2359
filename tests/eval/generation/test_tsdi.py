import copy
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.data.schema import Turn
from equipoise.eval.generation.engine import GenerationSettings, generate
from equipoise.eval.generation.tsdi import TokenBias, TSDISettings, estimate_token_bias
from equipoise.eval.generation.tsdi_decoding import TSDILogitsProcessor
from equipoise.eval.models import ModelError

# PEFT asks transformers by the old name; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS: list[tuple[Turn, ...]] = [
    ({"role": "user", "content": text},) for text in ("a", "What is the time, please?", "bb", "ccc ccc")
]
WORDS = ["a bc def ghij klmno"]  # words of unlike length: prompts of unlike length, so padding


def shifted(model: LlamaForCausalLM, vector: torch.Tensor) -> LlamaForCausalLM:
    """A copy whose logits are those of `model` plus `vector`, everywhere."""
    other = copy.deepcopy(model)
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    head.bias = nn.Parameter(vector.clone())
    other.lm_head = head
    return other


def adapted(model: LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(
        r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.3
    )
    return get_peft_model(model, config)


@pytest.fixture
def vector() -> torch.Tensor:
    return torch.randn(259, generator=torch.Generator().manual_seed(7)) * 5


def token_bias(bias: list[list[float]], **settings: object) -> TokenBias:
    table = torch.tensor(bias)
    chosen = TSDISettings(num_positions=len(bias), **settings)  # type: ignore[arg-type]
    return TokenBias(bias=table, mean_probability=torch.full_like(table, 0.5), settings=chosen)


def processor_of(table: TokenBias, prompt_length: int) -> TSDILogitsProcessor:
    return TSDILogitsProcessor(table.correction(), prompt_length, table.settings.plausibility)


@pytest.mark.parametrize("continuation", ["random", "aligned"])
def test_a_model_has_no_bias_against_itself(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, continuation: str
) -> None:
    settings = TSDISettings(num_prompts=5, num_positions=4, continuation=continuation)  # type: ignore[arg-type]
    measured = estimate_token_bias(tiny_model, copy.deepcopy(tiny_model), tiny_tokenizer, settings)
    assert measured.bias.shape == (4, 259)
    assert measured.bias.dtype == torch.float32
    assert measured.bias.abs().max() == 0
    torch.testing.assert_close(measured.mean_probability.sum(-1), torch.ones(4))
    decoding = GenerationSettings(max_new_tokens=8)
    with_bias = generate(tiny_model, tiny_tokenizer, PROMPTS, decoding, measured)
    assert with_bias == generate(tiny_model, tiny_tokenizer, PROMPTS, decoding)


@pytest.mark.parametrize("continuation", ["random", "aligned"])
def test_a_constant_shift_is_measured_and_undone(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    vector: torch.Tensor,
    continuation: str,
) -> None:
    aligned = shifted(tiny_model, vector)
    settings = TSDISettings(num_prompts=6, num_positions=5, space="logit", continuation=continuation)  # type: ignore[arg-type]
    in_logits = estimate_token_bias(aligned, tiny_model, tiny_tokenizer, settings)
    torch.testing.assert_close(in_logits.bias, vector.expand(5, -1), atol=1e-4, rtol=0)

    settings = TSDISettings(num_prompts=6, num_positions=5, continuation=continuation)  # type: ignore[arg-type]
    measured = estimate_token_bias(aligned, tiny_model, tiny_tokenizer, settings)
    constant = measured.bias - vector
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), atol=1e-4, rtol=0)

    reference = generate(tiny_model, tiny_tokenizer, PROMPTS, GenerationSettings(max_new_tokens=5))
    decoding = GenerationSettings(max_new_tokens=5, batch_size=3)
    assert generate(aligned, tiny_tokenizer, PROMPTS, decoding) != reference
    assert generate(aligned, tiny_tokenizer, PROMPTS, decoding, measured) == reference
    assert generate(aligned, tiny_tokenizer, PROMPTS, decoding, in_logits) == reference
    # After position L the aligned model speaks for itself again.
    (longer,) = generate(aligned, tiny_tokenizer, PROMPTS[:1], GenerationSettings(max_new_tokens=7), measured)
    ids = tiny_tokenizer.apply_chat_template(list(PROMPTS[0]), add_generation_prompt=True)["input_ids"]
    answer: list[int] = []
    with torch.no_grad():
        for speaker in [tiny_model] * 5 + [aligned] * 2:
            answer.append(speaker(torch.tensor([ids + answer])).logits[0, -1].argmax().item())
    assert longer.text == tiny_tokenizer.decode(answer)


def test_the_estimate_is_the_formula_row_by_row(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned = copy.deepcopy(tiny_model)
    with torch.no_grad():
        aligned.model.layers[0].mlp.down_proj.weight.mul_(-1)
    continuations = torch.tensor([[10, 20, 30], [40, 50, 60]])
    monkeypatch.setattr(
        "equipoise.eval.generation.tsdi.random_prompts", lambda *_, **__: [PROMPTS[0], PROMPTS[1]]
    )
    monkeypatch.setattr("equipoise.eval.generation.tsdi.random_continuations", lambda *_, **__: continuations)
    measured = estimate_token_bias(
        aligned, tiny_model, tiny_tokenizer, TSDISettings(num_prompts=2, num_positions=3), batch_size=2
    )
    expected, probability = torch.zeros(3, 259), torch.zeros(3, 259)
    for prompt, continuation in zip(PROMPTS[:2], continuations.tolist(), strict=True):
        ids = tiny_tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)["input_ids"]
        for position in range(3):
            context = torch.tensor([ids + continuation[:position]])
            with torch.no_grad():
                log_prob = aligned(context).logits[0, -1].log_softmax(-1)
                expected[position] += (log_prob - tiny_model(context).logits[0, -1].log_softmax(-1)) / 2
                probability[position] += log_prob.exp() / 2
    assert expected.abs().max() > 1
    torch.testing.assert_close(measured.bias, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(measured.mean_probability, probability, atol=1e-5, rtol=0)


def test_the_estimate_does_not_depend_on_batches_and_padding(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    aligned = copy.deepcopy(tiny_model)
    with torch.no_grad():
        aligned.model.layers[0].mlp.down_proj.weight.mul_(-1)
    settings = TSDISettings(num_prompts=7, num_positions=3, pool="words", prompt_tokens=5)
    one, three, all_at_once = (
        estimate_token_bias(aligned, tiny_model, tiny_tokenizer, settings, batch_size, words=WORDS)
        for batch_size in (1, 3, 32)
    )
    torch.testing.assert_close(three.bias, one.bias, atol=1e-4, rtol=0)
    torch.testing.assert_close(all_at_once.bias, one.bias, atol=1e-4, rtol=0)


def test_an_adapter_is_measured_against_its_own_base(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    reference = copy.deepcopy(tiny_model)
    lora = adapted(tiny_model)
    lora.train()
    settings = TSDISettings(num_prompts=4, num_positions=3)
    seen: list[tuple[int, int, str]] = []
    measured = estimate_token_bias(
        lora, None, tiny_tokenizer, settings, batch_size=3, progress=lambda *step: seen.append(step)
    )
    assert lora.training
    assert seen == [(3, 4, "random prompts"), (4, 4, "random prompts")]
    explicit = estimate_token_bias(lora, reference, tiny_tokenizer, settings)
    torch.testing.assert_close(measured.bias, explicit.bias, atol=1e-4, rtol=0)
    assert measured.bias.abs().max() > 0.1
    ids = torch.tensor([[5, 6, 7]])
    lora(input_ids=ids, labels=ids).loss.backward()  # training goes on: no inference tensor stays behind


def test_sampled_continuations_are_reproducible_and_leave_the_model_alone(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, vector: torch.Tensor
) -> None:
    aligned = adapted(copy.deepcopy(tiny_model))
    config, state = aligned.get_base_model().generation_config, torch.get_rng_state()
    settings = TSDISettings(num_prompts=4, num_positions=3, continuation="aligned")
    first = estimate_token_bias(aligned, tiny_model, tiny_tokenizer, settings)
    assert torch.equal(first.bias, estimate_token_bias(aligned, tiny_model, tiny_tokenizer, settings).bias)
    assert aligned.get_base_model().generation_config is config
    assert torch.equal(torch.get_rng_state(), state)
    drawn = estimate_token_bias(
        aligned, tiny_model, tiny_tokenizer, TSDISettings(num_prompts=4, num_positions=3)
    )
    torch.testing.assert_close(drawn.bias[0], first.bias[0])  # nothing stands before position 1
    assert not torch.allclose(drawn.bias[1:], first.bias[1:], atol=1e-3)


def test_what_cannot_be_measured_is_an_error(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = TSDISettings(num_prompts=1, num_positions=1)
    with pytest.raises(ModelError, match="needs a reference"):
        estimate_token_bias(tiny_model, None, tiny_tokenizer, settings)
    larger = copy.deepcopy(tiny_model)
    larger.resize_token_embeddings(300)
    with pytest.raises(ModelError, match="covers 300 tokens, the model at hand 259"):
        estimate_token_bias(tiny_model, larger, tiny_tokenizer, settings)
    with torch.no_grad():
        larger.lm_head.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite at 300 of 300"):
        estimate_token_bias(larger, copy.deepcopy(larger), tiny_tokenizer, settings)


def test_the_processor_subtracts_by_position_and_then_stops() -> None:
    processor = processor_of(token_bias([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], alpha=0.5), prompt_length=4)
    scores = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    ids = torch.zeros(2, 6, dtype=torch.long)
    torch.testing.assert_close(
        processor(ids[:, :4], scores), torch.tensor([[-0.5, 0.0, 0.5], [0.5, 2.0, 3.5]])
    )
    torch.testing.assert_close(
        processor(ids[:, :5], scores), torch.tensor([[0.0, -1.0, 0.0], [1.0, 1.0, 3.0]])
    )
    assert torch.equal(processor(ids, scores), scores)


def test_alpha_may_differ_by_position(tmp_path: Path) -> None:
    table = token_bias([[1.0, 0.0], [1.0, 0.0]], alpha=(2.0, 0.0))
    table.save(tmp_path / "table.safetensors")
    scores = torch.zeros(1, 2)
    for each in (table, TokenBias.load(tmp_path / "table.safetensors")):
        processor = processor_of(each, prompt_length=1)
        assert processor(torch.zeros(1, 1), scores).tolist() == [[-2.0, 0.0]]
        assert processor(torch.zeros(1, 2), scores).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="alpha has 3 values; expected 1 or 2"):
        table.with_settings(alpha=(1.0, 2.0, 3.0))
    one_for_all = processor_of(table.with_settings(alpha=3.0), 1)
    assert one_for_all(torch.zeros(1, 1), scores).tolist() == [[-3.0, 0.0]]
    with pytest.raises(ValueError, match="estimate anew"):
        table.with_settings(num_positions=1)


def test_an_implausible_token_keeps_its_probability() -> None:
    scores = torch.tensor([0.6, 0.3, 0.08, 0.02]).log()[None]
    # The correction would make the fourth token, hardly plausible, the most probable by far.
    bias = [[math.log(2.0), 0.0, 0.0, -10.0]]
    ids = torch.zeros(1, 1)
    everything = processor_of(token_bias(bias), 1)(ids, scores)
    assert everything.argmax().item() == 3
    # Limit 0.5 * 0.6 = 0.3, which the second token just reaches. 0.6 / 2 and 0.3 share 0.9 evenly.
    limited = processor_of(token_bias(bias, plausibility=0.49), 1)(ids, scores)
    torch.testing.assert_close(limited.softmax(-1), torch.tensor([[0.45, 0.45, 0.08, 0.02]]))


def test_plausibility_without_bias_changes_nothing() -> None:
    scores = torch.randn(3, 4)
    limited = processor_of(token_bias([[0.0] * 4], plausibility=0.3), 1)
    torch.testing.assert_close(limited(torch.zeros(3, 1), scores), scores)
    # At the limit 1 only the most probable token is corrected: it has nobody to share with.
    alone = processor_of(token_bias([[5.0] * 4], plausibility=1.0), 1)
    torch.testing.assert_close(alone(torch.zeros(3, 1), scores), scores)


def test_save_and_load(tmp_path: Path) -> None:
    saved = token_bias([[1.0, -2.0], [0.5, 0.0]], alpha=0.7, plausibility=0.1, pool="file", path="words.txt")
    path = tmp_path / "token_bias.safetensors"
    saved.save(path)
    saved.save(path)  # over itself
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    first = path.read_bytes()
    loaded = TokenBias.load(path, vocab_size=2)
    for _ in range(8):  # safetensors draws an order of the metadata every time
        loaded.save(path)
        assert path.read_bytes() == first
    assert loaded.settings == saved.settings
    assert torch.equal(loaded.bias, saved.bias)
    assert torch.equal(loaded.mean_probability, saved.mean_probability)
    with pytest.raises(ModelError, match=r"token_bias\.safetensors covers 2 tokens, the model at hand 3"):
        TokenBias.load(path, vocab_size=3)


def test_other_files_are_no_token_bias(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(ModelError, match="cannot be read"):
        TokenBias.load(path)
    path.write_text("not safetensors at all")
    with pytest.raises(ModelError, match="cannot be read"):
        TokenBias.load(path)
    save_file({"bias": torch.zeros(1, 2)}, path)
    with pytest.raises(ModelError, match="no token bias"):
        TokenBias.load(path)
    metadata = {"format": "equipoise.token_bias.1", "settings": '{"num_positions": 3}'}
    save_file({"bias": torch.zeros(1, 2), "mean_probability": torch.zeros(1, 2)}, path, metadata)
    with pytest.raises(ModelError, match=r"expected both \(3, 2\)"):
        TokenBias.load(path)


def test_a_bias_of_another_vocabulary_is_refused_when_decoding(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ModelError, match="covers 3 tokens, the model at hand 259"):
        generate(tiny_model, tiny_tokenizer, PROMPTS, GenerationSettings(), token_bias([[0.0] * 3]))


def test_top_tokens_are_ranked_by_their_share(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    bias, probability = torch.zeros(1, 259), torch.zeros(1, 259)
    tokens = tiny_tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    for token, its_bias, its_probability in zip(
        tokens, (1.0, 9.0, -2.0, -0.5), (0.5, 0.01, 0.1, 0.3), strict=True
    ):
        bias[0, token], probability[0, token] = its_bias, its_probability
    rows = TokenBias(bias, probability, TSDISettings(num_positions=1)).top_tokens(tiny_tokenizer, 3)
    # "b" has the largest bias by far, but is said so rarely that "a" makes up more of the shift.
    assert [row.token for row in rows] == ["a", "b", "c", "d"]
    assert [row.position for row in rows] == [1] * 4
    assert [row.share for row in rows] == pytest.approx([0.5, 0.09, -0.2, -0.15])
    assert [row.token_id for row in rows] == tokens
    assert len(TokenBias(bias, probability, TSDISettings(num_positions=1)).top_tokens(tiny_tokenizer, 1)) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_prompts": 0},
        {"num_positions": 0},
        {"prompt_tokens": 0},
        {"alpha": -1.0},
        {"alpha": math.inf},
        {"alpha": (1.0, 2.0)},
        {"alpha": (1.0,) * 7 + (-1.0,)},
        {"pool": "letters"},
        {"space": "probability"},
        {"continuation": "reference"},
        {"plausibility": 1.5},
        {"path": "words.txt"},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TSDISettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`file` needs a path"):
        TSDISettings(pool="file")
