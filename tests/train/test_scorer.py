import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.data.templates import encode_turns
from equipoise.eval.judges.base import Verdict
from equipoise.eval.judges.beaver import BeaverJudge
from equipoise.eval.models import load_model
from equipoise.eval.scorer import (
    Scorer,
    cut_behind_end,
    end_scores,
    load_scorer,
    load_scorer_tokenizer,
)
from equipoise.eval.scorer_card import ScorerCard, ScorerError, read_card
from equipoise.train.scorer import (
    check_same_tokenizer,
    check_scorer,
    save_scorer,
    tokenizer_fingerprint,
)

ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), two places of padding more than the longest row needs."""
    width = max(map(len, rows)) + 2
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64).unbind(0)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask


def random_head(bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(32, 1, bias=bias)


def with_adapter(model: LlamaForCausalLM) -> Any:
    """A LoRA adapter that changes something: B is not zero."""
    torch.manual_seed(2)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return peft


@pytest.fixture
def adapter_folder(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A cost model in the adapter layout."""
    model, tokenizer = load_model(str(tiny_model_folder), dtype="float32")
    scorer = Scorer(with_adapter(model), random_head())
    save_scorer(scorer, tokenizer, tmp_path / "scorer", ScorerCard("cost", backbone=str(tiny_model_folder)))
    return tmp_path / "scorer"


# ---- the score ------------------------------------------------------------------------------------------------------


def test_end_score_is_that_of_the_last_token_whatever_the_padding_side(tiny_model: LlamaForCausalLM) -> None:
    scorer = Scorer(tiny_model, random_head()).eval()
    with torch.no_grad():
        ends = [tiny_model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
        expected = torch.stack(ends) @ scorer.score_head.weight[0]
    for side in ("left", "right"):
        ids, mask = padded(ROWS, side)
        output = scorer(ids, mask)
        torch.testing.assert_close(output.end_scores, expected, atol=1e-5, rtol=1e-5)
        assert output.scores.shape == ids.shape
    for row, value in zip(ROWS, expected, strict=True):
        ids = torch.tensor([row])
        torch.testing.assert_close(
            scorer(ids, torch.ones_like(ids)).end_scores[0], value, atol=1e-5, rtol=1e-5
        )


def test_end_scores_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0]])
    assert end_scores(scores, mask).tolist() == [2.0, 6.0, 7.0]
    assert end_scores(scores, mask.bool()).tolist() == [2.0, 6.0, 7.0]


def test_a_row_of_padding_only_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\] are padding only"):
        end_scores(torch.zeros(2, 3), torch.tensor([[0, 1, 1], [0, 0, 0]]))


def test_scores_are_fp32_whatever_the_dtype(tiny_model: LlamaForCausalLM) -> None:
    scorer = Scorer(tiny_model.bfloat16(), random_head())
    ids, mask = padded(ROWS, "right")
    with torch.autocast("cpu", torch.bfloat16):
        output = scorer(ids, mask)
    assert output.scores.dtype == output.end_scores.dtype == torch.float32
    hidden = tiny_model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(output.scores[mask == 1], scorer.score_head(hidden.float())[..., 0][mask == 1])


def test_end_index_scores_these_places_alone(tiny_model: LlamaForCausalLM) -> None:
    scorer = Scorer(tiny_model, random_head())
    ids, mask = padded(ROWS, "right")
    whole = scorer(ids, mask)
    some = scorer(ids, mask, end_index=torch.tensor([4, 8]))
    assert some.scores is None
    torch.testing.assert_close(some.end_scores, whole.end_scores[:2])


def test_a_new_head_scores_zero(tiny_model: LlamaForCausalLM) -> None:
    assert not Scorer(tiny_model)(*padded(ROWS, "right")).scores.any()


def test_cut_behind_end() -> None:
    assert cut_behind_end([4, 5, 2, 9], {2}) == [4, 5, 2]
    assert cut_behind_end([4, 2, 5, 3, 9, 9], {2, 3}) == [4, 2, 5, 3]
    assert cut_behind_end([4, 5], {2}) == [4, 5]


# ---- folders --------------------------------------------------------------------------------------------------------


def test_adapter_layout_round_trip(adapter_folder: Path, tiny_model_folder: Path) -> None:
    assert {path.name for path in adapter_folder.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "score_head.safetensors",
        "scorer.json",
        "tokenizer.json",
    }
    assert load_file(adapter_folder / "score_head.safetensors")["score_head.weight"].shape == (1, 32)
    config = json.loads((adapter_folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model_folder)
    model, _ = load_model(str(tiny_model_folder), dtype="float32")
    expected = Scorer(with_adapter(model), random_head()).eval()(*padded(ROWS, "left")).scores
    scorer = load_scorer(adapter_folder, "float32")
    assert not any(parameter.requires_grad for parameter in scorer.parameters())
    assert scorer.card is not None
    assert scorer.card.kind == "cost"
    assert torch.equal(scorer(*padded(ROWS, "left")).scores, expected)
    plain = Scorer(load_model(str(tiny_model_folder), dtype="float32")[0], random_head())
    assert not torch.allclose(plain(*padded(ROWS, "left")).scores, expected, atol=1e-2)


def test_a_saved_cost_model_judges_by_the_sign_of_the_score_that_it_was_trained_on(
    adapter_folder: Path,
) -> None:
    judge = BeaverJudge.load(adapter_folder, "float32")
    prompts = [[{"role": "user", "content": text}] for text in ("What is nitre?", "How are you?", "x")]
    judgements = judge.judge(prompts, ["A salt.", "", "Well, thank you."])
    scorer, tokenizer = load_scorer(adapter_folder, "float32"), load_scorer_tokenizer(adapter_folder)
    for prompt, response, judgement in zip(
        prompts, ["A salt.", "", "Well, thank you."], judgements, strict=True
    ):
        turns = [*prompt, {"role": "assistant", "content": response}]
        trained_on = cut_behind_end(encode_turns(tokenizer, turns, prompt=False), {tokenizer.eos_token_id})
        cost = scorer(*padded([trained_on], "right")).end_scores.item()
        assert judgement.raw == f"cost {cost:.4f}"
        assert (judgement.verdict is Verdict.UNSAFE) == (cost > 0)


def test_full_layout_round_trip_has_pkus_keys(
    tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    scorer = Scorer(tiny_model.model, random_head(bias=True)).eval()
    save_scorer(scorer, tiny_tokenizer, tmp_path / "scorer", ScorerCard("reward", mean=0.5, std=2.0))
    keys = set(load_file(tmp_path / "scorer" / "model.safetensors"))
    assert {"score_head.weight", "score_head.bias", "model.embed_tokens.weight", "model.norm.weight"} <= keys
    assert not any(key.startswith("lm_head") for key in keys)
    config = json.loads((tmp_path / "scorer" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForScore"]
    assert (config["score_type"], config["score_dim"], config["score_bias"]) == ("reward", 1, True)
    assert (config["do_normalize"], config["mean"], config["var"]) == (True, [0.5], [4.0])
    ids, mask = padded(ROWS, "right")
    expected = (scorer(ids, mask).scores - 0.5) / 2.0
    assert torch.equal(load_scorer(tmp_path / "scorer", "float32")(ids, mask).scores, expected)
    (tmp_path / "scorer" / "scorer.json").unlink()  # what others' tools leave: the same from config.json
    torch.testing.assert_close(load_scorer(tmp_path / "scorer", "float32")(ids, mask).scores, expected)


def write_pku(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **config: Any
) -> None:
    """A folder as safe-rlhf publishes them: sharded, with a normaliser's buffers and no scorer.json."""
    folder.mkdir()
    tensors = {f"model.{name}": tensor.clone() for name, tensor in model.model.state_dict().items()}
    extra = {
        "score_head.weight": random_head().weight.detach(),
        "normalizer.mean": torch.tensor([1.0]),
        "normalizer.var": torch.tensor([4.0]),
        "normalizer.count": torch.tensor([7]),
    }
    shards = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": extra}
    for name, shard in shards.items():
        save_file(shard, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = {
        "score_type": "cost",
        "score_dim": 1,
        "bias": False,
        "do_normalize": False,
        "mean": [1.0],
        "var": [4.0],
    }
    whole = model.config.to_dict() | {"architectures": ["LlamaForScore"]} | fields | config
    (folder / "config.json").write_text(json.dumps(whole))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "normalise", "shift", "scale"),
    [("cost", False, 0.0, 1.0), ("cost", True, 0.0, 2.0), ("reward", True, 1.0, 2.0)],
    ids=["plain", "a cost is divided only: its sign has a meaning", "a reward is shifted too"],
)
def test_pkus_layout_loads(
    kind: str,
    normalise: bool,
    shift: float,
    scale: float,
    tmp_path: Path,
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    write_pku(tmp_path / "pku", tiny_model, tiny_tokenizer, score_type=kind, do_normalize=normalise)
    ids, mask = padded(ROWS, "right")
    plain = Scorer(tiny_model, random_head())(ids, mask).scores
    torch.testing.assert_close(
        load_scorer(tmp_path / "pku", "float32")(ids, mask).scores, (plain - shift) / scale
    )


def test_a_published_model_without_statistics_is_not_normalised(
    tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_pku(tmp_path / "pku", tiny_model, tiny_tokenizer, do_normalize=True, mean=None, var=None)
    card = read_card(tmp_path / "pku")
    assert (card.mean, card.std) == (0.0, 1.0)


def test_a_folder_that_names_itself_wrongly_is_put_right(
    tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_pku(tmp_path / "pku", tiny_model, tiny_tokenizer, score_type="reward")
    with pytest.raises(
        ScorerError, match=r'is a reward model, expected a cost model .* `{"kind": "cost"}` into'
    ):
        check_scorer(tmp_path / "pku", "cost", tiny_tokenizer)
    (tmp_path / "pku" / "scorer.json").write_text('{"kind": "cost"}')
    assert check_scorer(tmp_path / "pku", "cost", tiny_tokenizer).kind == "cost"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("gone", r"No folder"),
        ("pickled", r"pickled weights only \(pytorch_model.bin\), which are not read"),
        ("empty", r"holds no \*.safetensors; expected a scorer folder"),
        ("no head", r"has adapter_config.json but no score_head.safetensors"),
        ("no kind", r"`kind` in scorer.json .* is 'critic', expected one of reward, cost"),
        ("not json", r"scorer.json is not JSON"),
        ("format", r"scorer.json: format 7, this release reads 1"),
        ("no backbone", r"names no `backbone`"),
        (
            "backbone moved",
            r"is an adapter on `nowhere/at/all`, which does not load(.|\n)*write its new place",
        ),
        ("backbone changed", r"was trained on other weights than those now in"),
        (
            "head of another width",
            r"score_head.weight: found shape \(32,\), expected shape \(1, hidden size\)",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(adapter_folder: Path, spoil: str, message: str) -> None:
    card = json.loads((adapter_folder / "scorer.json").read_text())
    changes: dict[str, dict[str, Any]] = {
        "no kind": {"kind": "critic"},
        "format": {"format": 7},
        "no backbone": {"backbone": None},
        "backbone moved": {"backbone": "nowhere/at/all"},
        "backbone changed": {"backbone_hash": "0" * 32},
    }
    folder = adapter_folder
    if spoil in changes:
        (folder / "scorer.json").write_text(json.dumps(card | changes[spoil]))
    elif spoil == "not json":
        (folder / "scorer.json").write_text("{")
    elif spoil == "no head":
        (folder / "score_head.safetensors").unlink()
    elif spoil == "head of another width":
        save_file({"score_head.weight": torch.zeros(32)}, folder / "score_head.safetensors")
    else:
        folder = folder.parent / "other"
        if spoil != "gone":
            folder.mkdir()
        if spoil == "pickled":
            (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ScorerError, match=message):
        load_scorer(folder, "float32")


def test_missing_decoder_weights_are_named(
    tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_pku(tmp_path / "pku", tiny_model, tiny_tokenizer)
    shard = tmp_path / "pku" / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ScorerError, match=r"lacks 1 of the decoder's weights \(first: norm.weight\)"):
        load_scorer(tmp_path / "pku", "float32")


# ---- does it belong to the policy? ----------------------------------------------------------------------------------


def test_the_policys_own_tokenizer_is_accepted_unread(
    adapter_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert read_card(adapter_folder).tokenizer == tokenizer_fingerprint(tiny_tokenizer)
    (adapter_folder / "tokenizer.json").unlink()  # the fingerprint is enough
    check_scorer(adapter_folder, "cost", tiny_tokenizer)


def test_tokens_that_only_the_scorer_has_do_no_harm(
    adapter_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    theirs = copy.deepcopy(tiny_tokenizer)
    theirs.add_special_tokens({"pad_token": "<pad>"})
    check_same_tokenizer(theirs, tiny_tokenizer, "stages.rl.reward_model")


def test_what_differs_between_tokenizers_is_said(
    adapter_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.add_tokens(["<tool>"])
    tiny_tokenizer.chat_template = "{{ messages }}"
    tiny_tokenizer.eos_token = "<|endoftext|>"
    expected = (
        r"stages.rl.cost_model: .*scorer was trained with another tokenizer than the policy's.*: "
        r"1 of the policy's 260 tokens are missing or have another number \(first: '<tool>'\); the end token is "
        r"'<\|im_end\|>', the policy's is '<\|endoftext\|>'; the chat template is another one"
    )
    with pytest.raises(ScorerError, match=expected):
        check_scorer(adapter_folder, "cost", tiny_tokenizer, "stages.rl.cost_model")


def test_the_same_vocabulary_cut_differently_is_noticed(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    theirs = copy.deepcopy(tiny_tokenizer)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ScorerError, match="the same vocabulary, but text is cut differently"):
        check_same_tokenizer(theirs, tiny_tokenizer, "here")
