"""Matrix products of groups of rows, each group with a matrix of its own: what the experts of an MoE layer compute.

Rows lie in DeepGEMM's contiguous layout: group after group, each beginning at a multiple of `alignment`, with zero rows
in between, in a buffer whose size does not depend on how the rows are divided. `group_rows` describes such a buffer.

Dimensions: R rows of the buffer, G groups, K input width, N output width, A alignment.
"""

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from dsjax.config import GroupedMatmulKernel
from dsjax.pallas.choice import NUM_SMS
from dsjax.pallas.choice import resolve as resolve_for_hopper
from dsjax.pallas.matmul.reference import TILE
from dsjax.runtime import target_platform

MULTIPLES = (16, 4, 1)
"""Block sizes of `tiles`, in units of the alignment. Large products run at full speed, small ones leave no row over."""
LARGEST_BLOCK = 1024
"""Rows above which a block gains nothing."""
MOST_COPIED = 2**30
"""Bytes of copied matrices that `batched` may cost."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sizes", "padded_sizes", "group_of_tile", "blocks"],
    meta_fields=["rows", "alignment"],
)
@dataclass(frozen=True)
class Groups:
    """How R rows are divided into groups; everything the products need, derived once per dispatch."""

    sizes: Int32[Array, "G"]
    """Rows of each group, padding not counted."""
    padded_sizes: Int32[Array, "G"]
    """The same rounded up to the alignment; group g begins at the sum of those before it."""
    group_of_tile: Int32[Array, "R/A"]
    """Group that each A rows belong to; G behind the last group."""
    blocks: tuple[tuple[Int32[Array, "B"], Int32[Array, "B"], Int32[Array, ""]], ...]
    """For each block size: first row and group of every block, and how many of these entries are in use."""
    rows: int
    """R."""
    alignment: int
    """A."""

    @property
    def starts(self) -> Int32[Array, "G"]:
        """First row of each group."""
        return jnp.cumsum(self.padded_sizes) - self.padded_sizes

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Rows of a block, for each of `blocks`."""
        return _block_sizes(self.rows, self.alignment)


def default_alignment(platform: str) -> int:
    """Alignment A that suits a platform: small on a CPU, where padding costs more than small products; a tile of the
    tensor cores elsewhere."""
    return 32 if platform == "cpu" else 128


def buffer_rows(total: int, groups: int, alignment: int) -> int:
    """Rows R of a buffer that holds `total` rows however they are divided into `groups`; a multiple of `alignment`."""
    return (total + groups * (alignment - 1)) // alignment * alignment


def group_rows(sizes: Int32[Array, "G"], rows: int, alignment: int) -> Groups:
    """Describe a buffer of `rows` rows that holds `sizes[g]` rows of each group g.

    The sizes are data, not checked: with `rows = buffer_rows(sum(sizes), G, alignment)` they always fit.

    Raises:
        ValueError: `rows` is no multiple of `alignment`.
    """
    if rows % alignment:
        raise ValueError(f"a grouped buffer has rows = {rows}, which should be a multiple of alignment = {alignment}")
    tiles = -(-sizes // alignment)
    first = (jnp.cumsum(tiles) - tiles) * alignment
    blocks = []
    left = tiles
    for block in _block_sizes(rows, alignment):
        count = left // (block // alignment)
        group, within = _enumerate(count, rows // block)
        blocks.append((first[group] + within * block, group, count.sum()))
        left -= count * (block // alignment)
        first += count * block
    index = jnp.arange(rows // alignment)
    group_of_tile = (jnp.cumsum(tiles)[None, :] <= index[:, None]).sum(1, dtype=jnp.int32)
    return Groups(sizes, tiles * alignment, group_of_tile, tuple(blocks), rows, alignment)


def resolve(
    impl: GroupedMatmulKernel, platform: str, *, dtype: DTypeLike, alignment: int, copied_bytes: int = 0
) -> GroupedMatmulKernel:
    """The implementation that `impl` means on `platform` ("cpu", "gpu", "tpu", as `runtime.target_platform` says).

    `tiles` loops over blocks of rows that are really there, however they are divided: CPU, and correct everywhere.
    `mosaic` is the kernels of `pallas.matmul.sixteen_bits`: Hopper, for operands in bfloat16 and groups that begin at
    multiples of 128. `batched` is one batched product of all tiles with copies of their matrices: other NVIDIA chips
    and types, where every turn of a loop is felt, as long as these `copied_bytes` are at most `MOST_COPIED`; beyond, a
    turn's work is long. `ragged` is `jax.lax.ragged_dot`, a kernel on TPU; elsewhere XLA multiplies every row with
    every matrix.

    Args:
        dtype: of both operands.

    Raises:
        ValueError: no such implementation, or `mosaic` where it does not work.
    """
    if impl not in get_args(GroupedMatmulKernel):
        raise ValueError(
            f"grouped matmul: no implementation {impl!r}; there are {', '.join(get_args(GroupedMatmulKernel))}"
        )
    on_hopper = platform == "gpu" and resolve_for_hopper("auto") == "mosaic"
    fits = on_hopper and dtype == jnp.bfloat16 and alignment == TILE
    if impl == "mosaic" and not fits:
        here = f"{'Hopper' if on_hopper else platform}, {jnp.dtype(dtype).name} and {alignment}"
        raise ValueError(
            "kernels.grouped_matmul = 'mosaic' needs a Hopper GPU (H100, H200, H800), bfloat16 and alignment = "
            f"{TILE}; here are {here}; 'auto' runs everywhere"
        )
    if impl != "auto":
        return impl
    if fits:
        return "mosaic"
    return {"cpu": "tiles", "tpu": "ragged"}.get(platform, "batched" if copied_bytes <= MOST_COPIED else "tiles")


def grouped_matmul(
    x: Float[Array, "R K"],
    w: Float[Array, "G N K"],
    groups: Groups,
    impl: GroupedMatmulKernel = "auto",
    num_sms: int = NUM_SMS,
) -> Float[Array, "R N"]:
    """y = x @ w[g].T for the rows of each group g; zero in all other rows.

    Rows of `x` that belong to no group must be zero. Sums are in float32, the result in the type of `x`. The gradients
    of `x` and of `w` are separate equations, so that a pipeline can put off the second.

    Args:
        num_sms: multiprocessors that `mosaic` takes.

    Raises:
        ValueError: shapes that do not fit, or no such implementation here.
    """
    if x.shape[0] != groups.rows or w.shape[0] != groups.sizes.shape[0] or x.shape[1] != w.shape[2]:
        raise ValueError(
            f"grouped matmul of x {x.shape} with w {w.shape}: x should be [{groups.rows}, K] and w "
            f"[{groups.sizes.shape[0]}, N, K]"
        )
    copied_bytes = groups.rows // groups.alignment * w[0].size * w.dtype.itemsize
    resolved = resolve(
        impl,
        target_platform(),
        dtype=jnp.promote_types(x.dtype, w.dtype),
        alignment=groups.alignment,
        copied_bytes=copied_bytes,
    )
    return _grouped_matmul(x, w, groups, resolved, num_sms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(x, w, groups, impl, num_sms):
    return _rows_times_matrices(x, w, groups, impl, num_sms, contract=2)


def _forward(x, w, groups, impl, num_sms):
    return _rows_times_matrices(x, w, groups, impl, num_sms, contract=2), (x, w, groups)


def _backward(impl, num_sms, residuals, dy):
    x, w, groups = residuals
    dx = _rows_times_matrices(dy, w, groups, impl, num_sms, contract=1)
    dw = _rows_times_rows(dy, x, groups, impl, num_sms).astype(w.dtype)
    return dx.astype(x.dtype), dw, None


_grouped_matmul.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("impl", "num_sms", "contract"))
def _rows_times_matrices(
    x: Float[Array, "R I"],
    w: Float[Array, "G N K"],
    groups: Groups,
    impl: GroupedMatmulKernel,
    num_sms: int,
    contract: int,
) -> Float[Array, "R O"]:
    """x @ w[g].T (`contract` = 2) or x @ w[g] (`contract` = 1), row by row."""
    out_width = w.shape[3 - contract]
    match impl:
        case "mosaic" | "interpret":  # the latter for tests
            return _kernels().grouped_matmul(x, w, groups.group_of_tile, contract=contract, impl=impl, num_sms=num_sms)
        case "tiles":
            y = jnp.zeros((groups.rows, out_width), x.dtype)
            for size, (starts, group_of_block, count) in zip(groups.block_sizes, groups.blocks, strict=True):

                def block(i, y, size=size, starts=starts, group_of_block=group_of_block):
                    rows = lax.dynamic_slice_in_dim(x, starts[i], size)
                    matrix = lax.dynamic_index_in_dim(w, group_of_block[i], keepdims=False)
                    product = _dot(rows, matrix, 1, contract - 1).astype(y.dtype)
                    return lax.dynamic_update_slice_in_dim(y, product, starts[i], axis=0)

                y = lax.fori_loop(0, count, block, y)
            return y
        case "batched":
            tiles = x.reshape(-1, groups.alignment, x.shape[1])
            matrices = jnp.take(w, groups.group_of_tile, axis=0, mode="clip")
            y = lax.dot_general(
                tiles, matrices, (((2,), (contract,)), ((0,), (0,))), preferred_element_type=jnp.float32
            )
            return y.astype(x.dtype).reshape(groups.rows, out_width)
        case "ragged":
            w = w if contract == 1 else w.swapaxes(1, 2)
            y = lax.ragged_dot(x, w, groups.padded_sizes, preferred_element_type=jnp.float32).astype(x.dtype)
            # What ragged_dot leaves in rows behind the last group is not specified.
            return jnp.where(jnp.arange(groups.rows)[:, None] < groups.padded_sizes.sum(), y, 0)


@functools.partial(jax.jit, static_argnames=("impl", "num_sms"))
def _rows_times_rows(
    dy: Float[Array, "R N"], x: Float[Array, "R K"], groups: Groups, impl: GroupedMatmulKernel, num_sms: int
) -> Float[Array, "G N K"]:
    """dy.T @ x of each group's rows, in float32. Zero rows of `x` count for nothing, whatever `dy` holds there."""
    num_groups = groups.sizes.shape[0]
    match impl:
        case "mosaic" | "interpret":
            return _kernels().grouped_wgrad(dy, x, groups.padded_sizes, impl=impl, num_sms=num_sms)
        case "tiles":
            dw = jnp.zeros((num_groups, dy.shape[1], x.shape[1]), jnp.float32)
            for size, (starts, group_of_block, count) in zip(groups.block_sizes, groups.blocks, strict=True):

                def block(i, dw, size=size, starts=starts, group_of_block=group_of_block):
                    g = group_of_block[i]
                    product = _dot(
                        lax.dynamic_slice_in_dim(dy, starts[i], size),
                        lax.dynamic_slice_in_dim(x, starts[i], size),
                        0,
                        0,
                    )
                    product += lax.dynamic_index_in_dim(dw, g, keepdims=False)
                    return lax.dynamic_update_index_in_dim(dw, product, g, axis=0)

                dw = lax.fori_loop(0, count, block, dw)
            return dw
        case "batched":
            tiles = [a.reshape(-1, groups.alignment, a.shape[1]) for a in (dy, x)]
            products = lax.dot_general(*tiles, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
            return jax.ops.segment_sum(products, groups.group_of_tile, num_groups, indices_are_sorted=True)
        case "ragged":
            contract_rows = lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
            )
            return lax.ragged_dot_general(dy, x, groups.padded_sizes, contract_rows, preferred_element_type=jnp.float32)


def _kernels() -> ModuleType:
    from dsjax.pallas.matmul import sixteen_bits  # see `pallas.choice`

    return sixteen_bits


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32)


def _block_sizes(rows: int, alignment: int) -> tuple[int, ...]:
    wanted = [m * alignment for m in MULTIPLES if m == 1 or m * alignment <= min(rows, LARGEST_BLOCK)]
    return tuple(wanted) if rows else ()


def _enumerate(counts: Int32[Array, "G"], length: int) -> tuple[Int32[Array, "L"], Int32[Array, "L"]]:
    """List `counts[g]` items of each g in order: the g of each, and its number within g."""
    ends = jnp.cumsum(counts)
    index = jnp.arange(length, dtype=jnp.int32)
    group = jnp.minimum((ends[None, :] <= index[:, None]).sum(1, dtype=jnp.int32), counts.shape[0] - 1)
    return group, index - (ends - counts)[group]
