"""`python -m dsjax.serve` in two processes: one answers, the other follows."""

import contextlib
import os
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from processes import SMALL_UNIT, addressed, ended, is_of_gloo, launched

from dsjax.inference.engine import Engine
from dsjax.inference.sampling import Sampling

pytestmark = pytest.mark.slow
WORDS = ("--port=0", "--name=small", "--deployment=unit.toml", "--context=256")


@contextmanager
def served(run, folder, *words):
    """Start two processes; yield the launcher and the address, and what has been written to stderr."""
    (folder / "unit.toml").write_text(SMALL_UNIT)
    with launched(folder, 2, "dsjax.serve", run, *WORDS, *words) as process, addressed(process, 600) as (url, said):
        yield process, url, said


def rest(process):
    return [line for line in process.stderr.read().splitlines() if not is_of_gloo(line)]


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_life(run, model, tmp_path):
    """Answers are those of an engine on one device; SIGTERM lets what runs end, in all processes."""
    engine = Engine(model)
    requests = [engine.submit([40 + i], Sampling(seed=i), max_tokens=30) for i in range(4)]
    engine.run()
    with served(run, tmp_path) as (process, url, said):
        assert [line.partition(" of ")[0] for line in said] == ["dsjax: step 1", f"dsjax: small is served at {url}\n"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        found = [
            client.completions.create(model="small", prompt=[[40 + i]], seed=i, temperature=1, max_tokens=30)
            for i in range(4)
        ]
        assert [each.choices[0].text for each in found] == [request.text for request in requests]
        assert httpx.get(f"{url}/health").status_code == 200
        time.sleep(1)  # nothing to do: nothing is said
        stream = client.completions.create(model="small", prompt=[[40]], temperature=0, max_tokens=200, stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert process.wait(120) == 0
        assert rest(process) == ["dsjax: passing SIGTERM on to all processes; the next one ends them at once"]


def test_an_end_before_it_is_ready(run, tmp_path, eventually):
    """All processes compile what they have begun, and no more."""
    (tmp_path / "unit.toml").write_text(SMALL_UNIT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [word for word in WORDS if "port" not in word]
    with launched(tmp_path, 2, "dsjax.serve", run, *words, f"--port={port}", "--grace=0") as process:

        def is_starting():
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"http://127.0.0.1:{port}/ready").text == "the server is starting\n"

        eventually(is_starting, 300)
        process.send_signal(signal.SIGTERM)
        status, _, said = ended(process)
    assert status == 0
    assert "is served" not in said and "Traceback" not in said


def test_a_lost_follower_ends_the_server(run, tmp_path):
    """While it answers, and without a launcher that would end it: that one is stopped."""
    with served(run, tmp_path, "--distributed.heartbeat=10") as (process, url, _):
        _, follower = children_of(process)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        stream = client.completions.create(model="small", prompt=[[40]], temperature=0, max_tokens=250, stream=True)
        next(stream)
        process.send_signal(signal.SIGSTOP)
        os.kill(follower, signal.SIGKILL)
        with pytest.raises(openai.APIError):
            list(stream)
        with pytest.raises((httpx.HTTPError, AssertionError)):
            assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) == 128 + signal.SIGKILL
        assert rest(process)[-1] == "dsjax: process 1 ended with signal SIGKILL; ending the others"
