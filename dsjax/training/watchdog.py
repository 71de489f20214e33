"""Ends a process whose run does not go on, and says where it stood: a hang on one of many machines leaves no error."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dsjax.parallel.hosts import leave, process_prefix
from dsjax.training.phases import OF_EVERY_STEP, Phases
from dsjax.training.progress import duration

EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: worth another try, which `dsjax.launch` and cluster managers give it."""
POLL = 1.0
"""Seconds between two looks, at most."""


class Watchdog:
    """While entered, a thread watches over the phases of a run.

    In a phase that every step has, the run may be for `factor` times the median step, and for `seconds` in any case; in
    the others, and before there is a median, for `patience`. Beyond, the stacks of all threads go to stderr and to
    `file`, and the process ends at once with `EXIT_STATUS`. Counted is only time in which this thread runs: a machine
    that sleeps and a process that is stopped are not late.
    """

    def __init__(
        self,
        phases: Phases,
        in_flight: Callable[[], int],
        *,
        file: Path,
        program: str,
        factor: float,
        seconds: float,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Watch over `phases`.

        Args:
            in_flight: the oldest step that is not done.
            program: what a step runs.
            factor: 0 watches over nothing.
        """
        self._phases, self._in_flight, self._file, self._program = phases, in_flight, file, program
        self._factor, self._seconds, self._patience, self._clock = factor, seconds, patience, clock
        self._poll = min(POLL, seconds / 4, patience / 4)
        self._seen, self._waited, self._last = phases.changes, 0.0, clock()
        self._left = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._factor:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()

    def look(self) -> str | None:
        """Return what is late, if anything is; to be called every `POLL` seconds or more often."""
        now = self._clock()
        self._waited += min(now - self._last, 2 * self._poll)
        self._last = now
        if self._phases.changes != self._seen:
            self._seen, self._waited = self._phases.changes, 0.0
        phase, median = self._phases.current, self._phases.median_step
        routine = phase in OF_EVERY_STEP and median is not None
        limit = max(self._seconds, self._factor * median) if routine else self._patience
        if self._waited <= limit:
            return None
        usual = f"median {median:.3g} s" if median is not None else "no median yet"
        return (
            f"step {self._in_flight()} has been without progress for {duration(self._waited)}, {usual}: "
            f"{self._program}, in phase {phase!r}"
        )

    def _watch(self) -> None:
        while not self._left.wait(self._poll):
            if late := self.look():
                self._end(late)

    def _end(self, late: str) -> None:
        line = f"dsjax: {process_prefix()}{late}; ended by the watchdog (train.stall_factor), stacks in {self._file}\n"
        # First what needs nobody: a disk that hangs may be what the run waits for.
        os.write(2, line.encode())
        faulthandler.dump_traceback(2)
        threading.Timer(10, leave, [EXIT_STATUS]).start()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "w", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            faulthandler.dump_traceback(file)
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h\n")  # the progress bar had hidden the cursor
        leave(EXIT_STATUS)
