"""Quantizers: what `reference` defines, by XLA or by kernels for Hopper.

Kernels take BF16 and float32, and tiles of 128. Where rows or columns are no multiple of 32, arrays are padded with
zeros first and cut afterwards; other partial tiles cost nothing. `auto` takes XLA for what the kernels do not; to ask
for a kernel where there is none is an error. `num_sms` are the multiprocessors that a kernel takes, at least 1; others
are left to communication.

Scales have their natural layout, [M, K/128]; kernels write and read most of them transposed, and XLA removes pairs of
transposes.

Codes and scales of kernels are those of the definition to the bit, except where it is itself defined only up to
rounding: behind an exponential function (`swiglu_tiles`) and behind a sum over a row (`rms_norm_tiles`). Of codes that
are no number, only that is kept, not the sign; of E5M6, which has none such, a scale that is not finite says it, and
the words with it are arbitrary.
"""

from types import ModuleType

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Int32, UInt32

from dsjax.config import Fp8Kernel
from dsjax.pallas.choice import NUM_SMS, resolve
from dsjax.pallas.quantize import reference
from dsjax.pallas.quantize.reference import TILE, dequantize

__all__ = [
    "blocks",
    "dequantize",
    "pack_e5m6",
    "requantize_transposed",
    "rms_norm_tiles",
    "swiglu_backward",
    "swiglu_tiles",
    "tiles",
    "tiles_transposed",
    "transpose",
    "unpack_e5m6",
]


def tiles(
    x: Float[Array, "*batch K"],
    *,
    power_of_two: bool = False,
    tile: int = TILE,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
) -> tuple[Float8e4m3fn[Array, "*batch K"], Float[Array, "*batch K/tile"]]:
    """Quantize in tiles of 1 x 128: codes, and a float32 scale for every tile.

    Raises:
        ValueError: a kernel is asked for that does not exist: another tile, or another type than BF16 and float32.
    """
    impl = _resolve(impl, x, unsupported=None if tile == TILE else f"tiles of {tile}")
    if impl == "xla":
        return reference.tiles(x, power_of_two=power_of_two, tile=tile)
    *batch, k = x.shape
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    codes, scales = _kernels().tiles(_aligned(rows, 0, 1), impl, num_sms, power_of_two=power_of_two)
    return codes[:m, :k].reshape(x.shape), scales[:, :m].T.reshape(*batch, -1)


def tiles_transposed(
    x: Float[Array, "M K"], *, power_of_two: bool = False, impl: Fp8Kernel = "auto", num_sms: int = NUM_SMS
) -> tuple[Float8e4m3fn[Array, "K M"], Float[Array, "K M/128"]]:
    """Quantize in tiles of 128 x 1, transposed, as an operand of a product that sums over rows.

    Raises:
        ValueError: a kernel is asked for, for another type than BF16 and float32.
    """
    impl = _resolve(impl, x)
    if impl == "xla":
        return reference.tiles_transposed(x, power_of_two=power_of_two)
    m, k = x.shape
    codes, scales = _kernels().tiles_transposed(_aligned(x, 0, 1), impl, num_sms, power_of_two=power_of_two)
    return codes[:k, :m], scales[:, :k].T


def blocks(
    w: Float[Array, "*batch N K"], *, power_of_two: bool = False, impl: Fp8Kernel = "auto", num_sms: int = NUM_SMS
) -> tuple[Float8e4m3fn[Array, "*batch N K"], Float[Array, "*batch N/128 K/128"]]:
    """Quantize in blocks of 128 x 128.

    Raises:
        ValueError: a kernel is asked for, for another type than BF16 and float32.
    """
    impl = _resolve(impl, w)
    if impl == "xla":
        return reference.blocks(w, power_of_two=power_of_two)
    *batch, n, k = w.shape
    codes, scales = _kernels().blocks(_aligned(w.reshape(-1, n, k), 1, 2), impl, num_sms, power_of_two=power_of_two)
    return codes[:, :n, :k].reshape(w.shape), scales.reshape(*batch, *scales.shape[1:])


def requantize_transposed(
    codes: Float8e4m3fn[Array, "T K"],
    scales: Float[Array, "T K/128"],
    rows: Int32[Array, "M"] | None = None,
    *,
    power_of_two: bool = False,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
) -> tuple[Float8e4m3fn[Array, "K M"], Float[Array, "K M/128"]]:
    """Requantize tiles of 1 x 128 in tiles of 128 x 1, transposed.

    Args:
        rows: which rows to take, in which order; T for a row of zeros. All of them by default. XLA takes them, ahead of
            the kernel: Hopper's TMA gathers no rows.

    Raises:
        ValueError: a kernel is asked for, for codes other than E4M3.
    """
    impl = _resolve(impl, codes, types=(reference.E4M3,))
    if impl == "xla":
        return reference.requantize_transposed(codes, scales, rows, power_of_two=power_of_two)
    if rows is not None:
        codes, scales = (array.at[rows].get(mode="fill", fill_value=0) for array in (codes, scales))
    m, k = codes.shape
    codes, scales = _kernels().requantize_transposed(
        _aligned(codes, 0, 1), _aligned(scales.T, 1), impl, num_sms, power_of_two=power_of_two
    )
    return codes[:k, :m], scales[:, :k].T


def rms_norm_tiles(
    x: Float[Array, "M K"],
    gain: Float[Array, " K"],
    eps: float,
    *,
    power_of_two: bool = False,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
) -> tuple[Float8e4m3fn[Array, "M K"], Float[Array, "M K/128"]]:
    """Quantize RMSNorm(x) in tiles of 1 x 128; the norm is rounded to the type of `x` first, as the layer does.

    Raises:
        ValueError: a kernel is asked for that does not exist: another type than BF16 and float32, or a K that is no
            multiple of 128, too large, or such that no few rows have a multiple of 8 tiles.
    """
    m, k = x.shape
    impl = _resolve(impl, x, unsupported=None if _kernels().rms_norm_rows(k) else f"an RMSNorm of {k} columns")
    if impl == "xla":
        return reference.rms_norm_tiles(x, gain, eps, power_of_two=power_of_two)
    codes, scales = _kernels().rms_norm_tiles(_aligned(x, 0), gain, eps, impl, num_sms, power_of_two=power_of_two)
    return codes[:m], scales[:m]


def swiglu_tiles(
    gate_up: Float[Array, "M F2"],
    weights: Float[Array, " M"],
    *,
    power_of_two: bool = False,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
) -> tuple[Float8e4m3fn[Array, "M F"], Float[Array, "M F/128"]]:
    """Quantize silu(gate) * up * weight in tiles of 1 x 128, all in float32; [gate | up] side by side.

    Raises:
        ValueError: a kernel is asked for, for another type than BF16 and float32.
    """
    impl = _resolve(impl, gate_up)
    if impl == "xla":
        return reference.swiglu_tiles(gate_up, weights, power_of_two=power_of_two)
    m, f = _halves(gate_up)
    codes, scales = _kernels().swiglu_tiles(
        _aligned(gate_up.reshape(m, 2, f), 0, 2),
        _aligned(weights.astype(jnp.float32), 0),
        impl,
        num_sms,
        power_of_two=power_of_two,
    )
    return codes[:m, :f], scales[:, :m].T


def swiglu_backward(
    gate_up: Float[Array, "M F2"],
    weights: Float[Array, " M"],
    dy: Float[Array, "M F"],
    *,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
) -> tuple[Float[Array, "M F2"], Float[Array, " M"]]:
    """Return the gradients of [gate | up], in the type of `dy`, and of the weights, float32, of what `swiglu_tiles`
    quantizes.

    Raises:
        ValueError: a kernel is asked for, for another type than BF16 and float32.
    """
    impl = _resolve(impl, gate_up, dy)
    if impl == "xla":
        return reference.swiglu_backward(gate_up, weights, dy)
    m, f = _halves(gate_up)
    gradient, parts = _kernels().swiglu_backward(
        _aligned(gate_up.reshape(m, 2, f), 0, 2),
        _aligned(weights.astype(jnp.float32), 0),
        _aligned(dy, 0, 1),
        impl,
        num_sms,
    )
    return gradient[:m, :, :f].reshape(m, 2 * f), parts.sum(0)[:m]


def transpose(
    codes: Float8e4m3fn[Array, "*batch N K"], *, impl: Fp8Kernel = "auto", num_sms: int = NUM_SMS
) -> Float8e4m3fn[Array, "*batch K N"]:
    """Transpose codes: those of square blocks stay valid, with their scales transposed.

    Raises:
        ValueError: a kernel is asked for, for codes other than E4M3.
    """
    impl = _resolve(impl, codes, types=(reference.E4M3,))
    if impl == "xla":
        return reference.transpose(codes)
    *batch, n, k = codes.shape
    transposed = _kernels().transpose(_aligned(codes.reshape(-1, n, k), 1, 2), impl, num_sms)
    return transposed[:, :k, :n].reshape(*batch, k, n)


def pack_e5m6(
    x: Float[Array, "*batch K"], *, impl: Fp8Kernel = "auto", num_sms: int = NUM_SMS
) -> tuple[UInt32[Array, "*batch 3K/8"], Float[Array, "*batch K/128"]]:
    """Quantize to 12 bits, 5 of exponent and 6 of mantissa, in tiles of 1 x 128 with power-of-two scales.

    Raises:
        ValueError: K is no multiple of 8, or a kernel is asked for, for another type than BF16 and float32.
    """
    impl = _resolve(impl, x)
    if impl == "xla":
        return reference.pack_e5m6(x)
    *batch, k = x.shape
    reference.check_octets(k)
    of_tiles = _in_tiles(x, TILE)
    words, scales = _e5m6().pack(_aligned(of_tiles, 0), impl, num_sms)
    n = len(of_tiles)
    return words[:n].reshape(*batch, -1)[..., : 3 * k // 8], scales[:n].reshape(*batch, -1)


def unpack_e5m6(
    words: UInt32[Array, "*batch 3K/8"],
    scales: Float[Array, "*batch K/128"],
    *,
    dtype: DTypeLike = jnp.float32,
    impl: Fp8Kernel = "auto",
    num_sms: int = NUM_SMS,
) -> Float[Array, "*batch K"]:
    """Return what `pack_e5m6` packed."""
    impl = _resolve(impl, words, types=(jnp.uint32,))
    if impl == "xla":
        return reference.unpack_e5m6(words, scales, dtype=dtype)
    *batch, columns = words.shape
    of_tiles = _in_tiles(words, 3 * TILE // 8)
    x = _e5m6().unpack(_aligned(of_tiles, 0), _aligned(scales.reshape(-1), 0), impl, num_sms)
    return x[: len(of_tiles)].reshape(*batch, -1)[..., : columns // 3 * 8].astype(dtype)


def _kernels() -> ModuleType:
    from dsjax.pallas.quantize import kernels  # see `choice`

    return kernels


def _e5m6() -> ModuleType:
    from dsjax.pallas.quantize import e5m6

    return e5m6


def _resolve(
    impl: Fp8Kernel, *inputs: Array, types: tuple = (jnp.bfloat16, jnp.float32), unsupported: str | None = None
) -> Fp8Kernel:
    """Return the implementation for `inputs`: XLA's, where `auto` would be a kernel that does not support them."""
    resolved = resolve(impl)
    if resolved == "xla" or any(x.size == 0 for x in inputs):
        return "xla"
    wrong = [x.dtype for x in inputs if x.dtype not in types]
    if wrong:
        unsupported = f"inputs in {wrong[0]}"
    if not unsupported:
        return resolved
    if impl == "auto":
        return "xla"
    raise ValueError(f"quantizers: there is no kernel for {unsupported}; 'auto' and 'xla' compute it")


def _aligned(x: Array, *axes: int) -> Array:
    # Columns of codes, a byte each, decide; rows are columns of what is written transposed.
    from dsjax.pallas.quantize.stream import ALIGNMENT

    padding = [(0, -n % ALIGNMENT if axis in axes else 0) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, padding) if any(after for _, after in padding) else x


def _in_tiles(x: Array, columns: int) -> Array:
    """Return tiles as rows, the last of each row of `x` filled up with zeros."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % columns)]
    return (jnp.pad(x, padding) if x.shape[-1] % columns else x).reshape(-1, columns)


def _halves(gate_up: Float[Array, "M F2"]) -> tuple[int, int]:
    m, both = gate_up.shape
    if both % 2:
        raise ValueError(f"[gate | up] has {both} columns, should have an even number")
    return m, both // 2
