"""ZeRO-3 keeps parameters of less than 100,000 elements whole on every rank: all that a tiny model has.

A run of it would prove little of one whose weights are gathered and freed; so here none is too small.
"""

from accelerate.utils import DeepSpeedPlugin


def shard_small_parameters() -> None:
    """In this process; to be called before anything asks for accelerate's state."""
    original = DeepSpeedPlugin.__post_init__

    def patched(self: DeepSpeedPlugin) -> None:
        original(self)
        self.deepspeed_config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
        }

    DeepSpeedPlugin.__post_init__ = patched  # type: ignore[method-assign]
