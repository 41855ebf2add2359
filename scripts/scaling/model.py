"""Memory, traffic and time of one training step on many GPUs; the formulas and their sources are in README.md here."""

from dataclasses import dataclass

from equipoise.train.planning.memory import ModelSize, Training

SHARDED_ENGINES = ("zero3", "fsdp2")
ENGINES = ("zero2", *SHARDED_ENGINES)
GPUS_A_NODE = 8
LIVE_PARAMETERS = 1e9
"""DeepSpeed's stage3_max_live_parameters: gathered parameters that ZeRO-3 holds before it lets go."""


@dataclass(frozen=True)
class GPU:
    """A device and how it is connected; bandwidths in bytes a second and direction, for each GPU."""

    memory: float
    """Bytes."""
    flops: float
    """bf16 matrix products, dense, a second."""
    within_node: float
    between_nodes: float


GPUS = {
    "a100": GPU(memory=80e9, flops=312e12, within_node=300e9, between_nodes=25e9),
    "h100": GPU(memory=80e9, flops=989e12, within_node=450e9, between_nodes=50e9),
}
"""80 GB SXM modules of NVIDIA's data sheets: NVLink is half its bidirectional figure; one 200 (400) Gb/s port a GPU."""


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
        return self.memory <= 0.9 * self.gpu.memory

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
    return Step(
        memory=memory(training, engine, num_gpus, num_tokens),
        traffic=traffic(training, engine, num_gpus),
        compute_seconds=flops(training, num_tokens, length, recomputed=True)
        / (gpu.flops * kernel_efficiency),
        traffic_seconds=traffic(training, engine, num_gpus)
        / (gpu.within_node if num_gpus <= GPUS_A_NODE else gpu.between_nodes),
        useful_flops=flops(training, num_tokens, length, recomputed=False),
        gpu=gpu,
    )


def memory(training: Training, engine: str, num_gpus: int, num_tokens: int) -> float:
    """Bytes on each GPU: weights, states, what is gathered, activations and logits."""
    weights = training.weights / (num_gpus if engine in SHARDED_ENGINES else 1)
    return (
        weights
        + _states(training, engine, num_gpus)
        + _gathered(training, engine)
        + training.activations(num_tokens)
        + training.logits()
    )


def _states(training: Training, engine: str, num_gpus: int) -> float:
    """Gradients and optimizer states. DeepSpeed keeps fp32 weights and moments, FSDP2 those of the weights' dtype."""
    if (
        training.rank is not None
    ):  # fp32 adapters and their bf16 copy; ZeRO-2 shards gradients and moments alone
        adapters = training.size.adapter_parameters(training.rank)
        whole = 6 * adapters if engine == "zero2" else 0
        return whole + (training.trained - whole) / num_gpus
    a_parameter = 6 if engine == "fsdp2" else 2 + 12
    return a_parameter * training.size.num_parameters / num_gpus


def _gathered(training: Training, engine: str) -> float:
    """Parameters that are whole for a while: ZeRO-3's live ones, FSDP2's layer at work and the one fetched ahead."""
    size = training.size
    if engine == "zero3":
        return training.width * min(LIVE_PARAMETERS, size.num_parameters)
    return training.width * 2 * size.num_parameters / size.num_layers if engine == "fsdp2" else 0


def traffic(training: Training, engine: str, num_gpus: int) -> float:
    """Bytes that each GPU sends in a step: gathers and reductions on rings, (N - 1) / N of the tensor each."""
    trained = (
        training.size.num_parameters
        if training.rank is None
        else training.size.adapter_parameters(training.rank)
    )
    gathers = 2 * training.size.num_parameters if engine in SHARDED_ENGINES else trained
    return training.width * (gathers + trained) * (num_gpus - 1) / num_gpus


def flops(training: Training, num_tokens: int, length: int, recomputed: bool) -> float:
    """Of a forward and a backward pass: a forward pass is 2 P + 2 L a T a token (causal attention of length T)."""
    size = training.size
    forward = (2 * size.num_parameters + 2 * size.num_layers * size.attention_size * length) * num_tokens
    backward = 2 if training.rank is None else 1  # frozen weights have no gradient of their own
    return forward * (1 + backward + recomputed)
