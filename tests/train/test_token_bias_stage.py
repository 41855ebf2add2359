from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

from equipoise.data.sources import SafetyData
from equipoise.eval.generation.engine import GenerationSettings, generate
from equipoise.eval.generation.tsdi import TokenBias, TSDISettings, estimate_token_bias
from equipoise.eval.models import ModelError, load_model
from equipoise.train.recipe import ModelConfig, Recipe, RecipeError
from equipoise.train.recipe.loading import load_recipe
from equipoise.train.recipe.stages import TokenBiasStageConfig
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.stages.token_bias import run_token_bias

SMALL = TokenBiasStageConfig(num_prompts=4, num_positions=3, prompt_tokens=4, num_diagnosed=2)


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a folder's code into its cache before it runs it: not into the user's."""
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub", "transformers.utils"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.fixture
def context(
    tmp_path: Path, tiny_model_folder: Path, make_data: Callable[..., SafetyData]
) -> Callable[..., StageContext]:
    def make(**finished: StageResult) -> StageContext:
        return StageContext(
            recipe=Recipe(
                name="run", model=ModelConfig(id=str(tiny_model_folder), dtype="float32"), stages={}
            ),
            data=make_data(),
            run_dir=tmp_path / "run",
            base_folder=str(tiny_model_folder),
            log=lambda *_: None,
            rewind=lambda *_: None,
            say=lambda _: None,
            progress=lambda *_: None,
            finished=finished,
        )

    return make


def shifted(model_folder: Path, folder: Path) -> Path:
    """The model with another last layer; its tokenizer is beside it."""
    model, tokenizer = load_model(str(model_folder), dtype="float32")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(-1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_one_backbone_measures_what_two_models_do(
    train_stage: Any, make_stage: Any, context: Any, tiny_model_folder: Path
) -> None:
    trained = train_stage(make_stage(num_steps=2, learning_rate=1e-2)).result
    two = run_token_bias("bias", SMALL, trained.model_folder, context())
    one = run_token_bias("bias", replace(SMALL, one_backbone=True), trained.model_folder, context())
    assert two.token_bias is not None
    assert one.token_bias is not None
    assert two.token_bias.bias.abs().max() > 0.01
    torch.testing.assert_close(one.token_bias.bias, two.token_bias.bias, atol=1e-4, rtol=0)
    assert one.model_folder == trained.model_folder


def test_one_backbone_needs_the_adapter_of_that_reference(
    train_stage: Any, make_stage: Any, context: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    stage = replace(SMALL, one_backbone=True)
    with pytest.raises(ModelError, match="needs an adapter in"):
        run_token_bias("bias", stage, str(tiny_model_folder), context())
    trained = train_stage(make_stage(num_steps=1)).result
    other = StageResult(str(shifted(tiny_model_folder, tmp_path / "other")), 0.0, {})
    with pytest.raises(ModelError, match=r"was trained on .* the reference is .*other"):
        run_token_bias(
            "bias", replace(stage, reference="earlier"), trained.model_folder, context(earlier=other)
        )


def test_an_earlier_stage_may_be_the_reference(context: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    policy = shifted(tiny_model_folder, tmp_path / "policy")
    itself = context(safe=StageResult(str(policy), 0.0, {}))
    against_itself = run_token_bias("bias", replace(SMALL, reference="safe"), str(policy), itself)
    assert against_itself.token_bias is not None
    assert not against_itself.token_bias.bias.any()
    run_token_bias("bias", replace(SMALL, alpha=[1.0, 0.5, 0.0]), str(policy), itself)
    expected = estimate_token_bias(
        load_model(str(policy), dtype="float32")[0],
        *load_model(str(tiny_model_folder), dtype="float32"),
        TSDISettings(num_prompts=4, num_positions=3, prompt_tokens=4),
    )
    saved = TokenBias.load(tmp_path / "run" / "stages" / "bias" / "token_bias.safetensors")
    assert torch.equal(saved.bias, expected.bias)
    assert saved.settings.alpha == (1.0, 0.5, 0.0)


def test_the_stages_folder_decodes_the_policy(context: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    policy = str(shifted(tiny_model_folder, tmp_path / "policy"))
    result = run_token_bias("bias", replace(SMALL, space="logit", alpha=20.0), policy, context())
    folder = tmp_path / "run" / "stages" / "bias"
    model, tokenizer = load_model(policy, dtype="float32")
    prompt = ({"role": "user", "content": "hello"},)
    inputs = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_tensors="pt")
    options = {"max_new_tokens": 3, "custom_generate": str(folder), "trust_remote_code": True}
    answer = model.generate(**inputs, **options, token_bias_file=folder / "token_bias.safetensors")
    (expected,) = generate(
        model, tokenizer, [prompt], GenerationSettings(max_new_tokens=3), result.token_bias
    )
    new = answer[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == expected.text
    assert answer.tolist() != model.generate(**inputs, max_new_tokens=3).tolist()


def test_the_stage_says_what_alpha_does_to_safety(
    context: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    policy = str(shifted(tiny_model_folder, tmp_path / "policy"))
    said: list[str] = []
    surroundings = replace(context(), say=said.append)
    result = run_token_bias("bias", replace(SMALL, alpha=0.7, num_diagnosed=6), policy, surroundings)
    forks: Any = result.facts["forks"]
    assert forks["num_prompts"] == 6
    assert 0 < forks["num_changed"] <= 6
    assert set(forks["kept_rate"]) >= {"0", "0.7", "1", "2"}
    assert f"with alpha 0.7, {forks['kept_rate']['0.7']:.0%} [" in said[-1]
    assert StageResult.from_json(result.to_json(), None).facts == result.facts
    result = run_token_bias("bias", replace(SMALL, num_diagnosed=0), policy, surroundings)
    assert "forks" not in result.facts
    assert len(said) == 1


def loaded(*overrides: str) -> Recipe:
    with initialize_config_module("equipoise.recipes", version_base="1.3"):
        return load_recipe(compose("config", list(overrides)))


def test_the_recipe_takes_one_alpha_a_position() -> None:
    stage = loaded("recipe=tsdi", "stages.token_bias.alpha=[1,1,1,1,0.5,0.5,0,0]").stages["token_bias"]
    assert stage.alpha == [1, 1, 1, 1, 0.5, 0.5, 0, 0]
    stage = loaded("recipe=tsdi", "stages.token_bias.reference=helpful").stages["token_bias"]
    assert stage.reference == "helpful"


def override_of(text: str) -> str:
    """`+key=value` or `key=value` of the stage."""
    return f"{'+' * text.startswith('+')}stages.token_bias.{text.removeprefix('+')}"


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["alpha=[1,2]"], "alpha", r"a list of num_positions=8 of them"),
        (["alpha=-1"], "alpha", r"found -1, expected a number of 0 or more"),
        (["alpha=true"], "alpha", r"found True"),
        (["alpha=[1,1,1,1,1,1,1,x]"], "alpha", r"expected a number of 0 or more"),
        (["reference=saef"], "reference", r"expected base, helpful, safe, or a model folder"),
        (["one_backbone=true"], "one_backbone", r"the adapter of 'safe' was trained on 'helpful'"),
        (
            ["one_backbone=true", "+start_from=base"],
            "one_backbone",
            r"the policy is 'base', which is no preference or kto stage",
        ),
    ],
)
def test_what_a_token_bias_stage_cannot_do(overrides: list[str], key: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=rf"stages\.token_bias\.{key}: .*{reason}"):
        loaded("recipe=tsdi", *[override_of(override) for override in overrides])


def test_one_backbone_in_a_recipe() -> None:
    assert loaded("recipe=tsdi", "stages.token_bias.one_backbone=true", "stages.token_bias.reference=helpful")
    with pytest.raises(RecipeError, match="leaves no adapter to switch off"):
        loaded("recipe=tsdi", "stages.token_bias.one_backbone=true", "model.lora.enabled=false")


def test_the_penalty_of_the_recipe() -> None:
    penalty = loaded("recipe=token_bias").stages["safe"].token_bias
    assert (penalty.coef, penalty.every, penalty.pool) == (1.0, 2, "vocabulary")
    with pytest.raises(RecipeError, match=r"stages\.safe\.token_bias\.path: has to be given with"):
        loaded("recipe=token_bias", "stages.safe.token_bias.pool=file")
