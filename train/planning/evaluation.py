"""What judging takes of a device: behind a stage by itself, inside one (`gate.every`) beside what that holds.

Every rank loads the saved model whole onto its device (`gate.where=in_process`), or one process does on that of the
first rank (`subprocess`, `vllm`), if it has no `gate.devices` of its own:

    inside a stage   weights + states, less the gradients, which are free between steps
                     + w P + the judge's model + max(answering, scoring)
    behind it        w P + the judge's model + max(answering, scoring)
    answering        KV cache of a batch, and what a layer works on while it reads the prompts
    scoring          logits of the helpful prompts' reference answers, in the weights' dtype, and one row's in fp32

The judge's model is loaded when it first judges, and then stays, beside what is trained too.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase

from equipoise.data.errors import EquipoiseError
from equipoise.data.sources import SafetyData
from equipoise.data.templates import encode_turns
from equipoise.eval.config import JudgeConfig
from equipoise.eval.judges.loading import FORMS
from equipoise.eval.models import native_dtype, resolve_model
from equipoise.train.gatekeeper import evaluation_settings
from equipoise.train.planning.engine import FP32
from equipoise.train.planning.memory import Memory, Training
from equipoise.train.planning.stage_plans import StagePlan
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.rl import GRPOStageConfig
from equipoise.train.recipe.stages import StageConfig, TrainingConfig

EMBEDDED_PARAMETERS = 134_515_008
"""Of the embedded judge's model, SmolLM2-135M."""
BEHIND = "evaluation"
"""The plan's row of judging while nothing is trained."""
GIB = 2**30


@dataclass(frozen=True)
class Judging:
    """How a recipe has its states judged."""

    recipe: Recipe
    judge: float
    """Bytes of the judge's model on a device, where it is in this process."""
    longest_prompt: int
    """Tokens, of those that are answered."""
    longest_scored: int
    """Tokens, of a helpful prompt with its reference answer."""
    num_scored: int
    """Of these at once."""
    on_gpu: bool
    """Whether the device that is planned for is a GPU."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        data: SafetyData,
        tokenizer: PreTrainedTokenizerBase,
        on_gpu: bool,
        say: Callable[[str], None],
    ) -> "Judging":
        """Reads the configuration of the judge's model, no weights; `say`: what could not be counted."""
        settings = evaluation_settings(recipe)

        def length(exchange: Any, answer: str = "") -> int:
            answered = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
            return len(encode_turns(tokenizer, exchange.prompt, prompt=True)) + len(answered)

        scored = [length(e, e.response or "") for e in data.helpful_prompts[: settings.max_helpful_prompts]]
        fitting = [num for num in scored if num <= settings.helpfulness_max_length]
        return cls(
            recipe,
            judge_bytes(recipe.judge, on_gpu, say),
            longest_prompt=max(map(length, (*data.harmful_prompts, *data.lookalike_prompts)), default=0),
            longest_scored=max(fitting, default=0),
            num_scored=min(settings.helpfulness_batch_size, len(fitting)),
            on_gpu=on_gpu,
        )

    @property
    def elsewhere(self) -> bool:
        """Whether the process that judges has devices of its own."""
        return self.recipe.gate.where != "in_process" and self.recipe.gate.devices is not None

    def beside(self, name: str, row: StagePlan, memory: Memory) -> Memory:
        """What a stage takes, with the judges that it trains beside: the run's, once it has judged, and a reward's."""
        stages = self.recipe.stages
        before = [stage.evaluate for stage in list(stages.values())[: list(stages).index(name)]]
        inside = self.times_inside(stages[name], row) > 0
        judged = self.recipe.evaluation.baseline or any(before) or inside
        held = self.judge if judged and self.recipe.gate.where == "in_process" else 0.0
        return replace(memory, judge=held + self._reward(stages[name]))

    def _reward(self, stage: StageConfig) -> float:
        """Bytes of a judge that GRPO rewards by, which is loaded for the stage."""
        return self.judge if isinstance(stage, GRPOStageConfig) and "judge_verdict" in stage.rewards else 0.0

    def behind(self, training: Training, batch_size: int | None = None) -> Memory:
        """Of judging a state while nothing is trained; batch_size: in place of `evaluation.batch_size`."""
        if self.elsewhere:
            return Memory()
        num = batch_size or self.recipe.evaluation.batch_size
        answering = Memory(
            activations=training.width * num * self.longest_prompt * training.kept_a_layer(),
            cache=training.cache(num, self.longest_prompt + self.recipe.evaluation.max_new_tokens),
        )
        num_tokens, vocab = self.num_scored * self.longest_scored, training.size.vocab_size
        scoring = Memory(
            activations=training.width * num_tokens * training.kept_a_layer(),
            logits=(training.width * num_tokens + 2 * FP32 * self.longest_scored) * vocab,
        )
        phase = max(answering, scoring, key=lambda memory: memory.total)
        return replace(phase, evaluated=training.whole, judge=self.judge)

    def times_inside(self, stage: StageConfig, row: StagePlan) -> int:
        """How many states are judged here while the stage trains."""
        every = 0 if self.elsewhere else self.recipe.gate.every
        if not every or not stage.evaluate or not isinstance(stage, TrainingConfig):
            return 0
        return (int(row.steps) - 1) // every  # the last one is judged behind it

    def inside(self, name: str, row: StagePlan, training: Training, batch_size: int | None = None) -> Memory:
        """Of judging a state between two steps of a stage."""
        stage = self.recipe.stages[name]
        held = row.needs(training, 1)  # weights and states do not depend on the examples of a pass
        judging = self.behind(training, batch_size)
        states = held.states - training.engine.gradients(training)
        judges = judging.judge + self._reward(stage)
        return replace(judging, weights=held.weights, states=states, host=held.host, judge=judges)

    def ways_out(self, phases: Mapping[str, Callable[[int], Memory]], room: float) -> Iterator[str]:
        """What makes judging fit; phases: what does not, (answers at a time) -> its memory."""
        gate, size = self.recipe.gate, self.recipe.evaluation.batch_size

        def fits(batch_size: int, less: float = 0.0) -> bool:
            return all(memory(batch_size).total - less <= room for memory in phases.values())

        smaller = next((n for n in range(size - 1, 0, -1) if size % n == 0 and fits(n)), None)
        if smaller is not None:
            most = max(memory(smaller).total for memory in phases.values())
            yield f"evaluation.batch_size={smaller}: {most / GIB:.1f} GiB"
        judge = self.recipe.judge
        if self.judge and judge.name in FORMS and judge.engine == "transformers" and fits(size, self.judge):
            yield "judge.engine=server judge.url=...: the judge on a machine of its own"
        only_inside = BEHIND not in phases
        if only_inside:
            yield "gate.every=0: states are judged behind their stage only"
        if gate.devices is None and self.on_gpu:
            where = (
                "gate.where=subprocess (or vllm)"
                if gate.where == "in_process"
                else f"gate.where={gate.where}"
            )
            yield f"{where} gate.devices=...: judged on a device of its own" + (
                ""
                if only_inside
                else ", which has to hold the model whole: with vLLM, too, for its likelihoods"
            )


def judge_bytes(config: JudgeConfig, on_gpu: bool, say: Callable[[str], None]) -> float:
    """Bytes of the judge's weights on a device, from its model's configuration; 0 where that is not in this process.

    What cannot be counted is said.
    """
    if config.name == "ensemble":
        members = (JudgeConfig(**{"name": name, **keys}) for name, keys in config.judges.items())
        return sum(judge_bytes(member, on_gpu, say) for member in members)
    native = "bfloat16" if on_gpu else native_dtype()
    dtype = native if config.dtype == "native" else config.dtype
    width = FP32 if dtype == "float32" else 2
    if config.name == "embedded":  # stays on the CPU
        return 0.0 if on_gpu else width * EMBEDDED_PARAMETERS
    if config.engine == "server":
        return 0.0
    if config.engine == "vllm":
        say(f"judge {config.name}: vLLM takes what judge.engine_options give it, which is not in the plan")
        return 0.0
    assert config.model is not None, "checked with the recipe"
    try:
        # Not AutoConfig at once: where no hub can be reached it tries for half a minute.
        folder = resolve_model(config.model, config.revision)
        options = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
        read = AutoConfig.from_pretrained(folder, **options)
        with init_empty_weights():
            model = AutoModel.from_config(read, trust_remote_code=config.trust_remote_code)
    except (EquipoiseError, OSError, ValueError) as error:
        say(f"judge {config.name}: its model's size is not known and not in the plan ({error})")
        return 0.0
    head = 0 if read.get_text_config().tie_word_embeddings else model.get_input_embeddings().weight.numel()
    return width * float(sum(parameter.numel() for parameter in model.parameters()) + head)
