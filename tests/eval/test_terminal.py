import io

import pytest
from rich.console import Console

from equipoise.eval import terminal
from equipoise.eval.terminal import Progress, duration, rate_text


def screen(is_terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=is_terminal, width=100, highlight=False), file


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `time.monotonic` shows, to be moved by the test."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_every_ten_seconds(clock: list[float]) -> None:
    console, file = screen(is_terminal=False)
    with Progress(console) as progress:
        for done in range(41):
            progress(done, 40, "judging [base]")
            clock[0] += 1
    assert file.getvalue().splitlines() == [
        "judging [base]: 10/40 (1.0/s, 0:30 left)",
        "judging [base]: 20/40 (1.0/s, 0:20 left)",
        "judging [base]: 30/40 (1.0/s, 0:10 left)",
        "judging [base]: 40 in 0:40",
    ]


def test_a_step_that_resumes_does_not_count_what_was_done_before(clock: list[float]) -> None:
    console, file = screen(is_terminal=False)
    with Progress(console) as progress:
        progress(90, 100, "training")
        clock[0] += 20
        progress(95, 100, "training")
    assert file.getvalue() == "training: 95/100 (4.0 s each, 0:20 left)\n"


def test_a_step_that_starts_again_is_measured_anew(clock: list[float]) -> None:
    console, file = screen(is_terminal=False)
    with Progress(console) as progress:
        for _ in range(2):
            progress(0, 5, "generating")
            clock[0] += 5
            progress(5, 5, "generating")
    assert file.getvalue() == "generating: 5 in 0:05\n" * 2


def test_what_is_over_at_once_needs_no_line() -> None:
    console, file = screen(is_terminal=False)
    with Progress(console) as progress:
        progress(3, 3, "loading")
        progress(0, 0, "nothing")
    assert file.getvalue() == ""


def test_a_terminal_gets_a_bar_that_gives_way_to_a_line(clock: list[float]) -> None:
    console, file = screen(is_terminal=True)
    with Progress(console) as progress:
        progress(0, 4, "training")
        progress(2, 4, "training")
        console.print("a message")
        clock[0] += 65
        progress(4, 4, "training")
    printed = file.getvalue()
    assert "0/4" in printed
    assert "a message" in printed
    assert "training: 4 in 1:05" in printed
    assert printed.endswith("\x1b[?25h")  # the cursor is back


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True, force_terminal=True)
    with Progress(console, interval=0) as progress:
        progress(1, 4, "training")
        progress(2, 4, "training")
    assert capsys.readouterr().out == ""


def test_messages_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "console", Console(highlight=False, width=20))
    terminal.say("outputs/tsdi/seed0/report.html has [bold] things")
    assert capsys.readouterr().out == "outputs/tsdi/seed0/report.html has [bold] things\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (65, "1:05"), (3605, "1:00:05")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(12.34, "12.3/s"), (1, "1.0/s"), (0.25, "4.0 s each")])
def test_rates(rate: float, text: str) -> None:
    assert rate_text(rate) == text
