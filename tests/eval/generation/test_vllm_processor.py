"""vLLM's two interfaces, doubled after its published sources: nothing here runs vLLM itself.

V1: vllm/v1/sample/logits_processor/interface.py (BatchUpdate, MoveDirectionality) and the persistent batch that makes
the updates (vllm/v1/worker/gpu_input_batch.py: a new request takes a freed row, the last rows fill what is left free,
rows are swapped to reorder). V2: vllm/v1/worker/gpu/sample/logits_processor/interface.py (LogitsContext, slots).
"""

import enum
import importlib
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.eval.generation.tsdi import TokenBias, TSDISettings

NUM_POSITIONS, VOCABULARY, ALPHAS = 3, 7, (1.0, 0.5, 2.0)


class MoveDirectionality(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list[int]
    added: list[tuple[int, Any, list[int] | None, list[int]]]
    moved: list[tuple[int, int, MoveDirectionality]]


class V1LogitsProcessor(ABC):
    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        return None

    @abstractmethod
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None: ...

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def is_argmax_invariant(self) -> bool: ...

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None: ...


class V2LogitsProcessor(ABC):
    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        return None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        return None

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return True

    def apply_staged_writes(self) -> None:
        return None

    @abstractmethod
    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor: ...


@pytest.fixture
def vllm_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module as it is imported beside vLLM."""
    for name in ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.worker", "vllm.v1.worker.gpu"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.sample", ModuleType("sample"))
    v1, v2 = ModuleType("v1"), ModuleType("v2")
    v1.LogitsProcessor, v1.MoveDirectionality = V1LogitsProcessor, MoveDirectionality  # type: ignore[attr-defined]
    v2.LogitsProcessor = V2LogitsProcessor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.sample.logits_processor", v1)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.sample.logits_processor", v2)
    monkeypatch.delenv("EQUIPOISE_TOKEN_BIAS", raising=False)
    name = "equipoise.eval.generation.vllm_processor"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)  # the next import shall not find the doubles


@pytest.fixture
def bias() -> torch.Tensor:
    return torch.randn(NUM_POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def folder(bias: torch.Tensor, tmp_path: Path) -> Path:
    settings = TSDISettings(num_positions=NUM_POSITIONS, alpha=ALPHAS)
    TokenBias(bias, torch.full_like(bias, 1 / VOCABULARY), settings).export(tmp_path)
    return tmp_path


def config(model: Path | str, vocabulary: int = VOCABULARY, **options: Any) -> SimpleNamespace:
    chosen = {"additional_config": {}, "speculative_config": None} | options
    model_config = SimpleNamespace(model=str(model), get_vocab_size=lambda: vocabulary)
    return SimpleNamespace(model_config=model_config, **chosen)


def params(**extra_args: Any) -> SimpleNamespace:
    return SimpleNamespace(extra_args=extra_args or None)


def expected(bias: torch.Tensor, extra_args: dict[str, Any] | None, position: int) -> torch.Tensor:
    """What a row of zeros becomes."""
    given = extra_args or {}
    if not 0 <= position < NUM_POSITIONS or not given.get("tsdi", True):
        return torch.zeros(VOCABULARY)
    return -given.get("tsdi_alpha", ALPHAS[position]) * bias[position]


@dataclass
class Batch:
    """vLLM's persistent batch, with random traffic: rows of (extra_args, the running list of its answer)."""

    rows: list[tuple[Any, list[int]]] = field(default_factory=list)

    def step(self, draw: random.Random) -> BatchUpdate | None:
        """Some requests end, some arrive, free rows are filled from the end, two rows may be swapped."""
        free = sorted(draw.sample(range(len(self.rows)), draw.randint(0, len(self.rows))), reverse=True)
        free = [row for row in free if draw.random() < 0.4]
        added, moved = [], []
        for _ in range(draw.randint(0, 2)):
            request = draw.choice([params(), params(tsdi=False), params(tsdi=1), params(tsdi_alpha=0.25)])
            answer = [-1] * draw.choice([0, 0, 0, 2])  # taken up again after a preemption: it has tokens
            row = free.pop() if free else len(self.rows)
            self.rows[row : row + 1] = [(request, answer)]
            added.append((row, request, [1, 2], answer))
        removed = list(free)
        while free:
            last = len(self.rows) - 1
            if last in free:
                free.remove(last)
            else:
                target = free.pop()
                self.rows[target] = self.rows[last]
                moved.append((last, target, MoveDirectionality.UNIDIRECTIONAL))
            self.rows.pop()
        if len(self.rows) > 1 and draw.random() < 0.5:
            a, b = draw.sample(range(len(self.rows)), 2)
            self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        return BatchUpdate(len(self.rows), removed, added, moved) if removed or added or moved else None


@pytest.mark.parametrize("seed", range(20))
def test_every_row_follows_its_request(
    vllm_processor: ModuleType, folder: Path, bias: torch.Tensor, seed: int
) -> None:
    processor = vllm_processor.TSDIProcessor(config(folder), torch.device("cpu"), False)
    assert isinstance(processor, V1LogitsProcessor)
    assert not processor.is_argmax_invariant()
    draw, batch = random.Random(seed), Batch()
    num_corrected = 0
    for _ in range(40):
        processor.update_state(batch.step(draw))
        logits = torch.zeros(len(batch.rows), VOCABULARY)
        found = processor.apply(logits)
        for (request, answer), row in zip(batch.rows, found, strict=True):
            torch.testing.assert_close(row, expected(bias, request.extra_args, len(answer)))
            num_corrected += bool(row.any())
            if draw.random() < 0.8:  # a piece of a long prompt: what was sampled is thrown away
                answer.append(draw.choice([-1, 4]))  # -1: not known yet, under asynchronous scheduling
    assert num_corrected > 20


def test_nothing_is_left_to_do_after_the_last_position(vllm_processor: ModuleType, folder: Path) -> None:
    processor = vllm_processor.TSDIProcessor(config(folder), torch.device("cpu"), False)
    answer: list[int] = []
    processor.update_state(BatchUpdate(1, [], [(0, params(), [1], answer)], []))
    answer += [1] * NUM_POSITIONS
    processor.update_state(None)
    assert not processor.requests
    logits = torch.ones(1, VOCABULARY)
    assert processor.apply(logits) is logits


def context(slots: list[int], positions: list[int], requests: list[int], lengths: list[int]) -> Any:
    return SimpleNamespace(
        expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
        pos=torch.tensor(positions, dtype=torch.int32),
        idx_mapping_np=np.array(requests),
        seq_lens_upper_bound_np=np.array(lengths),
    )


def states(prompt_lengths: list[int]) -> SimpleNamespace:
    lengths = np.array(prompt_lengths, dtype=np.int32)
    return SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=len(prompt_lengths),
        prompt_len=SimpleNamespace(np=lengths, gpu=torch.from_numpy(lengths)),
    )


def test_rows_of_model_runner_v2(vllm_processor: ModuleType, folder: Path, bias: torch.Tensor) -> None:
    """Slot 0 is off, slot 1 decodes its second token, slot 2 prefills, slot 3 checks two drafts."""
    processor = vllm_processor.TSDIProcessorV2(
        config(folder, speculative_config=object()), states([5, 5, 9, 2])
    )
    assert isinstance(processor, V2LogitsProcessor)
    requests = [params(tsdi=0), params(), params(), params(tsdi_alpha=3.0)]
    assert [processor.add_request(slot, request) for slot, request in enumerate(requests)] == [
        False,
        True,
        True,
        True,
    ]
    processor.apply_staged_writes()
    # pos is the input token's: with a prompt of 5, position 4 predicts answer token 0.
    logits = torch.zeros(6, VOCABULARY)
    found = processor.apply(
        logits, context([3, 3, 3, 0, 1, 2], [2, 3, 4, 4, 5, 3], [3, 0, 1, 2], [5, 5, 6, 4])
    )
    drafts = [expected(bias, {"tsdi_alpha": 3.0}, position) for position in (1, 2, 3)]
    others = [torch.zeros(VOCABULARY), expected(bias, None, 1), torch.zeros(VOCABULARY)]
    torch.testing.assert_close(found, torch.stack(drafts + others))
    # Slot 3 is taken over by another request.
    assert not processor.add_request(3, params(tsdi=False))
    processor.apply_staged_writes()
    assert not processor.apply(torch.zeros(1, VOCABULARY), context([3], [2], [3], [3])).any()


def test_model_runner_v2_skips_steps_behind_the_last_position(
    vllm_processor: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = vllm_processor.TSDIProcessorV2(config(folder), states([5, 5]))
    for slot in (0, 1):
        processor.add_request(slot, params())
    processor.apply_staged_writes()
    monkeypatch.setattr(processor.bias, "take_out", lambda *_: pytest.fail("worked for nothing"))
    logits = torch.ones(2, VOCABULARY)
    assert processor.apply(logits, context([0, 1], [7, 8], [0, 1], [8, 9])) is logits
    monkeypatch.undo()
    assert processor.apply(torch.zeros(2, VOCABULARY), context([0, 1], [6, 8], [0, 1], [7, 9]))[0].any()


def test_plausibility_leaves_masked_tokens_masked(vllm_processor: ModuleType, tmp_path: Path) -> None:
    table = torch.zeros(1, VOCABULARY)
    table[0, 0] = -50.0
    settings = TSDISettings(num_positions=1, plausibility=0.1)
    TokenBias(table, torch.full_like(table, 1 / VOCABULARY), settings).export(tmp_path)
    processor = vllm_processor.TSDIProcessor(config(tmp_path), torch.device("cpu"), False)
    processor.update_state(BatchUpdate(1, [], [(0, params(), [1], [])], []))
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 0] = -torch.inf  # by a grammar
    found = processor.apply(logits)
    assert found[0, 0] == -torch.inf
    assert found.isfinite().sum() == VOCABULARY - 1


def test_where_the_token_bias_is_looked_for(
    vllm_processor: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(**options: Any) -> Any:
        chosen = config(tmp_path / "elsewhere", **options)
        return vllm_processor.TSDIProcessor(chosen, torch.device("cpu"), False)

    file = str(folder / "token_bias.safetensors")
    with pytest.raises(ValueError, match=r"No token bias at .*elsewhere.*Set EQUIPOISE_TOKEN_BIAS=PATH"):
        made()
    assert made(additional_config={"token_bias": file}).bias.alphas == list(ALPHAS)
    monkeypatch.setenv("EQUIPOISE_TOKEN_BIAS", file)
    assert len(made(additional_config=None).bias) == NUM_POSITIONS
    with pytest.raises(ValueError, match="covers 7 tokens, the served model 9"):
        made(vocabulary=9)


@pytest.mark.parametrize(
    "wrong", [{"tsdi": "no"}, {"tsdi": 0.5}, {"tsdi_alpha": -1}, {"tsdi_alpha": True}, {"tsdi_alpha": "1"}]
)
def test_bad_arguments_fail_their_request(vllm_processor: ModuleType, wrong: dict[str, Any]) -> None:
    for processor in (vllm_processor.TSDIProcessor, vllm_processor.TSDIProcessorV2):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            processor.validate_params(params(**wrong))
        processor.validate_params(params())


def test_it_can_be_imported_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "equipoise.eval.generation.vllm_processor", raising=False)
    module = importlib.import_module("equipoise.eval.generation.vllm_processor")
    assert module.request_alphas({"tsdi_alpha": 2}, [1.0, 1.0]) == [2.0, 2.0]
