"""The schedule of a program from a process that is ended before it makes machine code."""

import functools
import os
import tempfile
import textwrap
import time

import pytest

from dsjax.planning import scheduled as module
from dsjax.planning.aot import can_compile_for_gpus
from dsjax.planning.scheduled import scheduled

BUFFERS = """\
allocation 0: size 4096, page 0, parameter 0, shape |f32[32,32]| at ShapeIndex {}, maybe-live-out:
allocation 1: size 512, page 0, parameter 1, shape |f32[128]| at ShapeIndex {}:
allocation 2: size 4, page 0, thread-local:
allocation 3: size 16, page 0, constant:
allocation 4: size 1024, page 0, preallocated-temp:
 value: <1 sin @0> (size=1024,offset=0): f32[256]{0}
"""
LIKE_XLA = f"""
import os, subprocess, sys, time
from pathlib import Path
folder = Path(xla_dump_to)
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(told).write_text(f"{{os.getpid()}} {{sleeper.pid}}")
(folder / "m.before_optimizations.txt").write_text("HloModule m\\n\\nENTRY %main {{\\n}}\\n\\n")
(folder / "m.sm_9.0a_gpu_after_optimizations-buffer-assignment.txt").write_text({BUFFERS!r})
with (folder / "m.sm_9.0a_gpu_after_optimizations.txt").open("w") as file:
    for part in ("HloModule m\\n\\n%body {{\\n  x\\n}}\\n\\n", "ENTRY %main {{\\n", "  last\\n", "}}\\n\\n"):
        file.write(part)
        file.flush()
        time.sleep(0.3)
"""


def compiling(code, told=""):
    """A function that runs code in place of a compilation; it finds the options, and `told`, among its globals."""
    return functools.partial(exec, f"told = {str(told)!r}\n" + textwrap.dedent(code))


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def are_gone(told):
    pids = told.read_text().split()
    deadline = time.monotonic() + 30
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(pids) == 2 and not any(map(runs, pids))


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A file for the process to name itself in; temporary folders are beside it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "told"


def test_it_is_ended_when_the_program_is_there_to_its_end(told):
    found = scheduled(compiling(LIKE_XLA + "time.sleep(600)", told), every=0.05)
    assert found.text == "HloModule m\n\n%body {\n  x\n}\n\nENTRY %main {\n  last\n}\n\n"
    assert (found.argument_bytes, found.temporary_bytes) == (4096 + 512, 16 + 1024)
    assert found.seconds < 600
    assert are_gone(told), "nor what it had started"
    assert os.listdir(told.parent / "temporary") == []


def test_one_that_ends_by_itself_is_read_too(told):
    assert scheduled(compiling(LIKE_XLA + "sleeper.kill()", told), every=0.05).temporary_bytes == 1040


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "print('loading'); raise RuntimeError('no such chip')",
            r"with status 1, without a schedule\n(.*\n)*.*no such chip",
        ),
        ("import os; os.kill(os.getpid(), 9)", "by SIGKILL, as Linux does when memory is out, without a schedule$"),
        ("pass", "with status 0, without a schedule$"),
    ],
)
def test_one_that_fails_says_why(told, code, said):
    with pytest.raises(ChildProcessError, match=said):
        scheduled(compiling(code), every=0.05)
    assert os.listdir(told.parent / "temporary") == []


def test_an_interrupt_ends_it(told, monkeypatch):
    look = module._text

    def interrupted(folder):
        if told.exists() and told.read_text():
            raise KeyboardInterrupt
        return look(folder)

    monkeypatch.setattr(module, "_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scheduled(compiling(LIKE_XLA + "time.sleep(600)", told), every=0.05)
    assert are_gone(told)
    assert os.listdir(told.parent / "temporary") == []


REAL = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from dsjax.planning.aot import COMPILER_OPTIONS, gpu_devices
jax.config.update("jax_platforms", "cpu")
options = {name: value for name, value in globals().items() if name.startswith("xla")}
with gpu_devices(1, 2) as devices:
    at = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=at)
    made = jax.jit(lambda x: jnp.sin(x @ x).sum()).lower(x).compile(compiler_options=COMPILER_OPTIONS | options)
"""


@pytest.mark.skipif(
    not can_compile_for_gpus(), reason="JAX's CUDA plugin is not installed: uv run --extra cuda13 pytest"
)
def test_it_has_the_figures_of_the_whole_compilation():
    whole = {"__name__": "whole"}
    exec(REAL, whole)
    memory = whole["made"].memory_analysis()
    found = scheduled(compiling(REAL), every=0.05)
    assert found.argument_bytes == memory.argument_size_in_bytes
    assert found.temporary_bytes == memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert found.text.startswith("HloModule") and "is_scheduled=true" in found.text
