"""How tests run: shapes checked, eight CPU devices, compiled programs kept between runs."""

import gc
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# The rooms whose signatures declare shapes check them from here on.
CHECKED = ("data", "inference", "model", "parallel", "pipeline.chunk", "training")
install_import_hook([f"dsjax.{room}" for room in CHECKED], "shapes.check")

# Small programs compile for seconds and run for milliseconds: XLA's lowest effort halves the former.
jax.config.update("jax_disable_most_optimizations", True)

# Tests of meshes need devices; an existing process cannot change their number. Measured on two cores, a training step
# on the first of eight takes 10 % more CPU time than on a single one, and compiling, where the time of tests goes, no
# more. Set here and not in XLA_FLAGS, so that commands that tests start see the machine as it is.
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def _cpu() -> str:
    """The instruction set of this CPU: JAX's cache keys do not hold it, and its programs do not run on another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]


if not jax.config.jax_compilation_cache_dir:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "dsjax" / f"tests-{_cpu()}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# The first example of a property may compile; how long a machine takes says nothing about dsjax.
settings.register_profile("dsjax", deadline=None)
settings.load_profile("dsjax")

MOST_MAPS = 20_000
"""Parts of a process' memory that may be mapped after a file of tests. Every compiled program has some, and Linux
allows 65,530: at that, XLA crashes while it compiles."""


@pytest.fixture(scope="module", autouse=True)
def programs_are_freed() -> Iterator[None]:
    """Let go of compiled programs between files of tests, when there are many; they are in the cache on disk."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
