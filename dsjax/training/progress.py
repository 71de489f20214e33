"""What a person sees while a run trains: a progress bar in a terminal, a line now and then anywhere else."""

import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsjax.training.metrics import Record

SECONDS_BETWEEN_LINES = 20.0


class ProgressDisplay:
    """Shows the newest record: loss, validation loss, tokens per second, MFU and time left.

    In a terminal a bar is redrawn in place. Elsewhere (CI, a log file) there is a line for the first step of the
    process, for every validated or skipped one, for the last, and otherwise at most every `seconds_between_lines`.
    """

    def __init__(
        self,
        console: Console,
        *,
        first_step: int,
        last_step: int,
        val_loss: float | None = None,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
    ):
        self._console, self._last_step, self._interval = console, last_step, seconds_between_lines
        self._val_loss = val_loss
        self._next_line = -math.inf
        self._began, self._first_step = time.perf_counter(), first_step
        self._bar = _bar(console) if console.is_terminal else None
        self._numbers = "compiling the first step"
        if self._bar:
            self._task = self._bar.add_task("", total=last_step, completed=first_step, numbers=self._numbers)

    def __enter__(self):
        if self._bar:
            self._bar.start()
        elif self._first_step < self._last_step:
            self._console.print(self._numbers)
        return self

    def __exit__(self, *exception):
        if self._bar:
            self._bar.stop()

    def update(self, record: Record) -> None:
        """Shows one record; called for every step."""
        validated = record.get("val_loss") is not None
        if validated:
            self._val_loss = record["val_loss"]
        self._numbers = describe(record, self._val_loss)
        if self._bar:
            self._bar.update(self._task, completed=record["step"], numbers=self._numbers)
            return
        now = time.perf_counter()
        if validated or record["step"] == self._last_step or now >= self._next_line:
            self._console.print(
                f"step {record['step']}/{self._last_step}  {self._numbers}{self._left(record['step'])}", soft_wrap=True
            )
            self._next_line = now + self._interval

    def doing(self, what: str) -> None:
        """Says in the bar what keeps the run from its next step, such as a validation."""
        if self._bar:
            self._bar.update(self._task, numbers=f"{self._numbers}  [dim]{what}[/]")

    def _left(self, step: int) -> str:
        done = step - self._first_step
        if done < 2 or step == self._last_step:  # one step tells nothing: it was the compilation
            return ""
        return f"  {duration((time.perf_counter() - self._began) / done * (self._last_step - step))} left"


def describe(record: Record, val_loss: float | None) -> str:
    """One line with the numbers of a record that a person follows."""
    parts = [f"loss {record['loss']:.3f}"]
    if val_loss is not None:
        parts.append(f"val {val_loss:.3f}")
    if record["tokens_per_s"]:
        parts.append(f"{quantity(record['tokens_per_s'])} tokens/s")
    if record["mfu"]:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record["skipped_steps"]:
        parts.append(f"skipped {record['skipped_steps']}")
    return "  ".join(parts)


def shares_of_time(seconds: Mapping[str, float]) -> str:
    """What was done for how much of the time, most of it first: `step 91.2 %, compilation 7.9 %, save 0.9 %`."""
    whole = sum(seconds.values()) or 1.0
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * part / whole:.1f} %" for name, part in parts)


def quantity(number: float) -> str:
    """A count with three digits and a letter: 1234567 is 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """A time as a clock shows it: 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
        # A step may take minutes; rich otherwise forgets a speed after 30 seconds and shows no time left.
        speed_estimate_period=1800,
    )
