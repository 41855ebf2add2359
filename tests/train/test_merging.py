import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.train import merging
from equipoise.train.merging import (
    Adapter,
    MergeError,
    Weights,
    add_adapters,
    check_adapters,
    check_on_base,
    check_weights,
    merge_adapters,
    merge_weights,
)
from equipoise.train.model import save_adapter
from equipoise.train.recipe import ModelConfig, Recipe
from equipoise.train.recipe.stages import MergeStageConfig
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.stages.merge import run_merge


def silent(done: int, of: int) -> None:
    pass


def moved(model: Any, seed: int, scale: float = 0.1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model


@pytest.fixture
def make_folder(tmp_path: Path, tiny_model_folder: Path) -> Callable[..., Path]:
    """`make_folder(name, seed=..., dtype=..., change=...)`: the tiny model, moved; `change(model)` before saving."""

    def make(
        name: str,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        change: Callable[[Any], Any] | None = None,
    ) -> Path:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=dtype)
        model = moved(model, seed)
        if change is not None:
            model = change(model)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a
    )


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_of_0_and_1_are_the_inputs_and_a_half_is_the_mean(
    dtype: torch.dtype, make_folder: Any, tmp_path: Path
) -> None:
    first, second = make_folder("first", 1, dtype), make_folder("second", 2, dtype)
    a, b = tensors(first), tensors(second)
    check_weights(Weights(first), Weights(second))
    for weight in (0, 0.25, 0.5, 1):
        merge_weights(Weights(first), Weights(second), weight, tmp_path / f"{weight}", silent)
    assert same_bits(tensors(tmp_path / "0"), a)
    assert same_bits(tensors(tmp_path / "1"), b)
    for name, mean in tensors(tmp_path / "0.5").items():
        assert torch.equal(mean, ((a[name].double() + b[name].double()) / 2).to(dtype))
    for name, quarter in tensors(tmp_path / "0.25").items():
        torch.testing.assert_close(
            quarter.float(), 0.75 * a[name].float() + 0.25 * b[name].float(), atol=1e-2, rtol=0
        )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "0.5")
    assert model.dtype == dtype
    assert AutoTokenizer.from_pretrained(tmp_path / "0.5").chat_template


def test_large_models_are_written_in_parts_and_never_held_whole(
    make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_folder("first", 1), make_folder("second", 2)
    merge_weights(Weights(first), Weights(second), 0.5, tmp_path / "whole", silent)
    monkeypatch.setattr(merging, "SHARD_BYTES", 40_000)
    held: list[int] = []
    save = merging.save_file

    def watched(parts: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        held.append(sum(part.nbytes for part in parts.values()))
        save(parts, *args, **kwargs)

    monkeypatch.setattr(merging, "save_file", watched)
    progress: list[tuple[int, int]] = []
    merge_weights(
        Weights(first), Weights(second), 0.5, tmp_path / "parts", lambda done, of: progress.append((done, of))
    )
    assert len(held) > 2
    assert max(held) <= 40_000
    assert progress[-1] == (21, 21)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(held)
    assert same_bits(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in tensors(tmp_path / "whole").items())
    # And such folders are read, too.
    check_weights(Weights(tmp_path / "parts"), Weights(tmp_path / "whole"))


def test_models_that_do_not_fit_are_refused_with_the_reason(make_folder: Any, tmp_path: Path) -> None:
    first = make_folder("first", 1)

    def wider(model: Any) -> Any:
        model.resize_token_embeddings(264)
        return model

    def rotary(model: Any) -> Any:
        model.config.rms_norm_eps = 1e-3
        return model

    cases = {
        "vocab_size is 259 and 264": make_folder("wider", 2, change=wider),
        "rms_norm_eps is": make_folder("eps", 2, change=rotary),
        "tensors differ in dtype: lm_head.weight is F32 and BF16": make_folder("bf16", 2, torch.bfloat16),
    }
    tokenizer = make_folder("tokenizer", 2)
    other = AutoTokenizer.from_pretrained(tokenizer)
    other.chat_template = other.chat_template.replace("<|im_end|>", "<|im_end|> ")
    other.save_pretrained(tokenizer)
    cases["the tokenizers differ"] = tokenizer
    for reason, second in cases.items():
        with pytest.raises(MergeError, match="cannot be merged") as error:
            check_weights(Weights(first), Weights(second))
        assert reason in str(error.value)
    fewer = make_folder("fewer", 2, change=lambda model: model)
    kept = tensors(fewer)
    kept.pop("model.norm.weight")
    merging.save_file(kept, fewer / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"1 tensors of .*first are not in .*fewer: model\.norm\.weight"):
        check_weights(Weights(first), Weights(fewer))
    with pytest.raises(MergeError, match="is no model folder"):
        Weights(tmp_path)
    quantised = [make_folder(name, 2) for name in ("quantised", "quantised otherwise")]
    for value, folder in enumerate(quantised):
        kept = tensors(folder) | {"model.norm.weight": torch.full((32,), value, dtype=torch.int8)}
        merging.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        MergeError, match=r"1 tensors are no plain numbers \(quantised\?\): model\.norm\.weight"
    ):
        check_weights(*map(Weights, quantised))
    check_weights(Weights(quantised[0]), Weights(quantised[0]))
    (tmp_path / "model").mkdir()
    with pytest.raises(MergeError, match=r"no adapter .* in .*model or .*adapter; merge of=weights"):
        Adapter.load(tmp_path / "model")


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_adapter(tmp_path: Path, tiny_model_folder: Path) -> Callable[..., Path]:
    """`make_adapter(name, seed, r=..., ...)`: a stage's folder with `adapter/` and the merged `model/`."""

    def make(name: str, seed: int, base: Path = tiny_model_folder, **options: Any) -> Path:
        config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        save_adapter(model, str(base), tmp_path / name / "adapter")
        model.merge_and_unload().save_pretrained(tmp_path / name / "model")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / name / "model")
        return tmp_path / name / "model"

    return make


def test_merged_adapters_add_what_the_adapters_add(
    make_adapter: Any, tmp_path: Path, tiny_model_folder: Path
) -> None:
    first, second = Adapter.load(make_adapter("one", 1)), Adapter.load(make_adapter("two", 2))
    assert first.base == second.base == str(tiny_model_folder.resolve())
    check_adapters(first, second)
    base = Weights(tiny_model_folder)
    check_on_base(first, base)
    for weight in (0, 0.25, 1):
        folder = tmp_path / f"{weight}"
        merge_adapters(first, second, weight, folder / "adapter")
        add_adapters(base, ((1 - weight, first), (weight, second)), folder / "model", silent)
    # The ends are what the stages themselves merged and saved.
    assert same_bits(tensors(tmp_path / "0" / "model"), tensors(tmp_path / "one" / "model"))
    assert same_bits(tensors(tmp_path / "1" / "model"), tensors(tmp_path / "two" / "model"))
    assert same_bits(tensors(tmp_path / "0" / "adapter"), tensors(tmp_path / "one" / "adapter"))
    # Between them: the merged adapter loads in PEFT, gives the merged model, and is PEFT's own "cat".
    ids = torch.arange(20)[None]
    with torch.no_grad():
        mine = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model_folder), tmp_path / "0.25" / "adapter"
        )(ids).logits
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "0.25" / "model")(ids).logits
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model_folder), first.folder, adapter_name="one"
        )
        theirs.load_adapter(second.folder, adapter_name="two")
        theirs.add_weighted_adapter(["one", "two"], [0.75, 0.25], "both", combination_type="cat")
        theirs.set_adapter("both")
        torch.testing.assert_close(mine, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine, whole, atol=1e-4, rtol=1e-4)
    # The mean of the factors is something else: it has mixed terms.
    a = [adapter.factors(first.modules[0]) for adapter in (first, second)]
    mean_of_factors = ((a[0][1] + a[1][1]) / 2) @ ((a[0][0] + a[1][0]) / 2)
    mean_of_deltas = (a[0][1] @ a[0][0] + a[1][1] @ a[1][0]) / 2
    assert (mean_of_factors - mean_of_deltas).abs().max() > 0.01


def test_adapters_that_do_not_fit_are_refused_with_the_reason(
    make_adapter: Any, make_folder: Any, tmp_path: Path, tiny_model_folder: Path
) -> None:
    first = Adapter.load(make_adapter("first", 1))
    cases = {
        r"other rank: 4 and 8 \(merge of=weights\)": make_adapter("rank", 2, r=8),
        r"other layers: model\.layers\.0": make_adapter("layers", 2, target_modules=["q_proj"]),
        r"other base: .*tiny_model.* and .*chained.*train both from one": make_adapter(
            "chained", 2, base=make_folder("chained base", 3)
        ),
    }
    for reason, second in cases.items():
        with pytest.raises(MergeError, match=reason):
            check_adapters(first, Adapter.load(second))
    with pytest.raises(MergeError, match=r"no adapter .*merge of=weights"):
        Adapter.load(tiny_model_folder)
    dora = make_adapter("dora", 2, use_dora=True)
    with pytest.raises(MergeError, match="has tensors other than LoRA's A and B"):
        Adapter.load(dora)
    pattern = make_adapter("pattern", 2, rank_pattern={"q_proj": 2})
    with pytest.raises(MergeError, match="rank_pattern"):
        Adapter.load(pattern)
    rank_stable = Adapter.load(make_adapter("rslora", 2, use_rslora=True))
    assert rank_stable.scaling == 8 / math.sqrt(4)


# ---- the stage ------------------------------------------------------------------------------------------------------


def stage_context(tmp_path: Path, base: Path, finished: dict[str, Path], said: list[str]) -> StageContext:
    return StageContext(
        recipe=Recipe(name="run", stages={}, model=ModelConfig(id=str(base), dtype="float32")),
        data=None,  # type: ignore[arg-type]
        run_dir=tmp_path / "run",
        base_folder=str(base),
        log=lambda metrics, step, stage: None,
        rewind=lambda stage, step: None,
        say=said.append,
        progress=lambda *call: None,
        finished={name: StageResult(str(folder), 0.0, {}) for name, folder in finished.items()},
    )


def test_a_stage_leaves_a_model_for_every_share(
    make_adapter: Any, tmp_path: Path, tiny_model_folder: Path
) -> None:
    finished = {"helpful": make_adapter("helpful", 1), "safe": make_adapter("safe", 2)}
    said: list[str] = []
    context = stage_context(tmp_path, tiny_model_folder, finished, said)
    of_weights = run_merge("merged", MergeStageConfig(first="helpful", second="safe"), "unused", context)
    assert list(of_weights.variants) == ["0.25", "0.75", "0.5"]  # the one passed on is judged last
    assert of_weights.model_folder == of_weights.variants["0.5"]
    assert said[0] == "merged: 0.75 helpful + 0.25 safe"
    of_adapters = run_merge(
        "added", MergeStageConfig(first="helpful", second="safe", of="adapters"), "unused", context
    )
    for share, folder in of_weights.variants.items():
        added = tensors(Path(of_adapters.variants[share]))
        for name, weight in tensors(Path(folder)).items():
            torch.testing.assert_close(added[name], weight, atol=1e-6, rtol=1e-5)
        assert (Path(of_adapters.variants[share]).with_name("adapter") / "adapter_config.json").is_file()
    folders = MergeStageConfig(first="base", second=str(finished["safe"]), second_weights=[1.0], pass_on=1.0)
    to_safe = run_merge("folders", folders, "unused", context)
    assert same_bits(tensors(Path(to_safe.model_folder)), tensors(finished["safe"]))


def test_nothing_is_written_where_the_models_do_not_fit(
    make_adapter: Any,
    make_folder: Any,
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finished = {"helpful": make_adapter("helpful", 1), "safe": make_folder("safe", 2, torch.bfloat16)}
    context = stage_context(tmp_path, tiny_model_folder, finished, [])
    for of in ("weights", "adapters"):
        with pytest.raises(MergeError):
            run_merge("merged", MergeStageConfig(first="helpful", second="safe", of=of), "unused", context)
    assert not (tmp_path / "run").exists()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MergeError, match="GiB are free; fewer second_weights write less"):
        run_merge("merged", MergeStageConfig(first="helpful", second="base"), "unused", context)
    assert list((tmp_path / "run").rglob("*.safetensors")) == []
