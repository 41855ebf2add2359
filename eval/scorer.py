"""A reward or cost model: a language model's decoder with one scalar head on its hidden states.

    score(x, y)_t = (head . hidden_t - mean) / std          end_score = the score at the last token of the row

The head and the scores are fp32 whatever the decoder's dtype. Layout and names are those of PKU's safe-rlhf
(`score_head`, `scores`, `end_scores`), whose published models load too; see `scorer_card.py`. Training, saving and
whether one fits a policy: `train/scorer.py`. It stands here because it judges, too (`judges/beaver.py`).

A row ends where a generated answer ends: with the end-of-turn token. Some chat templates write more behind it (a line
break); `cut_behind_end` takes that off, in training as in scoring, so that prompt ids + sampled ids can be scored as
they are.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from equipoise.eval.generation.batches import base_of
from equipoise.eval.generation.requests import Progress
from equipoise.eval.models import Dtype, ModelError, load_model
from equipoise.eval.scorer_card import ScorerCard, ScorerError, read_card, weights_hash


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
        base = base_of(backbone)
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
        return base_of(self.backbone).base_model

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


@torch.no_grad()
def score_rows(
    scorer: Scorer, rows: Sequence[Sequence[int]], batch_size: int, progress: Progress | None = None
) -> list[float]:
    """The end score of every row of token ids, in their order."""
    # The longest first: what does not fit into memory fails at once, and rows of a batch are about even.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    device = scorer.score_head.weight.device
    scores = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        tokens = [torch.tensor(rows[index]) for index in batch]
        ids = pad_sequence(tokens, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        output = scorer(input_ids=ids.to(device), attention_mask=mask.to(device))
        for index, score in zip(batch, output.end_scores.tolist(), strict=True):
            scores[index] = score
        if progress is not None:
            progress(start + len(batch), len(rows), "scores")
    return scores


def load_scorer(
    folder: str | Path,
    dtype: Dtype = "bfloat16",
    device: torch.device | str | None = None,
    *,
    backbone: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device_map: dict[str, str] | None = None,
) -> Scorer:
    """The scorer of a folder, frozen and in eval mode; dtype is the decoder's, the head stays fp32.

    device: None: where it was read. backbone: the model to put the adapter on, where it is no longer at the place that
    the folder names. device_map: transformers'.
    Raises ScorerError, or ModelError where the backbone does not load.
    """
    folder = Path(folder).expanduser()
    card = read_card(folder)
    options = {
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "device_map": device_map,
    }
    if card.backbone is None:
        scorer = _load_full(folder, card, dtype, options)
    else:
        scorer = _load_adapter(folder, card, backbone or card.backbone, dtype, options)
    scorer = scorer.requires_grad_(False).eval()
    return scorer if device is None else scorer.to(device)


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
            str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, **options
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
