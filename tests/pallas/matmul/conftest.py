"""Kernels on a simulated GPU, in a process that may hang."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SECONDS = 60
"""For one case; the slowest takes a few."""
PROGRAM = Path(__file__).with_name("simulated.py")


class Simulator:
    """The process of `simulated.py`, started when it is needed, and again after it had to be ended."""

    def __init__(self, *change: str):
        self.change = change
        self.process: subprocess.Popen | None = None

    def __call__(self, seconds: float = SECONDS, **case) -> dict:
        """Run a case and return what it answers; raise TimeoutError if it does not."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, *self.change],
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        self.process.stdin.write(json.dumps(case) + "\n")
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.close()
            raise TimeoutError(f"no answer within {seconds} s: {case}")
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise ChildProcessError(f"the interpreter's process ended: {case}")
        return json.loads(line)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def simulate() -> Iterator[Callable[..., dict]]:
    """A function that runs a case of `simulated.py`."""
    simulator = Simulator()
    yield simulator
    simulator.close()


@pytest.fixture
def simulate_changed() -> Iterator[Callable[[str, str], Callable[..., dict]]]:
    """A function that, given a piece of the kernel's source and another in its place, returns one that runs a case."""
    simulators = []

    def changed(old: str, new: str) -> Simulator:
        simulators.append(Simulator(old, new))
        return simulators[-1]

    yield changed
    for simulator in simulators:
        simulator.close()
