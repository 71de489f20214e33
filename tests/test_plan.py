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
    lines = out.splitlines()
    assert lines[:2] == [
        "run       tiny, auto, 3.07 K tokens a step",
        "devices   8 x NVIDIA H800: pipe 4 x data 1 x node 1 x local 2",
    ]
    assert lines[2:10] == [
        "pipeline  DualPipe, 4 ranks, 12 micro-batches",
        "time      38 units, bubble 2 (5.3%); F = I = W = 1, B = 2, F&B = 3",
        "compiled  38 units, bubble 2 (5.3%); 20 ticks (and opcodes): 0 to 6 (6), 7 to 12 (1+1), 13 to 19 (8)",
        "buffers   activations 2, gradients 1, residuals 5, tapes 2",
        "rank 0    stage 0 (layers 1 to 2), 3 (layers 7 to 7); waits 2 units, holds 5 activations, 1 deferred W",
        "rank 1    stage 1 (layers 3 to 4), 2 (layers 5 to 6); waits 2 units, holds 5 activations, 2 deferred W",
        "rank 2    stage 2 (layers 5 to 6), 1 (layers 3 to 4); waits 2 units, holds 5 activations, 2 deferred W",
        "rank 3    stage 3 (layers 7 to 7), 0 (layers 1 to 2); waits 2 units, holds 5 activations, 1 deferred W",
    ]
    rest = "\n".join(lines[10:])
    for what in ("memory ", "  second copy ", "  together ", "time ", "  as the report's system", "to the next stage"):
        assert what in rest
    assert "fits: 84.9 GB" in rest and "It does not fit" not in rest


def test_json_has_every_figure(plan):
    """The keys that other programs read, and sums that hold."""
    figures = json.loads(plan(DUALPIPE, "--json", "--chip", "h100")[1])
    assert figures["memory_bytes_total"] == sum(figures["memory_bytes"].values())
    assert figures["chip"]["name"] == "NVIDIA H100 80GB HBM3" and figures["memory_fits"]
    report = figures["estimates"]["report"]
    assert figures["tokens_per_s_per_gpu"] == report["tokens_per_s_per_gpu"] > 0
    assert figures["step_time_s"] == report["step_time_s"] == pytest.approx(report["pipeline"] + report["update"])
    assert figures["tokens_per_s_per_gpu"] * figures["step_time_s"] * 8 == pytest.approx(24 * 128)
    assert 0 < figures["mfu"] == report["mfu"] < 1
    assert figures["estimates"]["program"]["step_time_s"] >= figures["step_time_s"]
    assert len(figures["memory_used_by_rank"]) == 4
    assert {hop["where"] for hop in figures["hops"]} >= {"dispatch, in the node", "to the next stage"}


def test_more_devices_are_more_copies(plan):
    """Each with as many sequences; the state is divided among them."""
    one, two = (
        json.loads(plan(DUALPIPE, "--json", "--train.batch-size", "48", "--devices", str(n))[1]) for n in (8, 16)
    )
    assert (one["mesh"]["data"], two["mesh"]["data"]) == (1, 2)
    assert two["memory_bytes"]["activations"] == one["memory_bytes"]["activations"]
    assert two["memory_bytes"]["master_weights"] < 0.6 * one["memory_bytes"]["master_weights"]
    assert (one["pipeline"]["micro_batches"], two["pipeline"]["micro_batches"]) == (24, 12)


def test_it_says_what_to_change(plan):
    """A micro-batch that is far too large: each change that is named saves memory."""
    run = str(CONFIGS / "small_gpu.toml")
    large = ("--train.batch-size", "256", "--train.micro-batch-size", "128")
    status, out, _ = plan(run, *large)
    assert status == 0 and "It does not fit: " in out
    advice = out.split("It does not fit: ")[1].splitlines()[1:]
    assert any("--train.micro-batch-size 1" in line for line in advice)
    before = json.loads(plan(run, *large, "--json")[1])
    assert not before["memory_fits"]
    for line in advice:
        change = re.split("[,:]", line.split(" --")[1])[0].split()
        after = json.loads(plan(run, *large, f"--{change[0]}", change[1], "--json")[1])
        assert after["memory_bytes_total"] < before["memory_bytes_total"], line


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
    assert status == 0 and "\npipeline  none, mesh.pipe = 1: micro-batches follow one another\n" in out
    assert json.loads(plan(str(CONFIGS / "tiny.toml"), "--json")[1])["pipeline"] is None
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
        (["--ticks"], "ticks = True: is about the picture"),
        (["--devices", "12"], "devices = 12: must be a multiple of mesh.pipe x mesh.node x mesh.local = 8"),
        (["--devices", "-8"], "devices = -8: must be at least 1"),
        (["--chip", "h900"], "chip = 'h900': must be one of 'h800', 'h100'"),
        (["--picture", "no/such/folder.png"], "picture = 'no/such/folder.png': there is no folder 'no/such'"),
        (["--draw", "no/such/folder.svg"], "draw = 'no/such/folder.svg': there is no folder 'no/such'"),
        (["--picture", "plan.doc"], "picture = 'plan.doc': must end in .png or .svg"),
        (["--compile", "--chip", "b200"], "compile = True"),
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


@pytest.mark.parametrize("compiled", [(), ("--ticks",)])
def test_the_picture_of_the_schedule(plan, tmp_path, compiled):
    file = tmp_path / "schedule.svg"
    status, out, _ = plan(DUALPIPE, "--draw", str(file), *compiled)
    assert status == 0 and "\npipeline  DualPipe" in out
    texts = [element.text for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == ("DualPipe, compiled" if compiled else "DualPipe")
    assert "rank 3" in texts


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_the_picture(plan, tmp_path, name):
    file = tmp_path / name
    assert plan(DUALPIPE, "--picture", str(file))[0] == 0
    if name.endswith("png"):
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000
    else:
        assert ElementTree.parse(file).getroot().tag.endswith("svg")


def test_help_does_not_wait_for_jax():
    code = "import sys, dsjax.plan\ntry: dsjax.plan.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--draw" in done.stdout
