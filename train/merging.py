"""Linear merging of two models, tensor by tensor from their files: never is a whole model in memory.

    merged = (1 - w) first + w second        w: the share of `second`, in [0, 1]

computed in fp32 and rounded once to the weights' dtype; w = 0 and w = 1 are the inputs themselves, bit by bit. P-SACPO
(Wachi et al. 2404.11049) merges what its two stages leave with w = 0.25, 0.5, 0.75.

Adapters are merged as what they add to the weights, (1 - w) B1 A1 + w B2 A2. A mean of the factors would be wrong, for
(B1 + B2)(A1 + A2) has mixed terms that neither model has; PEFT's `add_weighted_adapter` does that as "linear", and
what is done here as "cat": factors side by side, exact, of rank r1 + r2. Here it needs no model in memory.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from equipoise.data.errors import EquipoiseError
from equipoise.eval.models import load_tokenizer
from equipoise.train.scorer import tokenizer_fingerprint

SHARD_BYTES = 4 * 2**30
"""Largest file of merged weights, and so what merging takes in memory."""

_ADAPTER_FILE, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
)
_FLOATS = ("F64", "F32", "F16", "BF16")
"""What can be averaged; anything else is part of a quantised model, or an index."""
_MAY_DIFFER = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "tie_word_embeddings",
)
"""Of config.json: says nothing of the architecture, or shows in the tensors themselves."""


class MergeError(EquipoiseError):
    """Two models that cannot be merged; nothing has been written."""


class Weights:
    """The tensors of a model folder, read one by one; raises MergeError where there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        else:
            files = list(folder.glob("model.safetensors"))
        if not files or not all(file.is_file() for file in files) or not (folder / "config.json").is_file():
            raise MergeError(
                f"{folder} is no model folder; expected config.json and model.safetensors, or all parts of its index. "
                "Give a stage, base, or a folder that from_pretrained loads (for an adapter: of=adapters)"
            )
        self._open = [safe_open(file, framework="pt") for file in files]
        self._file = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> list[str]:
        """In the files' order."""
        return list(self._file)

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape), without reading the tensor."""
        part = self._file[name].get_slice(name)
        return part.get_dtype(), tuple(part.get_shape())

    def tensor(self, name: str) -> Tensor:
        """Read from the file."""
        return self._file[name].get_tensor(name)

    @cached_property
    def num_bytes(self) -> dict[str, int]:
        """Of each tensor."""
        sizes = {}
        for name in self.names:
            dtype, shape = self.layout(name)
            bits = int("".join(c for c in dtype.partition("_")[0] if c.isdigit()) or 8)  # BF16, F8_E4M3, BOOL
            sizes[name] = torch.Size(shape).numel() * bits // 8
        return sizes

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))


def check_weights(first: Weights, second: Weights, *, trust_remote_code: bool = False) -> None:
    """Raise MergeError that says how the two models differ, unless they are of one architecture and tokenizer.

    trust_remote_code: of the tokenizers.
    """
    found = [
        f"config.json: {key} is {first.config[key]!r} and {second.config[key]!r}"
        for key in first.config.keys() & second.config.keys()
        if first.config[key] != second.config[key] and key not in _MAY_DIFFER and not key.endswith("token_id")
    ]
    mine, theirs = set(first.names), set(second.names)
    for here, there, names in ((first, second, mine - theirs), (second, first, theirs - mine)):
        if names:
            found.append(f"{len(names)} tensors of {here.folder} are not in {there.folder}: {_some(names)}")
    layouts = {name: (first.layout(name), second.layout(name)) for name in sorted(mine & theirs)}
    for what, place in (("dtype", 0), ("shape", 1)):
        differing = [name for name, (a, b) in layouts.items() if a[place] != b[place]]
        if differing:
            a, b = layouts[differing[0]]
            advice = " (save both in one, as model.dtype does)" if what == "dtype" else ""
            found.append(
                f"{len(differing)} tensors differ in {what}: {differing[0]} is {a[place]} and {b[place]}{advice}"
            )
    if not found:
        quantised = [name for name, (a, _) in layouts.items() if a[0] not in _FLOATS]
        if any(not _same_bits(first.tensor(name), second.tensor(name)) for name in quantised):
            found.append(f"{len(quantised)} tensors are no plain numbers (quantised?): {_some(quantised)}")
        tokenizers = [_fingerprint(model.folder, trust_remote_code) for model in (first, second)]
        if tokenizers[0] != tokenizers[1]:
            found.append("the tokenizers differ (vocabulary, special tokens or chat template)")
    if found:
        lines = "\n  ".join(sorted(found))
        raise MergeError(f"{first.folder} and {second.folder} cannot be merged:\n  {lines}")


def merge_weights(
    first: Weights, second: Weights, weight: float, target: Path, progress: Callable[[int, int], None]
) -> None:
    """Write (1 - weight) first + weight second into the folder `target`, with everything else that `first` has.

    Both must have passed `check_weights`. progress: (tensors done, of all).
    """

    def mixed(name: str) -> Tensor:
        a = first.tensor(name) if weight < 1 else None
        b = second.tensor(name) if weight > 0 else None
        if a is None or b is None or first.layout(name)[0] not in _FLOATS:
            same = b if a is None else a
            assert same is not None
            return same
        exact = torch.promote_types(a.dtype, torch.float32)
        return ((1 - weight) * a.to(exact) + weight * b.to(exact)).to(a.dtype)

    _write(first, target, mixed, progress)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in PEFT's layout."""

    folder: Path
    config: LoraConfig
    tensors: Mapping[str, Tensor]

    @classmethod
    def load(cls, model_folder: Path) -> "Adapter":
        """Of a folder with adapter_config.json, or of the `adapter/` beside a stage's model; raises MergeError."""
        places = [model_folder]
        if model_folder.name == "model":
            places.append(model_folder.with_name("adapter"))
        for folder in places:
            if (folder / _ADAPTER_CONFIG).is_file() and (folder / _ADAPTER_FILE).is_file():
                adapter = cls(folder, LoraConfig.from_pretrained(folder), load_file(folder / _ADAPTER_FILE))
                adapter._check_plain()
                return adapter
        where = " or ".join(map(str, places))
        raise MergeError(f"no adapter ({_ADAPTER_CONFIG}, {_ADAPTER_FILE}) in {where}; merge of=weights")

    @property
    def base(self) -> str:
        """The model it was trained on."""
        return str(self.config.base_model_name_or_path)

    @property
    def modules(self) -> list[str]:
        """What it changes, as the base's tensors are called without `.weight`."""
        return [
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            for name in self.tensors
            if name.endswith(".lora_A.weight")
        ]

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        rank = self.config.r**0.5 if self.config.use_rslora else self.config.r
        return float(self.config.lora_alpha / rank)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """(A (r, in), B (out, r)), fp32."""
        name = f"base_model.model.{module}.lora_"
        return self.tensors[f"{name}A.weight"].float(), self.tensors[f"{name}B.weight"].float()

    def delta(self, module: str) -> Tensor:
        """What it adds to the module's weight, fp32."""
        a, b = self.factors(module)
        added = (b @ a) * self.scaling
        return added.T if self.config.fan_in_fan_out else added

    def _check_plain(self) -> None:
        special = {name for name in self.tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))}
        if special or self.config.rank_pattern or self.config.alpha_pattern:
            what = f"tensors other than LoRA's A and B of linear layers ({_some(special)})" if special else ""
            what = what or "ranks or alphas of single layers (rank_pattern, alpha_pattern)"
            raise MergeError(f"the adapter in {self.folder} has {what}; merge of=weights")


def check_adapters(first: Adapter, second: Adapter) -> None:
    """Raise MergeError that says how the two adapters differ, unless they can be added up on one base."""
    found = []
    if first.base != second.base:
        reason = "what they add fits their own base only; merge of=weights, or train both from one"
        found.append(f"other base: {first.base} and {second.base} ({reason})")
    if first.config.r != second.config.r:
        found.append(f"other rank: {first.config.r} and {second.config.r} (merge of=weights)")
    if set(first.modules) != set(second.modules):
        found.append(f"other layers: {_some(set(first.modules) ^ set(second.modules))} in one of them only")
    both = first.tensors.keys() & second.tensors.keys()
    shapes = [name for name in both if first.tensors[name].shape != second.tensors[name].shape]
    if shapes and first.config.r == second.config.r:
        found.append(f"other shapes: {_some(shapes)}")
    if found:
        lines = "\n  ".join(found)
        raise MergeError(f"the adapters in {first.folder} and {second.folder} cannot be merged:\n  {lines}")


def check_on_base(adapter: Adapter, base: Weights) -> None:
    """Raise MergeError unless every layer that the adapter changes is a weight of the base."""
    missing = {f"{module}.weight" for module in adapter.modules} - set(base.names)
    if missing:
        raise MergeError(
            f"{len(missing)} layers of the adapter in {adapter.folder} have no weight of that name in {base.folder}: "
            f"{_some(missing)}; merge of=weights"
        )
    quantised = [m for m in adapter.modules if base.layout(f"{m}.weight")[0] not in _FLOATS]
    if quantised:
        raise MergeError(
            f"{base.folder}: {_some(quantised)} are no plain numbers (quantised?), and nothing can be added to them; "
            "merge onto the unquantised model"
        )


def merge_adapters(first: Adapter, second: Adapter, weight: float, target: Path) -> None:
    """Write an adapter with the delta (1 - weight) first + weight second into the folder `target`.

    Both must have passed `check_adapters`. Its rank is the sum of theirs; weights 0 and 1 give the input's own files.
    """
    if weight in (0, 1):
        shutil.copytree(second.folder if weight else first.folder, target, dirs_exist_ok=True)
        return
    tensors = {}
    for module in first.modules:
        parts = [
            (share * adapter.scaling, *adapter.factors(module))
            for share, adapter in ((1 - weight, first), (weight, second))
        ]
        name = f"base_model.model.{module}.lora_"
        tensors[f"{name}A.weight"] = torch.cat([scale * a for scale, a, _ in parts])
        tensors[f"{name}B.weight"] = torch.cat([b for _, _, b in parts], dim=1).contiguous()
    config = LoraConfig.from_pretrained(first.folder)
    config.r = config.lora_alpha = first.config.r + second.config.r  # the scaling is in the factors
    config.use_rslora = False
    config.save_pretrained(target)
    save_file(tensors, target / _ADAPTER_FILE, metadata={"format": "pt"})


def add_adapters(
    base: Weights,
    shares: Sequence[tuple[float, Adapter]],
    target: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Write the base with each adapter's delta times its share into the folder `target`."""
    changed = {f"{module}.weight": module for _, adapter in shares for module in adapter.modules}

    def mixed(name: str) -> Tensor:
        before = base.tensor(name)
        if name not in changed:
            return before
        deltas = [share * adapter.delta(changed[name]) for share, adapter in shares if share]
        return (before.float() + torch.stack(deltas).sum(0)).to(before.dtype)

    _write(base, target, mixed, progress)


def _write(
    like: Weights, target: Path, tensor: Callable[[str], Tensor], progress: Callable[[int, int], None]
) -> None:
    """A model folder with the tensors that `tensor` gives by name, and all else that `like` has."""
    target.mkdir(parents=True, exist_ok=True)
    for file in like.folder.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copy2(file, target / file.name)
    plan = split_state_dict_into_shards_factory(
        like.num_bytes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    done = 0
    for filename, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = tensor(name).contiguous()
            done += 1
            progress(done, len(like.names))
        save_file(tensors, target / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _fingerprint(folder: Path, trust_remote_code: bool) -> str:
    return tokenizer_fingerprint(load_tokenizer(str(folder), trust_remote_code=trust_remote_code))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
