"""The one persistent kernel behind every product: a ring in shared memory between TMA and the tensor cores.

A block of threads stays on its SM and computes one tile of the output after another. One of its warpgroups only copies:
it has TMA bring both operands, block of K by block of K, into the slots of the ring. The others multiply, each its 64
rows of the tile, with wgmma. A slot has two barriers: on `full` arrive the copies that fill it, on `empty` the
warpgroups that have read it. The copying one does not wait for the end of a tile, so that the next tile's blocks come
while this one's result is being written.

Codes in E4M3 come with scales. The tensor cores sum 128 columns of K, which share scales; then every thread multiplies
these partial sums by the scales and adds them, in float32 and in registers of its own, to the total (report section
3.3.2). 16-bit numbers stay in the tensor cores' sums for all of K.

What makes a product dense, grouped, masked or a gradient of weights is its `Schedule`: which tiles there are, to which
group each belongs, and over which blocks of K it sums.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from dsjax.config import Fp8Kernel
from dsjax.pallas.hopper import fence_async_shared_cta, interpreter, tiled_smem, traced_once
from dsjax.pallas.matmul.config import BLOCK_BYTES, ROWS, Config

Scalar = int | Int32[Array, ""]
Ref = Any
"""Of an array in global or shared memory."""
SCALED_TOGETHER = 128
"""Rows of B that share a scale, where it has scales of blocks."""


@dataclass(frozen=True)
class Tile:
    """A tile of the output."""

    m: Scalar
    """Place along M, in tiles."""
    n: Scalar
    """Place along N, in tiles."""
    first: Scalar
    """First block of K that it sums over."""
    end: Scalar
    """Block behind the last one; without any, the tile is zero."""
    group: Scalar | None = None
    """Index into those arrays that have a leading axis."""


class Schedule(Protocol):
    """Which tiles there are. With clusters, tiles are pairs of them along the cluster's axis."""

    def count(self, tables: Sequence[Ref]) -> Scalar:
        """Return how many."""
        ...

    def tile(self, index: Scalar, tables: Sequence[Ref]) -> Tile:
        """Return one, looked up in tables of int32 in global memory."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "b", "a_scales", "b_scales"],
    meta_fields=["b_scale_rows", "a_major", "b_major"],
)
@dataclass(frozen=True)
class Operands:
    """The arrays of a product a b^T; any of them may have a leading axis for groups."""

    a: Array
    """[M, K], or [K, M] where `a_major` is "mn"."""
    b: Array
    """[N, K], or [K, N] where `b_major` is "mn"."""
    a_scales: Float[Array, "K/128 M"] | None = None
    b_scales: Float[Array, "..."] | None = None
    """[N/128, K/128], or [K/128, N] where `b_scale_rows` is 1."""
    b_scale_rows: Literal[1, 128] = SCALED_TOGETHER
    a_major: Literal["k", "mn"] = "k"
    b_major: Literal["k", "mn"] = "k"


@traced_once("schedule", "config", "out_shape", "out_dtype", "num_sms", "name", "impl")
def multiply(
    operands: Operands,
    schedule: Schedule,
    tables: Sequence[Int32[Array, "..."]],
    config: Config,
    *,
    out_shape: tuple[int, ...],
    out_dtype: DTypeLike,
    num_sms: int,
    name: str,
    into: Ref | None = None,
    impl: Fp8Kernel,
) -> Array | None:
    """Run the kernel.

    Args:
        tables: what `schedule` looks tiles up in.
        out_shape: [M, N], or with a leading axis for groups.
        num_sms: streaming multiprocessors to use.
        name: the kernel's, for profiles.
        into: reference to a float32 array that the product is added to, in place; then nothing is returned.
        impl: "mosaic" or "interpret".
    """
    a, b = operands.a, operands.b
    scaled = operands.a_scales is not None
    by_row = scaled and operands.b_scale_rows == 1
    block_k = BLOCK_BYTES // a.dtype.itemsize
    stages, warpgroups = config.stages, config.warpgroups
    scratch = {
        "a_tiles": tiled_smem((stages, *_as_it_lies(config.tile_m, block_k, operands.a_major)), a.dtype),
        "b_tiles": tiled_smem((stages, *_as_it_lies(config.tile_n, block_k, operands.b_major)), b.dtype),
        "out_tiles": tiled_smem((warpgroups, config.store_buffers, ROWS, config.store_n), out_dtype),
        "full": plgpu.Barrier(num_arrivals=2 + scaled + by_row, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }
    if scaled:
        scratch["a_scale_tiles"] = plgpu.SMEM((stages, config.tile_m), jnp.float32)
    if by_row:
        scratch["b_scale_tiles"] = plgpu.SMEM((stages, config.tile_n), jnp.float32)
    cluster = {}
    if config.cluster:
        cluster = {"cluster": (config.cluster_size,), "cluster_names": ("cluster",)}
        # A slot is empty when the blocks of the cluster have all read it: what one copies goes to all.
        scratch["empty"] = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=warpgroups, num_barriers=stages
        )
    body = functools.partial(
        _kernel,
        schedule=schedule,
        config=config,
        block_k=block_k,
        majors=(operands.a_major, operands.b_major),
        num_scales=2 * scaled,
        num_tables=len(tables),
        adds=into is not None,
    )
    kernel = plgpu.kernel(
        body,
        out_type=() if into is not None else jax.ShapeDtypeStruct(out_shape, out_dtype),
        scratch_types=scratch,
        grid=(num_sms // config.cluster_size,),
        grid_names=("sm",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        **cluster,
        **interpreter(impl),
    )
    scales = (operands.a_scales, operands.b_scales) if scaled else ()
    out = kernel(a, b, *scales, *tables, *(() if into is None else (into,)))
    return out if into is None else None


def _as_it_lies(rows: Any, of_k: Any, major: str) -> tuple[Any, Any]:
    return (rows, of_k) if major == "k" else (of_k, rows)


def _of_group(array: Ref, tile: Tile) -> Ref:
    return array.at[tile.group] if len(array.shape) == 3 else array


def _kernel(
    a: Ref,
    b: Ref,
    *refs: Ref,
    schedule: Schedule,
    config: Config,
    block_k: int,
    majors: tuple[str, str],
    num_scales: int,
    num_tables: int,
    adds: bool,
    a_tiles: Ref,
    b_tiles: Ref,
    out_tiles: Ref,
    full: Ref,
    empty: Ref,
    a_scale_tiles: Ref | None = None,
    b_scale_tiles: Ref | None = None,
) -> None:
    a_scales, b_scales = refs[:num_scales] if num_scales else (None, None)
    tables, out = refs[num_scales : num_scales + num_tables], refs[-1]
    tile_m, tile_n, stages = config.tile_m, config.tile_n, config.stages
    copying_registers, multiplying_registers = config.registers
    warpgroup = lax.axis_index("warpgroup")

    def tile_of(index: Scalar) -> Tile:
        tile = schedule.tile(index, tables)
        if config.cluster is None:
            return tile
        place = getattr(tile, config.cluster) * config.cluster_size + lax.axis_index("cluster")
        return replace(tile, **{config.cluster: place})

    def next_slot(slot: Scalar) -> Scalar:
        return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)

    def copy_tiles() -> None:
        plgpu.set_max_registers(copying_registers, action="decrease")
        a_for_all = {"collective_axes": "cluster"} if config.cluster == "n" else {}
        b_for_all = {"collective_axes": "cluster"} if config.cluster == "m" else {}

        @plgpu.nd_loop((schedule.count(tables),), collective_axes="sm", init_carry=(jnp.int32(0), jnp.int32(0)))
        def filled(loop, carry):
            tile = tile_of(loop.index[0])
            rows, columns = pl.ds(tile.m * tile_m, tile_m), pl.ds(tile.n * tile_n, tile_n)

            def copy_block(i, carry):
                count, slot = carry

                @pl.when(count >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])
                    # The slot was read as threads read. TMA, about to write it, keeps no order with that by itself.
                    fence_async_shared_cta()

                of_k = pl.ds(i * block_k, block_k)
                copies = [
                    (_of_group(a, tile).at[_as_it_lies(rows, of_k, majors[0])], a_tiles, a_for_all),
                    (_of_group(b, tile).at[_as_it_lies(columns, of_k, majors[1])], b_tiles, b_for_all),
                ]
                if a_scale_tiles is not None:
                    copies.append((_of_group(a_scales, tile).at[i, rows], a_scale_tiles, a_for_all))
                if b_scale_tiles is not None:
                    copies.append((_of_group(b_scales, tile).at[i, columns], b_scale_tiles, b_for_all))
                for source, tiles, for_all in copies:
                    plgpu.copy_gmem_to_smem(source, tiles.at[slot], full.at[slot], **for_all)
                return count + 1, next_slot(slot)

            return lax.fori_loop(tile.first, tile.end, copy_block, carry)

        # No block may end while others of its cluster still release its slots.
        def await_release(i, slot):
            @pl.when(filled[0] + i >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            return next_slot(slot)

        lax.fori_loop(0, stages, await_release, filled[1])

    def multiply_tiles() -> None:
        plgpu.set_max_registers(multiplying_registers, action="increase")
        our_rows = pl.ds(warpgroup * ROWS, ROWS)

        def operands(slot: Scalar) -> tuple[Ref, Ref]:
            left = a_tiles.at[slot, our_rows] if majors[0] == "k" else a_tiles.at[slot, :, our_rows].T
            right = b_tiles.at[slot]
            return left, right.T if majors[1] == "k" else right

        def release(slot: Scalar) -> None:
            if config.cluster and a_scale_tiles is not None:
                # To the other blocks of a cluster one thread speaks for all, who should have read the scales by now;
                # and the fence of another block's copying warpgroup would say nothing of reads in this one.
                plgpu.commit_smem()
            plgpu.barrier_arrive(empty.at[slot])

        def scaled_sum(tile: Tile, slot: Scalar) -> tuple[Scalar, list[Array]]:
            # Of B's scales, one number holds for these columns; or else so many numbers are read at a time.
            width = tile_n if b_scale_tiles is None and tile_n <= SCALED_TOGETHER else 64
            parts = tile_n // width

            def block_scales(i):
                """Scales of B for block `i` of K, one for each part: read one block ahead, as memory is far."""
                if b_scale_tiles is not None:
                    return ()
                b_of_group = _of_group(b_scales, tile)
                last_row, last_block = (size - 1 for size in b_of_group.shape)
                rows = [lax.div(tile.n * tile_n + part * width, SCALED_TOGETHER) for part in range(parts)]
                return tuple(b_of_group[lax.min(row, last_row), lax.min(i, last_block)] for row in rows)

            def add_block(i, carry):
                slot, b_scale, totals = carry
                plgpu.barrier_wait(full.at[slot])
                next_b_scale = block_scales(i + 1)
                a_scale = plgpu.load(a_scale_tiles.at[slot, our_rows], layout=plgpu.Layout.WGMMA.reduce(1))

                def partial_sum(accumulator):
                    plgpu.wgmma(accumulator, *operands(slot))
                    return accumulator[...]  # waits

                product = pl.run_scoped(partial_sum, plgpu.ACC((ROWS, tile_n), jnp.float32))
                if b_scale_tiles is None:
                    release(slot)
                added = []
                for part in range(parts):
                    columns = pl.ds(part * width, width)
                    if b_scale_tiles is None:
                        scale = lax.broadcast_in_dim(a_scale * b_scale[part], (ROWS, width), [0])
                    else:
                        # Part by part, as not all fit into registers.
                        b_row_scale = plgpu.load(b_scale_tiles.at[slot, columns], layout=plgpu.Layout.WGMMA.reduce(0))
                        scale = lax.broadcast_in_dim(a_scale, (ROWS, width), [0]) * lax.broadcast_in_dim(
                            b_row_scale, (ROWS, width), [1]
                        )
                    added.append(totals[part] + product[:, part * width : (part + 1) * width] * scale)
                if b_scale_tiles is not None:
                    release(slot)
                return next_slot(slot), next_b_scale, tuple(added)

            zero = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
            start = (slot, block_scales(tile.first), (zero,) * parts)
            slot, _, totals = lax.fori_loop(tile.first, tile.end, add_block, start)
            return slot, list(totals)

        def plain_sum(tile: Tile, slot: Scalar) -> tuple[Scalar, list[Array]]:
            def over_k(accumulator):
                def add_block(i, carry):
                    slot, previous = carry
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(accumulator, *operands(slot))
                    plgpu.wgmma_wait(1)  # The previous product is done with its slot, this one goes on.

                    @pl.when(i > tile.first)
                    def _():
                        release(previous)

                    return next_slot(slot), slot

                end, last = lax.fori_loop(tile.first, tile.end, add_block, (slot, slot))
                plgpu.wgmma_wait(0)

                @pl.when(tile.end > tile.first)
                def _():
                    release(last)

                return end, accumulator[...]

            end, total = pl.run_scoped(over_k, plgpu.ACC((ROWS, tile_n), jnp.float32))
            return end, [total]

        def store(tile: Tile, totals: list[Array]) -> None:
            width, buffers = config.store_n, config.store_buffers
            for i in range(tile_n // width):
                total, column = divmod(i * width, totals[0].shape[1])
                buffer = out_tiles.at[warpgroup, i % buffers]
                plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
                buffer[...] = totals[total][:, column : column + width].astype(out_tiles.dtype)
                plgpu.commit_smem()
                rows = pl.ds(tile.m * tile_m + warpgroup * ROWS, ROWS)
                place = _of_group(out, tile).at[rows, pl.ds(tile.n * tile_n + i * width, width)]
                plgpu.copy_smem_to_gmem(buffer, place, **({"reduction_op": "add"} if adds else {}))

        @plgpu.nd_loop((schedule.count(tables),), collective_axes="sm", init_carry=jnp.int32(0))
        def _(loop, carry):
            tile = tile_of(loop.index[0])
            slot, totals = (plain_sum if a_scale_tiles is None else scaled_sum)(tile, carry)
            if adds:
                pl.when(tile.end > tile.first)(lambda: store(tile, totals))
            else:
                store(tile, totals)
            return slot

        plgpu.wait_smem_to_gmem(0)

    pl.when(warpgroup == config.warpgroups)(copy_tiles)
    pl.when(warpgroup < config.warpgroups)(multiply_tiles)
