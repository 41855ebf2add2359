"""The records that travel between the folders: a prompt, a preference pair, a labelled or an unpaired answer.

Every loader in `sources.py` ends in one of these; everything behind it reads nothing else.
"""

from dataclasses import dataclass, field

Turn = dict[str, str]
"""One message of a conversation: `{"role": "user" | "assistant" | "system", "content": text}`."""

HELPFUL = "helpful"
"""The category of a record that carries no hazard (instructions, small talk, code ...)."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt to be answered, with a reference answer where the suite has one."""

    id: str
    prompt: tuple[Turn, ...]
    category: str
    """Canonical category id (`S1` ... `S14`, `OTHER`), or `helpful`."""
    response: str | None = None
    """A reference answer (helpfulness), never the model's own."""
    source: str = ""
    meta: dict[str, object] = field(default_factory=dict, compare=False)
    """`labels`: what the source calls the harm."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, the first preferred."""

    id: str
    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str
    category: str
    chosen_safe: bool | None = None
    """None: nobody said."""
    rejected_safe: bool | None = None
    source: str = ""
    meta: dict[str, object] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class LabelledExchange:
    """An answer somebody has labelled: what judges are fitted and calibrated on."""

    id: str
    prompt: tuple[Turn, ...]
    response: str
    category: str
    safe: bool | None = None
    refusal: bool | None = None
    source: str = ""
    meta: dict[str, object] = field(default_factory=dict, compare=False)
    """`labels`: what the source calls the harm."""


@dataclass(frozen=True, slots=True)
class UnpairedExchange:
    """An answer that is desirable or not, without another one beside it: what KTO trains on."""

    id: str
    prompt: tuple[Turn, ...]
    response: str
    desirable: bool
    category: str
    source: str = ""
    meta: dict[str, object] = field(default_factory=dict, compare=False)
