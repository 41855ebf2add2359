"""What a folder with a reward or cost model says about itself; read without loading a weight.

Two layouts, both in safetensors:

    adapter    adapter_config.json, adapter_model.safetensors (PEFT's), score_head.safetensors, scorer.json, tokenizer
    full       config.json, *.safetensors with the decoder's `model.*` beside `score_head.*`, tokenizer: what PKU's
               safe-rlhf publishes (`LlamaForScore`); ours have a scorer.json too

`scorer.json` beats `config.json`: a published folder that names itself wrongly is put right by a file of one line,
`{"kind": "cost"}` (the config.json of beaver-7b-v1.0-cost says `"score_type": "reward"`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside

KINDS = ("reward", "cost")
CARD_FILE = "scorer.json"
HEAD_FILE = "score_head.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_FORMAT = 1


class ScorerError(EquipoiseError):
    """A reward or cost model that cannot be read, or is not the one that is needed."""


@dataclass(frozen=True)
class ScorerCard:
    """See the module."""

    kind: str
    """reward (higher is better) | cost (higher is worse, above 0 is unsafe)."""
    backbone: str | None = None
    """The model folder (or hub id) that the adapter belongs on; None: the folder is complete."""
    backbone_hash: str | None = None
    """Of the backbone's weight files, so that another model in the same place is noticed; None: not a folder."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer (`scorer.tokenizer_fingerprint`); None: made elsewhere."""
    mean: float = 0.0
    """Taken off every score; always 0 for a cost, whose sign says safe or unsafe."""
    std: float = 1.0
    """What a score is divided by, then; both are 0 and 1 where the scores are not normalised."""

    def write(self, folder: Path) -> None:
        """Write the folder's `scorer.json`."""
        write_aside(folder / CARD_FILE, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")


def read_card(folder: str | Path) -> ScorerCard:
    """The card of a scorer folder, of ours or of PKU's layout; raises ScorerError that says what is missing."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ScorerError(
            f"No folder `{folder}`; expected one that a reward_model or cost_model stage wrote, or a local copy of a "
            "published score model (`hf download OWNER/NAME --local-dir FOLDER`)."
        )
    found = sorted(path.name for path in folder.iterdir())
    if not any(name.endswith(".safetensors") for name in found):
        pickled = [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
        raise ScorerError(
            f"{folder} has pickled weights only ({', '.join(pickled[:3])}), which are not read: they can run code. "
            "If you trust them: `safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)`."
            if pickled
            else f"{folder} holds no *.safetensors; expected a scorer folder ({_LAYOUTS})."
        )
    ours = _json(folder / CARD_FILE)
    config = _json(folder / "config.json")
    if ADAPTER_CONFIG in found:
        for name in (ADAPTER_FILE, HEAD_FILE, CARD_FILE):
            if name not in found:
                raise ScorerError(f"{folder} has {ADAPTER_CONFIG} but no {name}: expected {_LAYOUTS}.")
    elif not config:
        raise ScorerError(f"{folder} has neither {ADAPTER_CONFIG} nor config.json: expected {_LAYOUTS}.")
    return _merged(folder, ours, config, adapter=ADAPTER_CONFIG in found)


def check_kind(card: ScorerCard, kind: str, where: str) -> None:
    """Raise ScorerError unless the scorer is of this kind; `where`: what names it, for the message."""
    if card.kind == kind:
        return
    raise ScorerError(
        f"{where} is a {card.kind} model, expected a {kind} model"
        + (" (a cost is high for what is unsafe, a reward for what is good)" if kind in KINDS else "")
        + f". If the folder names itself wrongly, put `{json.dumps({'kind': kind})}` into its {CARD_FILE}."
    )


def weights_hash(folder: str | Path) -> str | None:
    """Hash of a model folder's *.safetensors files; None where there is none (a hub id)."""
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


_LAYOUTS = (
    f"{ADAPTER_CONFIG}, {ADAPTER_FILE}, {HEAD_FILE} and {CARD_FILE}, or config.json and *.safetensors with a "
    "score_head.weight in them"
)


def _merged(folder: Path, ours: Mapping[str, Any], config: Mapping[str, Any], adapter: bool) -> ScorerCard:
    kind = ours.get("kind", config.get("score_type"))
    if kind not in KINDS:
        raise ScorerError(
            f"{folder}: `kind` in {CARD_FILE} (or `score_type` in config.json) is {kind!r}, expected one of "
            f"{', '.join(KINDS)}. Put `{json.dumps({'kind': 'reward'})}` or `{json.dumps({'kind': 'cost'})}` into its "
            f"{CARD_FILE}."
        )
    if ours.get("format", _FORMAT) != _FORMAT:
        raise ScorerError(
            f"{folder / CARD_FILE}: format {ours['format']!r}, this release reads {_FORMAT}; train the scorer anew."
        )
    mean, std = ours.get("mean", 0.0), ours.get("std", 1.0)
    if not ours and config.get("do_normalize"):
        mean = (config.get("mean") or [0.0])[0] if kind == "reward" else 0.0
        std = (config.get("var") or [1.0])[0] ** 0.5
    if not std > 0:
        raise ScorerError(f"{folder}: the scores' standard deviation is {std!r}, expected a number above 0.")
    if adapter and not ours.get("backbone"):
        raise ScorerError(
            f"{folder / CARD_FILE} names no `backbone`, the model folder its adapter belongs on."
        )
    return ScorerCard(
        kind=kind,
        backbone=ours.get("backbone") if adapter else None,
        backbone_hash=ours.get("backbone_hash"),
        tokenizer=ours.get("tokenizer"),
        mean=float(mean),
        std=float(std),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ScorerError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ScorerError(f"{path}: found {type(values).__name__}, expected an object with keys")
    return values
