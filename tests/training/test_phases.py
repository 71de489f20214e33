"""The stopwatch of a run."""

import pytest

from dsjax.training.phases import Phases


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def test_phases_add_up_to_the_time_that_passed():
    clock = Clock()
    phases = Phases(clock)
    clock.wait(1)
    with phases("data"):
        clock.wait(2)
        assert phases.current == "data"
    with pytest.raises(KeyError), phases("save"):
        clock.wait(4)
        raise KeyError  # what fails has taken its time too
    clock.wait(8)
    assert phases.total() == {"step": 9, "data": 2, "save": 4} and phases.current == "step"
    assert phases.lap() == {"step": 9, "data": 2, "save": 4}
    with phases("data"):
        clock.wait(16)
    assert phases.lap() == {"step": 0, "data": 16, "save": 0}
    assert sum(phases.total().values()) == clock.now - 100


def test_the_median_step_is_of_what_every_step_has():
    clock = Clock()
    phases = Phases(clock)
    for seconds in (0, 3, 5, 4):
        assert phases.median_step is None or seconds == 4
        with phases("data"):
            clock.wait(1)
        clock.wait(seconds)
        with phases("validation"):
            clock.wait(1000)
        phases.end_step()
    assert phases.median_step == 4.5
