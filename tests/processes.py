"""Commands that tests start, alone or as two processes that `dsjax.launch` joins."""

import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import jax

TESTS = Path(__file__).parent
AS_TESTS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}
"""The environment of a command that compiles as the tests do, and keeps its programs where they do."""
SMALL_UNIT = """
[model]
name = "tiny"

[layout]
node = 2
tensor = 2

[engine]
slots = 4
context = 64
page_size = 4
prefill_tokens = 16
"""
"""A deployment of four devices."""


@contextmanager
def started(folder, *command, **environment):
    """A command in a folder, that compiles as the tests do; it and all that it starts end with the `with`."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | AS_TESTS | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def launched(folder, devices, module, *words):
    """Two processes with so many devices each."""
    own = ("--processes", 2, "--devices-per-process", devices, "--module", module)
    return started(folder, "-m", "dsjax.launch", *own, *words)


def ended(process):
    """Status, stdout and stderr of a command, without what Gloo writes between them."""
    out, err = process.communicate(timeout=600)
    # Lines of Gloo begin wherever the text before them has ended.
    return process.returncode, *(re.sub(r"(\[1\] )?\[Gloo\] Rank.*\n", "", text) for text in (out, err))


def is_of_gloo(line):
    """Whether Gloo has written a line, of which another process may have written the beginning."""
    return "[Gloo]" in line or "peer ranks" in line


@contextmanager
def addressed(process, seconds):
    """Wait for a server's address; yield it, and what it has written to stderr but for lines of Gloo.

    It is killed if it takes longer to the end of the `with`: a test that waits for what says nothing ends too.
    """
    watch = threading.Timer(seconds, process.kill)
    watch.start()
    try:
        said = []
        for line in process.stderr:
            if not is_of_gloo(line):
                said.append(line)
            if found := re.search(r"is served at (http://\S+)", line):
                yield found[1], said
                break
        else:
            raise AssertionError("".join(said))
    finally:
        watch.cancel()
