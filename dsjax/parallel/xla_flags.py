"""What XLA and NCCL are told for the good of a run: a table, by chip, each entry with its reason.

What the environment sets already stays, flag by flag; `xla_flags = false` leaves all away. They are read when JAX
creates its backend, so they are set before. A flag that XLA does not know ends the process, so a test asks it.

What is usual and not here was measured on programs compiled ahead of time (jax 0.12): on GPUs the latency hiding
scheduler and pipelined all-gathers left a step over data x node x local as it is without, and double buffering of loops
made it three times as long and hid no more. On TPUs (v5p, libtpu 0.0.50) asynchronous collectives and their fusion
changed nothing in a loop over layers that gathers weights. On CPUs a collective that waits is never ended early, so
there is nothing to make longer.
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsjax.config import Config

type Platform = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True)
class Flag:
    """One recommendation."""

    name: str
    """Of a flag of XLA (`--xla_...`), or of an environment variable."""
    value: str
    why: str

    @property
    def of_xla(self) -> bool:
        """Whether it goes into XLA_FLAGS."""
        return self.name.startswith("--")


MEMORY_SHARE = 0.96
"""Of a device's memory, what a run may take; NCCL and CUDA are assumed to get along with the rest."""

_GPU = (
    Flag(
        "--xla_gpu_nccl_terminate_on_error",
        "true",
        "a process whose transfer fails ends, and whatever started it starts all again, in place of one that hangs",
    ),
    Flag(
        "--xla_gpu_memory_limit_slop_factor",
        "1000",
        "XLA's scheduler counts what a loop holds once more for every branch inside; of a step that fits it believes "
        "that memory is out, hides no transfer and computes results twice. This is ten times the limit",
    ),
    Flag(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        str(MEMORY_SHARE),
        "of a GPU's memory JAX takes three quarters; the rest of this is room for NCCL and CUDA",
    ),
    Flag("NCCL_DEBUG", "WARN", "NCCL says itself what is wrong with the network, and otherwise nothing"),
)


def recommended(config: Config, platform: Platform) -> tuple[Flag, ...]:
    """Return what is recommended for a run on a kind of chip, and what its settings ask for in any case."""
    if platform != "gpu":
        return ()
    return (*(_GPU if config.xla_flags else ()), *_channels(config))


def compiler_options(config: Config, platform: Platform) -> dict[str, bool | int]:
    """Return XLA's of the recommended flags as `jax.stages.Lowered.compile` takes them."""
    flags = [flag for flag in recommended(config, platform) if flag.of_xla]
    return {flag.name.removeprefix("--"): json.loads(flag.value) for flag in flags}  # true, or a number


def _channels(config: Config) -> tuple[Flag, ...]:
    """Return what gives NCCL the multiprocessors that `kernels.communication_sms` keeps free for it.

    NCCL runs a transfer as a kernel of a block of threads per channel, each on a multiprocessor of its own, and XLA
    runs one transfer at a time. The other side of the setting is `Runtime.leaving`.
    """
    sms, why = config.kernels.communication_sms, "as many as our kernels leave free (kernels.communication_sms)"
    names = ("--xla_gpu_nccl_collective_max_nchannels", "--xla_gpu_nccl_p2p_max_nchannels")
    return tuple(Flag(name, str(sms), why) for name in names) if sms else ()


def set_flags(
    config: Config, environment: MutableMapping[str, str] = os.environ, platform: Platform | None = None
) -> list[str]:
    """Set what is recommended for a run and not given; to be called before JAX is used.

    Args:
        environment: of this process.
        platform: by default the one that JAX will choose.

    Returns:
        What was set, as it would be written in a shell.

    Raises:
        ValueError: XLA_FLAGS holds what XLA does not understand.
    """
    _require_understood(environment)
    given = {word.partition("=")[0] for word in _words(environment)}
    new = [
        flag
        for flag in recommended(config, platform or likely_platform(environment))
        if flag.name not in given and flag.name not in environment
    ]
    flags = [f"{flag.name}={flag.value}" for flag in new if flag.of_xla]
    if flags:
        environment["XLA_FLAGS"] = " ".join([*flags, environment.get("XLA_FLAGS", "")]).strip()
    for flag in new:
        if not flag.of_xla:
            environment[flag.name] = flag.value
    return [f"{flag.name}={flag.value}" for flag in new]


def _require_understood(environment: Mapping[str, str]) -> None:
    """Let another process read XLA_FLAGS: XLA ends the one that reads a wrong flag, at times with pages of help."""
    if not (flags := environment.get("XLA_FLAGS", "").strip()):
        return
    words = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    said = subprocess.run(words, env=os.environ | dict(environment), capture_output=True, text=True)
    if said.returncode:
        lines = [line.partition("] ")[2] for line in said.stderr.splitlines() if "] " in line] or ["XLA refuses it"]
        reason = lines[0].replace(" in XLA_FLAGS", "").removesuffix(".")
        raise ValueError(f"XLA_FLAGS = {flags!r}: {reason[:1].lower()}{reason[1:]}")


def _words(environment: Mapping[str, str]) -> Sequence[str]:
    flags = environment.get("XLA_FLAGS", "")
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise ValueError(f"XLA_FLAGS = {flags!r}: {str(error).lower()}") from None


def likely_platform(environment: Mapping[str, str] = os.environ) -> Platform:
    """Return the platform that JAX will choose, without asking JAX, for that would fix the flags."""
    asked = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        return {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}.get(asked, "cpu")
    if any(_installed(f"jax_cuda{version}_plugin") for version in (12, 13)) and list(Path("/dev").glob("nvidia[0-9]*")):
        return "gpu"
    return "tpu" if _installed("libtpu") and list(Path("/dev").glob("accel[0-9]*")) else "cpu"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
