"""Traces of steps."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import jax
import pytest
from rich.console import Console

from dsjax.training.loop import train
from dsjax.training.profile import STEP, parse_range


@pytest.mark.parametrize("text", ["10", "10:", "0:3", "4:3", "a:b", "1:2:3", "-1:2"])
def test_ranges_that_are_none(text):
    with pytest.raises(ValueError, match=rf"^profile = '{text}': must be the first and the last step to trace"):
        parse_range(text, 100)


def test_ranges_of_the_run():
    assert parse_range("10:13", 13) == (10, 13) and parse_range("5:5", 13) == (5, 5)
    with pytest.raises(ValueError, match=r"profile = '10:14': must be steps of the run, which has train.steps = 13$"):
        parse_range("10:14", 13)


def steps_in(trace: Path) -> list[int]:
    """The numbers of the steps that a trace has, in order of time."""
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                number = dict(event.stats).get("step_num")
                if event.name == STEP and number is not None:
                    found.append((event.start_ns, int(number)))
    return [number for _, number in sorted(found)]


def test_a_trace_has_its_steps_and_their_work(short_run, tmp_path):
    out = StringIO()
    config = replace(short_run, train=replace(short_run.train, steps=6), run=str(tmp_path / "run"))
    train(config, profile="3:4", console=Console(file=out))
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert steps_in(trace) == [3, 4]
    assert b"jit_step" in trace.read_bytes()
    assert re.search(r"profile   from step 3 to 4: .*run/profile", out.getvalue().replace("\n", ""))

    out.truncate(0)
    train(replace(config, train=replace(config.train, log_every=1)), profile="3:4", console=Console(file=out))
    assert "steps 3 to 4 were not among those of this process: no trace" in out.getvalue().replace("\n", " ")


def test_a_range_that_cannot_be_ends_the_command_in_one_line(command, tmp_path):
    process = command(tmp_path / "run", "--profile", "19:21")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and err.count("\n") == 1
    assert "profile = '19:21': must be steps of the run, which has train.steps = 20" in err
    assert not (tmp_path / "run").exists()
