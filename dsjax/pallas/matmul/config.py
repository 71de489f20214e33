"""How a product is cut into tiles, and which cut suits which product."""

import functools
import importlib.metadata
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.pallas.choice import NUM_SMS, SHARED_MEMORY

Kind = Literal["dense", "dense_1d1d", "grouped", "masked", "wgrad", "grouped_16bit", "wgrad_16bit"]
"""Which product: the functions of `scaled`, `dense` with scales of blocks or of rows, and those of `sixteen_bits`."""
Axis = Literal["m", "n"]

BLOCK_BYTES = 128
"""Of K in a slot of the ring: the widest swizzle. 128 columns of E4M3, which share a scale, or 64 of BF16."""
ROWS = 64
"""Of one wgmma, and so of a warpgroup."""
MOST_STAGES = 8
"""Beyond which the ring hides nothing more."""
BARRIERS = 1024
"""Bytes of shared memory, at most, that are not of the arrays."""


@dataclass(frozen=True)
class Config:
    """One cut."""

    warpgroups: int = 2
    """That multiply, each 64 rows of a tile; one more copies."""
    tile_n: int = 128
    """Columns of a tile."""
    stages: int = 5
    """Slots of the ring."""
    store_n: int = 64
    """Columns that are written at a time."""
    cluster: Axis | None = None
    """Two blocks of threads, side by side along this axis, get by one copy what both need."""
    snake: int = 16
    """Tiles along M of a band of the output, see `schedules.Dense`."""

    @property
    def tile_m(self) -> int:
        """Rows of a tile."""
        return ROWS * self.warpgroups

    @property
    def cluster_size(self) -> int:
        """Blocks of threads of a cluster."""
        return 2 if self.cluster else 1

    @property
    def registers(self) -> tuple[int, int]:
        """Per thread, of the copying warpgroup and of the others: multiples of 8, for all threads at most 64K."""
        return {1: (40, 240), 2: (40, 232), 3: (32, 160)}[self.warpgroups]

    @property
    def store_buffers(self) -> int:
        """Buffers that writes take turns in. An odd number of writes per tile would begin the next with the last's."""
        return 2 if self.tile_n // self.store_n % 2 == 0 else 1

    def shared_memory(self, kind: Kind, out_dtype: DTypeLike) -> int:
        """Return the bytes of shared memory that a kernel's arrays take."""
        slot = (self.tile_m + self.tile_n) * BLOCK_BYTES
        if not kind.endswith("16bit"):
            slot += 4 * self.tile_m
        if kind in ("dense_1d1d", "wgrad"):
            slot += 4 * self.tile_n
        stores = self.tile_m * self.store_n * jnp.dtype(out_dtype).itemsize * self.store_buffers
        return self.stages * slot + stores

    def check(self, kind: Kind, out_dtype: DTypeLike, num_sms: int) -> None:
        """Refuse a cut for which there is no kernel.

        Raises:
            ValueError: says which number does not fit.
        """
        widths = (64, 128, 192, 256)
        part = 64 if self.tile_n > 128 else self.tile_n
        if self.warpgroups not in (1, 2, 3) or self.tile_n not in widths or self.stages < 2:
            raise ValueError(f"{self}: should have 1 to 3 warpgroups, tile_n in {widths}, at least 2 stages")
        if part % self.store_n or self.store_n * jnp.dtype(out_dtype).itemsize % 16:
            raise ValueError(f"{self}: store_n should divide {part}, and be a multiple of 16 bytes")
        if not kind.startswith("dense") and (self.cluster == "m" or ("wgrad" not in kind and self.warpgroups == 3)):
            raise ValueError(f"{self}: a tile of a {kind} product has one group: no cluster along m, at most 128 rows")
        if (needed := self.shared_memory(kind, out_dtype) + BARRIERS) > SHARED_MEMORY:
            raise ValueError(f"{self}: needs {needed} bytes of shared memory for a {kind} product of {SHARED_MEMORY}")
        if num_sms < self.cluster_size:
            raise ValueError(f"{self}: needs {self.cluster_size} SMs, num_sms = {num_sms}")


def config_for(kind: Kind, m: int, n: int, out_dtype: DTypeLike, num_sms: int = NUM_SMS) -> Config:
    """Return the cut for an output [m, n]: of those in `candidates`, the one whose last wave is over first.

    Args:
        m: rows of the output; of one group where it has a leading axis, of all of them where they share a buffer.
    """

    def time(item: tuple[Config, float]) -> float:
        config, speed = item
        size = config.cluster_size
        pairs_m, pairs_n = (size if config.cluster == axis else 1 for axis in ("m", "n"))
        tiles = -(-m // (config.tile_m * pairs_m)) * -(-n // (config.tile_n * pairs_n))
        waves = -(-tiles // max(num_sms // size, 1))
        return waves * config.tile_m * config.tile_n / speed

    allowed = {config: speed for config, speed in candidates(kind, out_dtype).items() if config.cluster_size <= num_sms}
    return min(allowed.items(), key=time)[0]


@functools.cache
def candidates(kind: Kind, out_dtype: DTypeLike) -> dict[Config, float]:
    """Return the cuts that are worth a try, and the speed that each may have on large products.

    TFLOPS by a model of an SM, with codes in E4M3: L2 and shared memory deliver too little for small tiles. They have
    not been measured; `tune` does that.
    """
    moves = registers_move()
    speeds: dict[tuple[int, int, Axis | None], float] = {(2, 128, None): 1360, (1, 128, None): 900, (1, 64, None): 600}
    if kind.endswith("16bit"):
        speeds |= {(2, 256, None): 1750, (2, 128, "n"): 1520}
    elif moves:
        speeds |= {(2, 192, None): 1600}
    match kind:
        case "dense" | "grouped":
            speeds |= {(2, 128, "n"): 1520}
            if moves:
                speeds |= {(2, 192, "n"): 1750}
        case "grouped_16bit":
            speeds |= {(2, 256, "n"): 1800}
        case "dense_1d1d" | "wgrad":
            speeds |= {(2, 128, "n"): 1520}
            if moves:
                speeds |= {(2, 192, "n"): 1750}
    if kind == "dense" and moves:
        speeds |= {(3, 128, None): 1600, (3, 128, "m"): 1630, (3, 128, "n"): 1630}
    return {_with_most_stages(kind, out_dtype, *cut): speed for cut, speed in speeds.items()}


def _with_most_stages(kind: Kind, out_dtype: DTypeLike, warpgroups: int, tile_n: int, cluster: Axis | None) -> Config:
    store_n = 128 // jnp.dtype(out_dtype).itemsize
    for stages in range(MOST_STAGES, 1, -1):
        config = Config(warpgroups, tile_n, stages, store_n, cluster)
        if config.shared_memory(kind, out_dtype) + BARRIERS <= SHARED_MEMORY:
            return config
    raise AssertionError(f"{kind}: no ring fits with tiles of {warpgroups * ROWS} x {tile_n}")


@functools.cache
def registers_move() -> bool:
    """Return whether warpgroups that multiply get the registers that the copying one gives away (`setmaxnreg`).

    jax 0.12 links kernels with NVIDIA's nvjitlink where that is installed, and linked kernels cannot. Tiles that need
    those registers would then spill.
    """
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12):
        return True
    names = (found.metadata["Name"] or "" for found in importlib.metadata.distributions())
    return not any(name.lower().startswith("nvidia-nvjitlink") for name in names)
