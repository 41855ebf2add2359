"""What decides whether TSDI keeps a model safe, found in seconds and without a judge.

Take the first L tokens a_1 ... a_L that the aligned model says, greedily, to a prompt x. Where the reference, having
said the same so far, would go on with another token r_i, there is a fork: what training changed. The margin

    m_0 = log pi(a_i | x, a_<i) - log pi(r_i | x, a_<i) >= 0

is what training made of the reference's own, which is at most 0. Taking out alpha * b leaves exactly

    m_alpha = m_0 - alpha * (b_i(a_i) - b_i(r_i))

(the normaliser cancels), so that decoding keeps the aligned model's way up to alpha = m_0 / (b_i(a_i) - b_i(r_i)) and
goes the reference's beyond. The bias is the same for every prompt, m_0 is not: a model stays safe where on harmful
prompts its margins are large against the bias, that is, where most of what training gained there depends on the prompt.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from equipoise.data.schema import Turn
from equipoise.eval.generation.batches import base_of, decoding_by, encode_prompts, inference, left_pad
from equipoise.eval.generation.tsdi import TokenBias, continuation_logits
from equipoise.eval.generation.tsdi_decoding import scaled, take_out
from equipoise.eval.statistics import wilson_interval

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
KEPT = 0.9
"""Share of the prompts that a suggested alpha has to keep on the aligned model's way."""


@dataclass(frozen=True, slots=True)
class Forks:
    """Where the aligned model's first tokens leave the reference's way, and by how much."""

    alphas: tuple[float, ...]
    """Ascending; 0 and 1 are among them."""
    margins: Tensor
    """(num_prompts, L, len(alphas)) fp32, nats: m_alpha; infinite where the reference would say the same."""
    reference_margins: Tensor
    """(num_prompts, L) fp32, nats, at most 0: the same margin under the reference."""

    @property
    def num_prompts(self) -> int:
        """Prompts looked at."""
        return len(self.margins)

    @property
    def num_changed(self) -> int:
        """Prompts with a fork."""
        return int(self._changed.sum())

    def kept_rate(self, alpha: float) -> tuple[float, float, float]:
        """Share of the changed prompts that keep their way at the first fork, with Wilson's interval."""
        kept = int((self._at_first_fork(alpha) > 0).sum())
        low, high = wilson_interval(kept, self.num_changed)
        return (kept / self.num_changed if self.num_changed else 1.0), low, high

    def kept_throughout_rate(self, alpha: float) -> tuple[float, float, float]:
        """The same at every fork of the opening; lower, since another wording of the same answer is lost, too."""
        kept = int((self._at(alpha)[self._changed] > 0).all(-1).sum())
        low, high = wilson_interval(kept, self.num_changed)
        return (kept / self.num_changed if self.num_changed else 1.0), low, high

    @property
    def bias_share(self) -> float | None:
        """Share of what training gained at the first forks that the token bias explains; None where nothing changed."""
        if not self.num_changed:
            return None
        first = self._first_fork[self._changed, None]
        before = self._at_first_fork(0.0)
        gained = before - self.reference_margins[self._changed].gather(1, first).squeeze(1)
        return float((before - self._at_first_fork(1.0)).sum() / gained.sum())

    @property
    def suggested_alpha(self) -> float:
        """The largest alpha up to which at least `KEPT` of the changed prompts are kept all the way."""
        suggested = 0.0
        for alpha in self.alphas:
            if self.kept_rate(alpha)[0] < KEPT:
                break
            suggested = alpha
        return suggested

    @property
    def _forks(self) -> Tensor:
        return self._at(0.0).isfinite()

    @property
    def _changed(self) -> Tensor:
        return self._forks.any(-1)

    @property
    def _first_fork(self) -> Tensor:
        return self._forks.int().argmax(-1)

    def _at(self, alpha: float) -> Tensor:
        return self.margins[..., self.alphas.index(alpha)]

    def _at_first_fork(self, alpha: float) -> Tensor:
        return self._at(alpha).gather(1, self._first_fork[:, None]).squeeze(1)[self._changed]


def find_forks(
    aligned: Any,
    reference: Any | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Turn]],
    token_bias: TokenBias,
    alphas: Sequence[float] = ALPHAS,
    batch_size: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
) -> Forks:
    """Forks and their margins for every one of `alphas`, and for 0 and 1.

    Harmful prompts are what to look at, and best those of training: the suites are for judging. With `reference=None`,
    `aligned` is LoRA-wrapped and its base the reference. Where the token bias has one alpha a position, `alphas`
    multiply them. Under a plausibility limit the margins are those of decoding with it.
    """
    every = tuple(sorted({0.0, 1.0, *alphas}))
    settings = token_bias.settings
    correction = scaled(token_bias.bias, settings.alpha if isinstance(settings.alpha, tuple) else 1.0)
    rows = encode_prompts(tokenizer, prompts)
    margins, reference_margins = [], []
    models = (aligned,) if reference is None else (aligned, reference)
    with inference(*models):
        for start in range(0, len(rows), batch_size):
            batch = left_pad(
                rows[start : start + batch_size], tokenizer.pad_token_id, base_of(aligned).device
            )
            opening = _opening(aligned, *batch, tokenizer, settings.num_positions)
            logits = continuation_logits(aligned, *batch, opening)
            with aligned.disable_adapter() if reference is None else nullcontext():
                other = aligned if reference is None else reference
                reference_logits = continuation_logits(other, *batch, opening)
            said = opening.cpu()
            would_say = reference_logits.argmax(-1)
            each = [
                _margin(take_out(logits, alpha * correction, settings.plausibility), said, would_say)
                for alpha in every
            ]
            same = (said == would_say)[..., None]
            margins.append(torch.stack(each, dim=-1).masked_fill(same, math.inf))
            reference_margins.append(_margin(reference_logits, said, would_say))
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows), "openings")
    # Outside of inference mode, so that they are tensors like any other.
    return Forks(every, torch.cat(margins).clone(), torch.cat(reference_margins).clone())


def _opening(
    model: Any, input_ids: Tensor, attention_mask: Tensor, tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> Tensor:
    """The first tokens (B, L) of greedy answers; none of them ends the answer."""
    base = base_of(model)
    config = GenerationConfig(
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    with decoding_by(base, config):
        output = type(base).generate(base, input_ids=input_ids, attention_mask=attention_mask)
    return output[:, input_ids.shape[1] :]


def _margin(logits: Tensor, said: Tensor, would_say: Tensor) -> Tensor:
    """log pi(said) - log pi(would_say), (B, L), from logits (B, L, V)."""
    picked = logits.gather(-1, torch.stack([said, would_say], dim=-1))
    return picked[..., 0] - picked[..., 1]
