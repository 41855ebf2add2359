"""Every key of a recipe: its meaning, unit and default.

The YAML under `recipes/` fills these dataclasses (`recipe_loading.py`); nothing else in `train/` reads
configuration. A key that is not here is an error, so is a value of the wrong type or one that cannot work
(`recipe_checks.py`).
"""

from dataclasses import dataclass, field
from typing import Any

from equipoise.data.errors import EquipoiseError


class RecipeError(EquipoiseError):
    """A recipe that cannot be run: an unknown key, a wrong type, an impossible value or combination."""


@dataclass
class LoraConfig:
    """Low-rank adapters on the policy; the base under them is the reference."""

    enabled: bool = True
    """False: full fine-tuning, with a frozen copy as reference."""
    r: int = 16
    """Rank."""
    alpha: int = 32
    """The adapter's output is scaled by alpha / r."""
    dropout: float = 0.0
    """Share of the adapter's input dropped in training."""
    target_modules: Any = "all-linear"
    """PEFT's `target_modules`: "all-linear" or a list of module names."""


@dataclass
class ModelConfig:
    """The model that is trained."""

    id: str = "smollm2_135m"
    """"smollm2_135m" (the packaged one), a hub id, or a local folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None: its default branch."""
    dtype: str = "bfloat16"
    """Weights in memory: bfloat16 | float32. Log-probabilities are fp32 whatever this says."""
    attn_implementation: str = "sdpa"
    """sdpa | eager | flash_attention_2 | flash_attention_3 | flex_attention."""
    trust_remote_code: bool = False
    """Run the Python code of a hub repository."""
    reference: str = "auto"
    """auto (adapter_off with LoRA, frozen_copy without) | adapter_off | frozen_copy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class DataConfig:
    """What is trained on and judged on."""

    source: str = "samples"
    """samples (shipped) | jsonl (a user's own preference pairs at `path`)."""
    path: str | None = None
    """The file of `source: jsonl`; its schema is in data/README.md."""
    held_out_fraction: float = 0.0
    """Share of the prompts of `path` kept out of training and judged (split by normalised prompt)."""
    max_length: int = 512
    """Tokens of prompt + longer completion; a longer pair is dropped and counted."""
    max_prompts_per_category: int | None = None
    """Judge at most this many held-out prompts a category (a quick look); None: all."""


@dataclass
class MarginConfig:
    """Category margin: -log sigmoid(beta*h - delta_c)."""

    enabled: bool = False
    eta: float = 1.0
    """Step of the update: delta_c grows by eta times (unsafe rate - target)."""
    target: float = 0.1
    """tau: the unsafe rate at which a category's margin stops growing."""
    max: float = 2.0
    """Largest delta_c, in units of beta*h."""


@dataclass
class WeightConfig:
    """Category weights on the loss."""

    mode: str = "none"
    """none | group_dro | inverse_frequency."""
    eta: float = 0.1
    """Step of group DRO's exponentiated gradient."""
    temperature: float = 1.0
    """Inverse frequency: weight ~ n_c ** -temperature (0 = none, 1 = every category counts the same)."""


@dataclass
class MultiplierConfig:
    """Category multiplier: beta_c = beta / lambda_c."""

    enabled: bool = False
    eta: float = 1.0
    """Step of the update: log lambda_c grows by eta times (unsafe rate - target)."""
    target: float = 0.1
    """The unsafe rate at which a category's lambda stops growing."""
    max_log: float = 2.0
    """|log lambda_c| is clipped here."""


@dataclass
class CategoryConfig:
    """The per-category terms of a preference stage; off = plain DPO."""

    margin: MarginConfig = field(default_factory=MarginConfig)
    weight: WeightConfig = field(default_factory=WeightConfig)
    multiplier: MultiplierConfig = field(default_factory=MultiplierConfig)
    update_every: int = 10
    """Optimizer steps between updates from the running in-batch preference errors."""
    ema: float = 0.9
    """Decay of those running errors, per update."""
    shrinkage: float = 8.0
    """Pseudo-samples of the overall rate that a category's own rate is mixed with."""


@dataclass
class LossConfig:
    """The preference loss."""

    name: str = "sigmoid"
    """sigmoid | ipo | hinge | robust | apo_zero."""
    label_smoothing: float = 0.0
    """robust: the share of pairs whose label is wrong, in [0, 0.5)."""
    sft_coef: float = 0.0
    """Weight of the mean negative log-likelihood of the chosen answer, per token."""
    length_normalised: bool = False
    """h from mean instead of summed token log-probabilities."""


@dataclass
class KLConfig:
    """KL penalty against the reference."""

    coef: float = 0.0
    """kappa, the weight of the penalty in the loss; 0: off."""
    estimator: str = "forward"
    """forward KL(pi || pi_ref) | reverse KL(pi_ref || pi) | k3 (samples' tokens only)."""
    on: str = "chosen"
    """chosen (all pairs) | helpful (pairs of the category `helpful` only)."""
    per_category: dict[str, float] = field(default_factory=dict)
    """coef for single categories, in place of `coef`."""


@dataclass
class TokenBiasPenaltyConfig:
    """Penalty on what training shifts before the model has read anything."""

    coef: float = 0.0
    """Weight of the penalty in the loss; 0: off."""
    every: int = 4
    """Optimizer steps between penalised ones (the gradient is scaled up by it)."""
    num_contexts: int = 8
    """Random contexts a penalised step."""
    num_positions: int = 8
    """Answer positions from the start of the answer."""
    prompt_tokens: int = 16
    """Tokens of a random prompt."""
    pool: str = "vocabulary"
    """Where random prompts come from: vocabulary | words (of the training prompts)."""


@dataclass
class PreferenceStageConfig:
    """One stage of preference training."""

    kind: str = "preference"
    """preference: what makes this a preference stage."""
    mixture: dict[str, float] = field(default_factory=lambda: {"safety": 1.0})
    """Share of each subset (safety, helpful) among the pairs; one pass over the data keeps these shares."""
    beta: float = 0.1
    """Strength of the pull to the reference, per nat of log-ratio."""
    lam: float = 1.0
    """SACPO's lambda: this stage trains with beta / lam."""
    loss: LossConfig = field(default_factory=LossConfig)
    category: CategoryConfig = field(default_factory=CategoryConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    token_bias: TokenBiasPenaltyConfig = field(default_factory=TokenBiasPenaltyConfig)
    num_steps: int | None = None
    """Optimizer steps; overrides num_epochs."""
    num_epochs: float = 1.0
    """Passes over the mixture."""
    learning_rate: float = 2e-4
    """Peak of AdamW's learning rate."""
    lr_scheduler: str = "cosine"
    """cosine | linear | constant | constant_with_warmup."""
    warmup: float = 0.1
    """Share of the steps (< 1) or a number of steps (>= 1)."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: not clipped."""
    per_device_batch_size: int = 8
    """Pairs a forward pass on each rank."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer step."""
    save_every: int = 0
    """Optimizer steps between resumable checkpoints; 0: at the end only."""
    log_every: int = 1
    """Optimizer steps between lines of metrics.jsonl."""
    evaluate: bool = True
    """Judge and gate the stage's result."""


@dataclass
class TokenBiasStageConfig:
    """Measure the token bias (TSDI) of the stage before against the starting model."""

    kind: str = "token_bias"
    """token_bias: what makes this a token-bias stage."""
    alpha: float = 1.0
    """Share of the bias subtracted when decoding: logits_i - alpha * b_i."""
    num_prompts: int = 32
    """N: random prompts the bias is averaged over."""
    num_positions: int = 8
    """L: answer positions from the start of the answer that are measured and corrected."""
    pool: str = "vocabulary"
    """vocabulary | words (of the training prompts) | file (`path`)."""
    path: str | None = None
    """The file of `pool: file`."""
    prompt_tokens: int = 16
    """Tokens of a random prompt."""
    continuation: str = "random"
    """What stands before position i: random (tokens of the pool) | aligned (sampled by the trained model)."""
    space: str = "log_prob"
    """What is averaged and corrected: log_prob | logit."""
    plausibility: float = 0.0
    """Correct only tokens at least this share as probable as the most probable one; 0: all."""
    batch_size: int = 8
    """Random prompts a forward pass."""
    seed: int = 0
    """Of the random prompts and their continuations."""
    evaluate: bool = True
    """Judge and gate the model with the correction."""


@dataclass
class JudgeConfig:
    """Who judges the answers."""

    name: str = "embedded"
    """embedded: a classifier on the packaged model's hidden states, a stand-in for a real judge."""
    batch_size: int = 32
    """Answers judged at a time."""


@dataclass
class EvaluationConfig:
    """How checkpoints are evaluated."""

    max_new_tokens: int = 64
    """Tokens at which an answer is cut off."""
    batch_size: int = 32
    """Prompts answered at a time."""
    baseline: bool = True
    """Evaluate the starting model too; the gate's paired rules need it."""


@dataclass
class GateConfig:
    """See `eval/gate.py`; every rate is a share in [0, 1]."""

    every: int = 0
    """Optimizer steps between evaluations inside a stage; 0: after the stage only."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Fields of equipoise.eval.gate.GateRules."""


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    name: str = "none"
    """none | wandb."""
    project: str = "equipoise"
    """W&B project."""
    mode: str = "auto"
    """auto (online with a key, else offline) | online | offline."""
    tags: list[str] = field(default_factory=list)
    """W&B tags of the run."""


@dataclass
class Recipe:
    """One run, from data to verdict."""

    name: str
    """Of the run's folder: outputs/<name>/seed<seed>."""
    stages: dict[str, Any]
    """Stage name -> PreferenceStageConfig or TokenBiasStageConfig (by its `kind`), in order."""
    seed: int = 0
    """Of adapters, dropout, order of the pairs and the split of the data."""
    output_dir: str = "outputs"
    """Where run folders go, relative to the working folder."""
    beta: float = 0.1
    """For stages to refer to as ${beta}, so that `beta=0.05` reaches all of them."""
    lam: float = 1.0
    """For stages to refer to as ${lam}."""
    loss: LossConfig = field(default_factory=LossConfig)
    """For stages to refer to as ${loss}: the group loss/."""
    dry_run: bool = False
    """Load data and tokenizer, print the plan, and stop."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
