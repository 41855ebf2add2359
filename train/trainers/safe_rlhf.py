"""PPO-Lagrangian on accelerate: sample, score, move the multipliers, update policy and critics.

One step, on every rank:

    1. answers to this rank's prompts                                       (rollout.py)
    2. reward and cost of each; log-probabilities of policy and reference; the critics' values
    3. costs of all ranks into the windows; rank 0 moves lambda and broadcasts it    (losses/lagrange.py)
    4. advantages of both streams, combined with each answer's lambda       (losses/ppo.py)
    5. `update_epochs` optimizer steps over the answers; gradients are summed over ranks

Losses are means over the valid answers of all ranks: every rank divides by the same count, so the sum of gradients is
that of one process. Models are not wrapped in DDP or a DeepSpeed engine, which would want one forward for all roles of
a backbone; where the launch shards parameters, the frozen ones are sharded here (`safe_rlhf_models.py`). The random
state of a step depends on seed, step and rank alone.

Differences to PKU's safe-rlhf: the window holds the last answers of all ranks (theirs: of each rank, averaged); the sum
of the policy's and the PTX gradient makes a step (theirs: the mean, which AdamW's step does not notice); gradients
are clipped a role; AdamW's betas are PyTorch's; answers whose score is not finite are left out and counted.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import get_scheduler

from equipoise.data.files import write_aside
from equipoise.train.checkpoints import STATE_FILE, save_checkpoint
from equipoise.train.diagnostics.non_finite import stop_non_finite, stop_unsampled
from equipoise.train.diagnostics.steps import StepWatch
from equipoise.train.losses import ppo
from equipoise.train.losses.kl import k3
from equipoise.train.losses.lagrange import Multipliers
from equipoise.train.planning.phase_memory import PhaseMemory
from equipoise.train.preemption import Preempted
from equipoise.train.recipe.rl import SafeRLHFStageConfig
from equipoise.train.trainers.experience import Experience, Score, measure, set_advantages
from equipoise.train.trainers.rollout import Episode, RolloutBatch, Sampler, collate, ended
from equipoise.train.trainers.safe_rlhf_metrics import counts_of, gathered, metrics_of
from equipoise.train.trainers.safe_rlhf_models import POLICY, SafeRLHFModels, critic
from equipoise.train.trainers.step_table import StepTable
from equipoise.train.training import TrainingError, told_to_end


def shards_parameters(accelerator: Accelerator) -> bool:
    """Whether the launch spreads parameters over the ranks: FSDP, or ZeRO stage 3."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return bool(accelerator.state.deepspeed_plugin.zero_stage == 3)
    return accelerator.distributed_type is DistributedType.FSDP


@dataclass(frozen=True)
class Draws:
    """Prompts in the order in which they are drawn."""

    prompt_ids: Sequence[list[int]]
    """A prompt a draw."""
    categories: Sequence[int]
    """Index of each draw's category in `names`."""
    names: tuple[str, ...]
    """Categories."""


@dataclass(frozen=True)
class Answers:
    """Given answers for the PTX loss, in the order in which they are drawn; pass after pass."""

    rows: Sequence[tuple[list[int], list[int]]]
    """(prompt ids, answer ids)."""

    def draw(self, start: int, num: int) -> list[Episode]:
        """`num` answers from draw `start` on."""
        rows = [self.rows[i % len(self.rows)] for i in range(start, start + num)]
        return [Episode(start + i, 0, prompt, answer, True) for i, (prompt, answer) in enumerate(rows)]


class SafeRLHFTrainer:
    """See the module. Without `cost` it is PPO with a KL coefficient of kl / 2."""

    def __init__(
        self,
        models: SafeRLHFModels,
        stage: SafeRLHFStageConfig,
        accelerator: Accelerator,
        sampler: Sampler,
        draws: Draws,
        ends: set[int],
        reward: Score,
        cost: Score | None,
        multipliers: Multipliers | None,
        ptx: Answers | None,
        folder: Path,
        seed: int,
        log: Callable[[Mapping[str, float], int], None],
        progress: Callable[[int, int], None],
        step_end: Callable[[int], None],
    ) -> None:
        """folder: where checkpoints go; step_end: called with the number of steps done. draws: num_steps full steps."""
        assert (cost is None) == (multipliers is None)
        self.models, self.stage, self.accelerator = models, stage, accelerator
        self.sampler, self.draws, self.ends = sampler, draws, ends
        self.scores: dict[str, Score] = {"reward": reward} | ({"cost": cost} if cost is not None else {})
        self.multipliers, self.ptx = multipliers, ptx
        self.folder, self.seed = folder, seed
        self._log, self._progress, self._step_end = log, progress, step_end
        self.watch: StepWatch | None = None
        """Measures the steps where somebody asks for it."""
        self.belongs_to: Mapping[str, object] = {}
        """For the manifests of checkpoints."""
        self.memory = PhaseMemory(accelerator.device)
        self.seconds = dict.fromkeys(("rollout", "scoring", "update"), 0.0)
        self.counts = dict.fromkeys(("num_episodes", "num_non_finite", "num_empty", "num_flat_groups"), 0)
        """Over all steps."""
        self.answers_a_rank = stage.per_device_batch_size * stage.gradient_accumulation_steps
        self.prompts_a_rank = self.answers_a_rank // stage.num_generations
        self.num_steps = len(draws.prompt_ids) // (self.prompts_a_rank * accelerator.num_processes)
        self._multiplier_index = torch.full((len(draws.names),), -1)
        if multipliers is not None:
            self._multiplier_index = multipliers.index(draws.names)
        if shards_parameters(accelerator):
            models.shard(accelerator.device)
        for module in models.modules:
            module.to(accelerator.device)
        self._parameters = {role: list(models.parameters(role).values()) for role in models.roles}
        groups = [
            {
                "params": self._parameters[role],
                "lr": stage.learning_rate if role == POLICY else stage.critic_learning_rate,
            }
            for role in models.roles
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=stage.weight_decay)
        total = self.num_steps * stage.update_epochs
        warmup = math.ceil(stage.warmup * total) if stage.warmup < 1 else int(stage.warmup)
        self.scheduler = get_scheduler(stage.lr_scheduler, self.optimizer, warmup, total)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self, start: int = 0) -> None:
        """Steps from `start` (what a checkpoint had) to the end of the draws. Raises TrainingError, Preempted."""
        for step in range(start, self.num_steps):
            torch.manual_seed(hash((self.seed, step, self.accelerator.process_index)) % 2**63)  # dropout
            if self.watch is not None:
                self.watch.begin(step + 1)
            with self._phase("rollout"):
                episodes = self._sample(step)
            with self._phase("scoring"), torch.no_grad():
                experiences = [
                    self._measure(episodes[i : i + self.stage.per_device_batch_size])
                    for i in range(0, len(episodes), self.stage.per_device_batch_size)
                ]
                num_valid = self._move_multipliers(experiences, step)
                num_flat = set_advantages(experiences, self.stage, self._multiplier_of_category())
            with self._phase("update"):
                ptx_loss = self._update(experiences, num_valid, step)
            self._finish_step(experiences, num_flat, ptx_loss, step + 1)
            if self.watch is not None:
                self.watch.end(step + 1)
            self._progress(step + 1, self.num_steps)
            self._step_end(step + 1)
            ending = told_to_end()
            if ending or (self.stage.save_every and (step + 1) % self.stage.save_every == 0):
                self._save(step + 1)
            if ending:
                raise Preempted

    def _autocast(self) -> torch.autocast:
        # Not accelerate's: under DeepSpeed it leaves that to an engine, which is not used here.
        bf16 = self.accelerator.mixed_precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with self.memory.measured(name):
            yield
        self.seconds[name] += time.perf_counter() - started

    def _sample(self, step: int) -> list[Episode]:
        """This rank's answers of the step, those to one prompt behind one another."""
        num = self.stage.num_generations
        first = (step * self.accelerator.num_processes + self.accelerator.process_index) * self.prompts_a_rank
        draws = [d for d in range(first, first + self.prompts_a_rank) for _ in range(num)]
        slots = [draw * num + i % num for i, draw in enumerate(draws)]
        prompts = [self.draws.prompt_ids[draw] for draw in draws]
        answers = self.sampler.sample(self.models.acting(), prompts, slots)
        categories = [self.draws.categories[draw] for draw in draws]
        names = [self.draws.names[category] for category in categories]
        sampled = zip(slots, names, prompts, answers, strict=True)
        stop_unsampled(self.accelerator, self.folder, step + 1, self.models.tokenizer, sampled)
        return [
            Episode(slot, category, prompt, answer, ended(answer, self.ends))
            for slot, category, prompt, answer in zip(slots, categories, prompts, answers, strict=True)
            if answer is not None
        ]

    # ---- what the update needs --------------------------------------------------------------------------------------

    def _measure(self, episodes: Sequence[Episode]) -> Experience:
        with self._autocast():
            return measure(self.models, self._collate(episodes), self.scores, self.stage.missing_end_penalty)

    def _collate(self, episodes: Sequence[Episode]) -> RolloutBatch:
        return collate(episodes, self.models.tokenizer.pad_token_id, self.accelerator.device)

    def _move_multipliers(self, experiences: Sequence[Experience], step: int) -> int:
        """Take in the costs of all ranks, step every multiplier on rank 0; returns the valid answers of all ranks."""
        table = StepTable(("slot", "category", "valid", "cost"))
        for experience in experiences:
            slots = torch.tensor([e.slot for e in experience.batch.episodes])
            cost = experience.scores.get("cost", torch.zeros(len(slots)))
            columns = (slots, experience.categories, experience.valid, cost)
            table.keep(*(column.to(self.accelerator.device) for column in columns))
        found = table.gather(self.accelerator)
        valid = found["valid"].bool()
        if not bool(valid.any()):
            raise TrainingError(
                f"step {step + 1}: none of {len(valid)} answers can be learnt from: every one has a reward or a cost "
                "that is not finite, or no token. Look at the reward and the cost model (dtype, learning rate)."
            )
        if self.multipliers is not None:
            index = self._multiplier_index[found["category"].long()]
            seen = self.multipliers.observe(found["cost"][valid], index[valid])
            if self.accelerator.is_main_process and step >= self.stage.multiplier.delay:
                self.multipliers.update(seen, eta=self.stage.multiplier.eta)
            device = self.accelerator.device
            self.multipliers.log_multiplier = broadcast(self.multipliers.log_multiplier.to(device)).cpu()
        return int(valid.sum())

    def _multiplier_of_category(self) -> Tensor:
        """lambda of every category of `draws.names`, 0 where there is no constraint."""
        if self.multipliers is None:
            return torch.zeros(len(self.draws.names))
        return self.multipliers.of(self._multiplier_index)

    # ---- update -----------------------------------------------------------------------------------------------------

    def _update(self, experiences: Sequence[Experience], num_valid: int, step: int) -> float | None:
        """`update_epochs` optimizer steps; returns the PTX loss of all ranks, averaged over them."""
        ptx, num_ptx_tokens = self._ptx_batches(step)
        ptx_sum = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for _ in range(self.stage.update_epochs):
            for experience in experiences:
                self._backward_policy(experience, num_valid)
                for kind in self.models.critics:
                    self._backward_critic(kind, experience, num_valid)
            for batch in ptx:
                with self.models.training(POLICY):
                    with self._autocast():
                        loss = -self.models.log_probs(batch).sum() / num_ptx_tokens
                    (self.stage.ptx_coef * loss).backward()
                ptx_sum += loss.detach()
            self._optimize(experiences, step)
        if not ptx:
            return None
        return float(self.accelerator.reduce(ptx_sum, reduction="sum")) / self.stage.update_epochs

    def _ptx_batches(self, step: int) -> tuple[list[RolloutBatch], int]:
        """This rank's answers for the PTX loss, as many as it samples, and the answer tokens of all ranks."""
        if self.ptx is None:
            return [], 0
        rank, world, micro = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.stage.per_device_batch_size,
        )
        every = self.ptx.draw(step * world * self.answers_a_rank, world * self.answers_a_rank)
        mine = every[rank * self.answers_a_rank : (rank + 1) * self.answers_a_rank]
        batches = [self._collate(mine[i : i + micro]) for i in range(0, len(mine), micro)]
        return batches, sum(len(e.answer_ids) for e in every)

    def _backward_policy(self, experience: Experience, num_valid: int) -> None:
        with self.models.training(POLICY):
            with self._autocast():
                log_probs = experience.batch.by_answer(self.models.log_probs(experience.batch))
            loss, clipped = ppo.clipped_actor_loss(
                log_probs,
                experience.log_probs,
                experience.advantages,
                experience.mask,
                clip=self.stage.clip_ratio,
            )
            if self.stage.advantage == "grpo":
                pull = ppo.answer_mean(k3(log_probs, experience.ref_log_probs), experience.mask)
                loss = loss + self.stage.kl / 2 * pull
            (loss.sum() / num_valid).backward()
        experience.add("clipped", clipped)
        experience.add("actor_loss", loss)

    def _backward_critic(self, kind: str, experience: Experience, num_valid: int) -> None:
        with self.models.training(critic(kind)):
            with self._autocast():
                values = experience.batch.by_answer(self.models.values(kind, experience.batch))
            loss = ppo.clipped_critic_loss(
                values,
                experience.values[kind],
                experience.returns[kind],
                experience.mask,
                clip=self.stage.clip_value,
            )
            (loss.sum() / num_valid).backward()
        experience.add(f"{kind}_critic_loss", loss)

    def _optimize(self, experiences: Sequence[Experience], step: int) -> None:
        """Sum the gradients over ranks, clip each role's, and step."""
        for role, parameters in self._parameters.items():
            self._sum_over_ranks(parameters)
            limit = self.stage.max_grad_norm or math.inf
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
            if not torch.isfinite(norm):
                # A loss that is not finite has such a gradient, here that of all ranks.
                rows = self._described(experiences, role)
                stop_non_finite(f"the gradient of the {role}", self.folder, step + 1, rows)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def _described(self, experiences: Sequence[Experience], role: str) -> list[dict[str, Any]]:
        """The step's answers of all ranks, for whoever looks for what is not finite; collective."""
        key = "actor_loss" if role == POLICY else f"{role.removesuffix('_critic')}_critic_loss"
        decode, rows = self.models.tokenizer.decode, []
        for experience in experiences:
            losses = experience.totals[key]
            for i, episode in enumerate(experience.batch.episodes):
                scores = {kind: repr(float(values[i])) for kind, values in experience.scores.items()}
                rows.append(
                    {
                        "id": f"answer {episode.slot}",
                        "category": self.draws.names[episode.category],
                        "finite": bool(losses[i].isfinite()),
                        "prompt": decode(episode.prompt_ids),
                        "answer": decode(episode.answer_ids),
                        "loss": repr(float(losses[i])),
                        **scores,
                    }
                )
        return gather_object(rows)

    def _sum_over_ranks(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        if self.accelerator.num_processes == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten().float() for g in gradients]), reduction="sum")
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    # ---- metrics and checkpoints ------------------------------------------------------------------------------------

    def _finish_step(
        self, experiences: Sequence[Experience], num_flat: int, ptx_loss: float | None, step: int
    ) -> None:
        """Count, and log."""
        table = gathered(experiences, self.ends, self.stage.update_epochs, self.accelerator)
        flat = torch.tensor(num_flat, device=self.accelerator.device)
        counts = counts_of(table) | {"num_flat_groups": int(self.accelerator.reduce(flat, reduction="sum"))}
        for name, num in counts.items():
            self.counts[name] += num
        if step % self.stage.log_every:
            return
        rates = self.scheduler.get_last_lr()
        metrics = metrics_of(table, self.draws.names) | {"learning_rate": rates[0]}
        if self.models.critics:
            metrics["critic_learning_rate"] = rates[1]
        if self.stage.advantage != "gae":
            metrics["num_flat_groups"] = counts["num_flat_groups"]
        if ptx_loss is not None:
            metrics["ptx_loss"] = ptx_loss
        if self.multipliers is not None:
            metrics |= self.multipliers.metrics()
        self._log({f"train/{name}": value for name, value in metrics.items()}, step)

    def _save(self, step: int) -> None:
        """A checkpoint, whole or not at all. Every rank has the same, the first writes it."""
        main = self.accelerator.is_main_process
        save_checkpoint(
            self.folder, step, self.belongs_to, self._write_checkpoint if main else lambda folder: None
        )

    def _write_checkpoint(self, folder: Path) -> None:
        save_file(self.models.state_dict(), folder / "trained.safetensors")
        torch.save(
            {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()},
            folder / "optimizer.pt",
        )
        state: dict[str, Any] = {
            "multipliers": self.multipliers.state_dict() if self.multipliers else None,
            "counts": self.counts,
        }
        write_aside(folder / STATE_FILE, json.dumps(state) + "\n")

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint's `STATE_FILE` holds; raises ValueError when it does not fit."""
        if (state["multipliers"] is None) != (self.multipliers is None):
            raise ValueError("it was saved with a cost and this stage has none, or the other way round")
        if self.multipliers is not None:
            self.multipliers.load_state_dict(state["multipliers"])
        self.counts.update(state["counts"])

    def load_weights(self, folder: Path) -> None:
        """Restore the rest of a checkpoint; raises TrainingError when it is one of other models."""
        try:
            self.models.load_state_dict(load_file(folder / "trained.safetensors"))
        except ValueError as error:
            raise TrainingError(f"{folder}: {error}; remove the folder to start the stage anew") from error
        tensors = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.scheduler.load_state_dict(tensors["scheduler"])
