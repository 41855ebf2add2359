"""What is compared: each method is a recipe and what it changes there; the pairs, steps and learning rate are equal."""

from dataclasses import dataclass

BASE = "base"
"""The starting model, evaluated once."""
BASELINE = "dpo"
"""What every method is compared with."""


@dataclass(frozen=True)
class Method:
    """How one method is composed from the shipped recipes."""

    overrides: tuple[str, ...]
    """What the command line of train.py would say."""
    reuses: str | None = None
    """The method whose model of the same seed it starts from; it then trains nothing itself."""


METHODS = {
    "dpo": Method(("recipe=dpo",)),
    "dpo_tsdi": Method(
        # Only the last stage of recipe=tsdi; without its preference stages nothing reads loss.sft_coef.
        ("recipe=tsdi", "~stages.helpful", "~stages.safe", "loss.sft_coef=0"),
        reuses="dpo",
    ),
    "category_margin": Method(("recipe=category_margin",)),
    "category_dro": Method(("recipe=category_dro",)),
    "category_lambda": Method(("recipe=category_lambda",)),
    "token_bias": Method(("recipe=dpo", "stages.safe.token_bias.coef=1.0")),
}
"""In the order in which they run; a method that reuses another's model comes after it."""
