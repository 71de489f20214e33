"""How a process joins its run: which process it is, of how many, and where process 0 listens.

Under Slurm, in a Kubernetes JobSet and under `python -m dsjax.launch` nothing has to be said; elsewhere the options
`--distributed.*` say it. JAX's coordination service, in process 0, brings the processes together and ends all of them
when one is lost: whatever started them starts them again, and the run goes on from its last checkpoint.
Nothing here imports JAX before it must: settings are checked at once.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, NoReturn

from rich.console import Console

from dsjax.settings import in_one_line

COORDINATOR, PROCESSES, PROCESS = "DSJAX_COORDINATOR", "DSJAX_PROCESSES", "DSJAX_PROCESS"
"""Environment variables of what the options say; `launch/jobset.yaml` and `dsjax.launch` set them."""

_OPTIONS = ("distributed.coordinator", "distributed.processes", "distributed.process")


@dataclass(frozen=True)
class Distributed:
    """This process among those of its run; by default what Slurm, Kubernetes or `dsjax.launch` say, or it is alone."""

    coordinator: str = ""
    """Where process 0 listens, as `host:port`: the same for all processes."""
    processes: int = 0
    """How many there are; 1 runs alone whatever the environment says."""
    process: int = -1
    """Number of this one, from 0."""
    timeout: int = 300
    """Seconds in which all processes have to be there."""
    heartbeat: int = 100
    """Seconds of silence after which a process counts as lost, and all end."""

    def __post_init__(self) -> None:
        for name in ("timeout", "heartbeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"distributed.{name} = {getattr(self, name)}: must be at least 1")
        self.place()

    def place(self) -> "Place | None":
        """The place that the settings name by themselves, if they do.

        Raises:
            ValueError: they contradict each other, or one is missing.
        """
        if (self.coordinator, self.processes, self.process) == ("", 0, -1):
            return None
        if (self.coordinator, self.processes) == ("", 1) and self.process in (-1, 0):
            return Place()
        return _place(self.coordinator, self.processes, self.process, _OPTIONS, "settings")


@dataclass(frozen=True)
class Place:
    """Which process of a run this is."""

    process: int = 0
    processes: int = 1
    coordinator: str = ""
    """`host:port` of process 0; empty under Slurm, where JAX finds it, and for a process that is alone."""
    said_by: Literal["nobody", "settings", "environment", "slurm"] = "nobody"


_joined: Place | None = None


def find_place(distributed: Distributed, environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place: what the settings say, or else our variables, or else Slurm's, or else it is alone.

    Raises:
        ValueError: one line, where they contradict each other or one is missing.
    """
    if place := distributed.place():
        return place
    if any(name in environment for name in (COORDINATOR, PROCESSES, PROCESS)):
        coordinator = environment.get(COORDINATOR, "")
        numbers = (_integer(environment, name, absent) for name, absent in ((PROCESSES, 0), (PROCESS, -1)))
        return _place(coordinator, *numbers, (COORDINATOR, PROCESSES, PROCESS), "environment")
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if "SLURM_JOB_ID" in environment and (processes := _integer(environment, tasks, 1)) > 1:
        if "SLURM_STEP_NODELIST" not in environment:
            raise ValueError(
                f"{tasks} = {processes}, but srun has not started this process: put srun before the command, "
                "or run it alone with --distributed.processes 1"
            )
        return Place(_integer(environment, "SLURM_PROCID", 0), processes, said_by="slurm")
    return Place()


def start(distributed: Distributed = Distributed()) -> None:
    """Join the run; to be called before JAX is first used for anything. A second call changes nothing.

    A process that is alone joins nothing. JAX would abort a process that has waited in vain: here an error says for
    whom it waited. JAX's preemption service is left off, as it swallows SIGTERM: before the first step SIGTERM ends
    the process, as it does without JAX, and from then on `training.interrupts` asks the run to save.

    Raises:
        ValueError: see `find_place`.
        OSError: process 0 cannot listen, or does not answer.
        SystemExit: not all processes came; said on stderr, status 1, at once.
    """
    global _joined
    if _joined:
        return
    place = find_place(distributed)
    if place.processes > 1:
        _join(place, distributed)
    _joined = place


def processes() -> int:
    """How many processes the run has."""
    return _joined.processes if _joined else 1


def is_first_process() -> bool:
    """Whether this process is the one that writes and shows."""
    return _joined is None or _joined.process == 0


def console_of_process() -> Console:
    """Where this process shows progress: nowhere, unless it is process 0."""
    return Console(highlight=False, soft_wrap=True, quiet=not is_first_process())


def process_prefix() -> str:
    """What stands before an error: `process 1 (node1): `, or nothing for a process that is alone."""
    return f"process {_joined.process} ({socket.gethostname()}): " if _joined and _joined.processes > 1 else ""


@contextmanager
def errors_of_process() -> Iterator[None]:
    """Inside, an error that ends one process of several names the process, and ends it at once.

    JAX has a process that exits wait for the others, which wait for it in a collective: nobody would notice. So this
    one leaves without the cleanup that Python does at exit. What ends all processes alike is said by process 0 only.
    For a process that is alone nothing changes.
    """
    try:
        yield
    except BaseException as error:
        if processes() == 1:
            raise
        status = _status(error)
        if not status:
            raise
        if message := _message(error):
            _say_once(message)
        leave(status)


def _status(error: BaseException) -> int:
    """The exit status of a process that an error ends; 2 is for what would be the same at the next start."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case ValueError() | OSError() if not _SIGNS_OF_LOSS.search(str(error)):
            return 2
        case KeyboardInterrupt():
            return 128 + signal.SIGINT
    return 1


def _message(error: BaseException) -> str:
    """What is to be said of an error; empty where it has been said."""
    text = in_one_line(error)
    if _SIGNS_OF_LOSS.search(text):
        # Whoever started the processes knows which one is lost, and ends this one meanwhile.
        time.sleep(_SECONDS_TO_BE_ENDED)
        return f"another process is lost, or does not answer: {text[:300]}"
    if isinstance(error, SystemExit):
        return text.removeprefix("dsjax: ") if isinstance(error.code, str) else ""
    return text if isinstance(error, ValueError | OSError) else traceback.format_exc().rstrip()


_SIGNS_OF_LOSS = re.compile(
    r"Gloo \w+ failed|NCCL|CoordinationService|[Hh]eartbeat|Connection (?:closed|reset) by peer|Barrier timed out"
)
"""In errors of collectives and of JAX's coordination service, which have no common type."""
_SECONDS_TO_BE_ENDED = 5
_SECONDS_OF_LAST_WORDS = 2


def _say_once(message: str) -> None:
    """Print an error on stderr, unless process 0 says the same."""
    from jax._src.distributed import global_state  # JAX has no public name for the store

    client, milliseconds = global_state.client, _SECONDS_OF_LAST_WORDS * 1000
    if client is None:
        print(f"dsjax: {process_prefix()}{message}", file=sys.stderr, flush=True)
    elif is_first_process():
        print(f"dsjax: {message}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):  # only this process has failed, or the others say something else
            client.key_value_set("dsjax/last words", message)
            client.wait_at_barrier("dsjax/last words", milliseconds)
            time.sleep(0.2)  # without process 0, JAX would abort the others with a C++ stack before they have left
    else:
        said = None
        with suppress(RuntimeError):
            said = client.blocking_key_value_get("dsjax/last words", milliseconds)
        if said != message:
            print(f"dsjax: {process_prefix()}{message}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            client.wait_at_barrier("dsjax/last words", milliseconds)


def leave(status: int) -> NoReturn:
    """End this process at once, without waiting for threads or for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def simulate_devices(needed: int) -> bool:
    """Let this process have `needed` devices on a CPU too, and return whether it simulates them.

    A number of devices that JAX_NUM_CPU_DEVICES, XLA_FLAGS or `jax.config` give stays as it is, and so do GPUs and
    TPUs. Creates JAX's backend, and so comes after `start`, in all processes.

    Raises:
        ValueError: the CPU has fewer devices, because their number is given or JAX was used before; or there is no
            backend of the kind that JAX_PLATFORMS names.
    """
    import jax

    given = jax.config.jax_num_cpu_devices >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    elsewhere = (jax.config.jax_platforms or "cpu").split(",")[0] != "cpu"
    if needed > 1 and not given and not elsewhere:
        # Whether the machine has better devices, JAX knows only once it has looked; there this does no harm.
        # JAX that has been used refuses: clearing its backends would take compiled programs and arrays away.
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", needed)
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # by an assertion JAX says that it lacks the package for them
        asked = f"JAX_PLATFORMS = {jax.config.jax_platforms!r}: " if jax.config.jax_platforms else ""
        raise ValueError(f"{asked}{(str(error) or 'JAX has no such devices here').strip().splitlines()[0]}") from None
    if backend != "cpu":
        return False
    here = jax.local_device_count()
    if here < needed:
        raise ValueError(
            f"mesh: each process needs {needed} devices and has {here}: start Python with "
            f"JAX_NUM_CPU_DEVICES={needed}, which simulates them on the CPU"
        )
    return needed > 1


def _place(coordinator: str, processes: int, process: int, names: tuple[str, str, str], said_by: str) -> Place:
    """The place that three settings of these names give."""
    where, how_many, which = names
    if coordinator and not _is_address(coordinator):
        raise ValueError(f"{where} = {coordinator!r}: must be host:port of process 0, such as node0:29400")
    if processes < 0 or (processes == 0 and process < 0 and not coordinator):
        raise ValueError(f"{how_many} = {processes}: must be at least 1")
    if processes == 0:
        raise ValueError(f"{how_many} is missing: it must be how many processes the run has")
    if process == -1:
        raise ValueError(f"{which} is missing: it must be the number of this process, from 0 to {processes - 1}")
    if not 0 <= process < processes:
        raise ValueError(f"{which} = {process}: must be from 0 to {processes - 1}, as {how_many} = {processes}")
    if not coordinator and processes > 1:
        raise ValueError(f"{where} is missing: it must be host:port of process 0, the same for all {processes}")
    return Place(process, processes, coordinator, said_by)


def _is_address(text: str) -> bool:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):([0-9]{1,5})", text)
    return match is not None and 0 < int(match[2]) < 2**16


def _integer(environment: Mapping[str, str], name: str, absent: int) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"[0-9]*", text):
        raise ValueError(f"{name} = {text!r}: must be an integer of at least 0")
    return int(text) if text else absent


def _join(place: Place, distributed: Distributed) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)
    deadline = time.monotonic() + distributed.timeout
    if place.said_by == "slurm":
        where = f"the first of {os.environ['SLURM_STEP_NODELIST']}"
        how = {"cluster_detection_method": "slurm", "local_device_ids": _slurm_devices(os.environ)}
    else:
        where = place.coordinator
        how = {"cluster_detection_method": "deactivate", "coordinator_address": where}
        if place.process > 0:
            _await_coordinator(place, deadline, distributed.timeout)
        else:
            _require_free_port(where)
    impatience = complaint(
        max(deadline - time.monotonic(), 1),
        f"process {place.process}: after {distributed.timeout} s not all {place.processes} processes were "
        f"at {where}: start processes 0 to {place.processes - 1}, or raise distributed.timeout",
    )
    try:
        with impatience:
            jax.distributed.initialize(
                num_processes=place.processes,
                process_id=place.process,
                # After the complaint, as the end of this one is an abort with a C++ stack.
                initialization_timeout=distributed.timeout + 60,
                heartbeat_timeout_seconds=distributed.heartbeat,
                **how,
            )
    except jax.errors.JaxRuntimeError as error:
        raise OSError(f"process {place.process} cannot join the run at {where}: {error}") from None


def _slurm_devices(environment: Mapping[str, str]) -> list[int]:
    """GPUs of this task; empty for all that it sees. JAX by itself takes one, even of a node that has no other task."""
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "1")
    alone = all(count == "1" for count in re.sub(r"\(x[0-9]+\)", "", per_node).split(","))
    divided = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    return [] if alone or divided else [_integer(environment, "SLURM_LOCALID", 0)]


def _await_coordinator(place: Place, deadline: float, timeout: int) -> None:
    """Wait until process 0 listens; its name too may be known only once it runs, as in Kubernetes."""
    host, _, port = place.coordinator.rpartition(":")
    while True:
        try:
            # Short attempts: a packet that is dropped while a host comes up is not sent again for long.
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or error
                raise TimeoutError(
                    f"process {place.process} had no answer from process 0 at {place.coordinator} for {timeout} s "
                    f"({reason}): start it there, or correct the address"
                ) from None
        time.sleep(0.2)


def _require_free_port(address: str) -> None:
    """JAX 0.12 at times ends with a segmentation fault where the port of its coordinator is in use."""
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen at {address}: {os.strerror(error.errno)}; choose another port"
        ) from None


@contextmanager
def complaint(seconds: float, message: str) -> Iterator[None]:
    """Inside, what lasts longer than so many seconds ends this process with a message and status 1.

    For calls into JAX, which nothing else interrupts.
    """
    timer = threading.Timer(seconds, _give_up, [f"dsjax: {message}"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(message: str) -> None:
    print(message, file=sys.stderr)
    leave(1)
