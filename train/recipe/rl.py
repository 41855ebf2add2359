"""Every key of the stages that sample their own answers: its meaning, unit and default."""

from dataclasses import dataclass, field

from equipoise.train.recipe.stages import MixtureConfig, TrainingConfig, WeightConfig


@dataclass
class VLLMConfig:
    """Sampling by a vLLM server, started as `train/trainers/rollout.py` says."""

    enabled: bool = False
    """False: the training model itself samples (`generate`)."""
    url: str = "http://localhost:8000"
    """The server."""
    group_port: int = 51216
    """Port of the group over which the weights go to it."""
    timeout: float = 240.0
    """Seconds to wait for it to be up."""


@dataclass
class RolloutConfig:
    """How answers are sampled: at temperature 1 from the whole vocabulary, so that the policy's own log-probabilities
    are those of the sampling."""

    max_new_tokens: int = 128
    """Tokens at which an answer is cut off; a prompt that leaves less room in data.max_length is left out."""
    batch_size: int = 16
    """Answers sampled at a time on each rank (without vLLM)."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)


@dataclass
class MultiplierUpdateConfig:
    """The Lagrange multipliers of the cost constraint E[C] <= threshold."""

    per_category: bool = False
    """False: one multiplier, the published algorithm. True: one a harm category of the training prompts."""
    threshold: float = 0.0
    """d, in units of the cost; 0 is where the cost model's verdict turns from safe to unsafe."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """per_category: d_c of single categories, in place of `threshold`; `helpful` is unconstrained unless named here."""
    initial: float = 1.0
    """lambda at the start; 0 stays 0, which is PPO."""
    eta: float = 0.1
    """Step: log lambda grows by eta * lambda * (mean cost - threshold)."""
    max: float = 5.0
    """Largest lambda."""
    window: int = 128
    """Answers, over all ranks, whose mean cost is compared with the threshold."""
    delay: int = 0
    """Steps before the first update."""


@dataclass
class SafeRLHFStageConfig(MixtureConfig):
    """PPO-Lagrangian: the reward is raised while the cost is held under a threshold; an example is a sampled answer.

    A step samples per_device_batch_size * gradient_accumulation_steps answers on each rank and makes `update_epochs`
    optimizer steps of them; num_steps, save_every and log_every count such steps.
    """

    kind: str = "safe_rlhf"
    """safe_rlhf: what makes this a Safe RLHF stage."""
    mixture: dict[str, float] = field(default_factory=lambda: {"safety": 0.5, "helpful": 0.5})
    """Share of each subset's prompts (safety, helpful)."""
    reward_model: str | None = None
    """An earlier reward_model stage or a scorer folder; null: the last reward_model stage before this one."""
    cost_model: str | None = None
    """An earlier cost_model stage or a scorer folder; null: the last cost_model stage before this one."""
    layout: str = "shared"
    """shared (one frozen backbone; policy, reward, cost and critics are adapters on it) | separate (a model each)."""
    advantage: str = "gae"
    """gae (two critics) | rloo | grpo (no critics; several answers a prompt are compared)."""
    num_generations: int = 1
    """Answers a prompt; rloo and grpo need 2 or more."""
    update_epochs: int = 1
    """Optimizer steps over one batch of answers (PPO epochs); with 1 nothing is ever clipped."""
    critic_learning_rate: float = 2e-4
    """Peak of both critics' learning rate."""
    kl: float = 0.01
    """beta, per nat of log-ratio: half of it is taken off the reward, half is added to the cost."""
    gamma: float = 1.0
    """Discount a token."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation, a token."""
    clip_ratio: float = 0.2
    """The probability ratio's gain is cut off at 1 +- this."""
    clip_value: float = 5.0
    """Critics: how far a value may move from that of the sampling before its gain is cut off."""
    clip_score: float = 50.0
    """Rewards and costs of a token are clipped to +- this."""
    missing_end_penalty: float = 0.0
    """Taken off the reward of an answer that was cut off at rollout.max_new_tokens."""
    ptx_coef: float = 16.0
    """Weight of the negative log-likelihood a token of the helpful pairs' chosen answers; 0: off."""
    multiplier: MultiplierUpdateConfig = field(default_factory=MultiplierUpdateConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass
class ArithmeticConfig:
    """Generated problems, some of which have no answer (`data/tasks.py`)."""

    shares: dict[str, float] = field(
        default_factory=lambda: {"addition_1": 0.4, "addition_2": 0.2, "unanswerable": 0.4}
    )
    """Category -> share: addition_N, multiplication_N with operands of N digits (1 to 6), unanswerable."""
    num_training: int = 512
    """Problems to train on; drawn again, in another order, when more are needed."""
    num_held_out: int = 128
    """Other problems, asked before and after training; at most a third of a category that has few."""
    seed: int = 0
    """Of the problems; the run's seed orders them."""


@dataclass
class CostConfig:
    """A cost model's score under the constraint mean cost <= threshold, by a Lagrange multiplier."""

    model: str | None = None
    """A cost_model stage before this one or a scorer folder; null: no cost."""
    batch_size: int = 16
    """Answers scored at a time."""
    multiplier: MultiplierUpdateConfig = field(default_factory=MultiplierUpdateConfig)


@dataclass
class GRPOStageConfig(TrainingConfig):
    """GRPO on rewards that can be checked; an example is a sampled answer.

    A step is made of per_device_batch_size * gradient_accumulation_steps answers on each rank: that many divided by
    num_generations prompts.
    """

    kind: str = "grpo"
    """grpo: what makes this a GRPO stage."""
    mixture: dict[str, float] = field(default_factory=lambda: {"arithmetic": 1.0})
    """Share of each subset's tasks: arithmetic (generated) | file (`path`) | safety, helpful (the data's prompts; they
    have no answer to check, so a judge or a cost model has to reward them)."""
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    path: str | None = None
    """The tasks of the subset `file`: JSON lines with prompt, answer, category (data/README.md)."""
    held_out_fraction: float = 0.2
    """Share of the tasks of `path` that is asked before and after instead of trained on (by normalised prompt)."""
    instruction: str = (
        "Answer with a number only if you are more than {threshold} sure: right scores 1, wrong {penalty}, "
        'and "I don\'t know" 0.'
    )
    """Put behind every question that can be checked; {threshold} and {penalty} are filled in. Empty: nothing."""
    rewards: dict[str, float] = field(default_factory=lambda: {"calibrated_abstention": 1.0})
    """Reward -> weight: calibrated_abstention | numeric_answer | exact_answer | answer_format | response_length |
    judge_verdict. Each is normalised within its group before they are added (train/rewards/README.md)."""
    threshold: float = 0.5
    """t of calibrated_abstention: a wrong answer scores -t / (1 - t), so that answering pays above this confidence."""
    format_pattern: str | None = None
    """answer_format: the regular expression that a whole answer has to match."""
    length_limit: int | None = None
    """response_length: tokens from which on a longer answer scores less, down to -1 at max_completion_length."""
    cost: CostConfig = field(default_factory=CostConfig)
    weight: WeightConfig = field(default_factory=WeightConfig)
    """Category weights on the advantages; group DRO takes minus the reward for a category's loss."""
    beta: float = 0.02
    """KL penalty to the policy that the stage starts from (k3 a token); 0: none, and no reference pass."""
    num_generations: int = 8
    """Answers a prompt, which are compared with one another."""
    num_iterations: int = 1
    """Optimizer steps over the same answers; with 1 no ratio is ever clipped."""
    temperature: float = 1.0
    """Of the sampling."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    max_completion_length: int = 64
    """Tokens at which an answer is cut off."""
    epsilon: float = 0.2
    """The probability ratio's gain is cut off at 1 - this below..."""
    epsilon_high: float | None = None
    """... and 1 + this above; null: the same as epsilon."""
    loss_type: str = "dapo"
    """TRL's: dapo (mean over all tokens of the step) | grpo (mean a token, then over answers) | bnpo | dr_grpo."""
    mask_truncated: bool = False
    """Answers that were cut off are not learned from."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
