"""Runs of two real processes that are killed, cut off from their disk, or asked to stop: what is lost, what is said.

Every run ends, after it was started again, with the bits of one that nothing happened to.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import batched, product
from pathlib import Path

import jax
import numpy as np
import pytest

from dsjax.checkpoint.native import Checkpoints
from dsjax.config import CheckpointConfig, Config, MeshConfig
from dsjax.settings import to_toml
from dsjax.training.metrics import read_metrics
from dsjax.training.state import abstract_state

STEPS, EVERY = 40, 4

FAULTY = """
import json, os, resource, sys, threading, time
from pathlib import Path

from dsjax.checkpoint.native import Checkpoints, found_in
from dsjax.training import loop

me, notes = int(os.environ["DSJAX_PROCESS"]), Path(os.environ["NOTES"])
folder = Path(sys.argv[sys.argv.index("--run") + 1])
struck = notes / "struck"
before = len(struck.read_text().split()) if struck.exists() else 0
fault = [*json.loads(os.environ["FAULTS"]), None][before]
mine = fault and fault["victim"] == me
if me == 0:
    with open(notes / "starts", "a") as file:
        print(max(found_in(folder / "checkpoints")[0], default=0), file=file)

def strike(at, once=threading.Lock()):
    if once.acquire(blocking=False):
        with open(struck, "a") as file:
            print(at, file=file)
        os.kill(os.getpid(), fault["number"])

def strike_later(at):
    if fault["moment"] == "save":
        while not list((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
            time.sleep(0.001)
    time.sleep(fault["delay"])
    strike(at)

def disturbed(step):
    def disturbed(run, at, *rest):
        due = mine and at >= fault["step"]
        if due and fault["moment"] == "step":
            threading.Thread(target=strike_later, args=[at], daemon=True).start()
        if due and fault["moment"] == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            struck.write_text("0")
        step(run, at, *rest)
        if due and fault["moment"] == "between":
            strike(at + 1)
    return disturbed

def saving(save):
    def saving(checkpoints, step, *rest):
        if mine and step >= fault["step"] and fault["moment"] == "save":
            threading.Thread(target=strike_later, args=[step], daemon=True).start()
        save(checkpoints, step, *rest)
    return saving

loop.Run._step = disturbed(loop.Run._step)
Checkpoints.save = saving(Checkpoints.save)

from dsjax.train import main
main(sys.argv[1:])
"""
KILL, TERM = int(signal.SIGKILL), int(signal.SIGTERM)


@dataclass(frozen=True)
class Fault:
    """A signal to one process at a moment from some step on."""

    moment: str
    victim: int
    number: int
    step: int
    delay: float = 0.0
    """Seconds after the step, or the first file of a save."""


FEW = (Fault("step", 0, KILL, 6, 0.01), Fault("save", 1, KILL, 12, 0.005), Fault("between", 1, TERM, 18))


def twenty_faults() -> list[tuple[Fault, ...]]:
    """Every moment, victim and signal, and eight of them once more, in four runs; order, steps and delays drawn."""
    rng = random.Random(0)
    kinds = list(product(("step", "save", "between"), (0, 1), (KILL, TERM)))
    kinds += rng.sample(kinds, 8)
    rng.shuffle(kinds)
    return [
        tuple(Fault(*kind, rng.randrange(7 * at, 7 * at + 4), rng.uniform(0, 0.05)) for at, kind in enumerate(of_run))
        for of_run in batched(kinds, 5)
    ]


@pytest.fixture(scope="module")
def config(short_run) -> Config:
    """One dense and one MoE layer, whose experts are divided over the devices of two processes."""
    return replace(
        short_run,
        model=replace(short_run.model, num_hidden_layers=2, num_nextn_predict_layers=0),
        train=replace(short_run.train, steps=STEPS, validate_every=STEPS, log_every=1, ema_decay=0.0),
        checkpoint=CheckpointConfig(every=EVERY, keep=4),
        mesh=MeshConfig(local=2),
    )


@pytest.fixture(scope="module")
def launch(config, tmp_path_factory):
    """Start `dsjax.launch` on the run in a folder, and return its exit status, output and errors."""
    shared = tmp_path_factory.mktemp("launch")
    (shared / "run.toml").write_text(to_toml(config))
    (shared / "faulty.py").write_text(FAULTY)

    def launch(
        folder: Path, *options: str, own: tuple = (), faults: Sequence[Fault] = (), **more
    ) -> tuple[int, str, str]:
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(shared),
            "FAULTS": json.dumps([asdict(fault) for fault in faults]),
            "NOTES": str(folder),
        }
        module = ("--module", "faulty") if faults else ()
        words = ["--processes", "2", *module, *own, shared / "run.toml"]
        command = [sys.executable, "-m", "dsjax.launch", *map(str, words), "--run", str(folder / "run"), *options]
        process = subprocess.Popen(
            command, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True, **more
        )
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        return process.returncode, out, "\n".join(line for line in err.splitlines() if "[Gloo]" not in line)

    return launch


def arrays_of(config: Config, run: Path) -> list[np.ndarray]:
    abstract = abstract_state(replace(config, mesh=MeshConfig()))
    with Checkpoints(run / "checkpoints") as checkpoints:
        _, tree, _ = checkpoints.restore(abstract, STEPS)
    return jax.tree.leaves(jax.device_get(tree))


@pytest.fixture(scope="module")
def undisturbed(config, launch, tmp_path_factory) -> list[np.ndarray]:
    """The final arrays of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    status, _, err = launch(folder)
    assert status == 0, err
    return arrays_of(config, folder / "run")


def check_faults(faults, config, launch, undisturbed, folder):
    """Run into one fault after the other, to the end."""
    out, told = "", []
    for _ in range(1 + sum(fault.number == TERM for fault in faults)):  # on SIGTERM the whole run stops
        status, more, err = launch(folder, own=("--restarts", len(faults)), faults=faults)
        assert status == 0, err
        out, told = out + more, told + err.splitlines()
    struck, starts = (list(map(int, (folder / name).read_text().split())) for name in ("struck", "starts"))
    assert len(struck) == len(faults) and len(starts) == len(faults) + 1
    assert [int(step) for step in re.findall(rf"resumed   from step (\d+) of {STEPS}", out)] == list(
        filter(None, starts)
    )
    for fault, at, again in zip(faults, struck, starts[1:], strict=False):
        # What was saved last may have been on its way still.
        assert again > at - 2 * EVERY
        assert fault.number == KILL or again >= at
    stopped = [int(step) for step in re.findall(rf"stopped at step (\d+) of {STEPS}, saved", out)]
    assert stopped == [again for fault, again in zip(faults, starts[1:], strict=False) if fault.number == TERM]
    killed = [fault.victim for fault in faults if fault.number == KILL]
    assert [line for line in told if "starting" not in line] == [
        f"dsjax: process {victim} ended with signal SIGKILL; ending the others" for victim in killed
    ]
    for found, expected in zip(arrays_of(config, folder / "run"), undisturbed, strict=True):
        assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
    records = read_metrics(folder / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))


def test_a_run_goes_on_to_the_same_bits(config, launch, undisturbed, tmp_path):
    check_faults(FEW, config, launch, undisturbed, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes(launch, tmp_path):
    """Two of four devices each, of which one is lost; then one, on half the axis of data."""
    own = ("--devices-per-process", 4, "--fallback-processes", 1, "--fallback=--mesh.data 1")
    mesh = ("--mesh.data", "2", "--mesh.local", "4", "--train.batch-size", "8")
    status, out, err = launch(tmp_path, *mesh, own=own, faults=[Fault("between", 1, KILL, 6)])
    assert status == 0, err
    assert err.splitlines() == [
        "dsjax: process 1 ended with signal SIGKILL; ending the others",
        "dsjax: starting 1 of 2 --mesh.data 1",
    ]
    first, second = map(int, (tmp_path / "starts").read_text().split())
    assert first == 0 and second in (0, EVERY)
    assert "mesh      data 2, local 4: 8 devices in 2 processes" in out
    assert "mesh      local 4: 4 devices in 1 process" in out
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_and_says_what_was_saved(launch, tmp_path):
    """No file may grow as large as a checkpoint's, from the second checkpoint on."""
    status, out, err = launch(tmp_path, faults=[Fault("limit", 1, KILL, EVERY + 1)], own=("--restarts", 1))
    assert status == 0, err
    told = [line.removeprefix("[1] ") for line in err.splitlines()]
    wanted = [
        f"dsjax: process 1 ({socket.gethostname()}): cannot save in {tmp_path}/run/checkpoints: File too large; saved "
        f"last: step {EVERY}",
        "dsjax: process 1 ended with exit status 1; ending the others",
        "dsjax: starting all again, 1 of 1",
    ]
    assert [line for line in told if line in wanted] == wanted
    assert f"resumed   from step {EVERY} of {STEPS}" in out


@pytest.mark.slow
@pytest.mark.parametrize("faults", twenty_faults(), ids="abcd")
def test_twenty_faults(faults, config, launch, undisturbed, tmp_path):
    check_faults(faults, config, launch, undisturbed, tmp_path)
