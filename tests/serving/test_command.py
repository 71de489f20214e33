"""`python -m dsjax.serve` as a process: what it says, the key, signals, and what cannot work."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from processes import AS_TESTS, addressed, started

from dsjax.serve import main

HOME = Path(__file__).parents[2]
OPTIONS = ["--port=0", "--slots=2", "--page-size=8", "--prefill-tokens=64"]


@contextmanager
def served(run, *options, **environment):
    """Start the command; yield the process, its address, and what it has written to stderr."""
    command = [sys.executable, "-m", "dsjax.serve", str(run), *OPTIONS, *options]
    inherited = {name: value for name, value in os.environ.items() if name != "DSJAX_API_KEY"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=HOME, env=inherited | AS_TESTS | environment
    )
    try:
        with addressed(process, 300) as (url, said):
            yield process, url, said
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_life(run, tmp_path, number):
    with served(run, f"--disk={tmp_path}", "--name=mine", DSJAX_API_KEY="secret") as (process, url, said):
        assert said[0] == f"dsjax: step 1 of {run}; chat template: dsjax's own in DeepSeek-V3's format, as the " \
            "model's folder has none\n"  # fmt: skip
        assert said[1] == f"dsjax: mine is served at {url}\n"
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/v1/models").status_code == 401
        with socket.create_connection(url.removeprefix("http://").split(":")) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
        stream = client.completions.create(model="mine", prompt=[[40]], temperature=0, max_tokens=250, stream=True)
        next(stream)
        process.send_signal(number)
        # What runs is finished.
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert process.wait(60) == 0
        assert process.stderr.read() == "dsjax: Invalid HTTP request received.\n"
    assert list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize(("signals", "grace"), [(1, "0.5"), (2, "600")])
def test_an_end_in_the_middle_of_a_compilation(run, signals, grace):
    """What is compiled cannot be interrupted: the process ends with it, at once if it is asked twice."""
    code = (
        "import sys, time; from dsjax.inference.passes import Passes; from dsjax.serve import main;"
        "Passes.warming = lambda self: [lambda: time.sleep(600)]; sys.exit(main(sys.argv[1:]))"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [str(run), *OPTIONS, f"--port={port}", f"--grace={grace}"]
    with started(HOME, "-c", code, *words) as process:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/ready").text == "the server is starting\n":
                    break
            time.sleep(0.1)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)  # two at once are one
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.splitlines()[1:] == ["dsjax: ended in the middle of a compilation"]


def failure(capsys, *words):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_an_address_that_is_taken(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert failure(capsys, str(run), f"--port={port}") == f"dsjax: 127.0.0.1:{port}: Address already in use\n"


def test_a_warning(capsys, monkeypatch):
    monkeypatch.delenv("DSJAX_API_KEY", raising=False)
    words = ("nowhere", "--port=0", "--host=0.0.0.0")
    warning = "dsjax: warning: everybody who reaches 0.0.0.0 may use this server; give it an --api-key\n"
    error = "dsjax: nowhere: no such folder\n"
    assert failure(capsys, *words) == warning + error
    assert failure(capsys, *words, "--api-key=x") == error
    monkeypatch.setenv("DSJAX_API_KEY", "x")
    assert failure(capsys, *words) == error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "argument PATH is missing"),
        (["nowhere", "--port=0"], "nowhere: no such folder"),
        (["x", "--port=70000"], "port = 70000: must be at least 0 and below 65536"),
        (["x", "--timeout=0"], "timeout = 0.0: must be greater than 0"),
        (["x", "--grace=-1"], "grace = -1.0: must be at least 0"),
        (["x", "--max-body=0"], "max_body = 0: must be at least 1"),
        (["x", "--api-key=a b"], "api_key: must be ASCII characters without spaces"),
        (["x", "--slots=0"], "slots = 0: must be at least 1"),
        (["x", "--port=0", "--slots=2", "--queue=2", "--max-choices=16"], "must be at most slots + queue = 4"),
        (["x", "--port=0", "--slots=2", "--queue=2"], "x: no such folder"),
        (["x", "--hots=2"], "unknown option --hots; did you mean --host?"),
    ],
)
def test_what_cannot_work(capsys, words, message):
    error = failure(capsys, *words)
    assert message in error
    assert error.count("\n") == 1


def test_without_the_packages():
    code = "import sys; sys.modules['uvicorn'] = None; from dsjax.serve import main; main(['x'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOME, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "dsjax: uvicorn is not installed: install dsjax[serve], or say `uv run --extra serve`\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    page = capsys.readouterr().out
    assert all(option in page for option in ("PATH", "--host", "--api-key", "--max-body", "--slots", "--disk", "--ema"))
