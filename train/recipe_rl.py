"""Every key of the stages that sample their own answers: its meaning, unit and default."""

from dataclasses import dataclass, field

from equipoise.train.recipe_stages import TrainingConfig


@dataclass
class RolloutConfig:
    """How answers are sampled: at temperature 1 from the whole vocabulary, so that the policy's own log-probabilities
    are those of the sampling."""

    engine: str = "transformers"
    """transformers (`generate`) | vllm (a server started as `train/rollout.py` says)."""
    max_new_tokens: int = 128
    """Tokens at which an answer is cut off; a prompt that leaves less room in data.max_length is left out."""
    batch_size: int = 16
    """Answers sampled at a time on each rank (transformers)."""
    url: str = "http://localhost:8000"
    """The vLLM server."""
    group_port: int = 51216
    """Port of the group over which the weights go to the vLLM server."""
    timeout: float = 240.0
    """Seconds to wait for the vLLM server to be up."""


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
class SafeRLHFStageConfig(TrainingConfig):
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
