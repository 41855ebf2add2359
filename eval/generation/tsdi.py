"""TSDI: take out, when decoding, the token bias that safety training left behind.

Safety training makes some first words likelier whatever the question is ("I", "Sorry"). Shown random
prompts, a model betrays that habit as a shift against the model it was trained from; token-level
safety-debiased inference (TSDI, arXiv 2502.02153) measures the shift per answer position and subtracts it.

    b_i(v) = mean over N random prompts r and continuations y of
             log pi(v | r, y_<i) - log pi_ref(v | r, y_<i)                 for i = 1 ... L
    logits_i(v) <- logits_i(v) - alpha * b_i(v)                            for i <= L

The paper leaves open, and we chose: how random text is drawn (`pool`), N, L, and that continuations are
drawn like prompts (`continuation`). `plausibility` and per-position alpha are additions of this project.
How the bias is taken out is in `tsdi_decoding.py`.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import GenerationConfig, PreTrainedTokenizerBase

from equipoise.data.random_prompts import POOLS, Pool, random_continuations, random_prompts
from equipoise.eval.generation import tsdi_decoding
from equipoise.eval.generation.batches import base_of, decoding_by, encode_prompts, inference, left_pad
from equipoise.eval.generation.tsdi_decoding import FORMAT, TOKEN_BIAS_FILE, alphas_of, scaled
from equipoise.eval.models import ModelError


@dataclass(frozen=True, slots=True)
class TSDISettings:
    """How the token bias is measured and how much of it is taken out."""

    num_prompts: int = 32
    """N: random prompts the bias is averaged over."""
    num_positions: int = 8
    """L: answer positions from the start of the answer that are measured and corrected."""
    alpha: float | tuple[float, ...] = 1.0
    """Share of the bias subtracted when decoding: one for all positions, or one for each of the L."""
    pool: Pool = "vocabulary"
    """Where random text comes from: vocabulary | words (of given texts) | file (`path`)."""
    path: str | None = None
    """The text file of `pool: file`."""
    prompt_tokens: int = 16
    """Tokens of a random prompt, about; the chat template comes on top."""
    continuation: Literal["random", "aligned"] = "random"
    """What stands before position i: random tokens, or what the aligned model samples (batch by batch, so that
    the batch size matters a little)."""
    space: Literal["log_prob", "logit"] = "log_prob"
    """What is averaged. The two differ by one constant a position, which changes the table, not the decoding."""
    plausibility: float = 0.0
    """Correct only tokens at least this share as probable as the most probable one; 0: all."""
    seed: int = 0
    """Of the random prompts and their continuations."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_positions", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        alphas_of(self.alpha, self.num_positions)
        if not 0 <= self.plausibility <= 1:
            raise ValueError(f"plausibility is {self.plausibility}; expected a share from 0 to 1.")
        for name, choices in (
            ("pool", POOLS),
            ("space", ("log_prob", "logit")),
            ("continuation", ("random", "aligned")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}.")
        if (self.pool == "file") != (self.path is not None):
            raise ValueError(
                f"path is {self.path!r} and pool is {self.pool!r}: `file` needs a path, others none."
            )


@dataclass(frozen=True, slots=True)
class TokenShift:
    """A row of the report's table: one token at one position."""

    position: int
    """Counted from 1."""
    token_id: int
    token: str
    bias: float
    """Nats; above 0: training made the token likelier."""
    mean_probability: float
    """Of the aligned model over the random contexts."""
    share: float
    """mean_probability * bias, nats: about the token's part of KL(aligned || reference)."""


@dataclass(frozen=True, slots=True)
class TokenBias:
    """A measured token bias."""

    bias: torch.Tensor
    """(L, V) fp32, nats."""
    mean_probability: torch.Tensor
    """(L, V) fp32: the aligned model's probability of each token, averaged over the random contexts."""
    settings: TSDISettings

    def __post_init__(self) -> None:
        shape = (self.settings.num_positions, self.bias.shape[-1])
        if self.bias.shape != shape or self.mean_probability.shape != shape:
            raise ValueError(
                f"bias is {tuple(self.bias.shape)} and mean_probability {tuple(self.mean_probability.shape)}; "
                f"expected both {shape}."
            )

    def correction(self) -> torch.Tensor:
        """alpha_i * b_i, (L, V) fp32: what decoding subtracts."""
        return scaled(self.bias, self.settings.alpha)

    def expect_vocabulary(self, vocab_size: int) -> None:
        """Raise ModelError unless it was measured over `vocab_size` tokens."""
        if self.bias.shape[1] != vocab_size:
            raise ModelError(other_vocabulary("The token bias", self.bias.shape[1], vocab_size))

    def with_settings(self, **changes: Any) -> "TokenBias":
        """Return it with other decoding settings (`alpha`, `plausibility`); measured tables stay."""
        unknown = changes.keys() - {"alpha", "plausibility"}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))} shaped the measurement: estimate anew.")
        return replace(self, settings=replace(self.settings, **changes))

    def save(self, path: Path | str) -> None:
        """Write safetensors with the settings as metadata, equal tables as equal bytes; aside first, then renamed."""
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {"bias": self.bias, "mean_probability": self.mean_probability}
        metadata = {"format": FORMAT, "settings": json.dumps(asdict(self.settings))}
        try:
            data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
            aside.write_bytes(_in_order(data))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def export(self, folder: Path) -> None:
        """Write it into a model's folder, and beside it the code that decodes with it.

        `custom_generate/generate.py` is transformers' own layout: `generate(custom_generate=folder,
        trust_remote_code=True)` finds it there, and needs no equipoise.
        """
        self.save(folder / TOKEN_BIAS_FILE)
        code = folder / "custom_generate" / "generate.py"
        code.parent.mkdir(exist_ok=True)
        shutil.copyfile(tsdi_decoding.__file__, code)

    @classmethod
    def load(cls, path: Path | str, vocab_size: int | None = None) -> "TokenBias":
        """Read what `save` wrote, and check that it was measured over `vocab_size` tokens.

        Raises:
            ModelError: the file is missing, no token bias, damaged, or of another vocabulary.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ModelError(
                        f"{path} is no token bias: its format is {metadata.get('format')!r}, expected {FORMAT!r}."
                    )
                tensors = {name: file.get_tensor(name) for name in ("bias", "mean_probability")}
            settings = json.loads(metadata["settings"])
            if isinstance(settings.get("alpha"), list):
                settings["alpha"] = tuple(settings["alpha"])
            loaded = cls(settings=TSDISettings(**settings), **tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"The token bias {path} cannot be read: {error}. Expected a file that the token_bias stage wrote."
            ) from error
        if vocab_size is not None and loaded.bias.shape[1] != vocab_size:
            raise ModelError(other_vocabulary(f"The token bias {path}", loaded.bias.shape[1], vocab_size))
        return loaded

    def top_tokens(self, tokenizer: PreTrainedTokenizerBase, num_tokens: int = 5) -> list[TokenShift]:
        """Return, position by position, the most boosted and then the most suppressed tokens.

        Ranked by share of the shift, mean probability times bias: by raw bias, tokens that nobody would
        ever say lead. At most `num_tokens` of each sort.
        """
        shares = self.mean_probability * self.bias
        rows = []
        for position in range(self.settings.num_positions):
            count = min(num_tokens, shares.shape[1])
            boosted = shares[position].topk(count).indices.tolist()
            suppressed = shares[position].topk(count, largest=False).indices.tolist()
            chosen = [token for token in boosted if shares[position, token] > 0]
            chosen += [token for token in suppressed if shares[position, token] < 0]
            rows += [
                TokenShift(
                    position=position + 1,
                    token_id=token,
                    token=tokenizer.decode([token], clean_up_tokenization_spaces=False),
                    bias=self.bias[position, token].item(),
                    mean_probability=self.mean_probability[position, token].item(),
                    share=shares[position, token].item(),
                )
                for token in chosen
            ]
        return rows


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted; safetensors itself has them in another order every time."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors behind it stay aligned
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def estimate_token_bias(
    aligned: Any,
    reference: Any | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: TSDISettings,
    batch_size: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
    words: Sequence[str] | None = None,
) -> TokenBias:
    """Measure the token bias of `aligned` against `reference` on random prompts.

    With `reference=None`, `aligned` is a LoRA-wrapped model and its own adapter-off base the reference.
    One forward pass of [prompt | continuation] gives all L positions at once; memory does not grow with N.
    `words` are the texts of `pool: words`.

    Raises:
        ModelError: no reference, other vocabularies, or logits that are not finite.
        DataError: random text cannot be drawn, see `random_prompts`.
    """
    if reference is None and not hasattr(aligned, "peft_config"):
        raise ModelError(
            "The token bias needs a reference: give the model that training started from, "
            "or a LoRA-wrapped model, whose adapter can be switched off."
        )
    draw: dict[str, Any] = {
        "pool": settings.pool,
        "words": words,
        "path": settings.path,
        "seed": settings.seed,
    }
    prompts = random_prompts(tokenizer, settings.num_prompts, settings.prompt_tokens, **draw)
    rows = encode_prompts(tokenizer, prompts)
    drawn = random_continuations(tokenizer, settings.num_prompts, settings.num_positions, **draw)
    bias_sum = probability_sum = torch.zeros(())
    models = (aligned,) if reference is None else (aligned, reference)
    with inference(*models):
        for start in range(0, len(rows), batch_size):
            batch = slice(start, start + batch_size)
            input_ids, attention_mask = left_pad(rows[batch], tokenizer.pad_token_id, base_of(aligned).device)
            if settings.continuation == "random":
                continuation = drawn[batch].to(input_ids.device)
            else:
                continuation = _sampled(aligned, input_ids, attention_mask, tokenizer, settings, start)
            logits = continuation_logits(aligned, input_ids, attention_mask, continuation)
            with aligned.disable_adapter() if reference is None else nullcontext():
                reference_logits = continuation_logits(
                    aligned if reference is None else reference, input_ids, attention_mask, continuation
                )
            if logits.shape != reference_logits.shape:
                raise ModelError(
                    other_vocabulary("The reference", reference_logits.shape[2], logits.shape[2])
                )
            log_probs = logits.log_softmax(-1)
            if settings.space == "log_prob":
                shift = log_probs - reference_logits.log_softmax(-1)
            else:
                shift = logits - reference_logits
            # Summed in fp64: hundreds of prompts then add no rounding to what fp32 can hold.
            bias_sum = bias_sum + shift.double().sum(0)
            probability_sum = probability_sum + log_probs.exp().double().sum(0)
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows), "random prompts")
    # Outside of inference mode, so that the tables are tensors like any other.
    bias = (bias_sum / len(rows)).float()
    mean_probability = (probability_sum / len(rows)).float()
    if not bias.isfinite().all():
        raise ModelError(
            f"The token bias is not finite at {(~bias.isfinite()).sum().item()} of {bias.numel()} entries: "
            "one of the models produces infinite or undefined logits. Was its training stable?"
        )
    return TokenBias(bias=bias, mean_probability=mean_probability, settings=settings)


def continuation_logits(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, continuation: torch.Tensor
) -> torch.Tensor:
    """Logits (B, L, V) in fp32, on the CPU, for each position of a continuation (B, L)."""
    # The last token is left out: what would follow it is position L + 1.
    ids = torch.cat([input_ids, continuation[:, :-1]], dim=1)
    mask = torch.cat([attention_mask, torch.ones_like(continuation[:, :-1])], dim=1)
    device = base_of(model).device
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        # What `generate` uses too; by default positions would count the padding.
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
        logits_to_keep=continuation.shape[1],
        use_cache=False,
    )
    return output.logits[:, -continuation.shape[1] :].float().cpu()


def _sampled(
    aligned: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    settings: TSDISettings,
    start: int,
) -> torch.Tensor:
    """Sample L tokens (B, L) from the aligned model at temperature 1; none of them ends the answer."""
    base = base_of(aligned)
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        min_new_tokens=settings.num_positions,
        max_new_tokens=settings.num_positions,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # training switches it off in the model's config
    )
    devices = [base.device] if base.device.type == "cuda" else []
    with decoding_by(base, config), torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed + start)
        output = base.generate(input_ids=input_ids, attention_mask=attention_mask)
    return output[:, input_ids.shape[1] :]


def other_vocabulary(subject: str, found: int, expected: int) -> str:
    """What is said where two vocabularies differ."""
    return (
        f"{subject} covers {found} tokens, the model at hand {expected}. "
        "Both must share one vocabulary: take the models of one run, and estimate the token bias on them."
    )
