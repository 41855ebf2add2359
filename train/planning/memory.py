"""What a stage takes in memory on one device, worked out from the model's size and the stage's keys.

    M  weights + states + gathered + judge + max over phases of (activations + logits + KV cache)

with P parameters, w bytes each (bf16: 2), A adapter parameters, n tokens in a forward pass with gradients, L layers of
hidden size H, attention size a (heads x head size) and inner size I, adapter rank r, vocabulary V:

    weights      w P for every model that is held; with NF4 0.516 bytes instead of w for every parameter but those of
                 the embeddings and the head: 4 bits, 8 a block of 64 and 32 a 256 blocks (QLoRA, 2305.14314, section 3)
    states       16 A: an adapter's weight, gradient and two moments in fp32. Full fine-tuning 3 w P: gradient and
                 moments in the weights' dtype. 4 A for an adapter that is held and not trained. In bf16 both and
                 2 A more, autocast's copy. `engine.py` has what several processes share of weights and states
    gathered     what an engine holds whole for a while, see there; with NF4 a matrix at work in the compute dtype
    activations  w n L K, with K what a layer keeps of a token for the backward pass
                     LoRA       fp32   4 a +  4 H + 4 I +  7 r        bf16   4 a + 10 H + 4 I +  7 r
                     LoRA over NF4 as LoRA
                     full       fp32   4 a +  6 H + 4 I               bf16   4 a +  8 H + 4 I
                 With gradient checkpointing: w n (L H + K), every layer's input and one layer recomputed.
                 On top, w n K for the gradients of the layer in work
    logits       2 fp32 copies of (256, V): the LM head goes over completion tokens in chunks, whatever the batch. One
                 more in the weights' dtype in bf16, one more for the gradient in full fine-tuning, and then the
                 head's own gradient. A scorer has no LM head
    KV cache     2 w L k B T for B answers of T tokens with prompt; k the keys' size (KV heads x head size)

K is counted, not fitted: what autograd saves of a Llama in eager PyTorch with sdpa attention (the tests count again).
PEFT casts a layer's input to the adapter's fp32, hence the bf16 figures. Not in it: the process itself (on CPU the dry
run adds what it takes), the CUDA context, fragmentation, DDP's buckets (another 4 A), and attention kernels that build
(T, T) scores.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

from equipoise.train.losses.log_probs import CHUNK
from equipoise.train.model import uses_frozen_copy
from equipoise.train.planning.engine import FP32, Engine
from equipoise.train.recipe import ModelConfig

NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Of a weight in NF4 with double quantisation: 4.127 bits."""


@dataclass(frozen=True)
class ModelSize:
    """The numbers that memory depends on."""

    num_parameters: int
    """P, tied weights once."""
    num_layers: int
    hidden_size: int
    attention_size: int
    """Query heads x head size."""
    key_size: int
    """Key-value heads x head size."""
    inner_size: int
    vocab_size: int
    tied: bool = False
    """Whether the head is the embeddings' matrix."""

    @classmethod
    def of(cls, config: Any, num_parameters: int) -> Self:
        """From a model's configuration; of a mixture of experts `inner_size` is one expert's."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        return cls(
            num_parameters=num_parameters,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            attention_size=heads * head_size,
            key_size=key_heads * head_size,
            inner_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def block_parameters(self) -> int:
        """All but embeddings and head: what quantisation compresses, and N in FLOPs a token (norms are negligible)."""
        return self.num_parameters - self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int) -> int:
        """A: LoRA on all seven linear layers of every block, r (in + out) each."""
        hidden, attention, key, inner = self.hidden_size, self.attention_size, self.key_size, self.inner_size
        a_block = 2 * (hidden + attention) + 2 * (hidden + key) + 3 * (hidden + inner)
        return self.num_layers * rank * a_block


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float = 0
    states: float = 0
    """Adapters, gradients and optimizer moments."""
    gathered: float = 0
    """Weights that are whole, or in full precision, for a while."""
    evaluated: float = 0
    """A model that is judged, beside what is trained or alone (`evaluation.py`)."""
    judge: float = 0
    """Models that judge."""
    activations: float = 0
    logits: float = 0
    cache: float = 0
    host: float = 0
    """In the machine's memory, not the device's: what is offloaded."""

    @property
    def total(self) -> float:
        """All of it on the device."""
        held = self.weights + self.states + self.gathered + self.evaluated + self.judge
        return held + self.activations + self.logits + self.cache


@dataclass(frozen=True)
class Training:
    """A model as a recipe trains it; gives the memory of what is done with it."""

    size: ModelSize
    width: int
    """w: bytes of a weight."""
    rank: int | None
    """r; None: full fine-tuning."""
    checkpointing: bool
    frozen_copy: bool
    """Whether the reference is a second model."""
    quantised: bool = False
    """NF4 under the adapter."""
    engine: Engine = field(default_factory=Engine)

    @classmethod
    def of(cls, config: ModelConfig, size: ModelSize, engine: Engine | None = None) -> Self:
        """As the recipe's `model` says, under `engine` (None: one process)."""
        return cls(
            size,
            width=2 if config.dtype == "bfloat16" else FP32,
            rank=config.lora.r if config.lora.enabled else None,
            checkpointing=config.gradient_checkpointing,
            frozen_copy=uses_frozen_copy(config),
            quantised=config.quantization != "none",
            engine=engine or Engine(),
        )

    # ---- parts ------------------------------------------------------------------------------------------------------

    @property
    def whole(self) -> float:
        """One model as it is saved and judged: in the recipe's dtype, on one device."""
        return self.width * self.size.num_parameters

    @property
    def weights(self) -> float:
        """What a device holds of one model in training, without adapters."""
        return self.engine.weights(self._stored)

    @property
    def _stored(self) -> float:
        if not self.quantised:
            return self.whole
        blocks = self.size.block_parameters
        return NF4_BYTES * blocks + self.width * (self.size.num_parameters - blocks)

    @property
    def num_trained(self) -> int:
        """Parameters that are trained."""
        return self.size.num_parameters if self.rank is None else self.size.adapter_parameters(self.rank)

    @property
    def trained(self) -> float:
        """States of one trained model: adapter, gradient, moments; without an adapter, gradient and moments."""
        return self.engine.states(self)

    @property
    def frozen_adapter(self) -> float:
        """An adapter that is held and not trained."""
        if self.rank is None:
            return 0
        return FP32 * self.size.adapter_parameters(self.rank) + self.autocast_copy

    @property
    def autocast_copy(self) -> float:
        """The adapter in the dtype that it computes in."""
        assert self.rank is not None
        return 2 * self.size.adapter_parameters(self.rank) if self.width == 2 else 0

    def holding(self, num_models: int, states: float) -> Memory:
        """Models and states alone, what is gathered of one model, and what is offloaded."""
        host = self.engine.host(self, self._stored)
        return Memory(num_models * self.weights, states, self.engine.gathered(self), host=num_models * host)

    def kept_a_layer(self) -> float:
        """K: numbers, in the width of the weights, that a layer keeps of a token for the backward pass."""
        size = self.size
        if self.rank is None:
            hidden, rank = (8 if self.width == 2 else 6), 0
        else:
            hidden, rank = (10 if self.width == 2 else 4), 7 * self.rank
        return 4 * size.attention_size + hidden * size.hidden_size + 4 * size.inner_size + rank

    def activations(self, num_tokens: int) -> float:
        """A forward pass with gradients over `num_tokens`, padding included, and the backward pass through a layer."""
        kept = self.kept_a_layer()
        layers = self.size.num_layers
        inputs = layers * self.size.hidden_size + kept if self.checkpointing else layers * kept
        return self.width * num_tokens * (inputs + kept)

    def logits(self) -> float:
        """A chunk of completion tokens at the LM head: logits and what is worked out of them in place."""
        vocab = self.size.vocab_size
        copies = 2 * FP32 + (self.width if self.width != FP32 else 0)
        if self.rank is not None:
            return copies * CHUNK * vocab
        return (copies + FP32) * CHUNK * vocab + self.width * vocab * self.size.hidden_size

    def cache(self, num_answers: int, length: int) -> float:
        """KV cache of `num_answers` of `length` tokens with their prompts, and the logits of their next tokens."""
        keys_and_values = 2 * self.width * self.size.num_layers * self.size.key_size * num_answers * length
        return keys_and_values + 3 * FP32 * num_answers * self.size.vocab_size

    # ---- stages -----------------------------------------------------------------------------------------------------

    def policy(self, num_tokens: int, reference: bool) -> Memory:
        """Training a policy on given answers: SFT, the DPO family, KTO.

        reference: whether it is asked while training, for a KL or token-bias penalty; only a frozen copy takes memory
        for it. Its log-probabilities of the answers are computed before, by the policy that has not moved yet.
        """
        held = self.holding(2 if reference and self.frozen_copy else 1, self.trained)
        return replace(held, activations=self.activations(num_tokens), logits=self.logits())

    def scorer(self, num_tokens: int) -> Memory:
        """Training a reward or cost model."""
        return replace(self.holding(1, self.trained), activations=self.activations(num_tokens))

    def sampled(self, num_tokens: int, num_answers: int, length: int, scorers: int, vllm: bool) -> Memory:
        """GRPO: the policy samples, then learns from what it sampled; `scorers` are models of its size beside it."""
        learning = Memory(activations=self.activations(num_tokens), logits=self.logits())
        sampling = Memory() if vllm else Memory(cache=self.cache(num_answers, length))
        phase = max(learning, sampling, key=lambda memory: memory.total)
        models = 1 + scorers + (1 if self.frozen_copy else 0)
        held = self.holding(models, self.trained)
        return replace(held, activations=phase.activations, logits=phase.logits, cache=phase.cache)

    def safe_rlhf(
        self, num_tokens: int, num_answers: int, length: int, shared: bool, critics: bool, vllm: bool
    ) -> Memory:
        """Safe RLHF: policy, reference, reward and cost model, and their critics; one role learns at a time.

        shared: one backbone for all of them, adapters for the rest. Separate: a model for the policy, for each scorer
        and for each critic, and one for the reference where it is a frozen copy.
        """
        num_critics = 2 if critics else 0
        models = 1 if shared else 3 + num_critics + (1 if self.frozen_copy else 0)
        states = (1 + num_critics) * self.trained + 2 * self.frozen_adapter
        phase = self.sampled(num_tokens, num_answers, length, scorers=0, vllm=vllm)
        held = self.holding(models, states)
        return replace(held, activations=phase.activations, logits=phase.logits, cache=phase.cache)

    def token_bias(self, num_tokens: int, num_positions: int, shared: bool) -> Memory:
        """Measuring the token bias: two whole models (or one and its adapter), no gradients, a table of two (L, V)."""
        models = 1 if shared else 2
        table = 4 * FP32 * num_positions * self.size.vocab_size  # sums in work beside the table itself
        return Memory(
            weights=models * self.whole,
            states=self.frozen_adapter if shared else 0,
            activations=self.width * num_tokens * self.kept_a_layer(),
            logits=table + 3 * FP32 * num_tokens * self.size.vocab_size,
        )
