from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from equipoise.data.errors import DataError
from equipoise.data.random_prompts import ordinary_tokens, random_continuations, random_prompts


def test_vocabulary_prompts_are_user_turns_of_the_asked_length(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompts = random_prompts(tiny_tokenizer, 5, 16, seed=3)
    assert len(prompts) == 5
    for (turn,) in prompts:
        assert turn["role"] == "user"
        # One byte, one token, so that here the length is exact.
        assert len(tiny_tokenizer(turn["content"])["input_ids"]) == 16


def test_the_seed_decides(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert random_prompts(tiny_tokenizer, 4, 8, seed=1) == random_prompts(tiny_tokenizer, 4, 8, seed=1)
    assert random_prompts(tiny_tokenizer, 4, 8, seed=1) != random_prompts(tiny_tokenizer, 4, 8, seed=2)
    same = random_continuations(tiny_tokenizer, 4, 8, seed=1)
    assert torch.equal(same, random_continuations(tiny_tokenizer, 4, 8, seed=1))
    assert not torch.equal(same, random_continuations(tiny_tokenizer, 4, 8, seed=2))


def test_a_continuation_does_not_repeat_its_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ((turn,),) = random_prompts(tiny_tokenizer, 1, 8)
    (continuation,) = random_continuations(tiny_tokenizer, 1, 8)
    assert tiny_tokenizer(turn["content"])["input_ids"] != continuation.tolist()


def test_ordinary_tokens_are_neither_special_nor_half_a_character(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = ordinary_tokens(tiny_tokenizer).tolist()
    assert len(ids) == 128  # of 256 bytes, those that are a character by themselves: ASCII
    assert not set(ids) & set(tiny_tokenizer.all_special_ids)
    assert set(random_continuations(tiny_tokenizer, 50, 50).unique().tolist()) <= set(ids)


def test_words_are_drawn_from_the_texts_whatever_their_order(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = random_prompts(tiny_tokenizer, 6, 10, pool="words", words=["red green", "blue  red"])
    for (turn,) in prompts:
        words = turn["content"].split(" ")
        assert len(words) == 10
        assert set(words) <= {"red", "green", "blue"}
    assert prompts == random_prompts(tiny_tokenizer, 6, 10, pool="words", words=["blue green red"])


def test_a_file_is_a_pool_of_words(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("née\nred", encoding="utf-8")
    from_file = random_continuations(tiny_tokenizer, 4, 7, pool="file", path=path)
    assert from_file.shape == (4, 7)
    assert from_file.dtype == torch.int64
    assert torch.equal(from_file, random_continuations(tiny_tokenizer, 4, 7, pool="words", words=["red née"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "letters"}, "expected one of vocabulary, words, file"),
        ({"pool": "words"}, "no texts"),
        ({"pool": "words", "words": [" \n"]}, "contains no words"),
        ({"pool": "file"}, "no path"),
        ({"pool": "file", "path": "missing.txt"}, "missing.txt cannot be read"),
        ({"num_tokens": 0}, "at least 1 token"),
    ],
)
def test_what_cannot_be_drawn_from_is_named(
    tiny_tokenizer: PreTrainedTokenizerFast, options: dict[str, object], message: str
) -> None:
    for draw in (random_prompts, random_continuations):
        with pytest.raises(DataError, match=message):
            draw(tiny_tokenizer, 2, **{"num_tokens": 4, **options})
