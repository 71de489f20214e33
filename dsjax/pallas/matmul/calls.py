"""What calls of the kernel share: checks of arguments, padding, gradients of weights."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from dsjax.config import Fp8Kernel
from dsjax.pallas.matmul.config import BLOCK_BYTES, Config, Kind, config_for
from dsjax.pallas.matmul.kernel import Operands, multiply
from dsjax.pallas.matmul.reference import TILE
from dsjax.pallas.matmul.schedules import ALIGNMENT, SumOverGroups, block_bounds, dense

OUT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
SWIZZLED_ROWS = 8
"""Arrays that are copied into swizzled tiles, or out of them, should have a multiple of these rows."""
OUT_COLUMNS = 64
"""Results should have a multiple of these columns, for the same reason."""


def choose(config: Config | None, kind: Kind, m: int, n: int, out_dtype: DTypeLike, num_sms: int) -> Config:
    """Return `config`, or else what `config_for` chooses.

    Raises:
        ValueError: no kernel for it, or not for this type of result.
    """
    if jnp.dtype(out_dtype) not in OUT_DTYPES:
        raise ValueError(f"products are bfloat16 or float32, not {jnp.dtype(out_dtype)}")
    if num_sms < 1:
        raise ValueError(f"num_sms = {num_sms}, should be at least 1")
    config = config or config_for(kind, m, n, jnp.dtype(out_dtype), num_sms)
    config.check(kind, out_dtype, num_sms)
    return config


def check_operands(dtypes: tuple[DTypeLike, ...], **arrays: tuple[Array, int]) -> None:
    """Check types and numbers of dimensions of arrays given by name, and that the last dimensions are equal.

    Raises:
        ValueError: says which does not fit.
    """
    for name, (array, rank) in arrays.items():
        if array.ndim != rank or array.dtype not in [jnp.dtype(dtype) for dtype in dtypes]:
            wanted = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, should be {wanted} with {rank} dimensions")
    if len({array.shape[-1] for array, _ in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, (array, _) in arrays.items())
        raise ValueError(f"{shapes} should have equal last dimensions")


def check_scales(name: str, scales: Array, codes: Array, rows: int = 1) -> None:
    """Check that `scales` are those of `codes`, one for `rows` rows and 128 columns.

    Raises:
        ValueError: they are not.
    """
    *groups, m, k = codes.shape
    shape = (*groups, pl.cdiv(m, rows), pl.cdiv(k, TILE))
    if scales.shape != shape or scales.dtype != jnp.float32:
        raise ValueError(f"{name} is {scales.dtype}{list(scales.shape)}, should be float32{list(shape)}")


def check_tiles(rows: int, group_of_tile: Int32[Array, "R/128"]) -> None:
    """Check the layout of a grouped buffer.

    Raises:
        ValueError: it is not in tiles of 128 rows.
    """
    if group_of_tile.shape != (pl.cdiv(rows, ALIGNMENT),) or rows % ALIGNMENT:
        raise ValueError(
            f"group_of_tile {list(group_of_tile.shape)} of {rows} rows: kernels need one entry per {ALIGNMENT} rows"
        )


def check_sum(rows: int, shape: tuple[int, int, int], into: Array | None) -> None:
    """Check the arguments of a gradient of weights.

    Raises:
        ValueError: rows that are no multiple of 128, or `into` of another shape or type than the result.
    """
    if rows % ALIGNMENT:
        raise ValueError(f"a grouped buffer has {rows} rows, should be a multiple of {ALIGNMENT}")
    if into is not None and (into.shape != shape or into.dtype != jnp.float32):
        raise ValueError(f"into is {into.dtype}{list(into.shape)}, should be float32{list(shape)}")


def pad_to(array: Array, rows: int, columns: int) -> Array:
    """Return `array` with zeros, so that its last two dimensions are multiples; itself if they are."""
    m, n = array.shape[-2:]
    if m % rows == 0 and n % columns == 0:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, -m % rows), (0, -n % columns)])


def for_tma(scales: Float[Array, "*groups M K/128"]) -> Float[Array, "*groups K/128 M4"]:
    """Return scales so that those of a tile's rows are side by side, in rows of a multiple of 16 bytes."""
    return pad_to(scales.swapaxes(-1, -2), 1, 4)


def sum_over_groups(
    operands: Operands,
    padded_sizes: Int32[Array, "G"],
    into: Float[Array, "G N K"] | None,
    shape: tuple[int, int, int],
    config: Config,
    num_sms: int,
    name: str,
    impl: Fp8Kernel,
) -> Float[Array, "G N K"]:
    """Run the kernel of a gradient of weights, of `shape`; operands may be padded."""
    groups, n, k = shape
    padded = (groups, n + -n % SWIZZLED_ROWS, k + -k % OUT_COLUMNS)
    # The interpreter knows no adding by TMA.
    in_place = into is not None and padded == shape and impl == "mosaic"
    target = jax.new_ref(into) if in_place else None
    out = multiply(
        operands,
        SumOverGroups(dense(config, n, k, k_blocks=0), groups),
        (block_bounds(padded_sizes, BLOCK_BYTES // operands.a.dtype.itemsize),),
        config,
        out_shape=padded,
        out_dtype=jnp.float32,
        num_sms=num_sms,
        name=name,
        into=target,
        impl=impl,
    )
    if in_place:
        return jax.freeze(target)
    out = out[:, :n, :k]
    return out if into is None else into + out
