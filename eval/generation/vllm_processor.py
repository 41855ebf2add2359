"""TSDI decoding inside vLLM: the class that `vllm serve MODEL --logits-processors MODULE:CLASS` names.

    vllm serve outputs/tsdi/seed0/promoted --logits-processors equipoise.eval.generation.vllm_processor:TSDIProcessor

vLLM has two interfaces, and refuses a class of the other: `TSDIProcessor` is for its V1 model runner, `TSDIProcessorV2`
for Model Runner V2 (the default of the newest releases; VLLM_USE_V2_MODEL_RUNNER=0 switches it off).
Written against vLLM's published sources (vllm/v1/sample/logits_processor/ and vllm/v1/worker/gpu/sample/
logits_processor/) and tested on doubles of them; not run with vLLM itself.

The token bias is the file that the environment variable EQUIPOISE_TOKEN_BIAS names, or `additional_config:
{"token_bias": PATH}`, or token_bias.safetensors in the folder that is served. A request changes what happens to it by
`extra_args` (`vllm_xargs` over HTTP): `tsdi` false or 0 leaves it alone, `tsdi_alpha` replaces the file's alpha.
Beside vLLM, `pip install --no-deps equipoise` is enough: only torch, transformers and safetensors are imported.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.eval.generation.tsdi_decoding import (
    TOKEN_BIAS_FILE,
    alphas_of,
    read_token_bias,
    take_out,
)

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
    from vllm.v1.sample.logits_processor import MoveDirectionality
except ImportError:  # no vLLM here: the class can be read and tested, vLLM alone makes one
    V1LogitsProcessor = object
try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
except ImportError:  # no vLLM here, or one from before Model Runner V2
    V2LogitsProcessor = object

FILE_VARIABLE = "EQUIPOISE_TOKEN_BIAS"
SWITCH, ALPHA = "tsdi", "tsdi_alpha"
"""Keys of a request's `extra_args`."""


def request_alphas(extra_args: dict[str, Any] | None, default: Sequence[float]) -> list[float]:
    """Alpha of each of the L positions for one request; all 0 where it wants none. ValueError names a bad argument."""
    given = extra_args or {}
    switch = given.get(SWITCH, True)
    if switch not in (True, False):  # over HTTP they come as 1 and 0, which are equal to them
        raise ValueError(f"extra_args {SWITCH!r} is {switch!r}; expected true or false.")
    alpha = given.get(ALPHA)
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is not None and not (number and math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"extra_args {ALPHA!r} is {alpha!r}; expected a number of 0 or more.")
    if not switch:
        return [0.0] * len(default)
    return list(default) if alpha is None else [float(alpha)] * len(default)


class _Bias:
    """The table on vLLM's device, with what decoding needs to know of it."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        path = _token_bias_path(vllm_config)
        bias, settings = read_token_bias(path)
        vocabulary = vllm_config.model_config.get_vocab_size()
        if bias.shape[1] != vocabulary:
            raise ValueError(f"{path} covers {bias.shape[1]} tokens, the served model {vocabulary}.")
        self.table = bias.to(device)
        self.alphas = alphas_of(settings["alpha"], len(bias))
        self.plausibility: float = settings["plausibility"]

    def __len__(self) -> int:
        """Positions that are corrected, L."""
        return len(self.alphas)

    def take_out(self, logits: Tensor, positions: Tensor, alphas: Tensor) -> Tensor:
        """Logits (n, V) less alpha * b of each row's position; positions (n,) int64 and alphas (n,) fp32."""
        return take_out(logits, alphas[:, None] * self.table[positions], self.plausibility)


def _token_bias_path(vllm_config: Any) -> Path:
    """The file named by the environment or the configuration, or else the one in the served folder."""
    named = os.environ.get(FILE_VARIABLE) or (vllm_config.additional_config or {}).get("token_bias")
    path = Path(named) if named else Path(vllm_config.model_config.model) / TOKEN_BIAS_FILE
    if not path.is_file():
        raise ValueError(
            f"No token bias at {path}. Set {FILE_VARIABLE}=PATH, or --additional-config '{{\"token_bias\": PATH}}', or "
            "serve a local folder that has the file (`promoted/` of a run with a token_bias stage)."
        )
    return path


class TSDIProcessor(V1LogitsProcessor):
    """For vLLM's V1 model runner."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.bias = _Bias(vllm_config, device)
        self.device, self.is_pin_memory = device, is_pin_memory
        self.requests: dict[int, tuple[list[float], list[int]]] = {}
        """Row of the batch -> alphas of its request, and vLLM's own running list of its answer's tokens."""
        self.rows = self.positions = torch.empty(0, dtype=torch.int64)
        self.alphas = torch.empty(0)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError for arguments of a request that make no sense, when it is admitted."""
        request_alphas(sampling_params.extra_args, [0.0])

    def is_argmax_invariant(self) -> bool:
        """It changes what greedy decoding takes."""
        return False

    def update_state(self, batch_update: Any | None) -> None:
        """Follow the batch; called before every forward pass.

        A position is the length of the answer's list, not a count of calls: a prompt that is prefilled in pieces, and a
        request that is preempted and taken up again, are then at the right one. Under asynchronous scheduling the last
        tokens of the list are placeholders, which count too.
        """
        if batch_update is not None:
            self._follow(batch_update)
        num_positions = len(self.bias)
        finished = [row for row, (_, answer) in self.requests.items() if len(answer) >= num_positions]
        for row in finished:
            del self.requests[row]
        rows, positions, alphas = [], [], []
        for row, (of_request, answer) in self.requests.items():
            rows.append(row)
            positions.append(len(answer))
            alphas.append(of_request[len(answer)])
        self.rows, self.positions = self._on_device(rows), self._on_device(positions)
        self.alphas = self._on_device(alphas, torch.float32)

    def _follow(self, batch_update: Any) -> None:
        """In vLLM's order: removed, added, moved."""
        for row in batch_update.removed:
            self.requests.pop(row, None)
        for row, params, _, answer in batch_update.added:
            alphas = request_alphas(params.extra_args, self.bias.alphas)
            if any(alphas):
                self.requests[row] = (alphas, answer)
            else:  # it may stand where another request stood
                self.requests.pop(row, None)
        for source, target, direction in batch_update.moved:
            moved, displaced = self.requests.pop(source, None), self.requests.pop(target, None)
            if moved is not None:
                self.requests[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self.requests[source] = displaced

    def _on_device(self, values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, pin_memory=self.is_pin_memory).to(
            self.device, non_blocking=True
        )

    def apply(self, logits: Tensor) -> Tensor:
        """Logits (num_requests, V) fp32 with the bias taken out, in place."""
        if len(self.rows):
            logits[self.rows] = self.bias.take_out(logits[self.rows], self.positions, self.alphas)
        return logits


class TSDIProcessorV2(V2LogitsProcessor):
    """For vLLM's Model Runner V2."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.bias = _Bias(vllm_config, req_states.device)
        self.req_states = req_states
        self.speculative = vllm_config.speculative_config is not None
        self.staged = torch.zeros(req_states.max_num_reqs, len(self.bias))
        """Alpha of every slot and position, on the host; slots are recycled, so each new request overwrites its own."""
        self.alphas = self.staged.to(req_states.device)
        self.changed = False

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError for arguments of a request that make no sense, when it is admitted."""
        request_alphas(sampling_params.extra_args, [0.0])

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Note the request's alphas in its slot; returns whether its logits will be changed at all."""
        alphas = request_alphas(sampling_params.extra_args, self.bias.alphas)
        self.staged[req_idx] = torch.tensor(alphas)
        self.changed = True
        return any(alphas)

    def apply_staged_writes(self) -> None:
        """Bring new requests' alphas to the device, before the forward pass."""
        if self.changed:
            self.alphas.copy_(self.staged)
            self.changed = False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Logits (num_rows, V) fp32 with the bias taken out, in place; with drafts a request has several rows.

        `pos` is where a row's input token stands in its sequence, so that the answer token it predicts is number
        pos + 1 - prompt_len, counted from 0.
        """
        if self._all_past(ctx):
            return logits
        slots = ctx.expanded_idx_mapping.long()
        positions = ctx.pos.long() + 1 - self.req_states.prompt_len.gpu[slots].long()
        # Negative in a piece of a prompt that is prefilled in several; what is sampled there is thrown away.
        inside = (positions >= 0) & (positions < len(self.bias))
        positions = positions.clamp(0, len(self.bias) - 1)
        alphas = torch.where(inside, self.alphas[slots, positions], 0.0)
        return logits.copy_(self.bias.take_out(logits, positions, alphas))

    def _all_past(self, ctx: Any) -> bool:
        """Whether every answer is longer than L, found on the host, so that later steps cost nothing on the device.

        With speculative decoding the lengths that the host knows are too large, and no step is skipped.
        """
        prompts = self.req_states.prompt_len.np[ctx.idx_mapping_np]
        return not self.speculative and bool(
            (ctx.seq_lens_upper_bound_np[: len(prompts)] - prompts >= len(self.bias)).all()
        )
