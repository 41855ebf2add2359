import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from equipoise.train.recipe import ModelConfig
from equipoise.train.reference_cache import cache_file, load, reference_key, save


def test_what_is_saved_is_loaded(cache: Path) -> None:
    path = cache_file("model", "data", "float32")
    assert cache in path.parents
    chosen, rejected = torch.tensor([-1.5, -2.5, 0.0]), torch.tensor([-3.0, -4.0, 1e-7])
    save(path, chosen, rejected)
    loaded = load(path, 3)
    assert loaded is not None
    assert torch.equal(loaded[0], chosen)
    assert torch.equal(loaded[1], rejected)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing was left aside


def test_what_cannot_be_used_is_computed_anew(cache: Path) -> None:
    path = cache_file("model", "data", "float32")
    assert load(path, 3) is None
    save(path, torch.zeros(3), torch.zeros(3))
    assert load(path, 4) is None  # of other pairs
    path.write_bytes(path.read_bytes()[:20])
    assert load(path, 3) is None  # torn
    path.write_bytes(b"")
    assert load(path, 3) is None


def test_model_data_and_dtype_name_the_file(cache: Path) -> None:
    paths = {
        cache_file(model, data, dtype)
        for model in ("a", "b")
        for data in ("c", "d")
        for dtype in ("float32", "bfloat16")
    }
    assert len(paths) == 8


def test_the_reference_is_known_by_its_files_and_how_they_are_quantised(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_folder, copy)
    config = ModelConfig()
    key = reference_key(str(tiny_model_folder), config)
    assert reference_key(str(copy), config) == key
    assert reference_key(str(copy), ModelConfig(quantization="nf4")) != key
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][0, 0] = torch.nextafter(weights[name][0, 0], torch.tensor(1.0))
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert reference_key(str(copy), config) != key  # the least change of a weight
