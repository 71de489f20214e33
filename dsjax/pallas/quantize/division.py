"""Division by scales, rounded as IEEE 754 asks: codes of kernels equal those of the definition to the bit.

Mosaic GPU divides by `div.full.f32`, which may be off by two units in the last place. So a quotient is made here of
the inverse of the scale, computed once per tile, by fused multiply-adds (Markstein 1990): with r = 1/s rounded
correctly, a quotient q that is off by less than two units becomes one that is off by at most one, by

    q - (q s - x) r,

and the next such step rounds correctly. That takes five instructions, fewer than `div.full.f32`. Scales that are powers
of two need one: x r is exact.

The interpreter knows no fused multiply-add and divides.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float

from dsjax.config import Fp8Kernel
from dsjax.pallas.quantize.reference import LARGEST, SMALLEST_AMAX, divide, round_up

Layout = Any
"""Of an array in registers."""


def scales_of(
    amax: Float[Array, "*shape"], layout: Layout, impl: Fp8Kernel, *, power_of_two: bool, largest: float = LARGEST
) -> Float[Array, "*shape"]:
    """Return what `reference.scales_of` does, in a kernel."""
    amax = jnp.maximum(amax, SMALLEST_AMAX)
    if impl == "interpret":
        scales = divide(amax, largest)
    else:
        by, inverse = (plgpu.layout_cast(jnp.full_like(amax, c), layout) for c in (largest, 1 / largest))
        scales = jnp.where(amax < jnp.inf, _quotient(amax, by, inverse, layout), amax)
    return round_up(scales) if power_of_two else scales


def over(
    x: Float[Array, "R C"],
    scales: Float[Array, " R"],
    layout: Layout,
    impl: Fp8Kernel,
    *,
    power_of_two: bool,
) -> Float[Array, "R C"]:
    """Return x / scales, a scale for every row, in a kernel."""

    def spread(of_rows: Array) -> Array:
        return lax.broadcast_in_dim(of_rows, x.shape, [0])

    if impl == "interpret":
        return divide(x, spread(scales))
    if power_of_two:
        bits = lax.bitcast_convert_type(scales, jnp.int32)
        inverse = lax.bitcast_convert_type(0x7F000000 - bits, jnp.float32)
        return x * spread(jnp.where(scales < jnp.inf, inverse, jnp.where(scales == jnp.inf, 0.0, scales)))
    inverse = _inverse(scales, 1 / scales, layout.reduce(1))
    # x / inf, where the steps would make of 0 what is no number.
    infinite = scales == jnp.inf
    inverse, scales = jnp.where(infinite, 0.0, inverse), jnp.where(infinite, 0.0, scales)
    return _quotient(x, spread(scales), spread(inverse), layout)


def _inverse(scales: Array, estimate: Array, layout: Layout) -> Array:
    one = plgpu.layout_cast(jnp.ones_like(scales), layout)
    for _ in range(2):
        estimate = _step(one, scales, estimate, estimate, layout)
    # The one mantissa for which the steps need not round correctly: all ones.
    bits = lax.bitcast_convert_type(scales, jnp.int32)
    exact = lax.bitcast_convert_type(0x7F000000 - bits, jnp.float32)
    return jnp.where((bits & 0x7FFFFF) == 0x7FFFFF, exact, estimate)


def _quotient(x: Array, by: Array, inverse: Array, layout: Layout) -> Array:
    quotient = x * inverse
    for _ in range(2):
        quotient = _step(x, by, inverse, quotient, layout)
    return quotient


def _step(x: Array, by: Array, inverse: Array, quotient: Array, layout: Layout) -> Array:
    fma = _fma(x.shape, layout)
    return fma(fma(quotient, by, -x), -inverse, quotient)  # signs such that -0 stays what it is


@functools.cache
def _fma(shape: tuple[int, ...], layout: Layout) -> Any:
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * 3, return_type=result)
    def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
        return a._pointwise(llvm.intr_fma, b, c)

    return fma
