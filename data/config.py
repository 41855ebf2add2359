"""What a recipe says about its data; `train/recipe/` has it as `data`."""

from dataclasses import dataclass, field

CLEANING_ACTIONS = ("keep", "mark", "drop")

CLEANING_RULES = (
    "empty",
    "broken_turns",
    "contradictions",
    "exact_duplicates",
    "near_duplicates",
    "judged_unsafe",
    "refused_helpful",
    "rejected_refusal",
    "truncated",
    "language",
    "pii",
    "secrets",
)
"""In the order in which they apply."""


@dataclass
class CleaningConfig:
    """What is done about each fault of a record: keep | mark (kept, the rule's name in `meta.flags`) | drop.

    Rules apply in this order; a record that one of them drops is not seen by those behind it.
    """

    enabled: bool = False
    """Clean what a source gives before it is split; the rows that are dropped go to a file beside the report."""
    empty: str = "drop"
    """A turn or an answer without a letter or a digit."""
    broken_turns: str = "drop"
    """A chat template's own tokens in a text, another speaker's turn inside an answer, a code block never closed."""
    contradictions: str = "drop"
    """One answer to one prompt labelled safe and unsafe, or two answers preferred both ways; every record of them."""
    exact_duplicates: str = "drop"
    """Prompt and answers the same but for case, punctuation and spacing; the first is kept."""
    near_duplicates: str = "drop"
    """Prompt and answers nearly the same; the first is kept."""
    near_duplicate_similarity: float = 0.9
    """From which Jaccard similarity of their three-word runs on two records are nearly the same."""
    judged_unsafe: str = "keep"
    """A chosen answer whose P(safe) is below `min_p_safe`."""
    min_p_safe: float = 0.25
    p_safe: str = "column"
    """Where P(safe) comes from: column (`chosen_p_safe` of a pair) | judge (the recipe's judge reads every answer)."""
    refused_helpful: str = "drop"
    """A harmless prompt (`helpful`) whose chosen answer is a refusal, in English."""
    rejected_refusal: str = "mark"
    """A harmful prompt whose refusal is the rejected answer, over one that is none: refusals labelled unhelpful."""
    truncated: str = "mark"
    """A chosen answer that stops in the middle of a sentence; a rule of thumb."""
    language: str = "keep"
    """A record that is not in one of `languages` (extra `cleaning`)."""
    languages: list[str] = field(default_factory=list)
    """ISO 639-1 codes: [en, de]."""
    pii: str = "keep"
    """An e-mail address, a telephone, social security or credit-card number (extra `cleaning`)."""
    secrets: str = "keep"
    """A password, key or token of a known form (extra `cleaning`)."""

    def problems(self) -> dict[str, str]:
        """Key -> what is wrong with its value."""
        possible = ", ".join(CLEANING_ACTIONS)
        found = {
            rule: f"found {getattr(self, rule)!r}, possible: {possible}"
            for rule in CLEANING_RULES
            if getattr(self, rule) not in CLEANING_ACTIONS
        }
        if not 0 < self.near_duplicate_similarity <= 1:
            reason = f"found {self.near_duplicate_similarity!r}, expected a share in (0, 1]"
            found["near_duplicate_similarity"] = reason
        if not 0 <= self.min_p_safe <= 1:
            found["min_p_safe"] = f"found {self.min_p_safe!r}, expected a share in [0, 1]"
        if self.p_safe not in ("column", "judge"):
            found["p_safe"] = f"found {self.p_safe!r}, possible: column, judge"
        if self.language != "keep" and not self.languages:
            found["languages"] = "has to be given with a rule on language: [en]"
        elif self.languages and self.language == "keep":
            found["languages"] = f"found {self.languages}, but language=keep looks at none"
        return found


@dataclass
class DataConfig:
    """What is trained on and judged on."""

    source: str = "samples"
    """samples (shipped) | jsonl, csv, parquet, labelled (a user's own, at `path`) | mixture | a data set by name, with
    a version if it has several: pku_saferlhf, pku_saferlhf/30k, hh_rlhf/helpful ... (data/README.md lists them)."""
    path: str | None = None
    """The file of jsonl, csv, parquet or labelled, or a folder of such files; their schema is in data/README.md."""
    fields: dict[str, str] = field(default_factory=dict)
    """What a field is called in the user's file, where that differs: `{prompt: question, safe: meta.is_safe}`."""
    taxonomy: str | None = None
    """Whose labels stand in `category` of the user's file: a crosswalk by name (beavertails, llama_guard ...), or the
    path of a YAML of the user's own; None: S1 ... S14, OTHER and helpful."""
    default_category: str = "OTHER"
    """Of records in the user's file that name none: S1 ... S14, OTHER, or `helpful` for pairs about helpfulness."""
    mixture: dict[str, float] = field(default_factory=dict)
    """source=mixture: sources with their shares of the training pairs, `{pku_saferlhf: 0.8, helpful: 0.2}`. Besides the
    sources there are `safety` and `helpful`, the shipped training pairs. No pair is repeated: what the rarest part
    cannot keep up with is left out, and counted."""
    mirror: str | None = None
    """A folder with copies of hub repositories, `<mirror>/<owner>/<name>/...`, to read instead of the hub."""
    num_rows: int | None = None
    """Read at most this many rows of each data set, from its beginning (a quick look); None: all."""
    preference: str = "both"
    """pku_saferlhf: safe (safety pairs by safer_response_id) | helpful (helpful pairs by better_response_id) | both."""
    both_safe: str = "keep"
    """Safety pairs of two safe answers: keep | drop | mark (kept, with `both_safe` in their meta)."""
    both_unsafe: str = "keep"
    """Safety pairs of two unsafe answers: keep | drop | mark (kept, with `both_unsafe` in their meta)."""
    unsafe_chosen: str = "drop"
    """Helpful pairs whose preferred answer is unsafe: keep (as SACPO and Safe RLHF do) | drop | mark."""
    unpaired_path: str | None = None
    """JSON lines of single answers that are desirable or not, for KTO stages; their schema is in data/README.md."""
    held_out_fraction: float = 0.0
    """Share of the prompts kept out of training and judged (split by normalised prompt); not for samples."""
    max_suite_overlap: float = 0.5
    """A training record is dropped whose prompt holds more than this share of the n-grams (five words) of a prompt that
    the run is judged on; 1: only those that ask the very same are dropped."""
    max_length: int = 512
    """Tokens of prompt + longer completion; a longer pair is dropped and counted."""
    max_too_long_rate: float = 0.5
    """Share of a stage's examples that may be dropped so; above it nothing is trained."""
    max_template_fault_rate: float = 0.0
    """Share of a stage's examples that may be dropped because the chat template fails on them (the prompt is no prefix
    of prompt + answer, no generation prompt, two BOS tokens); above it nothing is trained."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    categorise: str = "none"
    """Who gives a category to pairs and answers in OTHER: none | classifier (fitted on labelled prompts when the data
    is loaded) | judge (the recipe's, if it names categories). Where the guess is not one of harm they stay OTHER."""
    categorise_from: str | None = None
    """classifier: JSON lines with `prompt` and `category` to fit it on; null: the shipped training records."""
    min_confidence: float = 0.5
    """classifier: probability below which a record stays in OTHER."""
    max_prompts_per_category: int | None = None
    """Judge at most this many held-out prompts a category (a quick look); None: all."""
