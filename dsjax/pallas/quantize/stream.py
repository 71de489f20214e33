"""Tensors through shared memory, tile by tile: what all quantizers have in common.

A fixed number of blocks of threads share the tiles. Each keeps loads of its next tiles in flight while it computes one,
and stores of the last ones: a ring of 2 or 3 buffers for every input, and of two for every output. Copies are TMA's,
which fills what lies outside of a tensor with zeros and stores nothing there, so that the last tiles may be partial.

JAX's own `emit_pipeline` does the same, but its outputs do not run in the interpreter.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsjax.config import Fp8Kernel
from dsjax.pallas.hopper import interpreter

STAGES = (3, 2)
"""Buffers of an input, of steps that read little and much."""
MUCH = 28 * 1024
OUTPUT_STAGES = 2
BLOCKS_PER_SM = 4
"""At most; as many as fit. They hide each other's latencies."""
SHARED_MEMORY_PER_SM = 233_472
RESERVED = 4096
"""Bytes of a block's shared memory that CUDA and reductions take, about."""
ALIGNMENT = 32
"""Of matrices' columns, as bytes; their rows should be a multiple of 8."""


@dataclass(frozen=True)
class Tile:
    """The part of an array that a step of a kernel reads or writes."""

    shape: tuple[int | None, ...]
    """None is one index, as an axis that the kernel does not see."""
    start: Callable[..., tuple[Any, ...]]
    """First indices of a step's tile; gets the step's place in the grid."""
    swizzled: bool = True
    """Whether its buffer is, against bank conflicts; for matrices."""
    rows: int | None = None
    """How many of its first rows there are, where the kernel computes more of them than it needs."""

    def of(self, ref: Any, place: Sequence[Any]) -> Any:
        """Return a step's part of an array in global memory."""
        sizes = self.shape if self.rows is None else (self.rows, *self.shape[1:])
        starts = self.start(*place)
        return ref.at[tuple(s if n is None else pl.ds(s, n) for s, n in zip(starts, sizes, strict=True))]

    def in_buffer(self, buffer: Any) -> Any:
        """Return what of a buffer is copied."""
        return buffer if self.rows is None else buffer.at[pl.ds(0, self.rows)]

    def buffers(self, count: int, array: Any) -> plgpu.SMEM:
        """Return `count` buffers for its part of an array."""
        shape = (count, *(n for n in self.shape if n is not None))
        if self.swizzled:
            return swizzled(shape, array.dtype, array.shape[-1])
        return plgpu.SMEM(shape, array.dtype, transforms=unswizzled(shape[-1]) if len(shape) > 2 else ())

    def nbytes(self, dtype: Any) -> int:
        """Return its size."""
        return prod(n or 1 for n in self.shape) * jnp.dtype(dtype).itemsize


def swizzled(shape: tuple[int, ...], dtype: Any, columns: int) -> plgpu.SMEM:
    """Return shared memory for tiles of a matrix of so many columns, a multiple of `ALIGNMENT`.

    The wider its swizzled parts the better, but TMA copies whole ones: they have to divide the columns.
    """
    size = jnp.dtype(dtype).itemsize
    row = min(shape[-1] * size, 128)
    width = next(width for width in (128, 64, 32) if width <= row and columns * size % width == 0)
    transforms = (plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def unswizzled(columns: int) -> tuple[plgpu.TilingTransform]:
    """Return what leaves a matrix of so many columns as it is; without, Mosaic would choose for it."""
    return (plgpu.TilingTransform((1, columns)),)


def stream(
    compute: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Sequence[tuple[jax.Array, Tile]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct | None, Tile | None]],
    impl: Fp8Kernel,
    num_sms: int,
    *,
    constants: Sequence[tuple[jax.Array, Tile]] = (),
    scratch: Sequence[Any] = (),
) -> list[jax.Array]:
    """Run `compute` for every place of a grid, the last axis fastest.

    Args:
        compute: gets the place, references to the inputs' and outputs' tiles in shared memory, then the constants and
            the scratch.
        inputs: arrays and what a step reads of them.
        outputs: shapes, None for the same array as the last; and what a step writes, None for an array that stays in
            global memory.
        num_sms: multiprocessors that it takes; each gets as many blocks of threads as fit.
        constants: what every step reads.
        scratch: further shared memory.

    Raises:
        ValueError: `num_sms` below 1.
    """
    if num_sms < 1:
        raise ValueError(f"num_sms = {num_sms}, should be at least 1")
    steps = prod(grid)
    arrays = [array for array, _ in outputs if array]
    array_of = [sum(array is not None for array, _ in outputs[: i + 1]) - 1 for i in range(len(outputs))]
    stored = [(arrays[i], tile) for i, (_, tile) in zip(array_of, outputs, strict=True) if tile]
    read = sum(tile.nbytes(x.dtype) for x, tile in inputs)
    stages = STAGES[read > MUCH]
    memory = stages * read
    memory += sum(OUTPUT_STAGES * tile.nbytes(x.dtype) for x, tile in stored)
    memory += sum(tile.nbytes(x.dtype) for x, tile in constants)
    memory += sum(prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in scratch)
    resident = max(1, min(BLOCKS_PER_SM, SHARED_MEMORY_PER_SM // (memory + RESERVED)))
    # The interpreter's multiprocessors have one each: blocks are threads of Python to it.
    blocks = min(steps, num_sms * (1 if impl == "interpret" else resident))

    def kernel(*refs: Any) -> None:
        refs = list(refs)

        def take(like: Sequence[Any]) -> list[Any]:
            return [refs.pop(0) for _ in like]

        sources, constant_sources, results = take(inputs), take(constants), take(arrays)
        results = [results[i] for i in array_of]
        fetched, written, kept = take(inputs), take(stored), take(constants)
        full, *own = refs
        constants_full = own.pop(0) if constants else None
        block = lax.axis_index("block")
        mine = lax.div(steps - block + (blocks - 1), jnp.int32(blocks))

        def place_of(step: Any) -> tuple[Any, ...]:
            rest, place = block + step * blocks, []
            for size in grid[:0:-1]:
                place.append(lax.rem(rest, jnp.int32(size)))
                rest = lax.div(rest, jnp.int32(size))
            return rest, *place[::-1]

        def fetch(step: Any, slot: Any) -> None:
            place = place_of(step)
            for (_, tile), source, buffer in zip(inputs, sources, fetched, strict=True):
                plgpu.copy_gmem_to_smem(tile.of(source, place), tile.in_buffer(buffer.at[slot]), full.at[slot])

        for (_, tile), source, buffer in zip(constants, constant_sources, kept, strict=True):
            start = (0,) * len(grid)
            plgpu.copy_gmem_to_smem(tile.of(source, start), tile.in_buffer(buffer.at[0]), constants_full)
        for stage in range(stages):
            pl.when(stage < mine)(functools.partial(fetch, jnp.int32(stage), stage))
        if constants:
            plgpu.barrier_wait(constants_full)

        @pl.loop(0, mine)
        def _(step: Any) -> None:
            slot, out_slot = lax.rem(step, jnp.int32(stages)), lax.rem(step, jnp.int32(OUTPUT_STAGES))
            place = place_of(step)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(OUTPUT_STAGES - 1, wait_read_only=True)
            of_step = iter([buffer.at[out_slot] for buffer in written])
            outs = [next(of_step) if tile else ref for ref, (_, tile) in zip(results, outputs, strict=True)]
            compute(place, [buffer.at[slot] for buffer in fetched], outs, *(buffer.at[0] for buffer in kept), *own)
            # Makes what was written visible to TMA; after it, all threads have also read their inputs.
            plgpu.commit_smem()
            for (_, tile), out, ref in zip(outputs, outs, results, strict=True):
                if tile:
                    plgpu.copy_smem_to_gmem(tile.in_buffer(out), tile.of(ref, place), commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            pl.when(step + stages < mine)(functools.partial(fetch, step + stages, slot))

        plgpu.wait_smem_to_gmem(0)

    buffers = [tile.buffers(stages, x) for x, tile in inputs]
    buffers += [tile.buffers(OUTPUT_STAGES, x) for x, tile in stored]
    buffers += [tile.buffers(1, x) for x, tile in constants]
    barriers = [plgpu.Barrier(num_arrivals=len(inputs), num_barriers=stages)]
    if constants:
        barriers.append(plgpu.Barrier(num_arrivals=len(constants)))
    run = plgpu.kernel(
        kernel,
        out_type=arrays,
        scratch_types=[*buffers, *barriers, *scratch],
        grid=(blocks,),
        grid_names=("block",),
        **interpreter(impl),
    )
    return run(*(x for x, _ in (*inputs, *constants)))
