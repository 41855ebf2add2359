"""FSDP2 on CPU: torch shards over gloo, but accelerate 1.15 takes the FSDP plug-in only where there are accelerators.

`AcceleratorState` reads ACCELERATE_USE_FSDP for MULTI_GPU and its like and not for MULTI_CPU, so a CPU launch with
fsdp2.yaml would silently train as DDP. This tells it otherwise; everything behind it is accelerate's and torch's own.
"""

from accelerate import PartialState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """In this process; to be called before anything asks for accelerate's state."""
    original = PartialState.__init__

    def patched(self: PartialState, cpu: bool = False, **kwargs: object) -> None:
        original(self, cpu, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched  # type: ignore[method-assign]
