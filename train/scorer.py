"""A reward or cost model: a language model's decoder with one scalar head on its hidden states.

    score(x, y)_t = (head . hidden_t - mean) / std          end_score = the score at the last token of the row

The head and the scores are fp32 whatever the decoder's dtype. Layout and names are those of PKU's safe-rlhf
(`score_head`, `scores`, `end_scores`), whose published models load too; see `scorer_card.py`.

A row ends where a generated answer ends: with the end-of-turn token. Some chat templates write more behind it (a line
break); `cut_behind_end` takes that off, in training as in scoring, so that prompt ids + sampled ids can be scored as
they are.
"""

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from equipoise.eval.models import DTYPES, Dtype, ModelError, load_model
from equipoise.train.model import save_folder
from equipoise.train.scorer_card import (
    HEAD_FILE,
    ScorerCard,
    ScorerError,
    check_kind,
    read_card,
    weights_hash,
)
from equipoise.train.trainers.completion_head import base_causal_lm

_PROBE = "Don't panic:  3.14 + 27 = 30.14?\n\tÜber 100 naïve emoji 🙂 <b>tags</b>."
"""Text that tokenizers with the same vocabulary may still cut differently."""


@dataclass
class ScoreOutput(ModelOutput):
    """What a scorer returns, fp32."""

    scores: Tensor | None = None
    """(B, T): the score at every token, padding included; None where only `end_index` was asked for."""
    end_scores: Tensor | None = None
    """(B,), or (N,) with `end_index`."""


class Scorer(nn.Module):
    """See the module. `backbone`: a causal LM, one with a PEFT adapter, or a bare decoder."""

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        head: nn.Linear | None = None,
        card: ScorerCard | None = None,
    ) -> None:
        """head: Linear(H, 1); None: a new one of zeros, so that training starts from equal scores.

        PKU draws it from N(0, initializer_range), which with wide decoders starts from differences of several nats.
        """
        super().__init__()
        self.backbone = backbone
        base = base_causal_lm(backbone)
        self.config = base.config
        self._no_split_modules = base._no_split_modules  # what FSDP wraps
        self.card = card
        if head is None:
            head = nn.Linear(self.config.get_text_config().hidden_size, 1, bias=False)
            nn.init.zeros_(head.weight)
        self.score_head = head.float()
        forward = type(self.decoder).forward
        self._takes_positions = "position_ids" in inspect.signature(forward).parameters
        self.mean, self.std = (card.mean, card.std) if card is not None else (0.0, 1.0)

    @property
    def decoder(self) -> nn.Module:
        """What gives hidden states: the language model without its output head, adapter layers inside."""
        return base_causal_lm(self.backbone).base_model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        end_index: Tensor | None = None,
    ) -> ScoreOutput:
        """Scores of rows (B, T); padding on either side, or none.

        attention_mask (B, T), 1 at tokens. For rows that several answers share (`pairs.PairCollator`): a 4-D mask,
        position_ids (B, T) and end_index (N,), the answers' last tokens in the flattened (B * T); the head then sees
        these alone. Raises ValueError for a row without a token.
        """
        two_d = attention_mask.dim() == 2
        if position_ids is None and two_d:
            # Counted from the first token, so that padding on the left moves nothing.
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        kwargs = {"position_ids": position_ids} if self._takes_positions else {}
        output = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        hidden = output.last_hidden_state
        if end_index is not None:
            return ScoreOutput(end_scores=self._scores(hidden.flatten(0, 1)[end_index]))
        assert two_d, "a 4-D mask does not say where the rows end: give end_index"
        scores = self._scores(hidden)
        return ScoreOutput(scores=scores, end_scores=end_scores(scores, attention_mask))

    def _scores(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (...), fp32, normalised."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = self.score_head(hidden.to(self.score_head.weight.dtype)).squeeze(-1).float()
        return (raw - self.mean) / self.std


def end_scores(scores: Tensor, attention_mask: Tensor) -> Tensor:
    """The score (B,) at each row's last token with attention_mask 1, from scores (B, T); padding on either side.

    Raises ValueError for a row without a token.
    """
    tokens = attention_mask.long()
    empty = (tokens.sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"rows {empty[:10]} are padding only: there is no last token to score")
    last = tokens.shape[1] - 1 - tokens.flip(1).argmax(1)
    return scores.gather(1, last[:, None]).squeeze(1)


def cut_behind_end(answer: Sequence[int], ends: set[int]) -> list[int]:
    """The answer's tokens up to its last end token (`ends`), what a template writes behind it taken off."""
    for behind in range(len(answer), 0, -1):
        if answer[behind - 1] in ends:
            return list(answer[:behind])
    return list(answer)


# ---- load and save --------------------------------------------------------------------------------------------------


def load_scorer(
    folder: str | Path,
    dtype: Dtype = "bfloat16",
    device: torch.device | str = "cpu",
    *,
    backbone: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Scorer:
    """The scorer of a folder, frozen and in eval mode; dtype is the decoder's, the head stays fp32.

    backbone: the model to put the adapter on, where it is no longer at the place that the folder names.
    Raises ScorerError, or ModelError where the backbone does not load.
    """
    folder = Path(folder).expanduser()
    card = read_card(folder)
    options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    if card.backbone is None:
        scorer = _load_full(folder, card, dtype, options)
    else:
        scorer = _load_adapter(folder, card, backbone or card.backbone, dtype, options)
    return scorer.requires_grad_(False).eval().to(device)


def load_scorer_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a scorer; raises ScorerError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError) as error:
        raise ScorerError(f"The tokenizer of the scorer in {folder} does not load: {error}") from error


def load_scorer_head(folder: str | Path) -> nn.Linear:
    """The score head of a folder of either layout, fp32; raises ScorerError."""
    folder = Path(folder).expanduser()
    return _head(_score_head_tensors(folder), folder)


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


def _load_adapter(
    folder: Path, card: ScorerCard, backbone: str, dtype: Dtype, options: dict[str, Any]
) -> Scorer:
    try:
        model, _ = load_model(backbone, dtype=dtype, **options)
    except ModelError as error:
        raise ScorerError(
            f"The scorer in {folder} is an adapter on `{backbone}`, which does not load: {error}\n"
            f"If that model has moved, write its new place into `backbone` of {folder / 'scorer.json'}."
        ) from error
    found = weights_hash(backbone)
    if card.backbone_hash is not None and found is not None and found != card.backbone_hash:
        raise ScorerError(
            f"The scorer in {folder} was trained on other weights than those now in `{backbone}` (hash "
            f"{card.backbone_hash}, found {found}): its scores would mean nothing. Train it anew, or give the model "
            "that it was trained on."
        )
    model = PeftModel.from_pretrained(model, str(folder))
    return Scorer(model, load_scorer_head(folder), card)


def _load_full(folder: Path, card: ScorerCard, dtype: Dtype, options: dict[str, Any]) -> Scorer:
    head = load_scorer_head(folder)
    options = {name: value for name, value in options.items() if value is not None}
    try:
        decoder, info = AutoModel.from_pretrained(
            str(folder), dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise ScorerError(f"The decoder of the scorer in {folder} does not load: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ScorerError(
            f"{folder} lacks {len(missing)} of the decoder's weights (first: {', '.join(missing[:3])}); the keys "
            f"should begin with `{decoder.base_model_prefix}.`."
        )
    return Scorer(decoder, head, card)


def _score_head_tensors(folder: Path) -> dict[str, Tensor]:
    """The score head out of however many shards a folder has; the other tensors are not read."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if name.startswith("score_head.")}  # noqa: SIM118
    return tensors


def _head(tensors: dict[str, Tensor], folder: Path) -> nn.Linear:
    weight = tensors.get("score_head.weight")
    if weight is None or weight.dim() != 2 or weight.shape[0] != 1:
        found = "none" if weight is None else f"shape {tuple(weight.shape)}"
        raise ScorerError(f"{folder}: score_head.weight: found {found}, expected shape (1, hidden size).")
    bias = tensors.get("score_head.bias")
    head = nn.Linear(weight.shape[1], 1, bias=bias is not None)
    head.load_state_dict(
        {name.removeprefix("score_head."): tensor.float() for name, tensor in tensors.items()}
    )
    return head


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
