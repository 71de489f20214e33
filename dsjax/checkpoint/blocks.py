"""FP8 weights in 128x128 blocks, as released checkpoints hold them (report section 3.3.2), in numpy.

A weight is E4M3 codes and one float32 scale per block; the value is code x scale (`weight_scale_inv` is this
multiplier, in spite of its name). Blocks at the edges are partial: 576 rows are 4.5 blocks, hence 5 rows of scales.
The conversions from and to E4M3 work on the bits of whole arrays, because ml_dtypes' casts take 10 times as long and
keep other threads waiting; ml_dtypes defines what is right, and the tests compare every code.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from dsjax.checkpoint.names import scale_shape

BLOCK = 128
E4M3_MAX = 448.0
_SMALLEST_AMAX = 1e-4
_IN_CACHE = 1 << 18
"""Elements that fit into a core's cache with what is made of them."""
_TO_FLOAT32 = np.float32(2.0**120)
"""E4M3's exponent field, moved into a float32, counts from 2**-127 instead of 2**-7."""
_SMALLEST_NORMAL = np.float32(2.0**-6)
_SUBNORMAL_STEP = np.float32(2.0**14)
"""A float32 this large has no finer step than 2**-9, E4M3's smallest number."""


def dequantize(
    codes: Float[np.ndarray, "R C"],
    scales: Float[np.ndarray, "r c"],
    first_row: int = 0,
    first_column: int = 0,
    dtype: Any = np.float32,
) -> Float[np.ndarray, "R C"]:
    """Return code x scale, rounded to float32 and then to `dtype`.

    Args:
        codes: float8_e4m3fn, a part of a weight that starts at (first_row, first_column).
        scales: float32, of all blocks of the weight.
        dtype: of the result, float32 or bfloat16.
    """
    out = np.empty(codes.shape, dtype)
    columns = np.arange(first_column, first_column + codes.shape[1]) // BLOCK
    rows = max(1, _IN_CACHE // codes.shape[1])
    row = 0
    while row < len(codes):
        block = (first_row + row) // BLOCK
        stop = min(len(codes), row + rows, (block + 1) * BLOCK - first_row)
        values = e4m3_to_float32(codes[row:stop])
        values *= scales[block][columns]
        out[row:stop] = values
        row = stop
    return out


def quantize(
    weight: Float[np.ndarray, "R C"], *, power_of_two: bool = False
) -> tuple[Float[np.ndarray, "R C"], Float[np.ndarray, "r c"]]:
    """Return codes (float8_e4m3fn) and scales (float32) of a weight or of rows of it that begin with a block.

    The scale is max(amax, 1e-4) / 448 as in DeepSeek's quantizers, rounded up to a power of two where the model's
    `scale_fmt` is ue8m0. Raises ValueError for values that are not finite, which no scale can hold.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    rows, _ = scale_shape(weight.shape, BLOCK)
    starts = np.arange(0, weight.shape[1], BLOCK)
    blocks = [weight[row * BLOCK : (row + 1) * BLOCK] for row in range(rows)]
    highest = np.stack([np.maximum(block.max(0), -block.min(0)) for block in blocks])
    amax = np.maximum.reduceat(highest, starts, axis=1)
    if not np.isfinite(amax).all():
        raise ValueError(f"a weight of shape {weight.shape} has values that are not finite")
    scales = np.maximum(amax, np.float32(_SMALLEST_AMAX)) / np.float32(E4M3_MAX)
    if power_of_two:
        fraction, exponent = np.frexp(scales)
        scales = np.ldexp(np.float32(1), exponent - (fraction == 0.5)).astype(np.float32)
    each = np.repeat(scales, BLOCK, axis=1)[:, : weight.shape[1]]
    scaled = np.concatenate([block / row for block, row in zip(blocks, each, strict=True)])
    return float32_to_e4m3(scaled), scales


def e4m3_to_float32(codes: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return E4M3 numbers as float32, exactly."""
    values = np.empty(codes.shape, np.float32)
    for source, out in _in_cache(codes.view(np.int8), values.view(np.int32)):
        np.left_shift(source, 20, out=out, dtype=np.int32)  # The sign fills the upper bits.
        out &= np.int32(-0x7810_0000)  # Sign, and exponent and fraction where float32 has the ends of its own.
        numbers = out.view(np.float32)
        numbers *= _TO_FLOAT32
        not_a_number = (source & 0x7F) == 0x7F
        if not_a_number.any():
            numbers[not_a_number] = np.nan
    return values


def float32_to_e4m3(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return float32 numbers rounded to the nearest E4M3, ties to even, those beyond +-448 to +-448.

    Raises ValueError for NaN.
    """
    codes = np.empty(values.shape, np.uint8)
    for source, out in _in_cache(np.ascontiguousarray(values, np.float32), codes):
        magnitude = np.abs(source)
        if np.isnan(magnitude.max()):
            raise ValueError("NaN has no E4M3 number")
        np.minimum(magnitude, np.float32(E4M3_MAX), out=magnitude)
        subnormal = (magnitude + _SUBNORMAL_STEP).view(np.uint32)
        subnormal -= _SUBNORMAL_STEP.view(np.uint32)
        small = magnitude < _SMALLEST_NORMAL
        bits = magnitude.view(np.uint32)
        odd = bits >> 20
        odd &= 1
        bits += odd
        bits += np.uint32(0x7FFFF)  # Half, so that cutting the low 20 bits rounds, and a tie goes to even.
        bits >>= 20
        bits -= np.uint32((127 - 7) << 3)
        np.copyto(bits, subnormal, where=small)
        np.right_shift(source.view(np.uint32), 24, out=odd)
        odd &= 0x80
        bits |= odd
        out[:] = bits
    return codes.view(ml_dtypes.float8_e4m3fn)


def _in_cache(source: np.ndarray, out: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield flat pieces of two contiguous arrays, small enough that steps over them stay in a core's cache."""
    source, out = np.ascontiguousarray(source).reshape(-1), out.reshape(-1)
    for start in range(0, source.size, _IN_CACHE):
        yield source[start : start + _IN_CACHE], out[start : start + _IN_CACHE]
