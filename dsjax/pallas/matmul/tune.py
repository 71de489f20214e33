"""Timing the cuts of a product on the GPU at hand, to put what is found into `config`.

for timing in tune("grouped", m=32768, n=4096, k=7168, groups=8):
    print(timing)
"""

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsjax.config import Fp8Kernel
from dsjax.pallas.choice import NUM_SMS
from dsjax.pallas.matmul import scaled, sixteen_bits
from dsjax.pallas.matmul.config import Config, Kind, candidates
from dsjax.pallas.matmul.reference import TILE

CODES = jnp.float8_e4m3fn
WARM_UP = 3
REPEATS = 20
SNAKES = (8, 16)

Product = Callable[..., Array]
Timer = Callable[[Callable[[], Array]], float]


@dataclass(frozen=True)
class Timing:
    """What one cut took."""

    config: Config
    seconds: float
    """Infinity if it does not run."""
    tflops: float
    error: str = ""
    """Why it does not run."""


def tune(
    kind: Kind,
    m: int,
    n: int,
    k: int,
    groups: int = 1,
    *,
    num_sms: int = NUM_SMS,
    configs: Iterable[Config] | None = None,
    impl: Fp8Kernel = "mosaic",
    timer: Timer | None = None,
) -> list[Timing]:
    """Run a product with every cut, on random operands in evenly filled groups; the fastest comes first.

    Args:
        m: rows of all groups together; of each group if "masked". Gradients of weights are [m, n] for each group.
        k: summed over; for gradients of weights, rows of all groups together.
        configs: by default those of `candidates`, each with several orders of tiles.
        timer: gives the seconds that a function takes, by default the best of a few runs.

    Raises:
        ValueError: rows that cannot be divided evenly into groups of a multiple of 128.
    """
    arrays, product, out_dtype = example(kind, m, n, k, groups)
    if configs is None:
        configs = [
            replace(config, snake=snake) for config in candidates(kind, jnp.dtype(out_dtype)) for snake in SNAKES
        ]
    operations = 2 * m * n * k * (groups if kind == "masked" else 1)
    timings = []
    for config in configs:
        function = jax.jit(lambda *arrays, config=config: product(*arrays, config=config, num_sms=num_sms, impl=impl))
        try:
            seconds = (timer or _seconds)(lambda function=function: function(*arrays))
            timings.append(Timing(config, seconds, operations / seconds / 1e12))
        except Exception as error:  # a cut that does not compile or run is a result of its own
            timings.append(Timing(config, float("inf"), 0.0, f"{type(error).__name__}: {error}"))
    return sorted(timings, key=lambda timing: timing.seconds)


def example(kind: Kind, m: int, n: int, k: int, groups: int = 1) -> tuple[tuple[Array, ...], Product, jnp.dtype]:
    """Return random operands, the function that multiplies them, and the type of its result; see `tune`.

    Raises:
        ValueError: rows that cannot be divided evenly into groups of a multiple of 128.
    """
    rows = k if kind.startswith("wgrad") else m
    if kind not in ("dense", "dense_1d1d", "masked") and rows % (groups * TILE):
        raise ValueError(f"{kind}: {rows} rows are not {groups} groups of a multiple of {TILE}")
    sizes = jnp.full(groups, rows // groups, jnp.int32)
    group_of_tile = jnp.asarray(np.repeat(np.arange(groups), max(rows // groups // TILE, 1)), jnp.int32)

    def codes(*shape: int, of: int = 1) -> tuple[Array, Array]:
        # Values as after quantization: power, and so the clock, depends on the bits.
        values = jax.random.normal(jax.random.key(len(shape) + of), shape, jnp.bfloat16) * 100
        *leading, height, width = shape
        return values.astype(CODES), jnp.ones((*leading, -(-height // of), -(-width // TILE)))

    def bf16(*shape: int) -> Array:
        return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)

    match kind:
        case "dense":
            return (*codes(m, k), *codes(n, k, of=TILE)), scaled.scaled_matmul, jnp.bfloat16
        case "dense_1d1d":
            product = functools.partial(scaled.scaled_matmul, rows=1, out_dtype=jnp.float32)
            return (*codes(m, k), *codes(n, k)), product, jnp.float32
        case "grouped":
            return (
                (*codes(m, k), *codes(groups, n, k, of=TILE), group_of_tile),
                scaled.grouped_scaled_matmul,
                jnp.bfloat16,
            )
        case "masked":
            arrays = (*codes(groups, m, k), *codes(groups, n, k, of=TILE), jnp.full(groups, m, jnp.int32))
            return arrays, scaled.masked_scaled_matmul, jnp.bfloat16
        case "wgrad":
            return (*codes(m, k), *codes(n, k), sizes), scaled.grouped_scaled_wgrad, jnp.float32
        case "grouped_16bit":
            return (bf16(m, k), bf16(groups, n, k), group_of_tile), sixteen_bits.grouped_matmul, jnp.bfloat16
        case "wgrad_16bit":
            return (bf16(k, m), bf16(k, n), sizes), sixteen_bits.grouped_wgrad, jnp.float32


def _seconds(run: Callable[[], Array]) -> float:
    for _ in range(WARM_UP):
        jax.block_until_ready(run())
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(REPEATS):  # queued one behind the other, so that starting them costs nothing
            result = run()
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - start) / REPEATS)
    return best
