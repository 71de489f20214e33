"""Grouped products of 16-bit numbers: what the experts compute in BF16, by the ring of the scaled products.

`reference` defines them. wgmma takes 16-bit operands in either order, so that nothing is transposed in memory: neither
the matrices for gradients of inputs nor the rows for gradients of weights. For `impl`, `num_sms` and `config` see
`scaled`.

Dimensions: R rows of a grouped buffer (see `model.grouped_matmul`; groups begin at multiples of 128), G groups, N and
K height and width of their matrices, I and O input and output width.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from dsjax.config import Fp8Kernel
from dsjax.pallas.choice import NUM_SMS, resolve
from dsjax.pallas.matmul import reference
from dsjax.pallas.matmul.calls import check_sum, check_tiles, choose, pad_to, sum_over_groups
from dsjax.pallas.matmul.config import BLOCK_BYTES, Config
from dsjax.pallas.matmul.kernel import Operands, multiply
from dsjax.pallas.matmul.schedules import Grouped, dense

BLOCK_K = BLOCK_BYTES // 2
"""Columns in a slot of the ring, and in a swizzled tile."""


def grouped_matmul(
    x: Float[Array, "R I"],
    w: Float[Array, "G N K"],
    group_of_tile: Int32[Array, "R/128"],
    *,
    contract: Literal[1, 2] = 2,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
    config: Config | None = None,
) -> Float[Array, "R O"]:
    """Return x w[g]^T (`contract` = 2) or x w[g] (1) for the rows of each group g, and zero for those behind the last
    group: sums in float32, results in the type of `x`.

    The kernel takes bfloat16, and N and K that are multiples of 64; others are padded here, which copies them. The
    definition takes tiles of any number of rows.

    Args:
        contract: axis of `w` that is summed over.
        group_of_tile: the group of every 128 rows; G behind the last group.

    Raises:
        ValueError: shapes or types that do not fit, or no such implementation here.
    """
    if contract not in (1, 2):
        raise ValueError(f"contract = {contract}, should be 1 or 2")
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[contract]:
        raise ValueError(f"x {list(x.shape)} should have the width of axis {contract} of w {list(w.shape)}")
    impl = resolve(impl)
    if impl == "xla":
        return reference.grouped_matmul(x, w, group_of_tile, contract=contract)
    _check_types(x=x, w=w)
    r, groups, n = x.shape[0], w.shape[0], w.shape[3 - contract]
    check_tiles(r, group_of_tile)
    config = choose(config, "grouped_16bit", r, n, x.dtype, num_sms)
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((r, n), x.dtype)
    x, w = pad_to(x, 1, BLOCK_K), pad_to(w, BLOCK_K, BLOCK_K)
    out = multiply(
        Operands(x, w, b_major="k" if contract == 2 else "mn"),
        Grouped(dense(config, r, n, x.shape[1] // BLOCK_K), groups, config.tile_m),
        (group_of_tile,),
        config,
        out_shape=(r, w.shape[3 - contract]),
        out_dtype=x.dtype,
        num_sms=num_sms,
        name="grouped_matmul",
        impl=impl,
    )
    return out[:, :n]


def grouped_wgrad(
    dy: Float[Array, "R N"],
    x: Float[Array, "R K"],
    padded_sizes: Int32[Array, "G"],
    *,
    into: Float[Array, "G N K"] | None = None,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
    config: Config | None = None,
) -> Float[Array, "G N K"]:
    """Return dy^T x of each group's rows, in float32.

    The kernel takes bfloat16, and N and K that are multiples of 64, as in `grouped_matmul`.

    Args:
        padded_sizes: rows of each group, multiples of 128 (data, not checked); the first group begins at row 0.
        into: what the sums are added to, as in `scaled.grouped_scaled_wgrad`.

    Raises:
        ValueError: shapes or types that do not fit, or no such implementation here.
    """
    if dy.ndim != 2 or x.ndim != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(f"dy {list(dy.shape)} and x {list(x.shape)} should have equally many rows")
    shape = (padded_sizes.shape[0], dy.shape[1], x.shape[1])
    check_sum(dy.shape[0], shape, into)
    if 0 in (*shape, dy.shape[0]):
        return jnp.zeros(shape, jnp.float32) if into is None else into
    impl = resolve(impl)
    if impl == "xla":
        return reference.grouped_wgrad(dy, x, padded_sizes, into=into)
    _check_types(dy=dy, x=x)
    config = choose(config, "wgrad_16bit", *shape[1:], jnp.float32, num_sms)
    operands = Operands(pad_to(dy, 1, BLOCK_K), pad_to(x, 1, BLOCK_K), a_major="mn", b_major="mn")
    return sum_over_groups(operands, padded_sizes, into, shape, config, num_sms, "grouped_wgrad", impl)


def _check_types(**arrays: Array) -> None:
    for name, array in arrays.items():
        if array.dtype != jnp.bfloat16:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, the kernel needs bfloat16")
