"""Alarms on what a stage logs: a loss that jumps, and chosen answers that training makes less likely.

They read the metrics of all ranks on their way to `metrics.jsonl` and add `alarm/...` to the line that sets one off;
what it means is said once a stage. A resumed stage goes on from the lines that are there: it raises the same alarms as
an uninterrupted one.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from equipoise.train.recipe.measuring import DiagnosticsConfig

FEWEST = 20
"""Losses before the first alarm: a median of fewer is no measure."""
RECENT = 10
"""Logged steps that the chosen answers' log-probability is averaged over: each has other pairs."""
NORMAL = 1.4826
"""Of the median absolute deviation, to be a normal distribution's standard deviation."""
FLOOR = 0.01
"""Share of the median that the deviation is taken to be at least: a loss that stands still would make noise a spike."""

Log = Callable[[Mapping[str, float], int, str], None]


def robust_z(value: float, window: list[float]) -> float:
    """(value - median) / (1.4826 MAD) of a window's losses; the deviation is at least `FLOOR` of the median."""
    median = statistics.median(window)
    deviation = NORMAL * statistics.median(abs(loss - median) for loss in window)
    return (value - median) / max(deviation, FLOOR * abs(median), 1e-12)


def chosen_log_ratio(metrics: Mapping[str, float]) -> float | None:
    """Mean over a step's pairs of log pi - log pi_ref of the chosen (KTO: desirable) answers, nats; None: not logged.

    The reference is where the stage starts, so it begins at 0.
    """
    if (desirable := metrics.get("train/desirable_log_ratio")) is not None:
        return desirable
    prefix = "train/chosen_log_ratio/"
    categories = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    counts = {name: metrics[f"train/num_pairs/{name}"] for name in categories}
    if not counts:
        return None
    return sum(metrics[prefix + name] * num for name, num in counts.items()) / sum(counts.values())


class Alarms:
    """The alarms of a run, on the first rank."""

    def __init__(
        self, config: DiagnosticsConfig, metrics_file: Path, log: Log, say: Callable[[str], None]
    ) -> None:
        """metrics_file: what an interrupted run has logged; log: where lines go."""
        self._config, self._file, self._log, self._say = config, metrics_file, log, say
        self._stage: str | None = None
        self._losses: deque[float] = deque(maxlen=config.window)
        self._chosen: deque[float] = deque(maxlen=RECENT)
        self._said: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """Log a line, with the alarms that it sets off."""
        if "train/loss" in metrics and stage != self._stage:
            self._begin(stage)
        raised = self._raised(metrics)
        self._log({**metrics, **raised}, step, stage)
        for alarm, value in raised.items():
            if alarm not in self._said:
                self._said.add(alarm)
                self._say(f"ALARM, {stage}, step {step}: {self._meaning(alarm, value, metrics)}")

    def _begin(self, stage: str) -> None:
        """Forget the stage before; take in what this one had logged before it was interrupted."""
        self._stage = stage
        self._losses.clear()
        self._chosen.clear()
        self._said.clear()
        if not self._file.exists():
            return
        with self._file.open(encoding="utf-8", newline="\n") as file:
            for text in file:
                line = json.loads(text)
                if line.get("stage") == stage and "train/loss" in line:
                    # What is not finite is logged as a text.
                    numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
                    self._said |= self._raised(numbers).keys()

    def _raised(self, metrics: Mapping[str, float]) -> dict[str, float]:
        raised = {}
        loss = metrics.get("train/loss")
        if loss is not None and math.isfinite(loss):
            if self._config.spike_z and len(self._losses) >= FEWEST:
                z = robust_z(loss, list(self._losses))
                if z >= self._config.spike_z:
                    raised["alarm/loss_spike"] = z
            self._losses.append(loss)
        chosen = chosen_log_ratio(metrics)
        if chosen is not None and math.isfinite(chosen):
            self._chosen.append(chosen)
            mean = statistics.fmean(self._chosen)
            if (
                self._config.falling_nats
                and len(self._chosen) == RECENT
                and mean <= -self._config.falling_nats
            ):
                raised["alarm/chosen_falling"] = mean
        return raised

    def _meaning(self, alarm: str, value: float, metrics: Mapping[str, float]) -> str:
        if alarm == "alarm/loss_spike":
            return (
                f"the loss {metrics['train/loss']:.4g} lies {value:.0f} robust standard deviations above the median of "
                f"the {len(self._losses) - 1} steps before (alarm at {self._config.spike_z:g}). One odd batch passes; "
                "where it does not come down, lower learning_rate or max_grad_norm and go back to a checkpoint before."
            )
        # Likelihood displacement: Pal et al. 2402.13228, Razin et al. 2410.08847; the remedy: Pang et al. 2404.19733.
        return (
            f"the chosen answers' mean log-probability lies {-value:.1f} nats below where the stage began, over the "
            f"last {RECENT} logged steps (alarm at {self._config.falling_nats:g}): the preference is learnt by making "
            "both answers less likely, and the freed probability may go to neither. An SFT term holds them "
            "(loss.sft_coef=1.0); so do a larger beta, a KL penalty, or a lower learning_rate."
        )
