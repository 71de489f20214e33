"""Block-scaled products of codes in E4M3: forward pass, gradients of inputs, gradients of weights, decoding.

`reference` defines them; here are the kernels for Hopper, and the choice. Operands are K-major, which is the only order
that wgmma takes codes in; scales are laid out as the quantizers write them, and transposed here for TMA, which XLA
joins with the transposition that a quantizer ends in.

`impl`: "xla" is the definition, "mosaic" the kernel, "interpret" the kernel on a simulated GPU with detection of races,
"auto" the kernel on Hopper and the definition elsewhere. `num_sms` leaves streaming multiprocessors to others, such as
the exchange between GPUs. `config` is for tests and tuning; by default `config_for` chooses.

Dimensions: M, N rows of the operands, K their width, R rows of a grouped buffer (see `model.grouped_matmul`; groups
begin at multiples of 128), G groups, C rows that a group has place for.
"""

from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Int32

from dsjax.config import Fp8Kernel
from dsjax.pallas.choice import NUM_SMS, resolve
from dsjax.pallas.matmul import reference
from dsjax.pallas.matmul.calls import (
    OUT_COLUMNS,
    SWIZZLED_ROWS,
    check_operands,
    check_scales,
    check_sum,
    check_tiles,
    choose,
    for_tma,
    pad_to,
    sum_over_groups,
)
from dsjax.pallas.matmul.config import Config
from dsjax.pallas.matmul.kernel import Operands, multiply
from dsjax.pallas.matmul.reference import TILE
from dsjax.pallas.matmul.schedules import Grouped, Masked, dense, masked_tables, n_tiles

CODES = (jnp.float8_e4m3fn,)


def scaled_matmul(
    a: Float8e4m3fn[Array, "M K"],
    a_scales: Float[Array, "M K/128"],
    b: Float8e4m3fn[Array, "N K"],
    b_scales: Float[Array, "N/rows K/128"],
    *,
    rows: Literal[1, 128] = 128,
    out_dtype: DTypeLike = jnp.bfloat16,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
    config: Config | None = None,
) -> Float[Array, "M N"]:
    """Return a b^T, of any shape.

    The kernel takes partial tiles: M that is a multiple of 8, N of 64, K of 128. Others are padded here, and the result
    cut, which copies them; so are the scales of M, or of N if `rows` is 1, that is no multiple of 4.

    Args:
        rows: of `b` that share a scale: 128 ("1D2D": forward pass and gradients of inputs) or 1 ("1D1D": gradients of
            weights).
        out_dtype: bfloat16 or float32.

    Raises:
        ValueError: shapes or types that do not fit, or no such implementation here.
    """
    if rows not in (1, TILE):
        raise ValueError(f"rows = {rows} of b share a scale, should be 1 or {TILE}")
    check_operands(CODES, a=(a, 2), b=(b, 2))
    check_scales("a_scales", a_scales, a)
    check_scales("b_scales", b_scales, b, rows)
    impl = resolve(impl)
    if impl == "xla":
        return reference.scaled_matmul(a, a_scales, b, b_scales, rows=rows, out_dtype=out_dtype)
    m, n = a.shape[0], b.shape[0]
    config = choose(config, "dense" if rows == TILE else "dense_1d1d", m, n, out_dtype, num_sms)
    if 0 in (*a.shape, n):
        return jnp.zeros((m, n), out_dtype)
    a, b = pad_to(a, SWIZZLED_ROWS, TILE), pad_to(b, OUT_COLUMNS, TILE)
    out = multiply(
        Operands(a, b, for_tma(a_scales), for_tma(b_scales) if rows == 1 else b_scales, b_scale_rows=rows),
        dense(config, m, n, a.shape[1] // TILE),
        (),
        config,
        out_shape=(a.shape[0], b.shape[0]),
        out_dtype=out_dtype,
        num_sms=num_sms,
        name="scaled_matmul",
        impl=impl,
    )
    return out[:m, :n]


def grouped_scaled_matmul(
    x: Float8e4m3fn[Array, "R K"],
    x_scales: Float[Array, "R K/128"],
    w: Float8e4m3fn[Array, "G N K"],
    w_scales: Float[Array, "G N/128 K/128"],
    group_of_tile: Int32[Array, "R/128"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
    config: Config | None = None,
) -> Float[Array, "R N"]:
    """Return x w[g]^T for the rows of each group g, and zero for those behind the last group.

    N and K are any, as in `scaled_matmul`. The definition takes tiles of any number of rows, the kernel of 128.

    Args:
        group_of_tile: the group of every 128 rows; G behind the last group.
        out_dtype: bfloat16 or float32.

    Raises:
        ValueError: shapes or types that do not fit, or no such implementation here.
    """
    check_operands(CODES, x=(x, 2), w=(w, 3))
    check_scales("x_scales", x_scales, x)
    check_scales("w_scales", w_scales, w, TILE)
    impl = resolve(impl)
    if impl == "xla":
        return reference.grouped_scaled_matmul(x, x_scales, w, w_scales, group_of_tile, out_dtype=out_dtype)
    r, (groups, n, _) = x.shape[0], w.shape
    check_tiles(r, group_of_tile)
    config = choose(config, "grouped", r, n, out_dtype, num_sms)
    if 0 in (*x.shape, n, groups):
        return jnp.zeros((r, n), out_dtype)
    x, w = pad_to(x, SWIZZLED_ROWS, TILE), pad_to(w, OUT_COLUMNS, TILE)
    out = multiply(
        Operands(x, w, for_tma(x_scales), w_scales),
        Grouped(dense(config, r, n, x.shape[1] // TILE), groups, config.tile_m),
        (group_of_tile,),
        config,
        out_shape=(r, w.shape[1]),
        out_dtype=out_dtype,
        num_sms=num_sms,
        name="grouped_scaled_matmul",
        impl=impl,
    )
    return out[:, :n]


def masked_scaled_matmul(
    x: Float8e4m3fn[Array, "G C K"],
    x_scales: Float[Array, "G C K/128"],
    w: Float8e4m3fn[Array, "G N K"],
    w_scales: Float[Array, "G N/128 K/128"],
    counts: Int32[Array, "G"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
    config: Config | None = None,
) -> Float[Array, "G C N"]:
    """Return x[g] w[g]^T for the first `counts[g]` rows of each group g; what other rows hold is not specified.

    For decoding: shapes do not depend on the counts, and tiles without a row cost nothing. C, N and K are any, as M, N
    and K in `scaled_matmul`.

    Raises:
        ValueError: shapes or types that do not fit, or no such implementation here.
    """
    check_operands(CODES, x=(x, 3), w=(w, 3))
    check_scales("x_scales", x_scales, x)
    check_scales("w_scales", w_scales, w, TILE)
    (groups, c, _), n = x.shape, w.shape[1]
    if counts.shape != (groups,) or w.shape[0] != groups:
        raise ValueError(f"counts {list(counts.shape)} and w {list(w.shape)} should be those of {groups} groups, as x")
    impl = resolve(impl)
    if impl == "xla":
        return reference.masked_scaled_matmul(x, x_scales, w, w_scales, counts, out_dtype=out_dtype)
    config = choose(config, "masked", c, n, out_dtype, num_sms)
    if 0 in (*x.shape, n):
        return jnp.zeros((groups, c, n), out_dtype)
    x, w = pad_to(x, SWIZZLED_ROWS, TILE), pad_to(w, OUT_COLUMNS, TILE)
    out = multiply(
        Operands(x, w, for_tma(x_scales), w_scales),
        Masked(n_tiles(config, n), x.shape[2] // TILE),
        masked_tables(counts, c, config.tile_m),
        config,
        out_shape=(groups, x.shape[1], w.shape[1]),
        out_dtype=out_dtype,
        num_sms=num_sms,
        name="masked_scaled_matmul",
        impl=impl,
    )
    return out[:, :c, :n]


def grouped_scaled_wgrad(
    dy_t: Float8e4m3fn[Array, "N R"],
    dy_scales: Float[Array, "N R/128"],
    x_t: Float8e4m3fn[Array, "K R"],
    x_scales: Float[Array, "K R/128"],
    padded_sizes: Int32[Array, "G"],
    *,
    into: Float[Array, "G N K"] | None = None,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
    config: Config | None = None,
) -> Float[Array, "G N K"]:
    """Return, for each group, the sum over its rows of dy x^T, in float32.

    N and K are any, as M and N in `scaled_matmul`.

    Args:
        padded_sizes: rows of each group, multiples of 128 (data, not checked); the first group begins at row 0.
        into: what the sums are added to. In place, if N is a multiple of 8 and K of 64, and XLA need not keep it; then
            what belongs to a group without rows is neither read nor written.

    Raises:
        ValueError: shapes or types that do not fit, or no such implementation here.
    """
    check_operands(CODES, dy_t=(dy_t, 2), x_t=(x_t, 2))
    check_scales("dy_scales", dy_scales, dy_t)
    check_scales("x_scales", x_scales, x_t)
    (n, r), k = dy_t.shape, x_t.shape[0]
    shape = (padded_sizes.shape[0], n, k)
    check_sum(r, shape, into)
    if 0 in (*shape, r):
        return jnp.zeros(shape, jnp.float32) if into is None else into
    impl = resolve(impl)
    if impl == "xla":
        return reference.grouped_scaled_wgrad(dy_t, dy_scales, x_t, x_scales, padded_sizes, into=into)
    config = choose(config, "wgrad", n, k, jnp.float32, num_sms)
    dy_t, x_t = pad_to(dy_t, SWIZZLED_ROWS, 1), pad_to(x_t, OUT_COLUMNS, 1)
    operands = Operands(dy_t, x_t, for_tma(dy_scales), for_tma(x_scales), b_scale_rows=1)
    return sum_over_groups(operands, padded_sizes, into, shape, config, num_sms, "grouped_scaled_wgrad", impl)
