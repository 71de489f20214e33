"""The processes of a run on this machine: started together, ended together."""

import ctypes
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dsjax.parallel.hosts import COORDINATOR, PROCESS, PROCESSES

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LINGER = 600  # seconds; a process that waited at exit for others that were gone has been seen to hang
_MOMENT = 0.05  # seconds; JAX ends a process so long after the coordinator is lost, with a C++ stack
_REFUSED = 2  # exit status, see `hosts.errors_of_process`
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True)
class Options:
    """Start several processes of one run on this machine; behind the options come the run and the options of train.

    The output is that of process 0, and on stderr that of the others, each line behind `[1] ` and so on.
    The first Ctrl-C or SIGTERM goes to all, so that the run saves and stops; the second ends all at once.
    """

    processes: int = 0
    """How many."""
    devices_per_process: int = 0
    """Devices of each: its part of the visible GPUs, simulated CPU devices where there are none; 0 for an equal part
    of the GPUs, or one CPU device."""
    restarts: int = 0
    """How often all are started again after one has failed; a run goes on from its last checkpoint. Not after exit
    status 2, with which a process refuses what would be refused again."""
    fallback_processes: int = 0
    """How many start once more when restarts are used up or of no use, as on a machine that has lost a GPU."""
    fallback: str = ""
    """What is added to the options of train then, in one word: `--fallback="--mesh.data 1"`."""
    grace: int = 3
    """Seconds that the others have to end by themselves once one has failed; none if it was killed, for they cannot go
    on or save without it."""
    module: str = "dsjax.train"
    """What each process runs, as `python -m` would."""

    def __post_init__(self) -> None:
        lows = {"processes": 1, "devices_per_process": 0, "restarts": 0, "fallback_processes": 0, "grace": 0}
        for name, low in lows.items():
            if getattr(self, name) < low:
                hint = ", before the run: --processes 2 configs/tiny.toml" if name == "processes" else ""
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {low}{hint}")
        if self.fallback and not self.fallback_processes:
            raise ValueError(f"fallback = {self.fallback!r}: also needs --fallback-processes, how many start with it")


def launch(command: Sequence[str], options: Options) -> int:
    """Run a command in several processes that `parallel.hosts.start` joins, from the main thread.

    Returns:
        Of the last start: 0 if all processes succeeded; otherwise the exit status of the one that failed first,
        128 + its number for a signal.

    Raises:
        ValueError: the machine has too few GPUs.
        OSError: the command cannot be started.
    """
    gpus = _visible_gpus(os.environ)
    starts = [(list(command), options)] * (options.restarts + 1)
    if options.fallback_processes:
        fewer = replace(options, processes=options.fallback_processes)
        starts.append(([*command, *shlex.split(options.fallback)], fewer))
    for _, each in starts:
        _divide(gpus, each)
    inbox: queue.SimpleQueue[_Exit | signal.Signals] = queue.SimpleQueue()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        if before[number] is not signal.SIG_IGN:  # a shell's background job is to outlive its Ctrl-C
            signal.signal(number, lambda number, _: inbox.put(signal.Signals(number)))
    try:
        at = 0
        while True:
            words, of_start = starts[at]
            run = _Run(words, of_start, _divide(gpus, of_start), inbox)
            status = run.to_the_end()
            last = len(starts) - 1
            if status == 0 or run.interrupted or at == last:
                return status
            if status == _REFUSED and at < options.restarts:
                if not options.fallback_processes:
                    return status
                at = last
            else:
                at += 1
            if at > options.restarts:
                _say(f"starting {options.fallback_processes} of {options.processes} {options.fallback}".rstrip())
            else:
                _say(f"starting all again, {at} of {options.restarts}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Exit(NamedTuple):
    process: int


class _Run:
    """One start of all processes."""

    def __init__(self, command: Sequence[str], options: Options, gpus: Sequence[str | None], inbox: queue.SimpleQueue):
        self.options, self.inbox = options, inbox
        self.interrupted = False
        self.status = 0
        self.failures: dict[int, int] = {}
        """Exit codes other than 0, the first to come first."""
        self.quiet = threading.Event()
        self.deadline: float | None = None
        self.children: dict[int, subprocess.Popen] = {}
        address = f"127.0.0.1:{_free_port()}"
        try:
            for process in range(options.processes):
                environment = _environment(process, options, address, gpus[process])
                self.children[process] = _start(command, process, environment)
        except BaseException:
            self._send(signal.SIGKILL)
            raise
        # Threads come last: a process that has some is no safe place to start another from.
        self.readers = [
            threading.Thread(target=_forward, args=(child, process, self.quiet), daemon=True)
            for process, child in self.children.items()
            if child.stdout
        ]
        waiters = [
            threading.Thread(target=self._wait, args=(child, process), daemon=True)
            for process, child in self.children.items()
        ]
        for thread in self.readers + waiters:
            thread.start()

    def to_the_end(self) -> int:
        """Wait for all processes, and return the exit status of the run."""
        try:
            while self.children:
                try:
                    left = None if self.deadline is None else max(0, self.deadline - time.monotonic())
                    event = self.inbox.get(timeout=left)
                except queue.Empty:
                    self._kill()
                    continue
                if isinstance(event, _Exit):
                    self._ended(event.process)
                else:
                    self._interrupt(event)
            for reader in self.readers:
                reader.join()
            if self.failures and not self.quiet.is_set():
                self._name_the_first()
            return self.status
        finally:
            self._send(signal.SIGKILL)
            if self.status and sys.stdout.isatty():
                print(end="\x1b[?25h", flush=True)  # a progress bar that was killed had hidden the cursor

    def _interrupt(self, number: signal.Signals) -> None:
        if self.interrupted:
            self._send(signal.SIGKILL)
            return
        self.interrupted = True
        _say(f"passing {number.name} on to all processes; the next one ends them at once")
        self._send(number)

    def _ended(self, process: int) -> None:
        child = self.children.pop(process)
        _signal_group(child, signal.SIGKILL)  # what it started itself
        code = child.wait()
        if not code:
            if self.deadline is None:
                self.deadline = time.monotonic() + _LINGER
            return
        self.failures[process] = code
        if self.quiet.is_set():
            return
        self.status = self.status or (code if code > 0 else 128 - code)
        if code < 0 or process == 0:  # JAX ends the others when its coordinator is gone
            self._end_the_others()
        elif len(self.failures) == 1:
            self.deadline = time.monotonic() + self.options.grace

    def _kill(self) -> None:
        """The time to end is over."""
        self.deadline = None
        if self.failures:
            self._end_the_others()
            return
        self.status = 1
        left = ", ".join(map(str, self.children))
        _say(f"the others finished {_LINGER} s ago: killing {left}")
        self.quiet.set()
        self._send(signal.SIGKILL)

    def _end_the_others(self) -> None:
        """Kill at once: they are in the middle of a step that needs all. What they say to it is of no interest."""
        self.quiet.set()
        self._send(signal.SIGKILL)
        self._name_the_first()

    def _name_the_first(self) -> None:
        codes = set(self.failures.values())
        process, code = next(iter(self.failures.items()))
        how = f"exit status {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        if len(self.failures) == self.options.processes > 1 and len(codes) == 1:
            _say(f"all processes ended with {how}")
        else:
            _say(f"process {process} ended with {how}{'; ending the others' if self.children else ''}")

    def _send(self, number: signal.Signals) -> None:
        for child in self.children.values():
            _signal_group(child, number)

    def _wait(self, child: subprocess.Popen, process: int) -> None:
        # Left unreaped until the main thread has taken note, so that a signal of its never meets another process.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        self.inbox.put(_Exit(process))


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES holds, or would hold if it were set."""
    if environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return []
    if (given := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.replace(" ", "").split(",") if name not in ("", "-1")]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _divide(gpus: list[str], options: Options) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each process; None on a machine without GPUs."""
    if not gpus:
        return [None] * options.processes
    each = options.devices_per_process or len(gpus) // options.processes
    needed = max(each, 1) * options.processes
    if needed > len(gpus):
        raise ValueError(
            f"{options.processes} processes of {max(each, 1)} devices need {needed} GPUs and {len(gpus)} are visible: "
            "start fewer, or set JAX_PLATFORMS=cpu, which simulates devices on the CPU"
        )
    return [",".join(gpus[each * process : each * (process + 1)]) for process in range(options.processes)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(process: int, options: Options, address: str, gpus: str | None) -> dict[str, str]:
    environment = os.environ | {
        COORDINATOR: address,
        PROCESSES: str(options.processes),
        PROCESS: str(process),
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # JAX would listen to the whole network
    }
    if options.devices_per_process:
        environment["JAX_NUM_CPU_DEVICES"] = str(options.devices_per_process)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    if process:
        environment["PYTHONUNBUFFERED"] = "1"  # its output is a pipe, and would come late
    return environment


def _start(command: Sequence[str], process: int, environment: dict[str, str]) -> subprocess.Popen:
    """A process in a group of its own: Ctrl-C in a terminal would reach it twice, from there and from us."""
    prctl, launcher = getattr(ctypes.CDLL(None), "prctl", None), os.getpid()

    def end_with_launcher() -> None:
        if prctl:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:
                os._exit(1)

    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if process else {}
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=end_with_launcher,
        **output,
    )


def _forward(child: subprocess.Popen, process: int, quiet: threading.Event) -> None:
    """Pass on lines, a moment late: those of a process that is about to be killed, over the loss of another, are not
    wanted."""
    begun = b""
    while chunk := os.read(child.stdout.fileno(), 1 << 16):
        *lines, begun = (begun + chunk).split(b"\n")
        if quiet.wait(_MOMENT):
            begun = b""
            continue  # to the end, so that nobody waits for a full pipe
        sys.stderr.buffer.write(b"".join(f"[{process}] ".encode() + line + b"\n" for line in lines))
        sys.stderr.buffer.flush()
    if begun:
        sys.stderr.buffer.write(f"[{process}] ".encode() + begun + b"\n")
        sys.stderr.buffer.flush()


def _signal_group(child: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS: not permitted where only zombies are left
        os.killpg(child.pid, number)


def _say(message: str) -> None:
    print("dsjax:", message, file=sys.stderr, flush=True)
