"""What a stage takes in memory on one device, worked out from the model's size and the stage's keys.

    M  weights + states + max over phases of (activations + logits + KV cache)

with P parameters, w bytes each (bf16: 2), A adapter parameters, n tokens in a forward pass with gradients, L layers of
hidden size H, attention size a (heads x head size) and inner size I, adapter rank r, vocabulary V:

    weights      w P for every model that is held
    states       16 A: an adapter's weight, gradient and two moments in fp32. Full fine-tuning 3 w P: gradient and
                 moments in the weights' dtype. 4 A for an adapter that is held and not trained. In bf16 both and
                 2 A more, autocast's copy
    activations  w n L K, with K what a layer keeps of a token for the backward pass
                     LoRA       fp32   4 a +  4 H + 4 I +  7 r        bf16   4 a + 10 H + 4 I +  7 r
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

from dataclasses import dataclass
from typing import Any, Self

from equipoise.train.losses.log_probs import CHUNK
from equipoise.train.model import uses_frozen_copy
from equipoise.train.recipe import ModelConfig

FP32 = 4


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
        )

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
    activations: float = 0
    logits: float = 0
    cache: float = 0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.states + self.activations + self.logits + self.cache


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

    @classmethod
    def of(cls, config: ModelConfig, size: ModelSize) -> Self:
        """As the recipe's `model` says."""
        return cls(
            size,
            width=2 if config.dtype == "bfloat16" else FP32,
            rank=config.lora.r if config.lora.enabled else None,
            checkpointing=config.gradient_checkpointing,
            frozen_copy=uses_frozen_copy(config),
        )

    # ---- parts ------------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> float:
        """One model, without adapters."""
        return self.width * self.size.num_parameters

    @property
    def trained(self) -> float:
        """States of one trained model: adapter, gradient, moments; without an adapter, gradient and moments."""
        if self.rank is None:
            return 3 * self.weights
        return 4 * FP32 * self.size.adapter_parameters(self.rank) + self._autocast_copy()

    @property
    def frozen_adapter(self) -> float:
        """An adapter that is held and not trained."""
        return (
            0 if self.rank is None else FP32 * self.size.adapter_parameters(self.rank) + self._autocast_copy()
        )

    def _autocast_copy(self) -> float:
        """The adapter in the dtype that it computes in."""
        assert self.rank is not None
        return 2 * self.size.adapter_parameters(self.rank) if self.width == 2 else 0

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
        models = 2 if reference and self.frozen_copy else 1
        return Memory(models * self.weights, self.trained, self.activations(num_tokens), self.logits())

    def scorer(self, num_tokens: int) -> Memory:
        """Training a reward or cost model."""
        return Memory(self.weights, self.trained, self.activations(num_tokens))

    def sampled(self, num_tokens: int, num_answers: int, length: int, scorers: int, vllm: bool) -> Memory:
        """GRPO: the policy samples, then learns from what it sampled; `scorers` are models of its size beside it."""
        learning = Memory(activations=self.activations(num_tokens), logits=self.logits())
        sampling = Memory() if vllm else Memory(cache=self.cache(num_answers, length))
        phase = max(learning, sampling, key=lambda memory: memory.total)
        models = 1 + scorers + (1 if self.frozen_copy else 0)
        return Memory(models * self.weights, self.trained, phase.activations, phase.logits, phase.cache)

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
        return Memory(models * self.weights, states, phase.activations, phase.logits, phase.cache)

    def token_bias(self, num_tokens: int, num_positions: int, shared: bool) -> Memory:
        """Measuring the token bias: two models (or one and its adapter), no gradients, a table of two (L, V)."""
        models = 1 if shared else 2
        table = 4 * FP32 * num_positions * self.size.vocab_size  # sums in work beside the table itself
        return Memory(
            models * self.weights,
            self.frozen_adapter if shared else 0,
            self.width * num_tokens * self.kept_a_layer(),
            table + 3 * FP32 * num_tokens * self.size.vocab_size,
        )
