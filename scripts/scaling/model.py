"""Time and efficiency of one training step on many GPUs; the formulas and their sources are in README.md here.

Memory and traffic are those of the dry run (`train/planning/`).
"""

from dataclasses import dataclass, replace

from equipoise.train.planning.engine import SHARDED, Engine
from equipoise.train.planning.machine import GPU, GPUS_A_NODE, HEADROOM
from equipoise.train.planning.memory import ModelSize, Training

ENGINES = ("zero2", *SHARDED)


def llama(num_layers: int, hidden: int, heads: int, key_heads: int, inner: int, vocab: int) -> ModelSize:
    """The size of a Llama with an untied head; its parameters are counted, not rounded."""
    keys = hidden // heads * key_heads
    a_block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    return ModelSize(
        num_parameters=num_layers * a_block + 2 * vocab * hidden + hidden,
        num_layers=num_layers,
        hidden_size=hidden,
        attention_size=hidden,
        key_size=keys,
        inner_size=inner,
        vocab_size=vocab,
    )


MODELS = {
    "7B": llama(32, 4096, 32, 32, 11008, 32000),
    "70B": llama(80, 8192, 64, 8, 28672, 32000),
    "405B": llama(126, 16384, 128, 8, 53248, 128256),
}
"""Llama 2 7B and 70B (2307.09288), Llama 3.1 405B (2407.21783, table 3)."""


@dataclass(frozen=True)
class Step:
    """One optimizer step of one micro-batch a GPU: what it takes on each GPU."""

    memory: float
    """Bytes."""
    traffic: float
    """Bytes that a GPU sends, and as many that it receives."""
    compute_seconds: float
    traffic_seconds: float
    useful_flops: float
    """Of a GPU, without what is recomputed: what efficiency counts."""
    gpu: GPU

    @property
    def fits(self) -> bool:
        """Whether a tenth of the GPU is left for what is not in the estimate."""
        return self.memory <= HEADROOM * self.gpu.memory

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the GPU's peak (MFU): with no traffic behind computing, and with all of it."""
        slow = self.compute_seconds + self.traffic_seconds
        fast = max(self.compute_seconds, self.traffic_seconds)
        return self.useful_flops / slow / self.gpu.flops, self.useful_flops / fast / self.gpu.flops


def training_of(size: ModelSize, rank: int | None) -> Training:
    """bf16 with gradient checkpointing; rank: of LoRA, None for full fine-tuning.

    The reference's log-probabilities are computed before: no second model is held.
    """
    return Training(size=size, width=2, rank=rank, checkpointing=True, frozen_copy=False)


def step(
    training: Training,
    engine: str,
    num_gpus: int,
    num_tokens: int,
    length: int,
    gpu: GPU,
    kernel_efficiency: float,
) -> Step:
    """A step of `num_tokens` a GPU in sequences of `length`; `kernel_efficiency`: of the peak, while nothing waits."""
    spread = replace(training, engine=Engine(engine, num_gpus))
    traffic = spread.engine.traffic(spread)
    return Step(
        memory=spread.policy(num_tokens, reference=False).total,
        traffic=traffic,
        compute_seconds=flops(training, num_tokens, length, recomputed=True)
        / (gpu.flops * kernel_efficiency),
        traffic_seconds=traffic / (gpu.within_node if num_gpus <= GPUS_A_NODE else gpu.between_nodes),
        useful_flops=flops(training, num_tokens, length, recomputed=False),
        gpu=gpu,
    )


def flops(training: Training, num_tokens: int, length: int, recomputed: bool) -> float:
    """Of a forward and a backward pass: a forward pass is 2 P + 2 L a T a token (causal attention of length T)."""
    size = training.size
    forward = (2 * size.num_parameters + 2 * size.num_layers * size.attention_size * length) * num_tokens
    backward = 2 if training.rank is None else 1  # frozen weights have no gradient of their own
    return forward * (1 + backward + recomputed)
