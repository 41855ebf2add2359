"""What a recipe says about its data; `train/recipe.py` has it as `data`."""

from dataclasses import dataclass, field


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
    max_prompts_per_category: int | None = None
    """Judge at most this many held-out prompts a category (a quick look); None: all."""
