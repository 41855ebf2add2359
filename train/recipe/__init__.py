"""Every key of a recipe: its meaning, unit and default.

The YAML under `recipes/` fills these dataclasses (`loading.py`); nothing else in `train/` reads
configuration. A key that is not here is an error, so is a value of the wrong type or one that cannot work
(`checks.py`).
"""

from dataclasses import dataclass, field
from typing import Any

from equipoise.data.config import DataConfig
from equipoise.data.errors import EquipoiseError
from equipoise.eval.config import JudgeConfig
from equipoise.train.recipe.measuring import DiagnosticsConfig, PlanConfig, ProfileConfig


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
    """Weights in memory: bfloat16 | float32 | native (bfloat16 where the machine computes in it, else float32).
    Log-probabilities are fp32 whatever this says."""
    attn_implementation: str = "sdpa"
    """sdpa | eager | flash_attention_2 | flash_attention_3 | flex_attention."""
    trust_remote_code: bool = False
    """Run the Python code of a hub repository."""
    reference: str = "auto"
    """auto (adapter_off with LoRA, frozen_copy without) | adapter_off | frozen_copy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    quantization: str = "none"
    """none | nf4 (QLoRA: while training the frozen weights take 4 bits; what is saved and judged has the originals)."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class LossConfig:
    """The preference loss."""

    name: str = "sigmoid"
    """sigmoid | ipo | hinge | robust | apo_zero | safedpo."""
    mix: dict[str, float] = field(default_factory=dict)
    """Further losses by name, each with its weight in the sum; `name` weighs 1 where it is not among them."""
    label_smoothing: float = 0.0
    """robust: the share of pairs whose label is wrong, in [0, 0.5)."""
    sft_coef: float = 0.0
    """Weight of the mean negative log-likelihood a token of the step's chosen answers."""
    length_normalised: bool = False
    """h from mean instead of summed token log-probabilities."""
    delta: float = 10.0
    """safedpo: Delta, by how much a safe answer has to beat an unsafe one, in units of beta*h."""
    unlabelled: str = "error"
    """safedpo: what becomes of pairs of a harm category with an answer nobody labelled safe or unsafe: error | drop."""

    @property
    def weights(self) -> dict[str, float]:
        """Every loss in the sum with its weight."""
        return {self.name: 1.0, **self.mix}


@dataclass
class EvaluationConfig:
    """How checkpoints are evaluated."""

    max_new_tokens: int = 64
    """Tokens at which an answer is cut off."""
    batch_size: int = 32
    """Prompts answered at a time."""
    baseline: bool = True
    """Evaluate the starting model too; the gate's paired rules need it."""
    controversial_is_unsafe: bool = True
    """How a verdict between safe and unsafe counts, where a judge has one (strict: true, loose: false)."""


@dataclass
class GateConfig:
    """See `eval/gate.py`; every rate is a share in [0, 1]."""

    every: int = 0
    """Optimizer steps between evaluations inside a stage; 0: after the stage only."""
    where: str = "in_process"
    """Where states are evaluated: in_process (every rank loads the saved model, they share the prompts) | subprocess
    (one process of its own, while the ranks wait) | vllm (the same, its answers by vLLM)."""
    devices: str | None = None
    """subprocess, vllm: CUDA_VISIBLE_DEVICES of that process, as "7" or "6,7"; null: those of the first rank."""
    timeout: float = 7200.0
    """subprocess, vllm: seconds for one evaluation; the run ends with an error after that."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """vllm: further arguments of vllm.LLM (tensor_parallel_size, gpu_memory_utilization ...)."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Fields of equipoise.eval.gate.GateRules."""


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    trackers: list[str] = field(default_factory=list)
    """Any of wandb, tensorboard, trackio."""
    project: str = "equipoise"
    """wandb, trackio: the project."""
    group: str | None = None
    """wandb, trackio: runs that are shown together; scripts/sweep names the sweep here. None: $WANDB_RUN_GROUP."""
    tags: list[str] = field(default_factory=list)
    """wandb: tags of the run."""
    mode: str = "auto"
    """wandb: auto ($WANDB_MODE, else online with a key, else offline) | online | offline."""
    log_model: str = "reference"
    """wandb, trackio: what of a promoted model is kept as an artifact: reference (paths, sizes, hashes) | upload (also
    its files) | none."""
    init_timeout: float = 30.0
    """wandb: seconds to wait for the server when the run starts; it goes on offline then."""
    finish_timeout: float = 60.0
    """wandb: seconds to send what is left when the run ends; `wandb sync` sends the rest. On a cluster that preempts it
    belongs below the grace period."""


@dataclass
class ResumeConfig:
    """How an interrupted run goes on: the same command, in the same folder."""

    force: bool = False
    """Go on although the recipe or the number of processes has changed, where that is sound (train/README.md)."""
    keep_last: bool = False
    """Keep the last checkpoint of a finished stage: with resume.force it can be trained on for more steps."""


@dataclass
class Recipe:
    """One run, from data to verdict."""

    name: str
    """Of the run's folder: outputs/<name>/seed<seed>."""
    stages: dict[str, Any]
    """Stage name -> a stage's keys (`stages.py`, by its `kind`), in order."""
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
    """Load data and tokenizer, print the plan, and stop; exit code 2 where the recipe cannot fit."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
