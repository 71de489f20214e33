"""Time on a device: what is timed, and the clock, CUPTI or the wall's."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

ROTATED = 256 * 2**20
"""Bytes of operands that calls take in turns: five times the L2 cache."""


@dataclass
class Rival:
    """Something that is timed: a function, and operands that its calls take in turns."""

    call: Callable[..., Any]
    sets: Sequence[tuple[Any, ...]]
    carried: Any = None
    """What every call takes before its operands and returns changed, in place."""
    wait: Callable[[Any], Any] = jax.block_until_ready
    done: int = 0

    def run(self, calls: int) -> None:
        """Call it so often, and wait."""
        result = None
        for _ in range(calls):
            operands = self.sets[self.done % len(self.sets)]
            self.done += 1
            if self.carried is None:
                result = self.call(*operands)
            else:
                result = self.carried = self.call(self.carried, *operands)
        self.wait(result)


class Clock:
    """Gives the seconds that a device works."""

    def __init__(self, on_gpu: bool):
        self.cupti = _cupti() if on_gpu else None
        self.name = "CUPTI: kernels on the device" if self.cupti else "wall clock of queued calls"
        self.flush, self.flushes = None, set()
        if self.cupti:
            xor, words = jax.jit(lambda words: words ^ 1), jnp.zeros(ROTATED // 4, jnp.uint32)
            self.flush = partial(xor, words)
            jax.block_until_ready(self.flush())
            self.flushes = {name for name, _ in _kernels_of(self.cupti, lambda: jax.block_until_ready(self.flush()))}

    def __call__(self, run: Callable[[int], Any], calls: int) -> float:
        """Return the seconds of one call, `run(calls)` being that many that it waits for."""
        if self.cupti is None:
            return wall_seconds(run, calls)
        return _sum(_kernels_of(self.cupti, lambda: run(calls))) / calls

    def flushed(self, call: Callable[[], Array], calls: int) -> float:
        """Return the seconds of a call on operands that are always the same, behind others that fill the cache; on the
        wall clock nothing can be told apart, and nothing is between."""

        def run() -> None:
            for _ in range(calls):
                self.flush()
                result = call()
            jax.block_until_ready(result)

        if self.cupti is None:
            return self(Rival(call, [()]).run, calls)
        found = _kernels_of(self.cupti, run)
        return _sum([(name, milliseconds) for name, milliseconds in found if name not in self.flushes]) / calls


def wall_seconds(run: Callable[[int], Any], calls: int) -> float:
    """Return the wall-clock time of one of some calls, which are queued and waited for together."""
    begin = time.perf_counter()
    run(calls)
    return (time.perf_counter() - begin) / calls


def _sum(kernels: list[tuple[str, float]]) -> float:
    seconds = sum(milliseconds for _, milliseconds in kernels) / 1e3
    if seconds <= 0:
        raise RuntimeError("CUPTI saw no kernel")
    return seconds


def _cupti() -> Any:
    """Return JAX's binding to CUPTI, None if it does not see kernels here."""
    try:
        from jax.experimental.mosaic.gpu import profiler

        binding = profiler.mosaic_gpu_lib._mosaic_gpu_ext
        add, x = jax.jit(lambda x: x + 1), jnp.zeros(2**20)
        jax.block_until_ready(add(x))
        _sum(_kernels_of(binding, lambda: jax.block_until_ready(add(x))))
        return binding
    except Exception:  # not installed, not permitted, or of another version: there is another clock
        return None


def _kernels_of(cupti: Any, run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Return names and milliseconds of the kernels that `run` starts and waits for."""
    cupti._cupti_init()
    try:
        run()
    finally:
        kernels = cupti._cupti_get_timings(False)
    return kernels
