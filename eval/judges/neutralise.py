"""Text that cannot steer a judge: whatever a template would read as its own mark is broken by a visible dot.

A judge reads what the model under test wrote inside a prompt of its own. Written there, `[/INST] safe` or `<|im_end|>`
ends the judge's question and answers it. Here every control token, section mark and role mark of the families below
gets a `·` inside (`<·|im_end|>`, `[·/INST]`, `END· CONVERSATION`, `User·:`), and nothing else is touched: take the
dots out, and the text is what it was.

Marks are looked for behind compatibility forms and look-alikes (full-width or angle brackets, Cyrillic and Greek
letters, accents) and across characters that don't show (zero-width, soft hyphen, control characters).

Families: Llama 2, Mistral (`[INST]`, `<<SYS>>`, `[TOOL_CALLS]`, `<s>`), ChatML, Qwen, Phi, Llama 3 and 4, Granite and
harmony (`<|...|>`), DeepSeek (`<｜...｜>`), Gemma (`<start_of_turn>`, `<|turn>`), T5, InternLM 2, GLM; reasoning
(`<think>`); the section marks of Llama Guard, MD-Judge, WildGuard, ShieldGemma, HarmBench, BingoGuard, DynaGuard,
StrongREJECT, Granite Guardian, beaver; the answers of DynaGuard, Granite Guardian, MD-Judge, Qwen3Guard, WildGuard.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

BREAK = "·"
"""What is put inside a mark: visible, one character, part of no known mark."""

_TAGS = (
    # Vocabulary of sentencepiece models, Gemma, T5, InternLM.
    r"s|bos|eos|pad|unk|mask|eod|eop|eoh|eoa|eom|sep|cls|start_of_turn|end_of_turn|start_of_image|end_of_image"
    r"|image_soft_token|extra_id_\d+|unused\d+|SPECIAL_\d+|TOKENS_UNUSED_\d+|SYS|sys"
    # Reasoning, tools, answers of judges (DynaGuard, Granite Guardian).
    r"|think|no-think|thinking|reasoning|answer|score|explanation|rules|transcript|guardian|tools|tool_calls?"
    r"|tool_response|tool_result|im_start|im_end"
)
_BRACKETS = (
    r"INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|MODEL_SETTINGS|ARGS|CALL_ID|THINK"
    r"|IMG|IMG_BREAK|IMG_END|AUDIO|BEGIN_AUDIO|PREFIX|SUFFIX|MIDDLE|control_\d+|gMASK|sMASK|sop|eop"
    r"|UNUSED_TOKEN_\d+|BOS|EOS|PAD|REASONING|RESULT|UNSAFE CATEGORY"
)
_ROLES = (
    r"user|agent|human|human user|ai|ai assistant|assistant|bot|chatbot|chatbot response|human question|system"
    r"|behavior|generation|answers?|query|response|user instruction|ai model response|criteria|scoring schema"
)
_FIELDS = (
    r"safety|result|verdict|judge?ment|violation|harmful request|response refusal|harmful response|refusal"
    r"|unsafe category|categories"
)
_VALUES = r"(?:safe|unsafe|controversial|yes|no|n/?a|none|pass|fail|true|false|[01])\b"

_GAP = r"[ \t_-]{1,4}"
_SECTION = rf"(?:OF{_GAP})?(?:THE{_GAP})?(?:CONVERSATION|UNSAFE{_GAP}CONTENT|SAFETY{_GAP}(?:POLICY|POLICIES))"

# The left half of a mark, followed by its right half: the dot goes between. Each begins with a fixed character, so that
# the search skips most of a text. No repetition is unbounded except at a line's start, and none can be entered in two
# ways, so that the time is linear.
_MARKS = (
    r"<(?=\|[^<>\n]{1,80}\|>)",  # <|im_end|>
    r"<(?=\|[^<>|\s]{1,80}>|[^<>|\s·]{1,80}\|>)",  # Gemma's <|turn> and <turn|>
    rf"<(?=[ \t]{{0,4}}/?[ \t]{{0,4}}(?:{_TAGS})[ \t]{{0,4}}/?>)",
    rf"\[(?=[ \t]{{0,4}}/?[ \t]{{0,4}}(?:{_BRACKETS})[ \t]{{0,4}}\])",
    r"\[(?=[ \t]{0,4}/[ \t]{0,4}(?i:inst)[ \t]{0,4}\])",
    rf"<(?=[ \t_-]{{0,4}}(?i:BEGIN|END){_GAP}(?i:CONVERSATION|UNSAFE{_GAP}CONTENT))",
    rf"END(?={_GAP}{_SECTION})",
    rf"BEGIN(?=(?:NING)?{_GAP}{_SECTION})",
    rf"\n[ \t>#*_`'\"\[-]*(?i:{_ROLES})[*_`'\"\]]{{0,3}}(?=[ \t]{{0,4}}:)",
    rf"\n[ \t>#*_`-]*(?i:{_FIELDS})[*_`]{{0,3}}(?=[ \t]{{0,4}}:[ \t*_`]{{0,4}}(?i:{_VALUES}))",
)

_BARE = {
    "<": "‹〈⟨❬❮˂ᐸ≺",
    ">": "›〉⟩❭❯˃ᐳ≻",
    "[": "【〔⟦〖❲",
    "]": "】〕⟧〗❳",
    "|": "∣│ǀ¦❘",
    ":": "꞉∶ː։",
    "/": "⁄∕⧸",
}
_LOOK_ALIKES = {ord(odd): plain for plain, odds in _BARE.items() for odd in odds} | {
    ord(odd): plain
    for odds, plains in (
        ("АВЕЅІЈКМНОРСТУХаеѕіјорсух", "ABESIJKMHOPCTYXaesijopcyx"),  # Cyrillic
        ("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧονι", "ABEZHIKMNOPTYXovi"),  # Greek
    )
    for odd, plain in zip(odds, plains, strict=True)
}
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that show nothing
_LINE_ENDS = dict.fromkeys(map(ord, "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), "\n")


def neutralise(text: str, special_tokens: Iterable[str] = ()) -> str:
    """Put a dot into every mark of a known template, and into `special_tokens`, the judge's own.

    Idempotent, and linear in the text's length. A special token of one character or of white space is left: it can't
    be broken.
    """
    pattern = _pattern(tuple(special_tokens))
    if text.isascii() and not _HIDDEN.search(text):
        return pattern.sub(rf"\g<0>{BREAK}", f"\n{text}")[1:]  # the first line has a start, too
    plain, positions = _plain(text)
    parts, done = [], 0
    for match in pattern.finditer(f"\n{plain}"):
        position = positions[match.end() - 2] + 1
        parts += [text[done:position], BREAK]
        done = position
    return "".join([*parts, text[done:]])


@cache
def _pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    own = {_plain(token)[0] for token in special_tokens if not token.isspace()}
    marks = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in sorted(own) if len(token) > 1]
    return re.compile("|".join([*_MARKS, *marks]))


def _plain(text: str) -> tuple[str, list[int]]:
    """The text as it looks, in plain characters, one for each that shows, and where each of them stands in `text`."""
    characters, positions = [], []
    for position, character in enumerate(text):
        shown = _shown(character)
        if shown:
            characters.append(shown)
            positions.append(position)
    return "".join(characters), positions


@cache
def _shown(character: str) -> str:
    """The plain character that this one looks like; empty where it does not show."""
    if ord(character) in _LINE_ENDS:
        return "\n"
    if character in "\t\n":
        return character
    plain = "".join(
        part
        for part in unicodedata.normalize("NFKD", character)
        if unicodedata.category(part) not in ("Cc", "Cf", "Mn", "Me") and part not in _BLANK
    )
    return (plain if len(plain) <= 1 else character).translate(_LOOK_ALIKES)
