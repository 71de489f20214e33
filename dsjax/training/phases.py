"""Where the time of a run goes: which phase the process is in, and how long it was in each."""

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Literal

Phase = Literal["step", "data", "compilation", "validation", "save"]
"""`step`: starting a step and waiting for the one before; `data`: waiting for tokens; `compilation`: tracing and
compiling a step of a new shape; `validation`; `save`: what of a save the run waits for."""
OF_EVERY_STEP: tuple[Phase, ...] = ("step", "data")
KEPT = 101
"""Steps of which the median is."""


class Phases:
    """A stopwatch that is always in one phase: in `step`, but inside of `with phases(name)`.

    The device works on while the process is in another phase than `step`: these are times of the process, which add up
    to the time that has passed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.current: Phase = "step"
        self.changes = 0
        """How often the run has moved on, to another phase or another step."""
        self._since = clock()
        self._total: dict[Phase, float] = defaultdict(float)
        self._at_lap: dict[Phase, float] = {}
        self._at_step = 0.0
        self._steps: deque[float] = deque(maxlen=KEPT)

    @contextlib.contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Inside, be in another phase."""
        before = self.current
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def end_step(self) -> None:
        """Take note that the run goes on to its next step."""
        self._enter(self.current)
        routine = sum(self._total[phase] for phase in OF_EVERY_STEP)
        self._steps.append(routine - self._at_step)
        self._at_step = routine

    @property
    def median_step(self) -> float | None:
        """Median seconds of the latest steps, without what not every step does; None before the third."""
        return median(self._steps) if len(self._steps) > 2 else None

    def total(self) -> dict[Phase, float]:
        """Return the seconds spent in each phase so far."""
        self._enter(self.current)
        return dict(self._total)

    def lap(self) -> dict[Phase, float]:
        """Return the seconds spent in each phase since the call before."""
        total = self.total()
        spent = {phase: seconds - self._at_lap.get(phase, 0.0) for phase, seconds in total.items()}
        self._at_lap = total
        return spent

    def _enter(self, phase: Phase) -> None:
        now = self._clock()
        self._total[self.current] += now - self._since
        self.current, self._since = phase, now
        self.changes += 1
