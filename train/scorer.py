"""A reward or cost model saved, and whether it fits the policy; its forward and its loading are `eval/scorer.py`."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from equipoise.eval.scorer import Scorer, load_scorer_tokenizer
from equipoise.eval.scorer_card import HEAD_FILE, ScorerCard, ScorerError, check_kind, read_card, weights_hash
from equipoise.train.model import save_folder

_PROBE = "Don't panic:  3.14 + 27 = 30.14?\n\tÜber 100 naïve emoji 🙂 <b>tags</b>."
"""Text that tokenizers with the same vocabulary may still cut differently."""


# ---- save -----------------------------------------------------------------------------------------------------------


def save_scorer(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: ScorerCard,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Save a scorer folder, aside and renamed: the adapter layout for a PEFT backbone, else the full one.

    state: the scorer's state dict where parameters are sharded (gathered by accelerate); None: its own. The card's
    tokenizer fingerprint and backbone hash are filled in here.
    """
    state = scorer.state_dict() if state is None else state
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "score_head": {}}
    for name, tensor in state.items():
        module, _, rest = name.partition(".")
        parts[module][rest] = tensor.detach().cpu().contiguous()
    head = {f"score_head.{name}": tensor for name, tensor in parts["score_head"].items()}
    is_adapter = isinstance(scorer.backbone, PeftModel)
    assert is_adapter == (card.backbone is not None)
    card = replace(
        card,
        tokenizer=tokenizer_fingerprint(tokenizer),
        backbone_hash=weights_hash(card.backbone) if card.backbone is not None else None,
    )

    def write(aside: Path) -> None:
        if is_adapter:
            _write_adapter(scorer.backbone, parts["backbone"], aside, str(card.backbone))
            save_file(head, aside / HEAD_FILE, metadata={"format": "pt"})
        else:
            _write_full(scorer, parts["backbone"], head, aside, card)
        tokenizer.save_pretrained(aside)
        card.write(aside)

    save_folder(folder, write)


def _write_adapter(model: PeftModel, state: dict[str, Tensor], folder: Path, backbone: str) -> None:
    config = model.peft_config["default"]
    # The embeddings are the backbone's: PEFT need not look up (on the hub) whether they were resized.
    adapter = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    before = config.base_model_name_or_path, config.inference_mode
    config.base_model_name_or_path, config.inference_mode = backbone, True
    config.save_pretrained(str(folder))
    config.base_model_name_or_path, config.inference_mode = before


def _write_full(
    scorer: Scorer, state: dict[str, Tensor], head: dict[str, Tensor], folder: Path, card: ScorerCard
) -> None:
    """The keys and config fields of PKU's `LlamaForScore` (here for any decoder)."""
    decoder = scorer.decoder
    assert isinstance(decoder, PreTrainedModel)
    prefix = decoder.base_model_prefix
    whole = {f"{prefix}.{name}": tensor for name, tensor in state.items()} | head
    config = scorer.config.to_dict() | {
        "architectures": [type(decoder).__name__.removesuffix("Model") + "ForScore"],
        "score_type": card.kind,
        "score_dim": 1,
        "score_bias": "score_head.bias" in head,
        "do_normalize": (card.mean, card.std) != (0.0, 1.0),
        "normalizer_type": None,
        "mean": [card.mean],
        "var": [card.std**2],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_torch_state_dict(whole, folder)  # in shards where it is large


# ---- does it belong to the policy? ----------------------------------------------------------------------------------


def check_scorer(
    folder: str | Path, kind: str, tokenizer: PreTrainedTokenizerBase, where: str = "The scorer"
) -> ScorerCard:
    """The card of a scorer of this kind (reward | cost) that reads the policy's tokens; loads no weights.

    where: what names the folder (a recipe's key), for the message. Raises ScorerError.
    """
    card = read_card(folder)
    check_kind(card, kind, f"{where}: {folder}")
    if card.tokenizer is None or card.tokenizer != tokenizer_fingerprint(tokenizer):
        check_same_tokenizer(load_scorer_tokenizer(folder), tokenizer, f"{where}: {folder}")
    return card


def check_same_tokenizer(
    theirs: PreTrainedTokenizerBase, policys: PreTrainedTokenizerBase, where: str
) -> None:
    """Raise ScorerError, naming what differs, unless the policy's tokens mean the same to the scorer.

    Tokens that only the scorer has (an added pad token) do no harm. A scorer without a chat template (PKU's published
    ones) is not compared by template.
    """
    differences = _differences(theirs, policys)
    if differences:
        raise ScorerError(
            f"{where} was trained with another tokenizer than the policy's, so it would misread what the policy "
            f"writes: {'; '.join(differences)}. Train the scorer from this policy (stages reward_model, cost_model), "
            "or take a scorer and a policy of the same family."
        )


def _differences(theirs: PreTrainedTokenizerBase, policys: PreTrainedTokenizerBase) -> list[str]:
    vocabulary = theirs.get_vocab()
    other = [t for t, i in policys.get_vocab().items() if vocabulary.get(t) != i and t != policys.pad_token]
    found = []
    if other:
        examples = ", ".join(f"{token!r}" for token in sorted(other)[:3])
        found.append(
            f"{len(other)} of the policy's {len(policys)} tokens are missing or have another number (first: {examples})"
        )
    elif theirs.encode(_PROBE, add_special_tokens=False) != policys.encode(_PROBE, add_special_tokens=False):
        found.append("the same vocabulary, but text is cut differently")
    if theirs.eos_token != policys.eos_token:
        found.append(f"the end token is {theirs.eos_token!r}, the policy's is {policys.eos_token!r}")
    if theirs.chat_template is not None and theirs.chat_template != policys.chat_template:
        found.append("the chat template is another one")
    return found


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all by which two tokenizers can differ for a scorer: vocabulary, cuts, special tokens, chat template."""
    parts: Any = [
        sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]),
        tokenizer.encode(_PROBE, add_special_tokens=False),
        tokenizer.eos_token,
        tokenizer.pad_token,
        tokenizer.chat_template,
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
