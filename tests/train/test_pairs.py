import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from equipoise.data.errors import DataError
from equipoise.data.schema import PreferencePair
from equipoise.data.sources import load_jsonl_pairs, load_samples
from equipoise.data.templates import encode_turns
from equipoise.train.pairs import (
    PairCollator,
    can_share_prompt,
    dataset_key,
    encode_pairs,
    model_inputs,
    pack_rows,
    pair_attention_mask,
    sum_by_sequence,
)
from equipoise.train.trainers.completion_head import add_completion_head


def make_pair(
    chosen: str = "no", rejected: str = "yes", prompt: str = "a question", id: str = "1"
) -> PreferencePair:
    turns = ({"role": "user", "content": prompt},)
    return PreferencePair(id, turns, chosen, rejected, "S1", True, False, "made up")


def example(
    pair: int, prompt: list[int], chosen: list[int], rejected: list[int], **more: Any
) -> dict[str, Any]:
    return {"pair": pair, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **more}


THREE = [
    example(7, [10, 11], [12], [13, 14], category_index=2),
    example(4, [20, 21, 22], [23, 24], [25, 26, 27, 28], category_index=0),
    example(5, [30], [31, 32], [33], category_index=1),
]


def log_probs(model: Any, examples: list[dict[str, Any]], *, two_rows: bool) -> tuple[Tensor, dict[str, Any]]:
    batch = PairCollator(pad_token_id=0, two_rows=two_rows)(examples)
    with torch.no_grad():
        return model(**model_inputs(batch)).log_probs, batch


def plain_log_probs(model: Any, examples: list[dict[str, Any]]) -> Tensor:
    """One answer at a time, without padding or mask, through all of the model's logits."""
    values = []
    for e in examples:
        for answer in (e["chosen_ids"], e["rejected_ids"]):
            ids = torch.tensor([e["prompt_ids"] + answer])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].float().log_softmax(-1)
            start = len(e["prompt_ids"])
            values.append(logits[start - 1 : -1].gather(-1, ids[0, start:, None]).squeeze(-1))
    return torch.cat(values)


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_an_answer_begins_behind_the_prompts_header(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_pairs([make_pair("no!", "yes", "hm?", "x")], tiny_tokenizer, 512)
    row = encoded.dataset[0]
    assert (
        tiny_tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\nhm?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tiny_tokenizer.decode(row["chosen_ids"]) == "no!<|im_end|>\n"
    assert tiny_tokenizer.decode(row["rejected_ids"]) == "yes<|im_end|>\n"
    assert (row["category"], row["pair"], encoded.ids, encoded.too_long) == ("S1", 0, ["x"], [])


def test_earlier_turns_are_part_of_the_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    row = encode_pairs([replace(make_pair(), prompt=tuple(turns))], tiny_tokenizer, 512).dataset[0]
    assert row["prompt_ids"] == encode_turns(tiny_tokenizer, turns, prompt=True)
    assert "b<|im_end|>" in tiny_tokenizer.decode(row["prompt_ids"])


def test_pairs_that_are_too_long_are_dropped_and_named(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [
        make_pair(id="a"),
        make_pair(rejected="y" * 60, id="b"),
        make_pair(chosen="n" * 60, id="c"),
        make_pair(id="d"),
    ]
    whole = encode_pairs(pairs, tiny_tokenizer, 512).dataset[1]
    length = len(whole["prompt_ids"]) + len(whole["rejected_ids"])
    assert encode_pairs(pairs, tiny_tokenizer, length).too_long == []  # exactly as long as allowed
    encoded = encode_pairs(pairs, tiny_tokenizer, length - 1)
    assert encoded.too_long == ["b", "c"]
    assert encoded.ids == ["a", "d"]
    assert list(encoded.dataset["pair"]) == [0, 1]


def test_when_nothing_fits(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"none of 1 pairs fits into data\.max_length=8 tokens"):
        encode_pairs([make_pair()], tiny_tokenizer, 8)


def test_a_template_that_renders_the_prompt_otherwise_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant thinks:{% endif %}"
    )
    with pytest.raises(DataError, match=r"2 of 2 pairs: .* not a prefix .*\(first: a, b\)"):
        encode_pairs([make_pair(id="a"), make_pair(id="b")], tiny_tokenizer, 512)


def test_the_key_depends_on_the_tokens_and_their_order_alone() -> None:
    rows = [{**e, "category": "S1"} for e in THREE]
    key = dataset_key(Dataset.from_list(rows))
    assert (
        dataset_key(Dataset.from_list([{**r, "category": "S2", "slot": 3, "pair": 9} for r in rows])) == key
    )
    assert dataset_key(Dataset.from_list(rows[::-1])) != key
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        changed = [{**rows[0], name: [*rows[0][name][:-1], 99]}, *rows[1:]]
        assert dataset_key(Dataset.from_list(changed)) != key
    moved = [{**rows[0], "prompt_ids": [10], "chosen_ids": [11, 12]}, *rows[1:]]
    assert dataset_key(Dataset.from_list(moved)) != key


# ---- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_by_hand() -> None:
    batch = PairCollator(pad_token_id=0)(THREE)
    # The longest pair fills a row; the two short ones share one, the longer first.
    torch.testing.assert_close(
        batch["input_ids"],
        torch.tensor([[20, 21, 22, 23, 24, 25, 26, 27, 28], [10, 11, 12, 13, 14, 30, 31, 32, 33]]),
    )
    torch.testing.assert_close(
        batch["position_ids"], torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5, 6], [0, 1, 2, 2, 3, 0, 1, 2, 1]])
    )
    torch.testing.assert_close(
        batch["segment"], torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 1, 2, 2, 3, 4, 4, 5]])
    )
    # By pair in the order given, chosen before rejected, wherever the rows are.
    assert batch["completion_targets"].tolist() == [12, 13, 14, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert batch["completion_sequence"].tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 5]
    # A prompt's last token predicts both answers' first.
    assert batch["completion_index"].tolist() == [10, 10, 12, 2, 3, 2, 5, 6, 7, 14, 15, 14]
    assert batch["chosen_lengths"].tolist() == [1, 2, 2]
    assert batch["rejected_lengths"].tolist() == [2, 4, 1]
    assert batch["pair"].tolist() == [7, 4, 5]
    assert batch["category_index"].tolist() == [2, 0, 1]


def test_a_batch_of_two_rows_a_pair_by_hand() -> None:
    batch = PairCollator(pad_token_id=0, two_rows=True)(THREE[:1])
    torch.testing.assert_close(batch["input_ids"], torch.tensor([[10, 11, 12, 0], [10, 11, 13, 14]]))
    assert batch["completion_index"].tolist() == [1, 5, 6]
    assert batch["completion_targets"].tolist() == [12, 13, 14]
    assert batch["completion_sequence"].tolist() == [0, 1, 1]
    inputs = model_inputs(batch)
    torch.testing.assert_close(inputs["attention_mask"], torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    assert "position_ids" not in inputs


def test_the_mask_by_hand() -> None:
    #                       p  p  c  c  r  p  c  r  .
    segment = torch.tensor([[0, 0, 1, 1, 2, 3, 4, 5, -1]])
    expected = [
        "x........",
        "xx.......",
        "xxx......",
        "xxxx.....",
        "xx..x....",
        ".....x...",
        ".....xx..",
        ".....x.x.",
        "........x",
    ]
    mask = pair_attention_mask(segment)
    assert mask.shape == (1, 1, 9, 9)
    assert mask.dtype == torch.bool
    assert ["".join("x" if seen else "." for seen in row) for row in mask[0, 0].tolist()] == expected


def test_sums_by_pair() -> None:
    batch = PairCollator(pad_token_id=0)(THREE)
    chosen, rejected = sum_by_sequence(torch.arange(12.0), batch)
    assert chosen.tolist() == [0, 3 + 4, 9 + 10]
    assert rejected.tolist() == [1 + 2, 5 + 6 + 7 + 8, 11]


def test_packing_by_hand() -> None:
    # 32 tokens in rows of at most 1.25 * 9: three would do if they were filled evenly, but one comes to 12.
    assert pack_rows([5, 9, 4, 3, 2, 9]) == [[1], [5], [0, 4], [2, 3]]
    assert pack_rows([8, 2]) == [[0, 1]]  # 10 tokens, just within
    assert pack_rows([8, 3]) == [[0], [1]]
    assert pack_rows([7]) == [[0]]


def test_packing_loses_nothing_and_widens_little() -> None:
    lengths = torch.randint(1, 100, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack_rows(lengths)
    assert sorted(pair for row in rows for pair in row) == list(range(200))
    widths = [sum(lengths[pair] for pair in row) for row in rows]
    assert max(widths) <= 1.25 * max(lengths)
    assert len(rows) * max(widths) < 1.1 * sum(lengths)  # little padding


def test_shared_rows_give_the_log_probs_of_an_answer_alone(tiny_model: LlamaForCausalLM) -> None:
    generator = torch.Generator().manual_seed(0)

    def ids(longest: int) -> list[int]:
        num = int(torch.randint(1, longest, (), generator=generator))
        return torch.randint(3, 259, (num,), generator=generator).tolist()

    examples = [example(i, ids(30), ids(12), ids(50)) for i in range(16)]
    add_completion_head(tiny_model)
    shared, batch = log_probs(tiny_model, examples, two_rows=False)
    assert len(batch["input_ids"]) < 16  # some rows hold several pairs
    plain = plain_log_probs(tiny_model, examples)
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_probs(tiny_model, examples, two_rows=True)[0], plain, atol=1e-5, rtol=1e-5)


def check_real_pairs(
    pairs: Sequence[PreferencePair], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = list(encode_pairs(pairs, tokenizer, 1500).dataset)
    add_completion_head(model)
    shared, batch = log_probs(model, examples, two_rows=False)
    apart, _ = log_probs(model, examples, two_rows=True)
    assert len(shared) == sum(len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples)
    assert float((shared - apart).abs().max()) < 1e-4
    sums, sums_apart = sum_by_sequence(shared, batch), sum_by_sequence(apart, batch)
    torch.testing.assert_close(sums, sums_apart, atol=1e-4, rtol=1e-5)


def test_one_row_equals_two_on_shipped_pairs(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = load_samples()
    check_real_pairs(samples.safety_pairs[::40] + samples.helpful_pairs[::40], tiny_model, tiny_tokenizer)


@pytest.mark.skipif("EQUIPOISE_DATA" not in os.environ, reason="EQUIPOISE_DATA names no folder of real data")
@pytest.mark.parametrize("name", ["pku_saferlhf_pairs.jsonl", "hh_harmless_pairs.jsonl"])
def test_one_row_equals_two_on_real_pairs(
    name: str, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = load_jsonl_pairs(str(Path(os.environ["EQUIPOISE_DATA"]) / name))
    check_real_pairs(pairs[::200], tiny_model, tiny_tokenizer)


# ---- models that cannot ---------------------------------------------------------------------------------------------


def refuse_4d_masks(model: LlamaForCausalLM) -> None:
    def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["attention_mask"].dim() != 2:
            raise ValueError("attention_mask must have two dimensions")

    model.base_model.register_forward_pre_hook(check, with_kwargs=True)


def drop_masks(model: LlamaForCausalLM) -> None:
    def drop(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": None}

    model.base_model.register_forward_pre_hook(drop, with_kwargs=True)


def drop_positions(model: LlamaForCausalLM) -> None:
    def drop(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": None}

    model.base_model.register_forward_pre_hook(drop, with_kwargs=True)


def test_a_model_that_can_share_the_prompt(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model.train()
    assert can_share_prompt(tiny_model, tiny_tokenizer)
    assert tiny_model.training
    assert "forward" not in vars(tiny_model)  # asked through a forward of ours, which is gone
    add_completion_head(tiny_model)
    mine = tiny_model.forward
    assert can_share_prompt(tiny_model, tiny_tokenizer)
    assert tiny_model.forward is mine


@pytest.mark.parametrize("cripple", [refuse_4d_masks, drop_masks, drop_positions])
def test_models_that_cannot_share_the_prompt(
    cripple: Any, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = plain_log_probs(tiny_model, THREE)
    cripple(tiny_model)
    add_completion_head(tiny_model.train())
    assert not can_share_prompt(tiny_model, tiny_tokenizer)
    assert tiny_model.training
    # Two rows still give the right numbers.
    torch.testing.assert_close(log_probs(tiny_model, THREE, two_rows=True)[0], plain, atol=1e-5, rtol=1e-5)


def test_a_recurrent_model_takes_two_rows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=2, state_size=4, use_mambapy=False)
    model = MambaForCausalLM(config).eval()
    plain = plain_log_probs(model, THREE)
    add_completion_head(model)
    assert not can_share_prompt(model, tiny_tokenizer)
    torch.testing.assert_close(log_probs(model, THREE, two_rows=True)[0], plain, atol=1e-5, rtol=1e-5)
