"""What the block-scaled products compute, in XLA: the definition, on any platform.

Both operands are codes in E4M3 with float32 scales, K-major. Every 128 columns of K make a partial sum, which is
multiplied by both scales and added to the total in float32 (report section 3.3.2): the error does not grow with K, as
it does in the tensor cores' own sums. An operand has a scale per row and 128 columns ("1D", activations) or per 128
rows and 128 columns ("2D", weights).

Grouped ones read a buffer of rows in groups, see `model.grouped_matmul`: group after group in tiles of so many rows as
there are for each entry of `group_of_tile`, which is G behind the last group.

Dimensions: M, N rows of the operands, K their width, R rows of a grouped buffer, T its tiles, G groups, C rows that a
group has place for.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Int32

TILE = 128
LONGEST_UNROLLED = 8
"""Partial sums that are written out; more of them are a loop."""


def scaled_matmul(
    a: Float8e4m3fn[Array, "M K"],
    a_scales: Float[Array, "M K/128"],
    b: Float8e4m3fn[Array, "N K"],
    b_scales: Float[Array, "N/rows K/128"],
    *,
    rows: Literal[1, 128] = 128,
    tile: int = TILE,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "M N"]:
    """Return a b^T.

    Args:
        rows: of `b` that share a scale: 128 ("1D2D": forward pass and gradients of inputs) or 1 ("1D1D": gradients of
            weights).
        tile: columns of both that share a scale.
    """
    m, k = a.shape
    n = b.shape[0]
    parts = -(-k // tile)
    if a_scales.shape != (m, parts) or b_scales.shape != (-(-n // rows), parts):
        raise ValueError(
            f"scales {a_scales.shape} and {b_scales.shape} of codes {a.shape} and {b.shape}: should be {(m, parts)} "
            f"and {(-(-n // rows), parts)} for tiles of {tile} columns and, of the second, {rows} rows"
        )
    a, b = (jnp.pad(array, ((0, 0), (0, parts * tile - k))) for array in (a, b))

    def add(i: int | Array, total: Float[Array, "M N"]) -> Float[Array, "M N"]:
        # E4M3 products are exact in float32, and as sums of 128 nearly so.
        left, right = (lax.dynamic_slice_in_dim(x, i * tile, tile, 1).astype(jnp.float32) for x in (a, b))
        part = lax.dot_general(left, right, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
        of_a, of_b = (lax.dynamic_index_in_dim(scales, i, 1, keepdims=False) for scales in (a_scales, b_scales))
        return total + part * (of_a[:, None] * jnp.repeat(of_b, rows)[:n])

    total = jnp.zeros((m, n), jnp.float32)
    if parts <= LONGEST_UNROLLED:
        for i in range(parts):
            total = add(i, total)
    else:
        total = lax.fori_loop(0, parts, add, total)
    return total.astype(out_dtype)


def grouped_scaled_matmul(
    x: Float8e4m3fn[Array, "R K"],
    x_scales: Float[Array, "R K/128"],
    w: Float8e4m3fn[Array, "G N K"],
    w_scales: Float[Array, "G N/128 K/128"],
    group_of_tile: Int32[Array, "T"],
    *,
    rows: Literal[1, 128] = 128,
    tile: int = TILE,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "R N"]:
    """Return x w[g]^T for the rows of each group g, and zero for those behind the last group."""
    groups, n, _ = w.shape

    def product(part):
        group, codes, scales = part
        g = jnp.minimum(group, groups - 1)
        y = scaled_matmul(codes, scales, w[g], w_scales[g], rows=rows, tile=tile, out_dtype=out_dtype)
        return jnp.where(group < groups, y, 0)

    parts = (group_of_tile, *(array.reshape(group_of_tile.shape[0], -1, array.shape[1]) for array in (x, x_scales)))
    return lax.map(product, parts).reshape(x.shape[0], n)


def masked_scaled_matmul(
    x: Float8e4m3fn[Array, "G C K"],
    x_scales: Float[Array, "G C K/128"],
    w: Float8e4m3fn[Array, "G N K"],
    w_scales: Float[Array, "G N/128 K/128"],
    counts: Int32[Array, "G"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "G C N"]:
    """Return x[g] w[g]^T for the first `counts[g]` rows of each group g. Here other rows are zero, by the kernel they
    are not specified."""
    y = lax.map(lambda group: scaled_matmul(*group, out_dtype=out_dtype), (x, x_scales, w, w_scales))
    return jnp.where(jnp.arange(x.shape[1])[None, :, None] < counts[:, None, None], y, 0)


def grouped_scaled_wgrad(
    dy_t: Float8e4m3fn[Array, "N R"],
    dy_scales: Float[Array, "N R/128"],
    x_t: Float8e4m3fn[Array, "K R"],
    x_scales: Float[Array, "K R/128"],
    padded_sizes: Int32[Array, "G"],
    *,
    tile: int = TILE,
    into: Float[Array, "G N K"] | None = None,
) -> Float[Array, "G N K"]:
    """Return, for each group, the sum over its rows of dy x^T, plus `into`. No 128 rows are of two groups."""

    def product(i):
        dy, x = (lax.dynamic_slice_in_dim(array, i * TILE, TILE, 1) for array in (dy_t, x_t))
        scales = TILE // tile  # of these rows
        of_dy, of_x = (lax.dynamic_slice_in_dim(array, i * scales, scales, 1) for array in (dy_scales, x_scales))
        return scaled_matmul(dy, of_dy, x, of_x, rows=1, tile=tile, out_dtype=jnp.float32)

    shape = (padded_sizes.shape[0], dy_t.shape[0], x_t.shape[0])
    dw = _sum_by_group(product, padded_sizes // TILE, shape)
    return dw if into is None else into + dw


def grouped_matmul(
    x: Float[Array, "R I"], w: Float[Array, "G N K"], group_of_tile: Int32[Array, "T"], *, contract: Literal[1, 2] = 2
) -> Float[Array, "R O"]:
    """Return x w[g]^T (`contract` = 2) or x w[g] (1) for the rows of each group g, and zero for those behind the last
    group: sums in float32, results in the type of `x`."""
    groups = w.shape[0]

    def product(tile):
        group, rows = tile
        matrix = w[jnp.minimum(group, groups - 1)]
        y = lax.dot_general(rows, matrix, (((1,), (contract - 1,)), ((), ())), preferred_element_type=jnp.float32)
        return jnp.where(group < groups, y, 0).astype(x.dtype)

    tiles = (group_of_tile, x.reshape(group_of_tile.shape[0], -1, x.shape[1]))
    return lax.map(product, tiles).reshape(x.shape[0], w.shape[3 - contract])


def grouped_wgrad(
    dy: Float[Array, "R N"],
    x: Float[Array, "R K"],
    padded_sizes: Int32[Array, "G"],
    *,
    into: Float[Array, "G N K"] | None = None,
) -> Float[Array, "G N K"]:
    """Return dy^T x of each group's rows in float32, plus `into`. No 128 rows are of two groups."""

    def product(i):
        rows = (lax.dynamic_slice_in_dim(array, i * TILE, TILE) for array in (dy, x))
        return lax.dot_general(*rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    dw = _sum_by_group(product, padded_sizes // TILE, (padded_sizes.shape[0], dy.shape[1], x.shape[1]))
    return dw if into is None else into + dw


def _sum_by_group(
    product: Callable[[Array], Float[Array, "N K"]], blocks: Int32[Array, "G"], shape: tuple[int, int, int]
) -> Float[Array, "G N K"]:
    """Sum products of blocks of rows, of which each group has so many."""
    ends = jnp.cumsum(blocks)
    return lax.fori_loop(
        0, ends[-1], lambda i, total: total.at[(ends <= i).sum()].add(product(i)), jnp.zeros(shape, jnp.float32)
    )
