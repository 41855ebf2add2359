"""How a launch spreads one model over devices: what each of them holds of it, and what it sends in a step.

With P parameters of w bytes, A adapter parameters and N processes, a device holds

                weights          gradients and optimizer                    gathered for a while
    single      w P              3 w P, or 16 A                             -
    ddp         w P              4 w P, or 20 A (gradients once more, in    -
                                 the buckets that are reduced)
    zero1       w P              w P + 12 P / N, or 8 A + 8 A / N           -
    zero2       w P              (w + 12) P / N, or 4 A + 12 A / N          -
    zero3       w P / N          the same over N, 16 A / N                  w min(1e9, P)
    fsdp2       w P / N          (16 - w) P / N, or 16 A / N                w 2 P / L: the layer at work and the next

and in bf16 2 A more for autocast's copy of an adapter (2 A / N under zero3 and fsdp2). Sources: ZeRO (1910.02054),
section 3.1 with K = 12 bytes of fp32 weights and moments, and figure 1; DeepSpeed's `stage3_max_live_parameters`;
accelerate's `fsdp2_prepare_model`, which makes fp32 of what is trained; FSDP 2's implicit prefetching. Offloaded,
states (`optimizer`) or weights as well (`all`) wait in the machine's memory: DeepSpeed's gradients pass through a
bucket of 5e8 elements, FSDP 2 takes all of it out together.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.environment import parse_flag_from_env

if TYPE_CHECKING:
    from equipoise.train.planning.memory import Training

SHARDED = ("zero3", "fsdp2")
"""Engines that shard the weights themselves."""
LIVE_PARAMETERS = 1e9
"""DeepSpeed's stage3_max_live_parameters: gathered parameters that ZeRO-3 holds before it lets go."""
BUCKET = 5e8
"""DeepSpeed's reduce_bucket_size, elements."""
FP32 = 4


@dataclass(frozen=True)
class Engine:
    """What a launch runs under, a device each process."""

    name: str = "single"
    """single | ddp | zero1 | zero2 | zero3 | fsdp2."""
    num_processes: int = 1
    offload: str = "none"
    """What waits in the machine's memory: none | optimizer (with gradients) | all (weights too)."""

    @classmethod
    def launched(cls) -> Self:
        """What this process was started under, read by accelerate from the environment that its launcher sets."""
        num = PartialState().num_processes
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            plugin = DeepSpeedPlugin()
            offload = "none"
            if plugin.offload_optimizer_device != "none":
                offload = "optimizer" if plugin.offload_param_device == "none" else "all"
            return cls(f"zero{plugin.zero_stage}" if plugin.zero_stage else "ddp", num, offload)
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return cls("fsdp2", num, "all" if parse_flag_from_env("FSDP_OFFLOAD_PARAMS") else "none")
        return cls("ddp" if num > 1 else "single", num)

    def __str__(self) -> str:
        waiting = {
            "none": "",
            "optimizer": ", optimizer offloaded",
            "all": ", weights and optimizer offloaded",
        }
        devices = f" over {self.num_processes} devices" if self.num_processes > 1 else ""
        return f"{self.name}{devices}{waiting[self.offload]}"

    # ---- what a device holds ----------------------------------------------------------------------------------------

    def weights(self, num_bytes: float) -> float:
        """Of a model of `num_bytes`."""
        if self.offload == "all":
            return 0.0
        return num_bytes / self.num_processes if self.name in SHARDED else num_bytes

    def states(self, training: "Training") -> float:
        """Gradients and optimizer states of one trained model."""
        if self.offload == "none":
            return self._states(training)
        trained = training.num_trained
        return 0.0 if self.name == "fsdp2" else training.width * min(BUCKET, trained)

    def _states(self, training: "Training") -> float:
        num, width = self.num_processes, training.width
        if training.rank is not None:
            adapters = training.size.adapter_parameters(training.rank)
            copy = training.autocast_copy
            if self.name in SHARDED:
                return (4 * FP32 * adapters + copy) / num
            whole = {"single": 16, "ddp": 20, "zero1": 8, "zero2": 4}[self.name]
            split = {"single": 0, "ddp": 0, "zero1": 8, "zero2": 12}[self.name]
            return (whole + split / num) * adapters + copy
        parameters = training.num_trained
        if self.name in ("single", "ddp"):
            return (3 if self.name == "single" else 4) * width * parameters
        if self.name == "fsdp2":
            return (4 * FP32 - width) * parameters / num
        gradients = width * parameters / (1 if self.name == "zero1" else num)
        return gradients + 3 * FP32 * parameters / num

    def gradients(self, training: "Training") -> float:
        """Of the states: what is let go with every step's `zero_grad`; DeepSpeed's are counted as kept."""
        if self.offload != "none" or self.name.startswith("zero"):
            return 0.0
        if self.name == "fsdp2":
            return FP32 * training.num_trained / self.num_processes
        width = training.width if training.rank is None else FP32
        return width * training.num_trained

    def gathered(self, training: "Training") -> float:
        """Weights that are whole for a while: gathered from other devices, or in full precision out of four bits."""
        size = training.size
        whole = 0.0
        if self.name == "zero3":
            whole = training.width * min(LIVE_PARAMETERS, size.num_parameters)
        elif self.name == "fsdp2":
            whole = training.width * 2 * size.num_parameters / size.num_layers
        if training.quantised:  # one layer's largest matrix
            whole += training.width * size.hidden_size * max(size.inner_size, size.attention_size)
        return whole

    def host(self, training: "Training", num_bytes: float) -> float:
        """What this device's process keeps in the machine's memory."""
        if self.offload == "none":
            return 0.0
        states = Engine(self.name, self.num_processes)._states(training)
        return states + (num_bytes / self.num_processes if self.offload == "all" else 0.0)

    # ---- what it sends ----------------------------------------------------------------------------------------------

    def traffic(self, training: "Training") -> float:
        """Bytes that a device sends in a micro-batch, and receives: gathers and reductions on rings.

        ZeRO, section 7: an all-reduce is twice (N - 1) / N of the tensor; sharded weights are gathered for the forward
        and for the backward pass, and gradients reduced once.
        """
        trained = training.num_trained
        moved = 2 * training.size.num_parameters + trained if self.name in SHARDED else 2 * trained
        return training.width * moved * (self.num_processes - 1) / self.num_processes


def local_processes() -> int:
    """Processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
