"""What a source gives before it is split: records of the schema, and a count of every row it left out."""

from collections import Counter
from dataclasses import dataclass, field

from equipoise.data.schema import Exchange, LabelledExchange, PreferencePair


@dataclass
class Records:
    """The records of one source."""

    pairs: list[PreferencePair] = field(default_factory=list)
    labelled: list[LabelledExchange] = field(default_factory=list)
    prompts: list[Exchange] = field(default_factory=list)
    """Prompts that nobody answered."""
    num_read: int = 0
    """Rows or lines read."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> rows left out because of it, or one of the two pairs of a row."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was done to records that are there: "both answers unsafe, kept" ..."""
