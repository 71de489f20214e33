"""The quantizers as kernels for Hopper (Mosaic GPU); `reference` says what each computes.

All are streams of tiles of 64 rows in registers, in the layout of wgmma's results: four threads share a row, so that
its largest magnitude takes two exchanges between them. Every input is read once.

Scales of M rows are written [K/128, M], as the products read them. M and K are multiples of `stream.ALIGNMENT`.

Dimensions: M rows, K columns, F columns of the gate.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn

from dsjax.config import Fp8Kernel
from dsjax.pallas.hopper import traced_once
from dsjax.pallas.quantize.division import over, scales_of
from dsjax.pallas.quantize.reference import E4M3, TILE, amax_of
from dsjax.pallas.quantize.stream import Tile, stream, swizzled

LAYOUT = plgpu.Layout.WGMMA
ROWS = 64
"""Of a tile in registers: those of a warpgroup."""


@traced_once("impl", "num_sms", "power_of_two")
def tiles(
    x: Float[Array, "M K"], impl: Fp8Kernel, num_sms: int, *, power_of_two: bool
) -> tuple[Float8e4m3fn[Array, "M K"], Float[Array, "K/128 M"]]:
    """Quantize in tiles of 1 x 128."""
    m, k = x.shape

    def compute(_: Any, inputs: list[Any], outputs: list[Any]) -> None:
        _quantize_rows(_load(inputs[0]), *outputs, impl, power_of_two)

    return tuple(stream(compute, _grid(m, k), [(x, _ROWS)], _codes_and_scales(m, k), impl, num_sms))


@traced_once("impl", "num_sms", "power_of_two")
def swiglu_tiles(
    gate_up: Float[Array, "M 2 F"], weights: Float[Array, " M"], impl: Fp8Kernel, num_sms: int, *, power_of_two: bool
) -> tuple[Float8e4m3fn[Array, "M F"], Float[Array, "F/128 M"]]:
    """Quantize silu(gate) * up * weight in tiles of 1 x 128."""
    m, _, f = gate_up.shape

    def compute(_: Any, inputs: list[Any], outputs: list[Any]) -> None:
        gate, up = (_load(ref) for ref in inputs[:2])
        product = gate / (1 + jnp.exp(-gate)) * up
        _quantize_rows(product * _of_rows(inputs[2], product.shape), *outputs, impl, power_of_two)

    inputs = [(gate_up, _half(0, TILE)), (gate_up, _half(1, TILE)), (weights, _VECTOR)]
    return tuple(stream(compute, _grid(m, f), inputs, _codes_and_scales(m, f), impl, num_sms))


@traced_once("impl", "num_sms")
def swiglu_backward(
    gate_up: Float[Array, "M 2 F"], weights: Float[Array, " M"], dy: Float[Array, "M F"], impl: Fp8Kernel, num_sms: int
) -> tuple[Float[Array, "M 2 F"], Float[Array, "F/64 M"]]:
    """Return the gradients of gate and up, and parts of those of the weights, which are to be added up."""
    m, f = dy.shape
    columns = 64  # twice as many would not fit into registers

    def compute(_: Any, inputs: list[Any], outputs: list[Any]) -> None:
        gate, up, dy = (_load(ref) for ref in inputs[:3])
        sigmoid = 1 / (1 + jnp.exp(-gate))
        silu = gate * sigmoid
        outputs[2][...] = jnp.sum(dy * silu * up, axis=1)
        d_product = dy * _of_rows(inputs[3], dy.shape)
        outputs[1][...] = (d_product * silu).astype(outputs[1].dtype)
        outputs[0][...] = (d_product * up * sigmoid * (1 + gate * (1 - sigmoid))).astype(outputs[0].dtype)

    gate, up = _half(0, columns), _half(1, columns)
    of_dy = Tile((ROWS, columns), lambda i, j: (i * ROWS, j * columns))
    inputs = [(gate_up, gate), (gate_up, up), (dy, of_dy), (weights, _VECTOR)]
    grid = _grid(m, f, columns)
    gradient = jax.ShapeDtypeStruct((m, 2, f), dy.dtype)
    # Halves of one array.
    outputs = [(gradient, gate), (None, up), (jax.ShapeDtypeStruct((grid[1], m), jnp.float32), _SCALES)]
    return tuple(stream(compute, grid, inputs, outputs, impl, num_sms))


@traced_once("impl", "num_sms", "power_of_two")
def tiles_transposed(
    x: Float[Array, "M K"], impl: Fp8Kernel, num_sms: int, *, power_of_two: bool
) -> tuple[Float8e4m3fn[Array, "K M"], Float[Array, "M/128 K"]]:
    """Quantize in tiles of 128 x 1, transposed."""
    m, k = x.shape

    def compute(_: Any, inputs: list[Any], outputs: list[Any]) -> None:
        _quantize_rows(_load(inputs[0].T), *outputs, impl, power_of_two)

    return tuple(stream(compute, _grid(k, m), [(x, _COLUMNS)], _codes_and_scales(k, m), impl, num_sms))


@traced_once("impl", "num_sms", "power_of_two")
def requantize_transposed(
    codes: Float8e4m3fn[Array, "M K"],
    scales: Float[Array, "K/128 M"],
    impl: Fp8Kernel,
    num_sms: int,
    *,
    power_of_two: bool,
) -> tuple[Float8e4m3fn[Array, "K M"], Float[Array, "M/128 K"]]:
    """Requantize tiles of 1 x 128 in tiles of 128 x 1, transposed."""
    m, k = codes.shape

    def compute(_: Any, inputs: list[Any], outputs: list[Any], halves: Any) -> None:
        of_columns = plgpu.load(inputs[1], layout=LAYOUT.reduce(0))
        x = _transposed(inputs[0], halves).astype(jnp.float32) * lax.broadcast_in_dim(of_columns, (ROWS, TILE), [1])
        _quantize_rows(x, *outputs, impl, power_of_two)

    of_scales = Tile((None, TILE), lambda i, j: (i * ROWS // TILE, j * TILE), swizzled=False)
    inputs = [(codes, _COLUMNS), (scales, of_scales)]
    return tuple(stream(compute, _grid(k, m), inputs, _codes_and_scales(k, m), impl, num_sms, scratch=[_HALVES]))


@traced_once("impl", "num_sms")
def transpose(codes: Float8e4m3fn[Array, "B N K"], impl: Fp8Kernel, num_sms: int) -> Float8e4m3fn[Array, "B K N"]:
    """Transpose codes."""
    batch, n, k = codes.shape

    def compute(_: Any, inputs: list[Any], outputs: list[Any], halves: Any) -> None:
        outputs[0][...] = _transposed(inputs[0], halves).astype(E4M3)

    source = Tile((None, TILE, ROWS), lambda b, i, j: (b, j * TILE, i * ROWS))
    result = Tile((None, ROWS, TILE), lambda b, i, j: (b, i * ROWS, j * TILE))
    outputs = [(jax.ShapeDtypeStruct((batch, k, n), E4M3), result)]
    return stream(compute, (batch, *_grid(k, n)), [(codes, source)], outputs, impl, num_sms, scratch=[_HALVES])[0]


@traced_once("impl", "num_sms", "power_of_two")
def blocks(
    w: Float[Array, "B N K"], impl: Fp8Kernel, num_sms: int, *, power_of_two: bool
) -> tuple[Float8e4m3fn[Array, "B N K"], Float[Array, "B N/128 K/128"]]:
    """Quantize in blocks of 128 x 128."""
    batch, n, k = w.shape
    grid = (batch, *_grid(n, k, rows=TILE))

    def compute(place: tuple[Any, ...], inputs: list[Any], outputs: list[Any]) -> None:
        # In two halves, each read twice, that all of them fit into registers.
        halves = [inputs[0].at[pl.ds(i * ROWS, ROWS)] for i in range(TILE // ROWS)]
        of_rows = jnp.maximum(*(_amax(_load(half), impl) for half in halves))
        of_all = jnp.maximum(of_rows, _amax(of_rows, impl))
        scales = scales_of(of_all, LAYOUT.reduce(1), impl, power_of_two=power_of_two)
        for i, half in enumerate(halves):
            codes = over(_load(half), scales, LAYOUT, impl, power_of_two=power_of_two).astype(E4M3)
            outputs[0][pl.ds(i * ROWS, ROWS)] = codes
        outputs[1][place] = jnp.max(scales)

    tile = Tile((None, TILE, TILE), lambda b, i, j: (b, i * TILE, j * TILE))
    outputs = [(jax.ShapeDtypeStruct(w.shape, E4M3), tile), (jax.ShapeDtypeStruct(grid, jnp.float32), None)]
    return tuple(stream(compute, grid, [(w, tile)], outputs, impl, num_sms))


def rms_norm_rows(k: int) -> int | None:
    """Return how many rows of K columns a tile of `rms_norm_tiles` takes; None if it takes none."""
    parts, partial = divmod(k, TILE)
    if partial or parts > ROWS:
        return None
    # Copies are of a multiple of 8 rows of 128 columns.
    return max((rows for rows in range(1, ROWS // parts + 1) if rows * parts % 8 == 0), default=None)


@traced_once("eps", "impl", "num_sms", "power_of_two")
def rms_norm_tiles(
    x: Float[Array, "M K"], gain: Float[Array, " K"], eps: float, impl: Fp8Kernel, num_sms: int, *, power_of_two: bool
) -> tuple[Float8e4m3fn[Array, "M K"], Float[Array, "M K/128"]]:
    """Quantize RMSNorm(x) in tiles of 1 x 128, for K that `rms_norm_rows` admits.

    A tile in registers has 64 rows of 128 columns, here parts of few, but whole, rows of x: of one, if K is 7168.
    """
    m, k = x.shape
    parts, rows = k // TILE, rms_norm_rows(k)
    copied = rows * parts

    def compute(_: Any, inputs: list[Any], outputs: list[Any], gains: Any, squares: Any) -> None:
        x = _load(inputs[0])
        squares[...] = jnp.sum(x * x, axis=1)
        plgpu.commit_smem()
        shape = (ROWS, ROWS)
        row, column = (plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, axis), LAYOUT) for axis in (0, 1))
        others = lax.broadcast_in_dim(plgpu.load(squares, layout=LAYOUT.reduce(0)), shape, [1])
        same = lax.div(row, jnp.int32(parts)) == lax.div(column, jnp.int32(parts))
        mean = jnp.sum(jnp.where(same, others, 0.0), axis=1) * (1 / k)
        inverse_rms = lax.broadcast_in_dim(lax.rsqrt(mean + eps), x.shape, [0])
        normed = (x * inverse_rms * _load(gains)).astype(inputs[0].dtype)
        _quantize_rows(normed.astype(jnp.float32), *outputs, impl, power_of_two)

    of_parts = Tile((ROWS, TILE), lambda i: (i * copied, 0), rows=copied)
    of_scales = Tile((ROWS,), lambda i: (i * copied,), swizzled=False, rows=copied)
    codes, scales = stream(
        compute,
        (pl.cdiv(m, rows),),
        [(x.reshape(-1, TILE), of_parts)],
        [
            (jax.ShapeDtypeStruct((m * parts, TILE), E4M3), of_parts),
            (jax.ShapeDtypeStruct((m * parts,), jnp.float32), of_scales),
        ],
        impl,
        num_sms,
        constants=[(jnp.tile(gain.astype(jnp.float32).reshape(parts, TILE), (rows, 1)), of_parts)],
        scratch=[plgpu.SMEM((ROWS,), jnp.float32)],
    )
    return codes.reshape(m, k), scales.reshape(m, parts)


_ROWS = Tile((ROWS, TILE), lambda i, j: (i * ROWS, j * TILE))
_COLUMNS = Tile((TILE, ROWS), lambda i, j: (j * TILE, i * ROWS))
"""Of a matrix whose transpose the kernel writes."""
_VECTOR = Tile((ROWS,), lambda i, j: (i * ROWS,), swizzled=False)
_SCALES = Tile((None, ROWS), lambda i, j: (j, i * ROWS), swizzled=False)
_HALVES = swizzled((TILE, ROWS), jnp.float16, ROWS)


def _half(which: int, columns: int) -> Tile:
    return Tile((ROWS, None, columns), lambda i, j: (i * ROWS, which, j * columns))


def _grid(rows_of: int, columns_of: int, columns: int = TILE, rows: int = ROWS) -> tuple[int, int]:
    return pl.cdiv(rows_of, rows), pl.cdiv(columns_of, columns)


def _codes_and_scales(m: int, k: int) -> list[tuple[jax.ShapeDtypeStruct, Tile]]:
    scales = jax.ShapeDtypeStruct((pl.cdiv(k, TILE), m), jnp.float32)
    return [(jax.ShapeDtypeStruct((m, k), E4M3), _ROWS), (scales, _SCALES)]


def _load(ref: Any) -> Float[Array, "R C"]:
    return plgpu.load(ref, layout=LAYOUT).astype(jnp.float32)


def _of_rows(ref: Any, shape: tuple[int, ...]) -> Float[Array, "R C"]:
    return lax.broadcast_in_dim(plgpu.load(ref, layout=LAYOUT.reduce(1)), shape, [0])


def _quantize_rows(x: Float[Array, "R C"], codes: Any, scales: Any, impl: Fp8Kernel, power_of_two: bool) -> None:
    of_rows = scales_of(_amax(x, impl), LAYOUT.reduce(1), impl, power_of_two=power_of_two)
    scales[...] = of_rows
    codes[...] = over(x, of_rows, LAYOUT, impl, power_of_two=power_of_two).astype(E4M3)


def _amax(x: Array, impl: Fp8Kernel) -> Array:
    # The interpreter's is XLA's maximum, the GPU's keeps what is no number.
    return amax_of(x, -1) if impl == "interpret" else jnp.max(jnp.abs(x), axis=-1)


def _transposed(codes: Any, halves: Any) -> Array:
    """Transpose codes by way of float16, which holds them exactly: shared memory can be read transposed in 16 bits."""
    halves[...] = plgpu.load(codes, layout=LAYOUT).astype(jnp.float16)
    plgpu.commit_smem()
    return plgpu.load(halves.T, layout=LAYOUT)
