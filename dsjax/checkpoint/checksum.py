"""A checksum of an array that does not depend on where its parts live.

Each element's bits are mixed with its position, and the results are added modulo 2**32. Addition commutes, so an array
spread over any mesh gives the same number, and every device only reads what it holds. The mixing is a bijection of the
bits at a given position: one flipped bit always changes the sum, and so do, with the certainty that 32 bits can give,
several flipped bits and elements that trade places.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, UInt32

_GOLDEN, _MIX, _SPREAD = 0x9E3779B1, 0x85EBCA6B, 2654435761
_BLOCK = 1 << 16
"""Elements of a host array that are mixed at once: few enough to stay in a core's cache."""


def checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Return a 32-bit checksum of every array, summed where it lives.

    Accelerators run a compiled program each for their part; what is in a CPU's memory is read by numpy, which needs no
    compiling for every new shape. Raises ValueError for a dtype without plain bits (a typed PRNG key, int4).
    """
    for name, array in arrays.items():
        _unsigned(name, array.dtype)
    found = {name: _on_host(a) if _is_host(a) else _on_device(a) for name, a in arrays.items()}
    return {name: int(value) for name, value in found.items()}


def checksums_of_parts(array: Any, axes: int) -> UInt32[np.ndarray, "..."]:
    """Return the checksum of every part of an array along its first axes, summed where it lives."""
    if not _is_host(array):
        found = _on_device
        for _ in range(axes):
            found = jax.vmap(found)
        return np.asarray(jax.jit(found)(array))
    array = np.asarray(array)
    parts = array.reshape(-1, *array.shape[axes:])
    return np.array([_on_host(part) for part in parts], np.uint32).reshape(array.shape[:axes])


def checksum_of_rows(rows: np.ndarray, first: int) -> int:
    """Return what rows of an array, from `first` on, add to its checksum, which is the sum modulo 2**32."""
    return _on_host(rows, first)


def _is_host(array: Any) -> bool:
    if not isinstance(array, jax.Array):
        return True
    return array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())


@jax.jit
def _on_device(array: Array) -> UInt32[Array, ""]:
    bits = array if array.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(array, _unsigned("", array.dtype))
    row, column = jnp.uint32(0), jnp.uint32(0)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        row, column = (index, column) if axis == 0 else (row, column * jnp.uint32(size) + index)
    return _mix(bits.astype(jnp.uint32), row, column).sum(dtype=jnp.uint32)


def _on_host(array: Any, first: int = 0) -> int:
    array = np.asarray(array)
    unsigned = _unsigned("", array.dtype)
    shape = array.shape + ((2,) if array.itemsize == 8 else ())
    rows, columns = (shape[0] if shape else 1), prod(shape[1:])
    bits = np.ascontiguousarray(array).reshape(-1).view(unsigned).reshape(rows, columns)
    some_rows, some_columns = max(1, _BLOCK // max(1, columns)), min(columns, _BLOCK)
    row = np.arange(first, first + rows, dtype=np.uint32)[:, None]
    column = np.arange(columns, dtype=np.uint32)
    total = 0
    for i in range(0, rows, some_rows):
        for j in range(0, columns, some_columns):
            part = np.s_[i : i + some_rows, j : j + some_columns]
            mixed = _mix(bits[part].astype(np.uint32), row[part[0]], column[part[1]])
            total += int(mixed.sum(dtype=np.uint32))
    return total % 2**32


def _mix(bits: Any, row: Any, column: Any) -> Any:
    """Mix uint32 bits with their place: the index of the first axis, and that in the others laid out in a row."""
    mixed = bits * np.uint32(_SPREAD)
    for index, salt in ((row, 1), (column, 2)):
        mixed = (mixed ^ (index * np.uint32(_GOLDEN) + np.uint32(salt))) * np.uint32(_MIX)
        mixed = mixed ^ (mixed >> np.uint32(15))
    return mixed


def _unsigned(name: str, dtype: Any) -> Any:
    """Return the unsigned type whose bits stand for the dtype's: 8-byte elements count as two of 4 bytes."""
    plain = not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) and np.dtype(dtype).kind in "biufV"
    sub_byte = plain and np.dtype(dtype) in (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4))
    if not plain or sub_byte or np.dtype(dtype).itemsize not in (1, 2, 4, 8):
        raise ValueError(
            f"{name}: arrays of dtype {dtype} cannot be saved; save plain numbers (jax.random.key_data for keys)"
        )
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[np.dtype(dtype).itemsize]
