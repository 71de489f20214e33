"""The planning command: its figures are those of the simulator and the compiler, and what cannot be is one line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dsjax.pipeline.program import compile_program
from dsjax.pipeline.schedule import SCHEDULES
from dsjax.pipeline.simulate import peak_activations, peak_deferred, simulate
from dsjax.plan import main

CONFIGS = Path(__file__).parent.parent / "configs"
DUALPIPE = str(CONFIGS / "tiny_dualpipe.toml")


@pytest.fixture
def plan(capsys):
    """Run the command: exit status, stdout, stderr."""

    def plan(*arguments):
        status = 0
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return plan


def test_the_report_in_words(plan):
    status, out, err = plan(DUALPIPE)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "pipeline  DualPipe, 4 ranks, 12 micro-batches",
        "time      38 units, bubble 2 (5.3%); F = I = W = 1, B = 2, F&B = 3",
        "compiled  38 units, bubble 2 (5.3%); 20 ticks (and opcodes): 0 to 6 (6), 7 to 12 (1+1), 13 to 19 (8)",
        "buffers   activations 2, gradients 1, residuals 5, tapes 2",
        "rank 0    stage 0 (layers 1 to 2), 3 (layers 7 to 7); waits 2 units, holds 5 activations, 1 deferred W",
        "rank 1    stage 1 (layers 3 to 4), 2 (layers 5 to 6); waits 2 units, holds 5 activations, 2 deferred W",
        "rank 2    stage 2 (layers 5 to 6), 1 (layers 3 to 4); waits 2 units, holds 5 activations, 2 deferred W",
        "rank 3    stage 3 (layers 7 to 7), 0 (layers 1 to 2); waits 2 units, holds 5 activations, 1 deferred W",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_figures_are_those_of_the_schedule(plan, name):
    sizes = ("--mesh.pipe", "2", "--train.batch-size", "24", "--pipeline.schedule", name)
    status, out, _ = plan(DUALPIPE, *sizes, "--json")
    figures = json.loads(out)["pipeline"]
    schedule = SCHEDULES[name](2, 12)
    timeline, program = simulate(schedule), compile_program(schedule)
    assert status == 0
    assert (figures["schedule"], figures["ranks"], figures["micro_batches"]) == (schedule.name, 2, 12)
    assert figures["time"]["makespan"] == timeline.makespan
    assert figures["time"]["bubble"] == list(timeline.bubble)
    assert figures["time"]["bubble_share"] == max(timeline.bubble) / timeline.makespan
    assert figures["peak_activations"] == list(peak_activations(schedule))
    assert figures["peak_deferred"] == list(peak_deferred(schedule))
    assert (figures["ticks"], figures["buffers"]) == (len(program.ticks), program.pools._asdict())
    assert figures["compiled_time"]["makespan"] >= timeline.makespan
    # Every MoE layer of `tiny`, which follow one dense layer, is in one stage; every stage on one rank, or on two.
    assert [layer for stage in figures["moe_layers"] for layer in stage] == list(range(1, 8))
    held = sorted(stage for stages in figures["stages"] for stage in stages)
    assert held == sorted(list(range(schedule.route.stages)) * (2 if name == "dualpipe" else 1))
    assert (figures["segments"][0][0], figures["segments"][-1][1]) == (0, figures["ticks"])


def test_a_bound_on_deferred_gradients(plan):
    _, out, _ = plan(DUALPIPE, "--pipeline.max-deferred", "1", "--json")
    figures = json.loads(out)["pipeline"]
    assert (max(figures["peak_deferred"]), figures["buffers"]["tapes"]) == (1, 1)


def test_no_pipeline(plan, tmp_path):
    status, out, _ = plan(str(CONFIGS / "tiny.toml"))
    assert (status, out) == (0, "pipeline  none, mesh.pipe = 1: micro-batches follow one another\n")
    assert json.loads(plan(str(CONFIGS / "tiny.toml"), "--json")[1]) == {"pipeline": None}
    status, _, err = plan(str(CONFIGS / "tiny.toml"), "--draw", str(tmp_path / "none.svg"))
    assert status == 2 and err.endswith("there is no pipeline, mesh.pipe = 1\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--mesh.pipe", "3"],
            "mesh.pipe = 3 .*: ranks = 3: DualPipe needs it even and at least 2; nearest: 2 or 4",
        ),
        (
            ["--train.batch-size", "12"],
            "mesh.pipe = 4 ranks with 6 micro-batches .*: micro_batches = 6: .* at least 8 .*; nearest: 8",
        ),
        (
            ["--train.batch-ramp-start", "8", "--train.batch-ramp-fraction", "0.5", "--pipeline.schedule", "dualpipev"],
            "mesh.pipe = 4 ranks with 4 micro-batches .*nearest: 8",
        ),
        (["--pipeline.schedule", "dualpipev"], "mesh.pipe: 8 stages of a model with 7 MoE layers: .*at most 7 stages"),
        (["--compiled"], "compiled = True: is about the picture"),
    ],
)
def test_what_cannot_be_is_one_line(plan, arguments, message):
    status, out, err = plan(DUALPIPE, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.match(f"dsjax: {message}", err)


def test_small_steps_of_a_ramp_have_another_schedule(plan):
    status, out, _ = plan(DUALPIPE, "--train.batch-ramp-start", "8", "--train.batch-ramp-fraction", "0.5")
    assert status == 0
    (line,) = [line for line in out.splitlines() if line.startswith("ramp")]
    assert line.startswith("ramp      4 (ZB1P), ") and line.endswith("10 (DualPipe) micro-batches")


@pytest.mark.parametrize("compiled", [(), ("--compiled",)])
def test_the_picture(plan, tmp_path, compiled):
    file = tmp_path / "schedule.svg"
    status, out, _ = plan(DUALPIPE, "--draw", str(file), *compiled)
    assert status == 0 and out.startswith("pipeline  DualPipe")
    texts = [element.text for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == ("DualPipe, compiled" if compiled else "DualPipe")
    assert "rank 3" in texts


def test_help_does_not_wait_for_jax():
    code = "import sys, dsjax.plan\ntry: dsjax.plan.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--draw" in done.stdout
