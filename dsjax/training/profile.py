"""A trace of some steps of a run, for XProf and TensorBoard's profile page: `--profile 10:13`."""

import re
from pathlib import Path
from types import TracebackType

import jax
from jaxtyping import PyTree
from rich.console import Console

STEP = "train"
"""What a step is called in a trace."""


def parse_range(text: str, steps: int) -> tuple[int, int]:
    """Return the first and the last step of a range such as `10:13`, which has both; steps count from 1.

    Raises:
        ValueError: it is none, or the run has fewer `steps`.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"profile = {text!r}: must be the first and the last step to trace, such as 10:13")
    if last > steps:
        raise ValueError(f"profile = {text!r}: must be steps of the run, which has train.steps = {steps}")
    return first, last


class Profile:
    """Traces the steps from `first` to `last` into `folder`; a context, which ends a trace that is open.

    The process waits for the device before the first and after the last of them, so that the trace has their work and
    nothing else. Each process traces its own devices.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, console: Console):
        self._steps, self._folder, self._console = steps, folder, console
        self._begun: int | None = None
        self._done = False
        if jax.process_count() > 1:
            self._folder /= f"process-{jax.process_index()}"

    def __enter__(self) -> "Profile":
        return self

    def before(self, step: int, state: PyTree) -> jax.profiler.StepTraceAnnotation:
        """Begin the trace if it is time, and return the context in which to start the step."""
        if self._steps and not self._done and not self._begun and self._steps[0] <= step <= self._steps[1]:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python would be most of the trace
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._begun = step
        return jax.profiler.StepTraceAnnotation(STEP, step_num=step)

    def after(self, step: int, state: PyTree) -> None:
        """End the trace if this was its last step."""
        if self._begun and not self._done and step == self._steps[1]:
            jax.block_until_ready(state)
            self._stop(f"to {step}")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._begun and not self._done:
            self._stop("until the run ended")
        elif self._steps and not self._done and error is None:
            first, last = self._steps
            self._console.print(f"profile   steps {first} to {last} were not among those of this process: no trace")

    def _stop(self, until: str) -> None:
        self._done = True
        jax.profiler.stop_trace()
        self._console.print(
            f"profile   from step {self._begun} {until}: {self._folder}, for TensorBoard's profile page (XProf)"
        )
