"""The published sets of prompts: where their rows are, which columns are read, whose labels their categories are, and
what a reader of the numbers has to know about each."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from equipoise.data.sources.hub import TEXT, HubSet
from equipoise.data.sources.labelled import DO_NOT_ANSWER
from equipoise.eval.suites.base import HARMFUL, LOOKALIKE


@dataclass(frozen=True)
class Source:
    """A set of prompts that somebody published, and how a row of it is read."""

    suites: tuple[str, ...]
    """The suites that it can be asked in, the usual one first."""
    hub: HubSet | None
    """On the Hugging Face hub; None: `suite.path` has to name a file."""
    upstream: str
    """Where its authors keep it."""
    fields: Mapping[str, tuple[str, ...]]
    """Field -> the columns it may stand in, those of the authors' file first; the first that a row has counts."""
    taxonomy: str | None
    """The crosswalk of its categories; None: they are kept as they are, and are no hazards of ours."""
    licence: str
    paper: str
    num_prompts: int
    """As published, in the split that is read."""
    faults: tuple[str, ...] = ()
    """What is known to be wrong with it, or has to be known to read its numbers."""
    keep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> the values of the rows that are asked; the others are counted."""


SOURCES: dict[str, Source] = {
    "beavertails_evaluation": Source(
        suites=(HARMFUL,),
        hub=HubSet(
            "PKU-Alignment/BeaverTails-Evaluation",
            "main",
            ("test.jsonl*",),
            {"prompt": TEXT, "category": TEXT},
        ),
        upstream="https://huggingface.co/datasets/PKU-Alignment/BeaverTails-Evaluation",
        fields={"prompt": ("prompt",), "category": ("category",)},
        taxonomy="beavertails",
        licence="CC BY-NC 4.0",
        paper="arXiv:2307.04657",
        num_prompts=700,
        faults=(
            "no commit of it is pinned here: the one that was read is recorded, suite.revision=COMMIT reads it again",
            "not for commercial use",
        ),
    ),
    "salad": Source(
        suites=(HARMFUL,),
        hub=HubSet(
            "OpenSafetyLab/Salad-Data",
            "e0f207e6a1f65392d945d0d67cf0fedc67d6285e",
            ("base_set.json",),
            {"question": TEXT, "3-category": TEXT},
        ),
        upstream="https://huggingface.co/datasets/OpenSafetyLab/Salad-Data",
        fields={"id": ("qid",), "prompt": ("question",), "category": ("3-category",)},
        taxonomy="salad_category",
        licence="Apache-2.0",
        paper="arXiv:2402.05044",
        num_prompts=21318,
        faults=(
            "15,433 of the 21,318 questions were written by a fine-tuned GPT-3.5; all categories are labels of models",
            "takes up questions of HH-RLHF, AdvBench, Do-Not-Answer and others: not independent of them",
        ),
    ),
    "ailuminate": Source(
        suites=(HARMFUL,),
        hub=None,
        upstream="https://github.com/mlcommons/ailuminate",
        fields={
            "id": ("release_prompt_id",),
            "prompt": ("prompt_text",),
            "category": ("hazard",),
        },
        taxonomy="ailuminate",
        licence="CC BY 4.0",
        paper="arXiv:2503.05731",
        num_prompts=1200,
        faults=(
            "the public demo set, a tenth of the practice set: no AILuminate grade follows from it",
            "some prompts are harmless questions about a hazard, so that an answer need not be unsafe",
        ),
    ),
    "harmbench": Source(
        suites=(HARMFUL,),
        hub=HubSet(
            "walledai/HarmBench",
            "a777536ffc60bc8317b06380da5b2acf8d6491fd",
            ("standard/*.parquet",),
            {"prompt": TEXT, "category": TEXT},
        ),
        upstream="https://github.com/centerforaisafety/HarmBench (data/behavior_datasets)",
        fields={
            "id": ("BehaviorID",),
            "prompt": ("Behavior", "prompt"),
            "context": ("ContextString", "context"),
            "category": ("SemanticCategory", "category"),
        },
        taxonomy="harmbench",
        licence="MIT",
        paper="arXiv:2402.04249",
        num_prompts=200,
        faults=(
            "asked directly, without an attack: HarmBench measures attacks, and its success rates are not these",
            "from the hub the 200 standard behaviours; a copy by others than the authors, behind a licence click",
            "copyright behaviours of the authors' file need its hash classifier, which no judge here replaces",
        ),
    ),
    "strongreject": Source(
        suites=(HARMFUL,),
        hub=HubSet(
            "walledai/StrongREJECT",
            "df54272b395ce9e584d2f8140519935425d8549f",
            ("data/train-*.parquet",),
            {"prompt": TEXT, "category": TEXT},
        ),
        upstream="https://github.com/alexandrasouly/strongreject",
        fields={"prompt": ("forbidden_prompt", "prompt"), "category": ("category",)},
        taxonomy="strongreject",
        licence="MIT",
        paper="arXiv:2402.10260",
        num_prompts=313,
        faults=(
            "the hub's copy is by others than the authors",
            "the published score needs the rubric: judge=strongreject",
        ),
    ),
    "do_not_answer": Source(
        suites=(HARMFUL,),
        hub=HubSet(
            DO_NOT_ANSWER["train"].repo,
            DO_NOT_ANSWER["train"].revision,
            DO_NOT_ANSWER["train"].files,
            {"question": TEXT, "types_of_harm": TEXT},
        ),
        upstream="https://github.com/Libr-AI/do-not-answer",
        fields={"id": ("id",), "prompt": ("question",), "category": ("types_of_harm",)},
        taxonomy="do_not_answer",
        licence="Apache-2.0",
        paper="arXiv:2308.13387",
        num_prompts=939,
        faults=(
            "mild: most chat models refuse or defuse nearly all of it, so that it separates few of them",
        ),
    ),
    "catqa": Source(
        suites=(HARMFUL,),
        hub=HubSet(
            "declare-lab/CategoricalHarmfulQA",
            "321e068b391b7d1aeeb882ac468356a9513c9167",
            ("data/catqa_english.json",),
            {"Question": TEXT, "Category": TEXT},
        ),
        upstream="https://github.com/declare-lab/resta",
        fields={"prompt": ("Question",), "category": ("Category",)},
        taxonomy="catqa",
        licence="Apache-2.0",
        paper="arXiv:2402.11746",
        num_prompts=550,
        faults=(
            "questions written by a language model",
            "'Tailored Financial Advice' asks for advice that many deployments allow",
        ),
    ),
    "xstest": Source(
        suites=(LOOKALIKE,),
        hub=HubSet(
            "walledai/XSTest",
            "0c87110a5dc1bc71f9e040a9fba627bd2cc8e0d5",
            ("data/train-*.parquet",),
            {"prompt": TEXT, "type": TEXT, "label": TEXT},
        ),
        upstream="https://github.com/paul-rottger/xstest",
        fields={"id": ("id",), "prompt": ("prompt",), "category": ("type",)},
        taxonomy=None,
        licence="CC BY 4.0",
        paper="arXiv:2308.01263",
        num_prompts=250,
        keep={"label": ("safe",)},
        faults=(
            "25 prompts of each of ten types: a type's rate is uncertain by some 20 points",
            "the hub's copy is by others than the authors",
        ),
    ),
    "or_bench": Source(
        suites=(LOOKALIKE,),
        hub=HubSet(
            "bench-llm/or-bench",
            "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
            ("or-bench-hard-1k.csv",),
            {"prompt": TEXT, "category": TEXT},
        ),
        upstream="https://huggingface.co/datasets/bench-llm/or-bench",
        fields={"prompt": ("prompt",), "category": ("category",)},
        taxonomy="or_bench",
        licence="CC BY 4.0",
        paper="arXiv:2405.20947",
        num_prompts=1319,
        faults=(
            "written by models and called safe by a vote of models: some prompts are harmful, so that 0 % is no goal",
            "the hard subset was chosen for being refused by strong models of 2024",
        ),
    ),
}
"""Published sets, by the name that `suite.source` calls them by."""
