"""What a run prints: messages, and how far the long steps are. On several ranks only the first one prints."""

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

console = Console(
    highlight=False,
    quiet=os.environ.get("RANK", "0") != "0",
    width=None if sys.stdout.isatty() else 120,  # a log file has no width of its own
)
"""Standard output; tables and messages go through it, so that they stay above a bar that is being drawn."""


def say(message: str) -> None:
    """Print one message, as it is: brackets are no markup, and a long line is not broken."""
    console.print(message, markup=False, soft_wrap=True)


class Progress:
    """How far the long steps are: `progress(done, total, what)` inside a `with`.

    On a terminal one bar a step, with rate and remaining time, which gives way to a line when the step ends. Elsewhere
    (a log file, CI) a line every `interval` seconds.
    """

    def __init__(self, to: Console = console, interval: float = 10.0) -> None:
        self._console = to
        self._interval = interval
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._steps: dict[str, _Step] = {}

    def __enter__(self) -> "Progress":
        if self._console.is_terminal and not self._console.quiet:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
            self._bars = Bars(*columns, _RateColumn(), TimeRemainingColumn(), console=self._console)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, done: int, total: int, what: str) -> None:
        """`done` of `total` parts of the step `what` are finished; `done` falling back means it starts again."""
        step = self._steps.get(what)
        if step is None or done < step.done:
            step = self._steps[what] = _Step(done, time.monotonic())
        step.done = done
        if done >= total:
            self._end(what, total, step)
        elif self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total, completed=done)
            self._bars.update(self._tasks[what], completed=done, total=total)
        elif step.due(self._interval):
            self._line(f"{what}: {done}/{total}{step.pace(total)}")

    def _end(self, what: str, total: int, step: "_Step") -> None:
        if self._bars is not None and what in self._tasks:
            self._bars.remove_task(self._tasks.pop(what))
        del self._steps[what]
        seconds = time.monotonic() - step.started
        if seconds >= 1:  # what is over at once needs no line
            self._line(f"{what}: {total} in {duration(seconds)}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
        sys.stdout.flush()  # a log file is read while it grows


class _Step:
    def __init__(self, done: int, now: float) -> None:
        self.first = self.done = done
        self.started = self.printed = now

    def due(self, interval: float) -> bool:
        """Whether a line is due; true at most once every `interval` seconds."""
        now = time.monotonic()
        if now - self.printed < interval:
            return False
        self.printed = now
        return True

    def pace(self, total: int) -> str:
        """` (2.5/s, 1:10 left)`, or nothing before the first part is finished."""
        seconds = time.monotonic() - self.started
        if self.done == self.first or seconds <= 0:
            return ""
        rate = (self.done - self.first) / seconds
        return f" ({rate_text(rate)}, {duration((total - self.done) / rate)} left)"


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(rate_text(task.speed) if task.speed else "")


def rate_text(rate: float) -> str:
    """Parts a second, or seconds a part where that is less than one."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def duration(seconds: float) -> str:
    """Minutes and seconds, `1:05`; from an hour on `1:00:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
