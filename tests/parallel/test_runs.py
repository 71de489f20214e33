"""Whole runs over meshes and processes: stopped on one, gone on with on another, killed and started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from meshes import ROUTINGS, TIGHT, check_equal, found_on
from processes import AS_TESTS
from rich.console import Console

from dsjax.checkpoint.native import Checkpoints
from dsjax.config import (
    CheckpointConfig,
    DataConfig,
    DispatchConfig,
    MeshConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
)
from dsjax.settings import to_toml
from dsjax.training.loop import train
from dsjax.training.metrics import read_metrics
from dsjax.training.state import abstract_state

STEPS = 6


@pytest.fixture(scope="module")
def short(run, tmp_path_factory):
    """Six steps on counted text, saved after every second; on one device."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text"
    text.mkdir()
    for document in range(20):
        text.joinpath(f"{document:02d}.txt").write_text(
            "".join(f"line {i} of document {document}: {i * document}\n" for i in range(60))
        )
    return replace(
        run,
        model=replace(run.model, vocab_size=300, n_group=8, topk_group=3),
        data=DataConfig(source="text", path=str(text), cache=str(folder / "cache"), sequence_length=16),
        train=TrainConfig(steps=STEPS, batch_size=8, validate_every=6, validation_sequences=8, log_every=1),
        # Sums in another order change the last bits; eps keeps Adam from making much of those of small gradients.
        optimizer=OptimizerConfig(learning_rate=1e-2, moment_dtype="fp32", eps=1e-4),
        checkpoint=CheckpointConfig(every=2, keep=3),
        run=str(folder / "alone"),
    )


def saved(config, step=STEPS):
    """The arrays of a checkpoint, on one device."""
    abstract = abstract_state(replace(config, mesh=MeshConfig()))
    with Checkpoints(Path(config.run) / "checkpoints") as checkpoints:
        _, tree, _ = checkpoints.restore(abstract | {"ema": abstract["params"]}, step)
    return jax.device_get(tree)


@pytest.fixture(scope="module")
def uninterrupted(short):
    train(short, console=Console(quiet=True))
    return saved(short)


def check_like(found, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * max(np.abs(b).max(), 1e-3), err_msg=jax.tree_util.keystr(path))


def test_a_run_goes_on_on_fewer_devices(short, uninterrupted, tmp_path):
    """Eight devices for two steps, four for two more, and one for the rest."""
    config = replace(short, run=str(tmp_path / "moved"))
    meshes = [
        (MeshConfig(node=2, local=4), TIGHT),
        (MeshConfig(data=2, local=2), DispatchConfig()),
        (MeshConfig(), DispatchConfig()),
    ]
    for done, (mesh, dispatch) in zip((0, 2, 4), meshes, strict=True):
        summary = train(replace(config, mesh=mesh, dispatch=dispatch), console=Console(quiet=True))
        assert summary.finished
        for later in range(done + 4, STEPS + 1, 2):  # as if it had been stopped there
            shutil.rmtree(tmp_path / "moved" / "checkpoints" / str(later))
    check_like(saved(config), uninterrupted)
    records = read_metrics(tmp_path / "moved" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[0]["exchange_rounds"] > 1 and records[0]["node_bytes"] > 0
    assert [record["node_bytes"] for record in records[2:]] == [0] * 4
    assert records[2]["local_bytes"] > 0 == records[5]["local_bytes"]


def launched(folder, *words, module=None, devices=4):
    """`dsjax.launch` of two processes in a folder."""
    command = [sys.executable, "-m", "dsjax.launch", "--processes", "2", "--devices-per-process", str(devices)]
    command += ["--module", module] if module else []
    environment = os.environ | AS_TESTS | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([*command, *map(str, words)], cwd=folder, env=environment, stdout=-1, stderr=-1, text=True)


TOGETHER = """
import pickle, sys
from dsjax.parallel.hosts import errors_of_process, start

start()
with errors_of_process():
    import functools, jax, numpy as np
    from jax.experimental import multihost_utils
    from dsjax.settings import load_config
    from meshes import ROUTINGS, found_on

    config = load_config([sys.argv[1]])
    fetch = functools.partial(multihost_utils.process_allgather, tiled=True)
    found = found_on(config, np.load(sys.argv[2]), ROUTINGS, fetch)
    if jax.process_index() == 0:
        with open("found.pickle", "wb") as file:
            pickle.dump(found, file)
"""


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_one_device(run, micro_batches, tmp_path):
    config = replace(run, mesh=MeshConfig(node=2, local=4), dispatch=TIGHT)
    (tmp_path / "config.toml").write_text(to_toml(config))
    (tmp_path / "together.py").write_text(TOGETHER)
    np.save(tmp_path / "tokens.npy", micro_batches)
    with launched(tmp_path, tmp_path / "config.toml", tmp_path / "tokens.npy", module="together") as process:
        _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    found = np.load(tmp_path / "found.pickle", allow_pickle=True)
    alone = found_on(run, micro_batches, ROUTINGS)
    for routing in ROUTINGS:
        check_equal(found[routing], alone[routing])


@pytest.mark.slow
def test_a_pipeline_over_two_processes_learns_the_same(short, uninterrupted, tmp_path):
    config = replace(
        short,
        run=str(tmp_path / "piped"),
        mesh=MeshConfig(pipe=2, local=2),
        pipeline=PipelineConfig(schedule="dualpipe"),
        train=replace(short.train, micro_batch_size=2),
    )
    (tmp_path / "config.toml").write_text(to_toml(config))
    with launched(tmp_path, tmp_path / "config.toml", devices=2) as process:
        _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    check_like(saved(config), uninterrupted)


@pytest.mark.slow
def test_a_killed_process_costs_what_was_not_saved(short, uninterrupted, tmp_path):
    """Process 1 of two dies in the middle; all are started again and end as if nothing had been."""
    config = replace(short, run=str(tmp_path / "killed"), mesh=MeshConfig(node=2, local=4))
    (tmp_path / "config.toml").write_text(to_toml(config))
    with launched(tmp_path, "--restarts", "1", tmp_path / "config.toml") as process:
        try:
            checkpoint = tmp_path / "killed" / "checkpoints" / "2"
            end = time.monotonic() + 300
            while not checkpoint.exists():
                assert process.poll() is None and time.monotonic() < end, process.communicate()
                time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[1]), signal.SIGKILL)
            _, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "process 1 ended with signal SIGKILL; ending the others" in err
    assert "starting all again, 1 of 1" in err
    check_like(saved(config), uninterrupted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
