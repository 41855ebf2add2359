"""Every key of a stage: its meaning, unit and default. The keys of the run are in `recipe.py`."""

from dataclasses import dataclass, field
from typing import Any

from equipoise.train.recipe import LossConfig


@dataclass
class StageConfig:
    """What every stage has."""

    kind: str = ""
    """What the stage does; the table of kinds is in `loading.py`."""
    start_from: str | None = None
    """The policy it starts from: null (what the stage before left) | base (the run's starting model) | the name of an
    earlier stage | a model folder."""
    evaluate: bool = True
    """Judge and gate the stage's result."""


@dataclass
class TrainingConfig(StageConfig):
    """What every stage that trains has."""

    num_steps: int | None = None
    """Optimizer steps; overrides num_epochs."""
    num_epochs: float = 1.0
    """Passes over the data."""
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
    """Examples a forward pass on each rank."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer step."""
    save_every: int = 0
    """Optimizer steps between resumable checkpoints; 0: at the end only."""
    log_every: int = 1
    """Optimizer steps between lines of metrics.jsonl."""


@dataclass
class MarginConfig:
    """Category margin: -log sigmoid(beta*h - delta_c)."""

    enabled: bool = False
    eta: float = 1.0
    """Step of the update: delta_c grows by eta times (unsafe rate - target)."""
    target: float = 0.1
    """tau: the unsafe rate at which a category's margin stops growing."""
    targets: dict[str, float] = field(default_factory=dict)
    """target for single categories, in place of `target`."""
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
    """Category multiplier: beta_c = beta / (lam lambda_c), SACPO's lambda, one a category."""

    enabled: bool = False
    eta: float = 1.0
    """Step of the update: log lambda_c grows by eta times (unsafe rate - target); 0: lambda_c stays as it starts."""
    target: float = 0.1
    """The unsafe rate at which a category's lambda stops growing."""
    targets: dict[str, float] = field(default_factory=dict)
    """target for single categories, in place of `target`."""
    initial: dict[str, float] = field(default_factory=dict)
    """lambda_c that single categories start with; the others start with 1, which is plain beta / lam."""
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
class KLConfig:
    """KL penalty against the reference."""

    coef: float = 0.0
    """kappa, the weight of the penalty in the loss; 0: off."""
    estimator: str = "forward"
    """forward KL(pi || pi_ref) | reverse KL(pi_ref || pi) | k3 (samples' tokens only)."""
    on: str = "chosen"
    """chosen (the chosen answers of all pairs) | helpful (those of the batch's pairs of the category `helpful`) |
    benign (the chosen answers of the data's helpful pairs, `num_benign` of them beside every step's own pairs)."""
    num_benign: int = 8
    """benign: answers an optimizer step, on each rank."""
    per_category: dict[str, float] = field(default_factory=dict)
    """coef for single categories, in place of `coef`."""

    @property
    def active(self) -> bool:
        """Whether anything is penalised."""
        return bool(self.coef) or any(self.per_category.values())


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
    """Where random prompts come from: vocabulary | words (of the training prompts) | file (`path`)."""
    path: str | None = None
    """The text file of `pool: file`."""


@dataclass
class MixtureConfig(TrainingConfig):
    """What every stage has that draws its examples from the data's subsets."""

    mixture: dict[str, float] = field(default_factory=lambda: {"safety": 1.0})
    """Share of each subset (safety, helpful) among the examples; one pass over the data keeps these shares."""
    balance: str = "none"
    """How often each category is drawn inside its subset: none (as often as it occurs) | category (all alike) |
    temperature (~ n_c ** (1 - balance_temperature)). A pass has as many draws as the subset has examples; those of rare
    categories recur in it, those of common ones are left for the next."""
    balance_temperature: float = 0.5
    """temperature: 0 is as `none`, 1 as `category`."""


@dataclass
class SFTStageConfig(MixtureConfig):
    """Supervised fine-tuning; an example is a pair's chosen answer, those labelled unsafe are left out."""

    kind: str = "sft"
    """sft: what makes this a stage of supervised fine-tuning."""
    tasks_of: str | None = None
    """A grpo stage whose tasks are answered here, in place of the mixture's pairs: a warm-up on the form of answers."""
    abstention_rate: float = 0.25
    """tasks_of: share of the tasks with an answer that "I don't know" is given to, so that sampling finds both."""
    weight: WeightConfig = field(default_factory=WeightConfig)
    """Category weights; frequencies and losses are counted in answer tokens."""
    kl: KLConfig = field(default_factory=KLConfig)
    """Against the model that the stage starts from."""


@dataclass
class LogRatioStageConfig(MixtureConfig):
    """What stages have that train on log pi - log pi_ref of given answers; the reference is where the stage starts."""

    beta: float = 0.1
    """Strength of the pull to the reference, per nat of log-ratio."""
    lam: float = 1.0
    """SACPO's lambda: this stage trains with beta / lam."""
    category: CategoryConfig = field(default_factory=CategoryConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    token_bias: TokenBiasPenaltyConfig = field(default_factory=TokenBiasPenaltyConfig)


@dataclass
class PreferenceStageConfig(LogRatioStageConfig):
    """One stage of preference training; an example is a pair."""

    kind: str = "preference"
    """preference: what makes this a preference stage."""
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass
class KTOStageConfig(LogRatioStageConfig):
    """One stage of KTO (2402.01306); an example is one answer that is desirable or is not."""

    kind: str = "kto"
    """kto: what makes this a KTO stage."""
    split_pairs: bool = False
    """false: examples that come unpaired, from `data.unpaired_path` or the shipped labelled answers | true: the data's
    preference pairs, each split into its desirable and its undesirable answer."""
    desirable_weight: float = 1.0
    """lambda_D: weight of a desirable answer's loss."""
    undesirable_weight: float | None = None
    """lambda_U: weight of an undesirable answer's loss; null: as many times desirable_weight as there are desirable
    answers to an undesirable one, so that both sides count the same."""


@dataclass
class ScorerStageConfig(MixtureConfig):
    """What reward and cost models have in common; an example is a pair, and the policy is left as it was."""

    evaluate: bool = False
    """false: there is no new policy to judge; the scorer's accuracy on held-out pairs is in the stage's facts."""
    regularization: float = 0.001
    """mu: weight of the squared scores of both answers, which keeps them near 0."""
    weight: WeightConfig = field(default_factory=WeightConfig)
    held_out_fraction: float = 0.1
    """Share of each category's prompts whose pairs are not trained on but scored at the end."""
    eval_every: int = 0
    """Optimizer steps between evaluations on the held-out pairs; 0: at the end only."""
    normalise: bool = False
    """Divide the saved model's scores by their standard deviation over the training answers; a reward is shifted to
    mean 0 too, a cost is not: its 0 separates safe from unsafe."""


@dataclass
class RewardModelStageConfig(ScorerStageConfig):
    """Train a reward model from the policy: which answer is preferred."""

    kind: str = "reward_model"
    """reward_model: what makes this a reward-model stage."""
    mixture: dict[str, float] = field(default_factory=lambda: {"helpful": 1.0})
    """Share of each subset (safety, helpful) among the pairs."""


@dataclass
class CostModelStageConfig(ScorerStageConfig):
    """Train a cost model from the policy: which answer is more harmful, and whether it is unsafe at all (cost > 0)."""

    kind: str = "cost_model"
    """cost_model: what makes this a cost-model stage."""
    mixture: dict[str, float] = field(default_factory=lambda: {"safety": 1.0})
    """Share of each subset (safety, helpful) among the pairs; both answers of a helpful pair count as safe, and
    neither as the more harmful one."""


@dataclass
class MergeStageConfig(StageConfig):
    """Merge two policies linearly (P-SACPO, 2404.11049); nothing is trained. What it starts from is `first`."""

    kind: str = "merge"
    """merge: what makes this a merge stage."""
    first: str = ""
    """base (the run's starting model) | the name of an earlier stage | a model folder."""
    second: str = ""
    """Likewise; in P-SACPO the safe stage, and `first` the helpful one."""
    of: str = "weights"
    """weights (any two models of one architecture) | adapters (of stages or folders that trained LoRA on one base)."""
    second_weights: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Shares of `second`, each in [0, 1]: every one makes a model, judged by itself."""
    pass_on: float = 0.5
    """The one of `second_weights` whose model the next stage starts from, and whose verdict counts last."""


@dataclass
class TokenBiasStageConfig(StageConfig):
    """Measure the token bias (TSDI) of the stage before against a reference; nothing is trained."""

    kind: str = "token_bias"
    """token_bias: what makes this a token-bias stage."""
    alpha: Any = 1.0
    """Share of the bias subtracted when decoding, logits_i - alpha_i * b_i: a number, or a list of num_positions."""
    reference: str = "base"
    """What the shift is measured against: base (the run's starting model) | the name of an earlier stage | a folder."""
    one_backbone: bool = False
    """false: policy and reference are two models in memory | true: one, the reference, with the adapter that the
    policy's stage trained on it switched on and off. Unmerged: the weights are not rounded as the merged ones are."""
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
    num_diagnosed: int = 32
    """Harmful training prompts on which to predict how much of its safety the model keeps with this alpha; 0: none."""
    seed: int = 0
    """Of the random prompts and their continuations."""
