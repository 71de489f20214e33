"""A run that does not go on is ended, and says where it stood."""

import threading

import pytest

from dsjax.training.phases import Phases
from dsjax.training.watchdog import EXIT_STATUS, POLL, Watchdog

from .test_phases import Clock


class Watched:
    """A run that takes steps of four seconds, watched on a clock of its own."""

    def __init__(self, tmp_path, **settings):
        self.clock = Clock()
        self.phases = Phases(self.clock)
        self.done = 0
        how = {"factor": 10.0, "seconds": 30.0, "patience": 600.0} | settings
        self.dog = Watchdog(
            self.phases,
            lambda: self.done + 1,
            file=tmp_path / "stall.txt",
            program="training step (dualpipe)",
            clock=self.clock,
            **how,
        )

    def step(self, seconds=4.0):
        self.wait(seconds)
        self.done += 1
        self.phases.end_step()

    def wait(self, seconds):
        """What the watchdog says meanwhile."""
        said = []
        for _ in range(round(seconds / POLL)):
            self.clock.wait(POLL)
            said.append(self.dog.look())
        return next(filter(None, said), None)


def test_a_step_may_take_some_times_the_median(tmp_path):
    run = Watched(tmp_path)
    for _ in range(5):
        run.step()
    assert run.wait(40) is None
    said = run.wait(2)
    assert said.startswith("step 6 has been without progress for 0:41, median 4 s: training step (dualpipe)")
    assert said.endswith("in phase 'step'")
    run.step(0)  # it was slow and nothing else
    assert run.wait(39) is None


def test_short_steps_may_take_the_floor_and_the_first_as_long_as_anything_else(tmp_path):
    run = Watched(tmp_path)
    assert run.wait(599) is None and "no median yet" in run.wait(3)
    for _ in range(5):
        run.step(1)
    assert run.wait(29) is None and run.wait(3)
    with run.phases("validation"):
        assert run.wait(599) is None and "in phase 'validation'" in run.wait(3)


def test_waiting_for_data_is_no_progress(tmp_path):
    run = Watched(tmp_path)
    for _ in range(5):
        run.step()
    with run.phases("data"):
        assert run.wait(39) is None and "in phase 'data'" in run.wait(3)


def test_a_machine_that_slept_is_not_late(tmp_path):
    run = Watched(tmp_path)
    for _ in range(5):
        run.step()
    assert run.wait(2) is None
    run.clock.wait(100_000)
    assert run.dog.look() is None and run.wait(36) is None and run.wait(2)


HANGS = """
import sys, time
import jax
from dsjax.training import loop

def wait(finite, step):
    if step == 7:
        time.sleep(1000)
    return finite

@jax.jit
def on_device(finite, step):
    return jax.pure_callback(wait, finite, finite, step)

made = loop.make_train_step

def make(*args):
    step = made(*args)

    def hangs(state, tokens, knobs):
        state, metrics = step(state, tokens, knobs)
        return state, metrics | {"finite": on_device(metrics["finite"], state.step)}

    return hangs

loop.make_train_step = make
from dsjax.train import main
main(sys.argv[1:])
"""
NO_DATA = """
import sys, threading
from dsjax.training import loop

tokens = loop.Run._tokens

def blocked(self, step):
    if step == 6:
        threading.Event().wait()
    return tokens(self, step)

loop.Run._tokens = blocked
from dsjax.train import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("code", "phase", "where"), [(HANGS, "step", "_settle"), (NO_DATA, "data", "blocked")], ids=["device", "data"]
)
def test_a_process_that_hangs_ends_with_its_stacks(command, tmp_path, code, phase, where):
    run = tmp_path / "run"
    options = ("--train.stall_seconds", "2", "--train.stall_factor", "3", "--train.ema_decay", "0")
    out, err = (process := command(run, *options, code=code)).communicate(timeout=300)
    assert process.returncode == EXIT_STATUS, (out, err)
    line = next(line for line in err.splitlines() if line.startswith("dsjax: "))
    assert line.startswith("dsjax: step 7 has been without progress for 0:0") and "training step" in line
    assert f"in phase '{phase}'; ended by the watchdog" in line
    written = (run / "stalls" / "process-0.txt").read_text()
    for text in (err, written):
        assert "Current thread" in text and f"in {where}" in text and "in to_the_end" in text
    assert written.startswith(line)


def test_zero_waits_for_ever(tmp_path):
    with Watched(tmp_path, factor=0.0).dog as dog:
        assert not any(thread.name == "watchdog" for thread in threading.enumerate()), dog
