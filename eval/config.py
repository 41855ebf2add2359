"""What a recipe or the command line says about judges, engines and suites; nothing heavy is imported here.

YAML key = field = argument. `problems()` of each says what cannot work before a model is loaded.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENGINES = ("transformers", "server", "vllm")
DTYPES = ("bfloat16", "float32", "native", "auto")


@dataclass
class ModelChoice:
    """A model that is not trained: the one under test, or a judge's."""

    id: str = "smollm2_135m"
    """"smollm2_135m" (the packaged one), a hub id, a local folder, or the name by which a server knows it."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null: its default branch."""
    dtype: str = "native"
    """Weights in memory: bfloat16 | float32 | native (bfloat16 where the machine computes in it) | auto."""
    attn_implementation: str | None = None
    """sdpa | eager | flash_attention_2 | flash_attention_3 | flex_attention; null: the model's own choice."""
    trust_remote_code: bool = False
    """Run the Python code of a hub repository."""

    def problems(self) -> dict[str, str]:
        """Key -> what is wrong with its value."""
        found = {}
        if not self.id.strip():
            found["id"] = "has to be given: model=NAME"
        if self.dtype not in DTYPES:
            found["dtype"] = f"found {self.dtype!r}, possible: {', '.join(DTYPES)}"
        return found


@dataclass
class EngineConfig:
    """Who completes requests."""

    name: str = "transformers"
    """transformers (in this process) | server (OpenAI-compatible, at `url`) | vllm (offline, in this process)."""
    url: str | None = None
    """server: its base, as in http://localhost:8000/v1."""
    key_env: str | None = None
    """server: the environment variable that holds the API key; None: no key is sent."""
    concurrency: int = 32
    """server: requests under way at once."""
    timeout: float = 120.0
    """server: seconds for one attempt."""
    deadline: float | None = None
    """server: seconds for all of it; what is not finished by then has failed. None: no limit."""
    options: dict[str, Any] = field(default_factory=dict)
    """vllm: further arguments of vllm.LLM (tensor_parallel_size, gpu_memory_utilization ...)."""

    def problems(self) -> dict[str, str]:
        """Key -> what is wrong with its value."""
        found = {}
        if self.name not in ENGINES:
            found["name"] = f"found {self.name!r}, possible: {', '.join(ENGINES)}"
        if self.name == "server" and not self.url:
            found["url"] = "has to be given with a server, as in http://localhost:8000/v1"
        elif self.name != "server" and self.url:
            found["url"] = f"found {self.url!r}, but {self.name} asks no server"
        elif self.url and not self.url.startswith(("http://", "https://")):
            found["url"] = f"found {self.url!r}, expected http://... or https://..."
        if self.key_env is not None and self.name != "server":
            found["key_env"] = f"found {self.key_env!r}, but {self.name} takes no key"
        elif self.key_env is not None and not os.environ.get(self.key_env):
            found["key_env"] = (
                f"the environment variable {self.key_env} is not set; export the key, or leave it out"
            )
        for name in ("concurrency", "timeout"):
            if getattr(self, name) <= 0:
                found[name] = f"found {getattr(self, name)}, expected above 0"
        if self.deadline is not None and self.deadline <= 0:
            found["deadline"] = f"found {self.deadline}, expected above 0, or null"
        if self.options and self.name != "vllm":
            found["options"] = f"found {', '.join(self.options)}, but only vllm takes any"
        return found


@dataclass
class JudgeConfig:
    """Who judges the answers: a published judge's form, and the engine that runs its model.

    The keys from `version` on are those of the forms (`eval/judges/`); null: the form's own default. A key that the
    judge does not read is an error.
    """

    name: str = "embedded"
    """embedded (a classifier on the packaged model's hidden states, a stand-in for a real judge) | a published judge by
    its name (eval/README.md lists them) | ensemble."""
    engine: str = "transformers"
    """Of the judge's model: transformers | server | vllm."""
    model: str | None = None
    """Hub id or local folder of the judge's model, or the name by which the server knows it."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null: its default branch."""
    dtype: str = "native"
    """Weights in memory: bfloat16 | float32 | native (bfloat16 where the machine computes in it) | auto."""
    trust_remote_code: bool = False
    """Run the Python code of a hub repository (MD-Judge v0.2 needs it)."""
    url: str | None = None
    """engine=server: its base, as in http://localhost:8000/v1."""
    key_env: str | None = None
    """engine=server: the environment variable that holds the API key."""
    concurrency: int = 32
    """engine=server: requests under way at once."""
    batch_size: int = 32
    """Answers judged at a time, where the model is in this process."""
    max_prompt_tokens: int = 4096
    """Longest exchange that the judge is given; a longer one is `overlong`, and no finding."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """engine=vllm: further arguments of vllm.LLM."""
    version: str | None = None
    """Which of several models of one name: llama_guard 3 | 3-1b | 4, granite_guardian 3.0 ... 4.1."""
    prompt_file: str | None = None
    """The prompt that the judge was trained on, where its tokenizer does not hold it; null: our own wording."""
    severity_prompt_file: str | None = None
    """bingoguard: the prompt of its second call."""
    rules_file: str | None = None
    """gpt_oss_safeguard, dynaguard, policy: your rules as text; null: the canonical categories."""
    taxonomy: str | None = None
    """policy: whose categories it names, as `data.taxonomy`."""
    crosswalk: str | None = None
    """gpt_oss_safeguard: the crosswalk of the categories that your rules name."""
    threshold: float | None = None
    """From which score or probability on an answer is unsafe: shieldgemma, strongreject, beaver."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """shieldgemma: guideline -> a threshold of its own."""
    criteria: list[str] = field(default_factory=list)
    """granite_guardian: which criteria are asked, one call each."""
    reasoning_effort: str | None = None
    """gpt_oss_safeguard: low | medium | high."""
    think: bool | None = None
    """granite_guardian 3.3 and 4.1, dynaguard: whether it thinks before it answers."""
    max_new_tokens: int | None = None
    """Longest answer of the judge, its reasoning included."""
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)
    """ensemble: name -> keys of this class for each judge, in order (cascade: the cheapest first); `name` may be left
    out where it is the judge's."""
    rule: str = "majority"
    """ensemble: majority | any_unsafe | cascade."""
    unsure: list[float] = field(default_factory=lambda: [0.1, 0.9])
    """ensemble, cascade: P(unsafe) from .. to that is passed on to the next judge."""

    @property
    def engine_config(self) -> EngineConfig:
        """The same keys as an engine has them."""
        return EngineConfig(
            name=self.engine,
            url=self.url,
            key_env=self.key_env,
            concurrency=self.concurrency,
            options=self.engine_options,
        )


@dataclass
class SuiteConfig:
    """What is asked, and what is made of the answers."""

    name: str = "category_safety"
    """category_safety (unsafe answers by category) | over_refusal (refused look-alikes) | likelihood (of reference
    answers) | compliance (ordinary prompts answered) | win_rate (against `opponent`, by a pairwise judge) | lm_eval |
    gate (what the gate reads: the first three)."""
    source: str = "samples"
    """samples (shipped) | file (yours, at `path`) | a published set by name (eval/suites/README.md lists them)."""
    path: str | None = None
    """Your file or folder (jsonl, json, csv, parquet), or a local copy of the published set in its authors' columns."""
    mirror: str | None = None
    """A folder with copies of hub repositories, `<mirror>/<owner>/<name>/...`, to read instead of the hub."""
    revision: str | None = None
    """A published set on the hub: another commit, tag or branch of it; null: the one it is pinned to."""
    fields: dict[str, str] = field(default_factory=dict)
    """source=file: what id, prompt, context, category, response are called in your file."""
    taxonomy: str | None = None
    """source=file: whose labels stand in `category`: a crosswalk by name, or the path of your YAML; null: ours."""
    opponent: str | None = None
    """win_rate: whose answers are held against: `reference` (those of the data), or a report.json with answers to the
    same prompts (suite=compliance or win_rate)."""
    tasks: list[str] = field(default_factory=list)
    """lm_eval: its tasks, as [ifeval, gsm8k]."""
    num_fewshot: int | None = None
    """lm_eval: examples before each question; null: as the task says."""

    def problems(self) -> dict[str, str]:
        """Key -> what is wrong with its value."""
        from equipoise.eval.suites.base import ASKS
        from equipoise.eval.suites.published import SOURCES  # here: data sets take a second to import
        from equipoise.eval.suites.sources import FIELDS

        found: dict[str, str] = {}
        if self.name not in ASKS:
            found["name"] = f"found {self.name!r}, possible: {', '.join(ASKS)}"
            return found
        asks = ASKS[self.name]
        possible = ["samples", "file", *(n for n, s in SOURCES.items() if set(asks) & set(s.suites))]
        if self.source not in possible:
            found["source"] = f"found {self.source!r}, possible with {self.name}: {', '.join(possible)}"
        elif self.source != "samples" and len(asks) > 1:
            found["source"] = f"found {self.source!r}, but {self.name} asks several suites of the samples"
        elif self.source == "file" and self.path is None:
            found["path"] = "has to be given with source=file: suite.path=FILE"
        elif self.source in SOURCES and SOURCES[self.source].hub is None and self.path is None:
            found["path"] = f"{self.source} is on no hub: download it from {SOURCES[self.source].upstream}"
        if self.path is not None and self.source == "samples":
            found["path"] = f"found {self.path!r}, but source=samples reads no file; add suite.source=file"
        elif self.path is not None and not Path(self.path).expanduser().exists():
            found["path"] = f"found {self.path!r}, which is no file and no folder"
        if self.mirror is not None and not Path(self.mirror).expanduser().is_dir():
            found["mirror"] = f"found {self.mirror!r}, which is no folder"
        if self.revision is not None and (
            self.path is not None or self.mirror is not None or self.source in ("samples", "file")
        ):
            found["revision"] = f"found {self.revision!r}, but nothing is read from the hub here"
        for name in self.fields:
            if name not in FIELDS:
                found["fields"] = f"found {name!r}, possible: {', '.join(FIELDS)}"
        for key in ("fields", "taxonomy"):
            if getattr(self, key) and self.source != "file":
                found[key] = f"found {getattr(self, key)!r}, but source={self.source} reads no file of yours"
        if self.name == "win_rate" and self.opponent is None:
            found["opponent"] = "has to be given with win_rate: suite.opponent=reference, or a report.json"
        elif self.opponent is not None and self.name != "win_rate":
            found["opponent"] = f"found {self.opponent!r}, but {self.name} compares with nobody"
        if self.name == "lm_eval" and not self.tasks:
            found["tasks"] = "has to be given with lm_eval: suite.tasks=[ifeval,gsm8k]"
        elif self.name != "lm_eval" and (self.tasks or self.num_fewshot is not None):
            found["tasks"] = f"only lm_eval has any; found suite.name={self.name}"
        return found


@dataclass
class CommandConfig:
    """What `python -m equipoise.eval` is told; recipes/evaluation.yaml has the groups and the defaults."""

    model: ModelChoice = field(default_factory=ModelChoice)
    engine: EngineConfig = field(default_factory=EngineConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    generation: dict[str, Any] = field(default_factory=dict)
    """Fields of equipoise.eval.generation.settings.GenerationSettings."""
    num_samples: int = 1
    """Answers to each prompt; more than one needs generation.temperature above 0."""
    limit: int | None = None
    """At most so many prompts of a suite, drawn evenly over its categories; of each task with lm_eval."""
    tsdi: str | None = None
    """A token bias (its file or folder) that is taken out when decoding; null: none."""
    controversial_is_unsafe: bool = True
    """How a verdict between safe and unsafe counts, where a judge has one."""
    calibration: str | None = None
    """What `calibrate` wrote about this judge: rates are then also given corrected for its errors."""
    baseline: str | None = None
    """A report.json to show beside this one, with paired changes."""
    state: str = "evaluated"
    """How the report calls the model."""
    cache: str | None = "auto"
    """The file that keeps replies and verdicts: auto (evaluation.sqlite in $EQUIPOISE_CACHE, or in the user's cache
    folder) | a file | null, none."""
    out: str = "outputs/evaluation"
    """Folder of report.json, report.html and report.md."""
    examples: str = "folded"
    """Prompts and answers in report.html: folded (each behind a click) | none (for a report that leaves the team);
    report.json has them all."""
    inspect_log: str | None = None
    """Write the report as an Inspect log too, to this file (.eval or .json); null: no. Needs inspect_ai."""
