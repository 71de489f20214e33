"""Before the first step: whether the hosts of a run can do it together. What disagrees is named with its host.

Each process says what it is through JAX's coordination service, which needs no devices; only then devices are counted,
and only then something is sent between them. So a host that is not like the others is an error at the start, and not
a run that hangs.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from dsjax.config import Config
from dsjax.parallel.agreement import gather, own_process
from dsjax.parallel.hosts import complaint, process_prefix, processes, simulate_devices
from dsjax.parallel.mesh import AXES, make_mesh
from dsjax.settings import to_dict

MAY_DIFFER = ("run", "data.path", "data.tokenizer", "data.cache")
"""Settings that are paths, and may have another name on another host: what is behind them is compared."""
PACKAGES = (
    *("dsjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-nccl-cu13", "nvidia-cudnn-cu13", "libtpu"),
)
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
"""Variables that change the program: processes with different programs wait for each other forever."""
CLOCK_SECONDS = 5.0
"""Between the clocks of two hosts, above which there is a warning: files and logs would seem to be of another time."""
_SECONDS_TO_BE_SEEN = 5.0


@dataclass(frozen=True)
class Space:
    """Bytes that a run will need on the file system of its folder."""

    least: int = 0
    """Of the next checkpoint: without it the run is refused."""
    wanted: int = 0
    """Of all that will be there at once: with less there is a warning."""


def preflight(
    config: Config, space: Space, console: Console, *, timeout: float = 300, always_say: bool = False
) -> Mesh:
    """Compare the processes of a run, try all-to-alls along its mesh, and say how it went.

    A process that is alone has nobody to disagree with, and only its folder and its own devices to try; on one device
    nothing is said. Creates JAX's backend: on a CPU with as many simulated devices as the mesh wants.

    Args:
        space: see `Space`.
        console: of process 0.
        timeout: seconds that an all-to-all may take, compilation included.
        always_say: say how it went on one device too.

    Raises:
        ValueError: in all processes, in one line: what disagrees or is missing, and in which process on which host.
        SystemExit: an all-to-all does not come back.
    """
    facts = _exchange_facts(config)
    hosts = [fact["host"] for fact in facts]
    _refuse([*_disagreements(facts, hosts), *_folder_problems(facts, hosts, space)])
    simulated = simulate_devices(config.mesh.devices // processes())
    devices = gather(_devices())
    _refuse(list(_odd_ones(devices, hosts)))
    mesh = make_mesh(config.mesh)
    rates = _try_links(mesh, hosts, timeout)
    if simulated:
        console.print(f"simulated {mesh.size} devices on the CPU")
    for warning in _warnings(config, facts, hosts, space):
        console.print(f"warning   {warning}")
    if mesh.size > 1 or always_say:
        console.print(f"preflight {_summary(facts, devices, rates)}")
    return mesh


def _exchange_facts(config: Config) -> list[dict[str, Any]]:
    """Return what every process says of itself, by process, before any looks at its devices."""
    run = Path(config.run).absolute()
    probe = _leave_probe(run) if own_process() == 0 else {}
    probe = gather(probe)[0]
    try:
        gather(None)  # so that clocks are read at the same time
        own = {
            "host": socket.gethostname(),
            "run": config.run,
            "clock": time.time(),
            "alike": _versions() | {name: os.environ.get(name, "") for name in ENVIRONMENT},
            "settings": _digest(_flat(to_dict(config))),
            "folder": _folder_error(run, probe),
            "free": _free_bytes(run),
        }
        facts = gather(own)
    finally:
        if own_process() == 0 and probe["name"]:
            _probe_path(run, probe).unlink(missing_ok=True)
    if len({fact["settings"] for fact in facts}) > 1:
        for fact, settings in zip(facts, gather(_flat(to_dict(config))), strict=True):
            fact["alike"] |= settings
    return facts


def require_alike(own: Mapping[str, str]) -> None:
    """Compare versions, and what processes have by the same names; to be called by all.

    Raises:
        ValueError: on every process, about all that is not the same.
    """
    found = gather({"host": socket.gethostname(), "alike": _versions() | own})
    _refuse(list(_odd_ones([each["alike"] for each in found], [each["host"] for each in found])))


def _versions() -> dict[str, str]:
    """Return versions by name, those of the machine too; what is absent is `none`."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    driver = Path("/proc/driver/nvidia/version")
    number = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", driver.read_text()) if driver.exists() else None
    return found | {"NVIDIA driver": number[1] if number else "none"}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings by dotted name as text, but those in `MAY_DIFFER`."""
    flat = {}
    for key, value in settings.items():
        name = prefix + key
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif name not in MAY_DIFFER:
            flat[name] = repr(value)
    return flat


def _digest(settings: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _devices() -> dict[str, str]:
    """Return what this process has: the others must have the same."""
    device = jax.local_devices()[0]
    kinds = sorted({each.device_kind for each in jax.local_devices()})
    return {
        "platform": device.platform,
        "devices": str(jax.local_device_count()),
        "kind of device": ", ".join(kinds),
        "runtime of devices": " ".join(device.client.platform_version.split()),
    }


# What disagrees.


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


def _disagreements(facts: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> Iterator[str]:
    return _odd_ones([fact["alike"] for fact in facts], hosts)


def _odd_ones(values: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> Iterator[str]:
    """Yield a line for each name under which not all processes have the same value."""
    for name in values[0]:
        of_name = [value.get(name, "none") for value in values]
        # Of two that are as frequent, that of process 0 comes first.
        (usual, count), *others = Counter(of_name).most_common()
        for other, _ in others:
            odd = [process for process, value in enumerate(of_name) if value == other]
            rest = "in the others" if count > 1 else f"in {_named([of_name.index(usual)], hosts)}"
            yield f"{name}: {other or 'empty'} in {_named(odd, hosts)}, {usual or 'empty'} {rest}"


def _named(odd: Sequence[int], hosts: Sequence[str]) -> str:
    """Return `process 3 (node3)`, or some of them."""
    shown = ", ".join(f"{process} ({hosts[process]})" for process in odd[:8])
    more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
    return f"process{'es' if len(odd) > 1 else ''} {shown}{more}"


def _folder_problems(facts: Sequence[Mapping[str, Any]], hosts: Sequence[str], space: Space) -> Iterator[str]:
    """Yield what is wrong with the run's folder, one line for all processes that find the same."""
    run, reasons = facts[0]["run"], {}
    for process, fact in enumerate(facts):
        if fact["folder"]:
            reasons.setdefault(fact["folder"], []).append(process)
    for reason, found in reasons.items():
        yield f"run = {run!r}: {f'{_named(found, hosts)}: ' if len(facts) > 1 else ''}{reason}"
    if not reasons and facts[0]["free"] < space.least:
        yield (
            f"run = {run!r}: a checkpoint has {_size(space.least)} and {_size(facts[0]['free'])} are free; "
            "make room, or name a folder on another file system"
        )


def _warnings(config: Config, facts: Sequence[Mapping[str, Any]], hosts: Sequence[str], space: Space) -> Iterator[str]:
    free = facts[0]["free"]
    if free < space.wanted:
        yield (
            f"run = {config.run!r}: {_size(free)} are free, and checkpoint.keep = {config.checkpoint.keep} checkpoints "
            f"and the one that is written beside them need {_size(space.wanted)} more"
        )
    for process, fact in enumerate(facts):
        ahead = fact["clock"] - facts[0]["clock"]
        if abs(ahead) > CLOCK_SECONDS:
            seconds = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'}"
            yield f"the clock of {_named([process], hosts)} is {seconds} that of {_named([0], hosts)}"


# The run's folder. Nothing is made in it, for it is not a run's yet: the nearest folder above stands for it.


def _leave_probe(run: Path) -> dict[str, Any]:
    """Write a file that all processes must see, and return how many folders above the run's it is."""
    levels = next(level for level, path in enumerate((run, *run.parents)) if path.exists())
    probe = {"levels": levels, "name": f".dsjax-{uuid.uuid4().hex}", "error": ""}
    path = _probe_path(run, probe)
    try:
        path.touch()
    except OSError as error:
        return probe | {"name": "", "error": f"cannot write in {path.parent}: {error.strerror}"}
    return probe


def _probe_path(run: Path, probe: Mapping[str, Any]) -> Path:
    return (run, *run.parents)[probe["levels"]] / probe["name"]


def _folder_error(run: Path, probe: Mapping[str, Any]) -> str:
    """Return why this process cannot use the run's folder with the others; empty where it can."""
    if probe["error"]:
        return probe["error"] if own_process() == 0 else ""
    if probe["levels"] > len(run.parents):
        return "not the folder that process 0 has"
    path = _probe_path(run, probe)
    end = time.monotonic() + _SECONDS_TO_BE_SEEN
    while not path.exists():
        if time.monotonic() > end:
            return f"{path.parent} is not the folder that process 0 has: it must be on a file system that all share"
        time.sleep(0.1)
    own = path.with_name(f"{path.name}-{own_process()}")
    try:
        own.write_bytes(b"dsjax")
        own.unlink()
    except OSError as error:
        return f"cannot write in {path.parent}: {error.strerror}"
    return ""


def _free_bytes(run: Path) -> int:
    try:
        return shutil.disk_usage(next(path for path in (run, *run.parents) if path.exists())).free
    except OSError:  # unreachable, which `_folder_error` says
        return 0


# What devices send to each other.


def _try_links(mesh: Mesh, hosts: Sequence[str], timeout: float) -> dict[str, tuple[float, str]]:
    """Return bytes per second that a device sends in an all-to-all along each axis, of the slowest host, and its name.

    Raises:
        ValueError: what arrives is not what was sent.
    """
    own: dict[str, Any] = {"wrong": [], "rates": {}}
    for axis in [axis for axis in AXES if mesh.shape[axis] > 1]:
        late = (
            f"{process_prefix()}the test all-to-all along mesh.{axis} has not come back for {timeout:.0f} s: "
            "look at the network between the hosts, or raise distributed.timeout"
        )
        with complaint(timeout, late):
            right, own["rates"][axis] = all_to_all(mesh, axis)
        if not right:
            own["wrong"].append(axis)
    found = gather(own)
    _refuse(
        [
            f"an all-to-all along mesh.{', mesh.'.join(each['wrong'])} brought {_named([process], hosts)} "
            "what was not sent"
            for process, each in enumerate(found)
            if each["wrong"]
        ]
    )
    by_host = list(zip([each["rates"] for each in found], hosts, strict=True))
    return {axis: min((rates[axis], host) for rates, host in by_host) for axis in own["rates"]}


def all_to_all(mesh: Mesh, axis: str, repetitions: int = 3) -> tuple[bool, float]:
    """Send a block to every device along an axis.

    Returns:
        Whether the devices of this process got what was meant for them, and the bytes per second that a device sent to
        others, the best of the repetitions.
    """
    size, words = mesh.shape[axis], (1 << 18 if mesh.devices.flat[0].platform == "cpu" else 1 << 24)
    block = -(-words // size)
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    shape = (mesh.size, size, block)
    # Along the axis, neighbours are so many devices apart.
    stride = int(np.prod([mesh.shape[name] for name in AXES[AXES.index(axis) + 1 :]]))

    def message(sender: int, receiver: int) -> np.ndarray:
        return (np.arange(block, dtype=np.int32) << 8) ^ (sender * mesh.size + receiver)

    def peers(device: int) -> list[int]:
        first = device - device // stride % size * stride
        return [first + each * stride for each in range(size)]

    def sent(index: tuple[slice, ...]) -> np.ndarray:
        device = index[0].start or 0
        return np.stack([message(device, peer) for peer in peers(device)])[None]

    exchange = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=1, tiled=True),
            mesh=mesh,
            in_specs=sharding.spec,
            out_specs=sharding.spec,
        )
    )
    x = jax.make_array_from_callback(shape, sharding, sent)
    arrived = jax.block_until_ready(exchange(x))
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(exchange(x))
        seconds.append(time.perf_counter() - began)
    right = all(
        np.array_equal(np.asarray(shard.data)[0, each], message(peer, shard.index[0].start or 0))
        for shard in arrived.addressable_shards
        for each, peer in enumerate(peers(shard.index[0].start or 0))
    )
    return right, 4 * block * (size - 1) / min(seconds)


def _summary(
    facts: Sequence[Mapping[str, Any]], devices: Sequence[Mapping[str, str]], rates: Mapping[str, tuple[float, str]]
) -> str:
    hosts = len({fact["host"] for fact in facts})
    count = len(facts)
    parts = [
        f"{hosts} host{'s' if hosts > 1 else ''}, {count} process{'es' if count > 1 else ''} of "
        f"{devices[0]['devices']} {devices[0]['kind of device']}; config {facts[0]['settings']}, "
        f"jax {facts[0]['alike']['jax']}"
    ]
    if rates:
        slowest = ", ".join(
            f"{axis} {rate / 1e9:.3g} GB/s{f' ({host})' if hosts > 1 else ''}" for axis, (rate, host) in rates.items()
        )
        parts.append(f"all-to-all per device: {slowest}")
    if count > 1:
        clocks = [fact["clock"] for fact in facts]
        parts.append(f"clocks within {max(clocks) - min(clocks):.2g} s")
    parts.append(f"{_size(facts[0]['free'])} free")
    return "; ".join(parts)


def _size(nbytes: float) -> str:
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if nbytes >= 0.9995 * limit:  # which is shown as 1, and not as 1e+03 of the smaller ones
            return f"{nbytes / limit:.3g} {letter}B"
    return f"{nbytes:.0f} B"
