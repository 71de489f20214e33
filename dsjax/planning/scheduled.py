"""XLA's schedule of a program and its memory, without machine code.

What a plan reads of a compiled program is known long before it is compiled. XLA writes the program in the order of its
execution and the assignment of its buffers into a folder, if it is told one, and only then makes machine code, kernel
by kernel, which takes most of the time. So another process compiles, and is ended as soon as both are written.
"""

import contextlib
import multiprocessing
import os
import re
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Options = dict[str, Any]
"""Of XLA, as `jax.stages.Lowered.compile` takes them."""

_NEEDED = "_after_optimizations"
_SAID = "stderr"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), ([^:]*)", re.MULTILINE)


@dataclass(frozen=True)
class Scheduled:
    """A program as XLA would run it on each device."""

    text: str
    """In the order of execution; what `jax.stages.Compiled.as_text` returns."""
    argument_bytes: int
    temporary_bytes: int
    """All else that it needs: intermediate results, constants, and results that take the place of no argument."""
    seconds: float
    """From the start of the process to its end."""
    cpu_seconds: float
    peak_rss_bytes: int
    """Of that process."""


def scheduled(compile_with: Callable[..., None], *args: Any, every: float = 0.5) -> Scheduled:
    """Return what XLA makes of a program, from a process that ends before machine code is made.

    Args:
        compile_with: `compile_with(options, *args)` compiles one program with these options of XLA; a function of a
            module, called in the other process.
        every: seconds between two looks at what it has written.

    Raises:
        ChildProcessError: that process has ended without a schedule; with the last lines that it wrote.
    """
    began, before = time.perf_counter(), _cpu_seconds()
    with tempfile.TemporaryDirectory(prefix="dsjax-xla-") as name:
        folder = Path(name)
        process = multiprocessing.get_context("spawn").Process(target=_compile, args=(folder, compile_with, args))
        process.start()
        try:
            while (text := _text(folder)) is None:
                if process.exitcode is not None and _text(folder) is None:
                    raise ChildProcessError(_reason(process.exitcode, folder))
                process.join(every)
        finally:
            _end(process)
        allocations = [(int(size), kind) for size, kind in _ALLOCATION.findall(_file(folder, "-buffer-assignment"))]
    arguments = sum(size for size, kind in allocations if "parameter" in kind)
    together = sum(size for size, kind in allocations if "thread-local" not in kind)
    return Scheduled(
        text=text,
        argument_bytes=arguments,
        temporary_bytes=together - arguments,
        seconds=time.perf_counter() - began,
        cpu_seconds=_cpu_seconds() - before,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    )


def _compile(folder: Path, compile_with: Callable[..., None], args: tuple) -> None:
    """Compile, in a process group of its own, which ends with the process that started it."""
    os.setsid()
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    said = os.open(folder / _SAID, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True, "xla_syntax_sugar_async_ops": True}
    compile_with(dump, *args)


def _text(folder: Path) -> str | None:
    """Return the program if it has been written to its end, and remove what is not needed, which may be gigabytes.

    XLA writes the buffers before it, and the entry computation last, which ends with a brace of its own line.
    """
    for file in folder.glob("*.txt"):
        if _NEEDED not in file.name or file.name.endswith("-values.txt"):
            file.unlink()
    for file in folder.glob(f"*{_NEEDED}.txt"):
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 8))
            ends = stream.read().rstrip().endswith(b"\n}")
        text = file.read_text() if ends else ""
        _, entry, rest = text.rpartition("\nENTRY ")
        if entry and "\n}" in rest:
            return text
    return None


def _file(folder: Path, suffix: str) -> str:
    (file,) = folder.glob(f"*{_NEEDED}{suffix}.txt")
    return file.read_text()


def _reason(status: int, folder: Path) -> str:
    said = (folder / _SAID).read_text(errors="replace").splitlines() if (folder / _SAID).is_file() else []
    lines = [line for line in said if line.strip()][-5:]
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    memory = ", as Linux does when memory is out" if status == -signal.SIGKILL else ""
    return "\n".join([f"the process that compiles ended {how}{memory}, without a schedule", *lines])


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """End a process and those that it has started."""
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):  # it has no group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
