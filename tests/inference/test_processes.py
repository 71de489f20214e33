"""Engines whose units have several processes, beside one of a single process with as many devices."""

import json
import os
import re
import signal
import socket
import time
from dataclasses import asdict, replace

import followed
import numpy as np
import pytest
from engines import SETTINGS
from processes import SMALL_UNIT, ended, launched, started

from dsjax.inference import passes
from dsjax.inference.engine import Engine
from dsjax.inference.layout import Layout
from dsjax.inference.load import load_model

UNIT = replace(SETTINGS, slots=4, context=64, shortest_table=64)


def check_like_one_process(run, folder, layout, settings, counted_steps=passes.COUNTED_STEPS, warm_up=True):
    """Two processes answer as this one does, and do the same; return what they have done."""
    given = json.dumps(asdict(layout)), json.dumps(asdict(settings)), counted_steps, warm_up
    with launched(folder, layout.devices // 2, "followed", run, *given) as process:
        engine = Engine(load_model(run, layout=layout, mtp=settings.speculate > 0), settings)
        expected, done = followed.answers(engine), followed.done(engine)
        engine.close()
        status, _, err = ended(process)
    assert status == 0, err
    found, expected = json.loads((folder / "found.json").read_text()), json.loads(json.dumps(expected))
    logprobs, close = found.pop("logprobs"), expected.pop("logprobs")
    assert found == expected
    assert {"stop", "length", "cancelled"} <= set(found["finish"])
    flat = [[value for pair in told[1:] for value in pair] + [told[0] or 0] for told in logprobs]
    np.testing.assert_allclose(
        np.concatenate(flat),
        np.concatenate([[value for pair in told[1:] for value in pair] + [told[0] or 0] for told in close]),
        atol=1e-4,
    )
    assert sum(told[0] is not None for told in logprobs) == 30
    both = [json.loads((folder / f"done{i}.json").read_text()) for i in range(2)]
    assert both[0] == both[1] == json.loads(json.dumps(done))
    return both[0]


def test_two_processes_answer_as_one(run, tmp_path):
    """A device each: a group per process, whose results the other has to get."""
    check_like_one_process(run, tmp_path, Layout(node=2), UNIT, warm_up=False)


@pytest.mark.slow
def test_speculation_in_two_processes(run, tmp_path):
    layout = Layout(node=2, data=2, tensor=2)
    done = check_like_one_process(run, tmp_path, layout, replace(UNIT, slots=8, speculate=2))
    assert done["counts"]["drafted"] > done["counts"]["accepted"] > 0


@pytest.mark.slow
def test_experts_are_moved_between_processes(run, tmp_path, monkeypatch):
    """As in the report's decode unit, by loads that all see alike; with pages that do not suffice for all requests."""
    monkeypatch.setattr(passes, "COUNTED_STEPS", 3)
    unit = {"shared_as_routed": True, "replicas": "balanced", "micro_batches": 2, "rebalance": 6}
    layout = Layout(node=4, tensor=2, slots=2, **unit)
    settings = replace(UNIT, slots=16)
    page_bytes = Engine(load_model(run, layout=layout), settings)._passes.page_bytes
    settings = replace(settings, cache_bytes=15 * page_bytes)
    done = check_like_one_process(run, tmp_path, layout, settings, 3)
    assert done["moved"] > 0 and done["counts"]["preemptions"] > 0


CHECKS = """
import sys
from dsjax.parallel.hosts import errors_of_process, start

start()
with errors_of_process():
    import jax
    from dataclasses import replace
    from dsjax import Engine, EngineSettings, load_model
    from dsjax.inference.layout import Layout

    run, me, small = sys.argv[1], jax.process_index(), EngineSettings(slots=2, context=32)

    def refused(act, *args, **how):
        try:
            act(*args, **how)
        except ValueError as error:
            print(error)
        else:
            raise AssertionError(act)

    refused(load_model, run, layout=Layout(node=4))
    refused(load_model, run, layout=Layout(node=2), devices=jax.local_devices())
    model = load_model(run, layout=Layout(node=2))
    refused(Engine, model, replace(small, disk="pages"))
    refused(Engine, model, replace(small, slots=2 + 2 * me))
    other = jax.tree.map(lambda leaf: jax.jit(lambda x: x + me, out_shardings=leaf.sharding)(leaf), model.biases)
    refused(Engine, replace(model, biases=other), small)
    # A unit of this process' own devices has nothing to do with the other.
    alone = Engine(load_model(run), small)
    assert alone.leads
    alone.close()
    engine = Engine(model, small)
    refused(engine.submit if me else engine.follow, *[[5]] * me, **{"max_tokens": 3} if me else {})
    engine.close() if engine.leads else engine.follow()
"""


def test_what_processes_cannot_have(run, tmp_path):
    (tmp_path / "checks.py").write_text(CHECKS)
    with launched(tmp_path, 1, "checks", run) as process:
        status, out, err = ended(process)
    assert status == 0, err
    sizes = "layout.node x layout.data x layout.tensor ="
    laws = [
        rf"{sizes} 4 x 1 x 1 = 4 devices: there are 2",
        rf"{sizes} 2 x 1 x 1 = 2 devices: there are 1",
        r"disk = 'pages': must be empty, because the unit has 2 processes",
        r"engine: EngineSettings\(slots=4, .* in process 1 \(.*\), EngineSettings\(slots=2, .* in process 0 \(.*\)",
        r"weights: [0-9a-f]{16} in process 1 \(.*\), [0-9a-f]{16} in process 0 \(.*\)",
    ]
    last = "this process cannot follow: process 0 leads", "this process cannot submit requests: process 0 leads"
    for found, own in zip((out, err), last, strict=True):
        for law in (*laws, own):  # Gloo writes between them
            assert len(re.findall(law, found)) == 1, (law, found)


@pytest.mark.slow
def test_the_command_says_once_what_is_wrong(run, tmp_path):
    unit = "--deployment", "unit.toml"
    (tmp_path / "unit.toml").write_text(SMALL_UNIT)
    for devices, words, message in [
        (1, (run, "--prompt", "x"), "layout: 1 device cannot be divided among 2 processes; name a --deployment that"),
        (3, (run, *unit), "layout: 4 devices, and the 2 processes have 6: must be as many"),
        (2, ("nowhere", *unit), "nowhere: no such folder"),
        (2, (run, "--prompts", "no.jsonl", "--output", "x", *unit), "no.jsonl: No such file"),
    ]:
        with launched(tmp_path, devices, "dsjax.generate", *words) as process:
            status, out, err = ended(process)
        assert (status, out) == (2, "")
        assert err.startswith(f"dsjax: {message}"), err
        assert err.count("\n") == 1 + ("ended with exit status 2" in err), err


@pytest.mark.slow
def test_the_command_writes_as_one_process_does(run, tmp_path):
    (tmp_path / "unit.toml").write_text(SMALL_UNIT)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "def {name}", "seed": 2}}\n' for name in "abcdef"))
    files = "--prompts", "prompts.jsonl", "--max-tokens", 9, "--deployment", "unit.toml", "--output"
    one = "--prompt", "def ", "--max-tokens", 30, "--deployment", "unit.toml"
    found, ends = {}, {}
    for name, command in {"alone": started, "both": lambda *words: launched(words[0], 2, *words[2:])}.items():
        with command(tmp_path, "-m", "dsjax.generate", run, *files, f"{name}.jsonl") as process:
            status, _, err = ended(process)
        assert status == 0, err
        assert err.count("dsjax: ") == 2 and "6 answers, 0 errors" in err, err
        with command(tmp_path, "-m", "dsjax.generate", run, *one) as process:
            status, out, err = ended(process)
        assert status == 0 and err.count("dsjax: ") == 2, err
        found[name] = sorted((tmp_path / f"{name}.jsonl").read_text().splitlines())
        ends[name] = out[-10:]  # Gloo writes in front of it
    assert found["alone"] == found["both"] and ends["alone"] == ends["both"]


FOR_EVER = """
import sys, time
from pathlib import Path
from dsjax.parallel.hosts import Distributed, errors_of_process, start

process, port = map(int, sys.argv[2:])
start(Distributed(f"127.0.0.1:{port}", 2, process, timeout=60, heartbeat=10))
with errors_of_process():
    from dsjax import Engine, EngineSettings, load_model
    from dsjax.inference.layout import Layout

    engine = Engine(load_model(sys.argv[1], layout=Layout(node=2)), EngineSettings(slots=2, context=32))
    if not engine.leads:
        engine.follow()
    while True:
        engine.submit([1, 2, 3], max_tokens=20)
        engine.run()
        Path("answered").touch()
        time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_lost_follower_ends_the_leader(run, tmp_path):
    """Without a launcher that would."""
    (tmp_path / "for_ever.py").write_text(FOR_EVER)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = "-m", "for_ever", run
    with started(tmp_path, *words, 0, port) as leader, started(tmp_path, *words, 1, port) as follower:
        end = time.monotonic() + 200
        while not (tmp_path / "answered").exists():
            assert leader.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        os.kill(follower.pid, signal.SIGKILL)
        status, _, err = ended(leader)
    assert status not in (0, None)
    assert re.search("another process is lost|unhealthy \\(stopped sending heartbeats\\)", err), err
