"""TSDI decoding: take a measured token bias out of the first tokens of every answer.

This file stands alone, because it travels: `TokenBias.export` copies it into a model's folder as
`custom_generate/generate.py`, and `model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)` finds it
there, with no equipoise installed. It needs torch, transformers and safetensors.

    logits_i(v) <- logits_i(v) - alpha_i * b_i(v)        for the answer's tokens i = 1 ... L

Source: token-level safety-debiased inference (TSDI), arXiv 2502.02153. Plausibility and one alpha a position are ours.
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import cached_file

TOKEN_BIAS_FILE = "token_bias.safetensors"
"""What a token bias is called in a model's folder."""
FORMAT = "equipoise.token_bias.1"


def take_out(scores: Tensor, correction: Tensor, plausibility: float = 0.0) -> Tensor:
    """Scores (B, V) less the correction, (V,) or (B, V), in nats; logits or log-probabilities alike.

    With a plausibility limit p > 0, a token less probable than p times the most probable one keeps exactly the
    probability the model gives it, and the correction moves probability only between the tokens above the limit. So
    nothing that the model finds implausible gains, and a correction of zero changes nothing.
    """
    corrected = scores - correction
    if plausibility == 0:
        return corrected
    implausible = scores < scores.amax(-1, keepdim=True) + math.log(plausibility)
    before = scores.masked_fill(implausible, -math.inf).logsumexp(-1, keepdim=True)
    after = corrected.masked_fill(implausible, -math.inf).logsumexp(-1, keepdim=True)
    return torch.where(implausible, scores, corrected + (before - after))


class TSDILogitsProcessor(LogitsProcessor):
    """Subtract the correction of position i from the logits of the i-th answer token, for i up to L.

    Left-padded rows share `prompt_length`, the padded width, so that every row stands at the same position.
    Subtracting from logits or from log-probabilities gives the same distribution: they differ by a constant a row.
    """

    def __init__(self, correction: Tensor, prompt_length: int, plausibility: float = 0.0) -> None:
        """Take alpha_i * b_i, (L, V) fp32; best on the device that decodes."""
        self.correction, self.prompt_length, self.plausibility = correction, prompt_length, plausibility

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return corrected scores (B, V), given the tokens so far (B, T)."""
        position = input_ids.shape[1] - self.prompt_length
        if position >= len(self.correction):
            return scores
        return take_out(scores, self.correction[position], self.plausibility)


def read_token_bias(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """The bias (L, V) in nats, fp32, and the settings it was measured with, from a token-bias file.

    Raises ValueError where the file is no token bias; safetensors' and the system's own errors where it can't be read.
    """
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no token bias: its format is {metadata.get('format')!r}, expected {FORMAT!r}."
            )
        return file.get_tensor("bias"), json.loads(metadata["settings"])


def alphas_of(alpha: float | Sequence[float], num_positions: int) -> list[float]:
    """One alpha a position, L of them, from one for all or one for each; ValueError where they don't fit."""
    given = [float(alpha)] if isinstance(alpha, int | float) else [float(value) for value in alpha]
    if len(given) not in (1, num_positions):
        raise ValueError(f"alpha has {len(given)} values; expected 1 or {num_positions}, one a position.")
    if not all(math.isfinite(value) and value >= 0 for value in given):
        raise ValueError(f"alpha is {alpha}; expected numbers of 0 or more.")
    return given * (num_positions // len(given))


def scaled(bias: Tensor, alpha: float | Sequence[float]) -> Tensor:
    """alpha_i * b_i, (L, V) fp32: what decoding subtracts."""
    return torch.tensor(alphas_of(alpha, len(bias)))[:, None] * bias


@lru_cache(maxsize=4)
def _correction_on(
    path: str, modified: int, device: str, alpha: tuple[float, ...] | None
) -> tuple[Tensor, float]:
    """(alpha_i * b_i, plausibility), read once a file, device and alpha: `generate` is called for every batch."""
    bias, settings = read_token_bias(path)
    return scaled(bias, settings["alpha"] if alpha is None else alpha).to(device), settings["plausibility"]


def _find_token_bias(model: Any) -> str:
    """The token bias in the folder, or the hub repository, that the model was loaded from."""
    name = getattr(model, "name_or_path", "")
    revision = getattr(model.config, "_commit_hash", None)
    found = None
    if name:
        found = cached_file(
            name, TOKEN_BIAS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    if found is None:
        raise ValueError(
            f"The model was loaded from {name!r}, which has no {TOKEN_BIAS_FILE}. Load it from the folder that has the "
            "token bias, or name the file: generate(..., token_bias_file=PATH)."
        )
    return found


def generate(
    model: Any,
    inputs: Tensor | None = None,
    logits_processor: LogitsProcessorList | None = None,
    token_bias_file: str | Path | None = None,
    alpha: float | Sequence[float] | None = None,
    **options: Any,
) -> Any:
    """`model.generate` with the token bias taken out; everything else is as transformers has it.

    token_bias_file: by default the one in the folder that the model was loaded from.
    alpha: in place of the file's own; 0 switches the correction off for this call.
    With beam search pass `renormalize_logits=True`: beams are compared by log-probabilities.
    Raises ValueError where there is no token bias, or one of another vocabulary.
    """
    path = Path(token_bias_file if token_bias_file is not None else _find_token_bias(model))
    chosen = (float(alpha),) if isinstance(alpha, int | float) else None if alpha is None else tuple(alpha)
    correction, plausibility = _correction_on(str(path), path.stat().st_mtime_ns, str(model.device), chosen)
    vocabulary = model.config.get_text_config().vocab_size
    if correction.shape[1] != vocabulary:
        raise ValueError(f"{path} covers {correction.shape[1]} tokens, the model at hand {vocabulary}.")
    prompt = inputs if inputs is not None else options.get("input_ids")
    # Embeddings leave `input_ids` empty; without either, transformers starts from one token.
    start = 0 if options.get("inputs_embeds") is not None else 1
    prompt_length = start if prompt is None else prompt.shape[1]
    processors = LogitsProcessorList(logits_processor or [])
    processors.append(TSDILogitsProcessor(correction, prompt_length, plausibility))
    # Not model.generate: of a model loaded with trust_remote_code, that is this very function.
    return type(model).generate(model, inputs, logits_processor=processors, **options)
