"""What the quantizers compute, in XLA: the definition, to the bit where XLA divides as IEEE 754 asks, as on CPUs. Its
divisions on NVIDIA's GPUs may be off by two units in the last place (`div.full.f32`); the kernels' are not.

A tensor is divided into tiles that share a scale, and divided by it: x = codes * scales. Tiles are 1 x 128 of
activations and their gradients, 128 x 1 where a product sums over tokens, and 128 x 128 of weights (report section
3.3.2). The last tile of a row or column may be partial.

Not a number or infinite values make a scale that is not finite, and so show in every product with their tile.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Int32, UInt32

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0
"""Of E4M3."""
TILE = 128
SMALLEST_AMAX = 1e-4
"""Below which a tile's largest value does not count, as in DeepSeek's code: small tiles underflow, and none is 0/0."""
E5M6_LARGEST = 65024.0


def scales_of(amax: Float[Array, "*shape"], *, power_of_two: bool, largest: float = LARGEST) -> Float[Array, "*shape"]:
    """Return the scales of tiles from their largest magnitudes: amax / 448, rounded up to a power of two if asked."""
    scales = divide(jnp.maximum(amax, SMALLEST_AMAX), largest)
    return round_up(scales) if power_of_two else scales


def round_up(scales: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Round positive numbers up to powers of two."""
    bits = lax.bitcast_convert_type(scales, jnp.int32)
    rounded = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(scales < jnp.inf, rounded, scales)


def amax_of(x: Float[Array, "*shape"], axis: int | tuple[int, ...]) -> Float[Array, "*rest"]:
    """Return the largest magnitude along axes; no number if there is one that is none.

    As a maximum of integers: XLA's of floating point numbers, on a CPU, may pass over what is no number.
    """
    magnitudes = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return lax.bitcast_convert_type(magnitudes.max(axis), jnp.float32)


def divide(x: Float[Array, "*shape"], by: Float[Array, "*shape"] | float) -> Float[Array, "*shape"]:
    """Return x / by, rounded once, for positive `by`.

    XLA makes of a division by what is broadcast a product with its rounded inverse, so that must not show. It still
    sees it where x, too, is one number broadcast.
    """
    return x / jnp.maximum(by, -jnp.abs(x))


def tiles(
    x: Float[Array, "*batch K"], *, power_of_two: bool = False, tile: int = TILE
) -> tuple[Float8e4m3fn[Array, "*batch K"], Float[Array, "*batch K/tile"]]:
    """Quantize in tiles of 1 x 128: codes, and a float32 scale for every tile."""
    divided, scales = _scaled(x, tile, power_of_two, LARGEST)
    return divided.astype(E4M3), scales


def tiles_transposed(
    x: Float[Array, "M K"], *, power_of_two: bool = False
) -> tuple[Float8e4m3fn[Array, "K M"], Float[Array, "K M/128"]]:
    """Quantize in tiles of 128 x 1, transposed, as an operand of a product that sums over rows."""
    return tiles(x.T, power_of_two=power_of_two)


def blocks(
    w: Float[Array, "*batch N K"], *, power_of_two: bool = False
) -> tuple[Float8e4m3fn[Array, "*batch N K"], Float[Array, "*batch N/128 K/128"]]:
    """Quantize in blocks of 128 x 128."""
    *batch, n, k = w.shape
    padded = jnp.pad(w.astype(jnp.float32), [(0, 0)] * len(batch) + [(0, -n % TILE), (0, -k % TILE)])
    divided = padded.reshape(*batch, padded.shape[-2] // TILE, TILE, padded.shape[-1] // TILE, TILE)
    scales = scales_of(amax_of(divided, (-3, -1)), power_of_two=power_of_two)
    codes = divide(divided, scales[..., :, None, :, None]).astype(E4M3)
    return codes.reshape(padded.shape)[..., :n, :k], scales


def dequantize(
    codes: Float8e4m3fn[Array, "*batch M K"], scales: Float[Array, "*batch M/a K/b"], rows: int = 1, tile: int = TILE
) -> Float[Array, "*batch M K"]:
    """Return codes * scales in float32.

    Args:
        rows: rows that share a scale: 1 of tiles, 128 of blocks.
        tile: columns that share one.
    """
    m, k = codes.shape[-2:]
    spread = jnp.repeat(jnp.repeat(scales, rows, axis=-2)[..., :m, :], tile, axis=-1)[..., :k]
    return codes.astype(jnp.float32) * spread


def requantize_transposed(
    codes: Float8e4m3fn[Array, "T K"],
    scales: Float[Array, "T K/128"],
    rows: Int32[Array, "M"] | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[Float8e4m3fn[Array, "K M"], Float[Array, "K M/128"]]:
    """Requantize tiles of 1 x 128 in tiles of 128 x 1, transposed.

    Args:
        rows: which rows to take, in which order; T for a row of zeros. All of them by default.
    """
    if rows is not None:
        codes, scales = (array.at[rows].get(mode="fill", fill_value=0) for array in (codes, scales))
    return tiles_transposed(dequantize(codes, scales), power_of_two=power_of_two)


def rms_norm_tiles(
    x: Float[Array, "M K"], gain: Float[Array, " K"], eps: float, *, power_of_two: bool = False
) -> tuple[Float8e4m3fn[Array, "M K"], Float[Array, "M K/128"]]:
    """Quantize RMSNorm(x) in tiles of 1 x 128; the norm is rounded to the type of `x` first, as the layer does."""
    x32 = x.astype(jnp.float32)
    inverse_rms = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return tiles((x32 * inverse_rms * gain).astype(x.dtype), power_of_two=power_of_two)


def swiglu_tiles(
    gate_up: Float[Array, "M F2"], weights: Float[Array, " M"], *, power_of_two: bool = False
) -> tuple[Float8e4m3fn[Array, "M F"], Float[Array, "M F/128"]]:
    """Quantize silu(gate) * up * weight in tiles of 1 x 128, all in float32; [gate | up] side by side."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return tiles(_silu(gate) * up * weights[:, None], power_of_two=power_of_two)


def swiglu_backward(
    gate_up: Float[Array, "M F2"], weights: Float[Array, " M"], dy: Float[Array, "M F"]
) -> tuple[Float[Array, "M F2"], Float[Array, " M"]]:
    """Return the gradients of [gate | up], in the type of `dy`, and of the weights, float32, of what `swiglu_tiles`
    quantizes."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    dy32, silu, sigmoid = dy.astype(jnp.float32), _silu(gate), 1 / (1 + jnp.exp(-gate))
    d_weights = (dy32 * silu * up).sum(-1)
    d_product = dy32 * weights[:, None]
    d_gate = d_product * up * sigmoid * (1 + gate * (1 - sigmoid))
    return jnp.concatenate([d_gate, d_product * silu], -1).astype(dy.dtype), d_weights


def transpose(codes: Float8e4m3fn[Array, "*batch N K"]) -> Float8e4m3fn[Array, "*batch K N"]:
    """Transpose codes: those of square blocks stay valid, with their scales transposed."""
    return codes.swapaxes(-1, -2)


def pack_e5m6(x: Float[Array, "*batch K"]) -> tuple[UInt32[Array, "*batch 3K/8"], Float[Array, "*batch K/128"]]:
    """Quantize to 12 bits, 5 of exponent and 6 of mantissa, in tiles of 1 x 128 with power-of-two scales.

    Eight values fill three words. Rounded as DeepSeek's kernel does: float32 to float16 towards zero, then
    the last 4 bits by nearest even, with the bits that float16 lost. Of subnormal values it takes the same 17 bits of
    float32, though more are lost: their last bit is not the nearest.

    Raises:
        ValueError: K is no multiple of 8.
    """
    check_octets(x.shape[-1])
    divided, scales = _scaled(x, TILE, True, E5M6_LARGEST)
    codes = e5m6_codes(divided).reshape(*x.shape[:-1], -1, 8)
    words = e5m6_words([codes[..., i] for i in range(8)])
    return jnp.stack(words, -1).reshape(*x.shape[:-1], -1), scales


def unpack_e5m6(
    words: UInt32[Array, "*batch 3K/8"], scales: Float[Array, "*batch K/128"], *, dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch K"]:
    """Return what `pack_e5m6` packed."""
    w = words.reshape(*words.shape[:-1], -1, 3)
    codes = jnp.stack(e5m6_of_words([w[..., i] for i in range(3)]), -1).reshape(*words.shape[:-1], -1)
    values = e5m6_values(codes)
    return (values * jnp.repeat(scales, TILE, axis=-1)[..., : values.shape[-1]]).astype(dtype)


def check_octets(k: int) -> None:
    """Raise a ValueError where K numbers do not fill words of E5M6."""
    if k % 8:
        raise ValueError(f"E5M6 packs 8 values in 3 words: the last axis is {k}, should be a multiple of 8")


def e5m6_codes(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Return the codes of numbers up to 65024: a sign, 5 bits of exponent and 6 of mantissa.

    The last 17 bits of float32 decide the rounding, what is above them becomes the code. Of a normal number that is its
    exponent, with another bias, and its mantissa. Of a subnormal one it is how many 2^-20 are in it, fewer than 64.
    Numbers below 2^-126 are zero to processors that know no subnormal float32, as XLA's on a CPU; to others, they may
    have the code of 2^-20, as others below it.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    steps = lax.bitcast_convert_type(jnp.minimum(magnitude, 113 << 23), jnp.float32) * 2.0**20
    code = jnp.maximum(magnitude - (112 << 23), steps.astype(jnp.int32) << 17 | magnitude & 0x1FFFF)
    code = (code + 0xFFFF + (code >> 17 & 1)) >> 17
    return lax.bitcast_convert_type(bits >> 20 & 0x800 | code, jnp.uint32)


def e5m6_values(codes: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the numbers of codes, of which more than 12 bits may be given."""
    magnitude = (codes & 0x7FF) << 17
    normal = lax.bitcast_convert_type(magnitude + (112 << 23), jnp.float32)
    subnormal = lax.bitcast_convert_type(magnitude + (113 << 23), jnp.float32) - 2.0**-14
    value = lax.bitcast_convert_type(jnp.where(codes & 0x7C0 != 0, normal, subnormal), jnp.uint32)
    return lax.bitcast_convert_type(value | codes >> 11 << 31, jnp.float32)


def e5m6_words(h: Sequence[UInt32[Array, "*shape"]]) -> list[UInt32[Array, "*shape"]]:
    """Return the 3 words of 8 codes, the first in the highest bits."""
    return [
        h[0] << 20 | h[1] << 8 | h[2] >> 4,
        h[2] << 28 | h[3] << 16 | h[4] << 4 | h[5] >> 8,
        h[5] << 24 | h[6] << 12 | h[7],
    ]


def e5m6_of_words(w: Sequence[UInt32[Array, "*shape"]]) -> list[UInt32[Array, "*shape"]]:
    """Return the 8 codes of 3 words, in their last 12 bits."""
    return [
        w[0] >> 20,
        w[0] >> 8,
        w[0] << 4 | w[1] >> 28,
        w[1] >> 16,
        w[1] >> 4,
        w[1] << 8 | w[2] >> 24,
        w[2] >> 12,
        w[2],
    ]


def _silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x / (1 + jnp.exp(-x))


def _scaled(
    x: Float[Array, "*batch K"], tile: int, power_of_two: bool, largest: float
) -> tuple[Float[Array, "*batch K"], Float[Array, "*batch K/tile"]]:
    k = x.shape[-1]
    padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -k % tile)])
    divided = padded.reshape(*x.shape[:-1], padded.shape[-1] // tile, tile)
    scales = scales_of(amax_of(divided, -1), power_of_two=power_of_two, largest=largest)
    return divide(divided, scales[..., None]).reshape(padded.shape)[..., :k], scales
