"""Prompts and continuations that mean nothing: what a model is shown to find its input-independent habits.

Used by TSDI (`eval/generation/tsdi.py`) and by its training-time counterpart.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from equipoise.data.errors import DataError
from equipoise.data.schema import Turn

Pool = Literal["vocabulary", "words", "file"]
POOLS: tuple[str, ...] = get_args(Pool)

_PROMPTS, _CONTINUATIONS = 0, 1
"""Streams of one seed, so that a continuation does not repeat its prompt."""


def random_prompts(
    tokenizer: Any,
    num_prompts: int,
    num_tokens: int,
    *,
    pool: Pool = "vocabulary",
    words: Sequence[str] | None = None,
    path: Path | str | None = None,
    seed: int = 0,
) -> list[tuple[Turn, ...]]:
    """Draw user turns of random text; the same seed gives the same prompts.

    `vocabulary` draws uniformly from the ordinary tokens of the vocabulary: no special tokens, and none
    that is only part of a character. `words` draws uniformly from the distinct words of the texts `words`,
    `file` from those of the UTF-8 text file `path`; a word counts as one token. The tokenizer may cut the
    joined text differently, so that `num_tokens` is a target, not an exact length.

    Raises:
        DataError: the pool is unknown, empty, or its `words` or `path` is missing.
    """
    _check_counts(num_prompts, num_tokens)
    generator = np.random.default_rng((seed, _PROMPTS))
    if pool == "vocabulary":
        drawn = generator.choice(ordinary_tokens(tokenizer), (num_prompts, num_tokens))
        texts = [tokenizer.decode(row.tolist(), clean_up_tokenization_spaces=False) for row in drawn]
    else:
        vocabulary = _distinct_words(pool, words, path)
        indices = generator.integers(len(vocabulary), size=(num_prompts, num_tokens))
        texts = [" ".join(vocabulary[index] for index in row) for row in indices]
    return [({"role": "user", "content": text},) for text in texts]


def random_continuations(
    tokenizer: Any,
    num_continuations: int,
    num_tokens: int,
    *,
    pool: Pool = "vocabulary",
    words: Sequence[str] | None = None,
    path: Path | str | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Draw random answers as token ids (num_continuations, num_tokens), int64; exact lengths.

    The pools are those of `random_prompts`; words are joined by spaces, encoded and cut to length.

    Raises:
        DataError: as `random_prompts`.
    """
    _check_counts(num_continuations, num_tokens)
    generator = np.random.default_rng((seed, _CONTINUATIONS))
    if pool == "vocabulary":
        drawn = generator.choice(ordinary_tokens(tokenizer), (num_continuations, num_tokens))
        return torch.from_numpy(drawn).long()
    vocabulary = _distinct_words(pool, words, path)
    indices = generator.integers(len(vocabulary), size=(num_continuations, num_tokens))
    texts = [" ".join(vocabulary[index] for index in row) for row in indices]
    # A word is at least one token, so num_tokens words are never too short.
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens] for text in texts]
    return torch.tensor(rows, dtype=torch.int64)


@lru_cache(maxsize=2)  # decoding a whole vocabulary takes a second, and a penalty draws every few steps
def ordinary_tokens(tokenizer: Any) -> np.ndarray:
    """Return the ids, ascending, of tokens that are text by themselves: neither special nor half a character."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = [index for index in sorted(tokenizer.get_vocab().values()) if index not in special]
    texts = tokenizer.batch_decode([[index] for index in ids], clean_up_tokenization_spaces=False)
    ordinary = [
        index
        for index, text in zip(ids, texts, strict=True)
        if text and "\N{REPLACEMENT CHARACTER}" not in text
    ]
    if not ordinary:
        raise DataError("The tokenizer has no ordinary tokens to draw random prompts from.")
    return np.array(ordinary, dtype=np.int64)


def _check_counts(num_rows: int, num_tokens: int) -> None:
    if num_rows < 1 or num_tokens < 1:
        raise DataError(
            f"Expected at least 1 random text of at least 1 token, found {num_rows} of {num_tokens}."
        )


def _distinct_words(pool: str, words: Sequence[str] | None, path: Path | str | None) -> list[str]:
    """The distinct words of the pool, sorted: the draw must not depend on the order of a set."""
    if pool == "words":
        if words is None:
            raise DataError("pool is `words`, but no texts to take words from were given.")
        texts: Sequence[str] = words
    elif pool == "file":
        if path is None:
            raise DataError("pool is `file`, but no path was given.")
        try:
            texts = [Path(path).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"The random prompts' file {path} cannot be read as UTF-8 text: {error}"
            ) from error
    else:
        raise DataError(f"pool is {pool!r}; expected one of {', '.join(POOLS)}.")
    distinct = sorted({word for text in texts for word in text.split()})
    if not distinct:
        raise DataError(f"The pool `{pool}`{f' ({path})' if pool == 'file' else ''} contains no words.")
    return distinct
