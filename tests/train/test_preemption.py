import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from equipoise.train import cli, preemption, training
from equipoise.train.checkpoints import STATE_FILE
from equipoise.train.preemption import REQUEUE, Preempted
from equipoise.train.recipe.stages import PreferenceStageConfig
from equipoise.train.training import ProgressCallback


def raise_signal(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_outside_of_training_a_signal_ends_the_run_at_once(number: int) -> None:
    before = signal.getsignal(number)
    with preemption.handled(), pytest.raises(Preempted):
        raise_signal(number)
    assert signal.getsignal(number) is before


def test_inside_of_training_it_waits_for_the_end_of_the_step() -> None:
    def step() -> None:
        with preemption.handled(), preemption.deferred():
            raise_signal()
            raise_signal()  # Slurm may send several
            assert preemption.asked()
            finished.append(1)

    finished: list[int] = []
    with pytest.raises(Preempted):
        step()
    assert finished == [1]
    assert not preemption.asked()  # the next run of this process is another one


def test_no_exception_handler_swallows_it() -> None:
    assert not issubclass(Preempted, Exception)


def test_a_forked_child_dies_of_it() -> None:
    with preemption.handled():
        child = os.fork()
        if child == 0:
            raise_signal()
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("equipoise.train.run.run", lambda recipe: raise_signal())
    monkeypatch.setenv(cli.EXIT_CODE_FILE, str(tmp_path / "code"))
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["recipe=tsdi"]) == REQUEUE == 75
    assert (tmp_path / "code").read_text() == "75\n"
    assert "the same command goes on" in capsys.readouterr().err


def test_steps_on_the_same_answers_are_finished_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to end behind step 3 of two steps an answer: saved behind step 4, or behind the last."""
    monkeypatch.setattr(training, "told_to_end", lambda: True)
    ended = {}
    for step in (3, 4, 5):
        callback, control = training._PreemptionCallback(2), TrainerControl()
        callback.on_step_end(None, TrainerState(global_step=step, max_steps=5), control)
        ended[step] = (callback.ended, control.should_save, control.should_training_stop)
    assert ended == {3: (False,) * 3, 4: (True,) * 3, 5: (True,) * 3}


@pytest.mark.slow
def test_a_stage_saves_and_goes_on_to_the_end_of_an_uninterrupted_one(
    train_stage: Any,
    make_stage: Callable[..., PreferenceStageConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real SIGTERM in the middle of step 3, far from the next checkpoint; two steps are left."""
    stage = make_stage(num_steps=5, save_every=4, lr_scheduler="cosine")
    whole = train_stage(stage, run="whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            ProgressCallback,
            "on_step_begin",
            lambda self, args, state, control, **_: raise_signal() if state.global_step == 2 else None,
        )
        with pytest.raises(Preempted), preemption.handled():
            train_stage(stage, run="told")
    folder = tmp_path / "told" / "stages" / "safe"
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    assert (folder / "checkpoints" / "checkpoint-3" / STATE_FILE).exists()
    assert not (folder / "model").exists()
    resumed = train_stage(stage, run="told")
    assert resumed.started_at == 3
    assert resumed.metrics == whole.metrics[3:]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
