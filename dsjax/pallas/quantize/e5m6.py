"""E5M6 as kernels for Hopper (Mosaic GPU): 12 bits a number, eight of them in three words.

Where a tile of 1 x 128 comes from does not matter to it: arrays here are [N, 128], a tile to a row with one scale each,
and what a step reads and writes is one piece of memory. N is a multiple of 4: what is copied has to be one of 16 bytes.

Eight numbers have to meet in a thread. So threads do not hold what wgmma's results would put there, but eight numbers
that lie next to each other; 16 lanes share a row. They read 16 bytes of BF16 at once, and write three words side by
side, both without bank conflicts and without swizzles: shared memory is read and written once. In registers, eight
numbers are taken apart into eight arrays, which costs no instruction; Mosaic has no such operation, but lets one be
written, here for 32 bits. So are accesses to words, one by one: of three at once Mosaic would make one of two and one
of one, which is misaligned in every other thread.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import memref, vector
from jaxtyping import Array, Float, UInt32

from dsjax.config import Fp8Kernel
from dsjax.pallas.hopper import traced_once
from dsjax.pallas.quantize.division import over, scales_of
from dsjax.pallas.quantize.reference import (
    E5M6_LARGEST,
    TILE,
    amax_of,
    e5m6_codes,
    e5m6_of_words,
    e5m6_values,
    e5m6_words,
)
from dsjax.pallas.quantize.stream import Tile, stream, unswizzled

ROWS = 64
"""Of a step."""
VALUES, WORDS = 8, 3
OCTETS = TILE // VALUES
"""Of a row, as many as lanes share it."""


@traced_once("impl", "num_sms")
def pack(x: Float[Array, "N 128"], impl: Fp8Kernel, num_sms: int) -> tuple[UInt32[Array, "N 48"], Float[Array, " N"]]:
    """Quantize rows to E5M6, with a power of two for each."""

    def compute(_: Any, inputs: list[Any], outputs: list[Any]) -> None:
        x = plgpu.load(inputs[0], layout=LAYOUT, optimized=False).astype(jnp.float32)
        amax = amax_of(x, -1) if impl == "interpret" else jnp.max(jnp.abs(x), axis=-1)
        scales = scales_of(amax, LAYOUT.reduce(1), impl, power_of_two=True, largest=E5M6_LARGEST)
        codes = e5m6_codes(over(x, scales, LAYOUT, impl, power_of_two=True))
        _store_words(outputs[0], e5m6_words(_split(codes, impl)), impl)
        outputs[1][...] = scales

    n = x.shape[0]
    outputs = [
        (jax.ShapeDtypeStruct((n, WORDS * OCTETS), jnp.uint32), _WORDS),
        (jax.ShapeDtypeStruct((n,), jnp.float32), _SCALES),
    ]
    return tuple(stream(compute, (pl.cdiv(n, ROWS),), [(x, _VALUES)], outputs, impl, num_sms))


@traced_once("impl", "num_sms")
def unpack(
    words: UInt32[Array, "N 48"], scales: Float[Array, " N"], impl: Fp8Kernel, num_sms: int
) -> Float[Array, "N 128"]:
    """Return what `pack` packed in BF16, which holds it exactly."""

    def compute(_: Any, inputs: list[Any], outputs: list[Any]) -> None:
        values = e5m6_values(_joined(e5m6_of_words(_load_words(inputs[0], impl)), impl))
        scales = plgpu.load(inputs[1], layout=LAYOUT.reduce(1))
        outputs[0][...] = (values * lax.broadcast_in_dim(scales, values.shape, [0])).astype(jnp.bfloat16)

    n = words.shape[0]
    outputs = [(jax.ShapeDtypeStruct((n, TILE), jnp.bfloat16), _VALUES)]
    return stream(compute, (pl.cdiv(n, ROWS),), [(words, _WORDS), (scales, _SCALES)], outputs, impl, num_sms)[0]


_VALUES, _WORDS = (
    Tile((ROWS, of_octet * OCTETS), lambda i: (i * ROWS, 0), swizzled=False) for of_octet in (VALUES, WORDS)
)
_SCALES = Tile((ROWS,), lambda i: (i * ROWS,), swizzled=False)


def _layout(of_octet: int) -> Any:
    """Return the layout in registers in which a thread holds so many neighbours."""
    columns = of_octet * OCTETS
    # Two rows are a warp's, eight a warpgroup's.
    tiling = plgpu.Tiling(((8, columns), (2, columns), (of_octet,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


LAYOUT, OF_PART = _layout(VALUES), _layout(1)
_PART = plgpu.ShapeDtypeStruct((ROWS, OCTETS), jnp.uint32, layout=OF_PART)
"""One number or word of every octet."""


def _split(x: UInt32[Array, "64 128"], impl: Fp8Kernel) -> Sequence[UInt32[Array, "64 16"]]:
    """Return the first numbers of octets, the second, ..."""
    if impl == "interpret":
        return [x.reshape(ROWS, OCTETS, VALUES)[..., i] for i in range(VALUES)]

    @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=(_PART,) * VALUES)
    def split(_: Any, x: Any) -> Any:
        parts = [np.empty_like(x.registers) for _ in range(VALUES)]
        for register, octet in np.ndenumerate(x.registers):
            for i, part in enumerate(parts):
                part[register] = _vector([_element(octet, i)])
        return tuple(_array(part, OF_PART) for part in parts)

    return split(x)


def _joined(parts: Sequence[UInt32[Array, "64 16"]], impl: Fp8Kernel) -> UInt32[Array, "64 128"]:
    """Undo `_split`."""
    if impl == "interpret":
        return jnp.stack(parts, -1).reshape(ROWS, TILE)
    whole = plgpu.ShapeDtypeStruct((ROWS, TILE), jnp.uint32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(OF_PART,) * VALUES, return_type=whole)
    def join(_: Any, *parts: Any) -> Any:
        octets = np.empty_like(parts[0].registers)
        for register in np.ndindex(octets.shape):
            octets[register] = _vector([_element(part.registers[register], 0) for part in parts])
        return _array(octets, LAYOUT)

    return join(*parts)


def _store_words(ref: Any, words: Sequence[UInt32[Array, "64 16"]], impl: Fp8Kernel) -> None:
    if impl == "interpret":
        ref[...] = jnp.stack(words, -1).reshape(ref.shape)
        return

    @plgpu.inline_mgpu(arg_types=(_REF, (OF_PART,) * WORDS))
    def store(_: Any, ref: Any, words: Any) -> None:
        ref = mgpu.memref_reshape(ref, (ROWS, OCTETS, WORDS))
        for i, word in enumerate(words):
            word.foreach(lambda value, at, i=i: memref.store(value, ref, [*at, mgpu.c(i, ir.IndexType.get())]))

    store(ref, tuple(words))


def _load_words(ref: Any, impl: Fp8Kernel) -> Sequence[UInt32[Array, "64 16"]]:
    if impl == "interpret":
        words = ref[...].reshape(ROWS, OCTETS, WORDS)
        return [words[..., i] for i in range(WORDS)]

    @plgpu.inline_mgpu(arg_types=(_REF,), return_type=(_PART,) * WORDS)
    def load(_: Any, ref: Any) -> Any:
        ref = mgpu.memref_reshape(ref, (ROWS, OCTETS, WORDS))

        def word(i: int) -> Any:
            def at(*octet: Any) -> Any:
                return memref.load(ref, [*octet, mgpu.c(i, ir.IndexType.get())])

            return mgpu.FragmentedArray.build((ROWS, OCTETS), OF_PART.to_mgpu(), at, is_signed=False)

        return tuple(word(i) for i in range(WORDS))

    return load(ref)


_REF = plgpu.RefType(unswizzled(WORDS * OCTETS))


def _element(register: Any, i: int) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=[i])


def _vector(elements: Sequence[Any]) -> Any:
    return vector.from_elements(ir.VectorType.get((len(elements),), elements[0].type), elements)


def _array(registers: np.ndarray, layout: Any) -> Any:
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=False)
