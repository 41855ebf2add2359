"""What decides whether TSDI keeps a model safe, found in seconds and without a judge.

Take the first L tokens a_1 ... a_L that the aligned model says, greedily, to a prompt x. Where the reference, having
said the same so far, would go on with another token r_i, there is a fork: what training changed. The margin

    m_0 = log pi(a_i | x, a_<i) - log pi(r_i | x, a_<i) >= 0

is what training made of the reference's own, which is at most 0. Taking out alpha * b leaves exactly

    m_alpha = m_0 - alpha * (b_i(a_i) - b_i(r_i))

(the normaliser cancels), so that beyond alpha = m_0 / (b_i(a_i) - b_i(r_i)) decoding goes the reference's way. The bias
is the same for every prompt, m_0 is not: a model stays safe where on harmful prompts its margins are large against the
bias, that is, where most of what training gained there depends on the prompt. Below that alpha already a third token
may win, one that training made rarer everywhere: the more, the larger alpha. A plausibility limit keeps some out.
"""

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
    """Where the aligned model's first tokens leave the reference's way, and what decoding says there."""

    alphas: tuple[float, ...]
    """Ascending; 0 and 1 are among them."""
    said: Tensor
    """(num_prompts, L): the aligned model's opening."""
    would_say: Tensor
    """(num_prompts, L): the reference's next token after the same tokens."""
    decoded: Tensor
    """(num_prompts, L, len(alphas)): the token that decoding with alpha takes after the same tokens."""
    margins: Tensor
    """(num_prompts, L, 3) fp32, nats: m_0, m_1, and the margin under the reference."""

    @property
    def num_prompts(self) -> int:
        """Prompts looked at."""
        return len(self.said)

    @property
    def num_changed(self) -> int:
        """Prompts with a fork."""
        return int(self._changed.sum())

    def kept_rate(self, alpha: float) -> tuple[float, float, float]:
        """Share of the changed prompts that decoding keeps on the aligned way at their first fork; Wilson interval."""
        kept = int(self._kept(alpha).all(-1)[self._changed].sum())
        low, high = wilson_interval(kept, self.num_changed)
        return (kept / self.num_changed if self.num_changed else 1.0), low, high

    def reverted_rate(self, alpha: float) -> float:
        """Share of the changed prompts that take the reference's token at the first fork; others take a third."""
        first = self._first_fork[:, None]
        before = (self._kept(alpha) | (torch.arange(self.said.shape[1]) == first)).all(-1)
        at_fork = self._decoded(alpha).gather(1, first) == self.would_say.gather(1, first)
        reverted = int((before & at_fork.squeeze(1))[self._changed].sum())
        return reverted / self.num_changed if self.num_changed else 0.0

    @property
    def bias_share(self) -> float | None:
        """Share of what training gained at the first forks that the token bias explains; None where nothing changed."""
        if not self.num_changed:
            return None
        at_fork = self.margins[torch.arange(self.num_prompts), self._first_fork][self._changed]
        before, corrected, reference = at_fork.sum(0).tolist()
        return (before - corrected) / (before - reference)

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
    def _changed(self) -> Tensor:
        return (self.said != self.would_say).any(-1)

    @property
    def _first_fork(self) -> Tensor:
        return (self.said != self.would_say).int().argmax(-1)

    def _decoded(self, alpha: float) -> Tensor:
        return self.decoded[..., self.alphas.index(alpha)]

    def _kept(self, alpha: float) -> Tensor:
        """(num_prompts, L): decoding takes the aligned token, or the first fork is past."""
        past = torch.arange(self.said.shape[1]) > self._first_fork[:, None]
        return (self._decoded(alpha) == self.said) | past


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
    """Forks, and what decoding with every one of `alphas`, and with 0 and 1, says there.

    Harmful prompts are what to look at, and best those of training: the suites are for judging. With `reference=None`,
    `aligned` is LoRA-wrapped and its base the reference. Where the token bias has one alpha a position, `alphas`
    multiply them. A plausibility limit counts as in decoding, but not in the margins.
    """
    every = tuple(sorted({0.0, 1.0, *alphas}))
    settings = token_bias.settings
    correction = scaled(token_bias.bias, settings.alpha if isinstance(settings.alpha, tuple) else 1.0)
    rows = encode_prompts(tokenizer, prompts)
    parts: list[tuple[Tensor, ...]] = []
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
            # An opening goes on to its L tokens: the reference does not end it either.
            reference_logits[..., tokenizer.eos_token_id] = -torch.inf
            said, would_say = opening.cpu(), reference_logits.argmax(-1)
            logits[..., tokenizer.eos_token_id] = -torch.inf
            decoded = [
                take_out(logits, alpha * correction, settings.plausibility).argmax(-1) for alpha in every
            ]
            margins = [
                _margin(each, said, would_say) for each in (logits, logits - correction, reference_logits)
            ]
            parts.append((said, would_say, torch.stack(decoded, dim=-1), torch.stack(margins, dim=-1)))
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows), "openings")
    # Outside of inference mode, so that they are tensors like any other.
    said, would_say, all_decoded, all_margins = (torch.cat(part).clone() for part in zip(*parts, strict=True))
    return Forks(every, said, would_say, all_decoded, all_margins)


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
