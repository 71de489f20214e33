"""All-to-all along one axis of the mesh, in three ways that give the same result.

Every device holds buffers [n, C, ...]: C slots for each of the n devices of the axis, the first `sent[i]` of which go
to device i. It gets as many of each, again n times C slots, and zeros where nothing was sent. A move is its own
transpose, with `sent` and `received` exchanged.
"""

import math
from itertools import accumulate
from typing import get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, PyTree

from dsjax.config import Transport
from dsjax.parallel.mesh import Axes
from dsjax.runtime import target_platform


def resolve(transport: Transport, platform: str) -> str:
    """Return the name of what `transport` is on a platform: CPUs have no `ragged_all_to_all`, and emulate it.

    Raises:
        ValueError: no such transport.
    """
    if transport not in get_args(Transport):
        raise ValueError(f"no transport {transport!r}; there are {', '.join(get_args(Transport))}")
    return "ragged, emulated" if transport == "ragged" and platform == "cpu" else transport


def move(
    payload: PyTree[Array], sent: Int32[Array, " n"], received: Int32[Array, " n"], *, axis: Axes, transport: Transport
) -> PyTree[Array]:
    """Return what all devices of the axis sent here, by sender; slots that are not in use hold zeros.

    Args:
        payload: [n, C, ...], by receiver; several arrays travel as one message. Unused slots must hold zeros.
        sent: slots in use, by receiver.
        received: the same at the other end: slots in use, by sender.
        axis: of the mesh.
    """
    if lax.axis_size(axis) == 1:
        return payload
    leaves, structure = jax.tree.flatten(payload)
    # Numbers travel as bits: XLA would send BF16 as float32 where a platform has no BF16 sums, as CPUs.
    unit = max(size for size in (4, 2, 1) if not any(_row_bytes(leaf) % size for leaf in leaves))
    words = [_to_words(leaf, unit) for leaf in leaves]
    buffer = words[0] if len(words) == 1 else jnp.concatenate(words, axis=-1)
    match resolve(transport, target_platform()):
        case "padded":
            moved = lax.all_to_all(buffer, axis, 0, 0, tiled=True)
        case "gather":
            moved = lax.all_gather(buffer, axis)[:, lax.axis_index(axis)]
        case "ragged":
            moved = _ragged(lax.ragged_all_to_all, buffer, sent, received, axis)
        case "ragged, emulated":
            moved = _ragged(_emulated_ragged_all_to_all, buffer, sent, received, axis)
    starts = accumulate((w.shape[-1] for w in words[:-1]), initial=0)
    return structure.unflatten([_from_words(moved, start, leaf) for start, leaf in zip(starts, leaves, strict=True)])


def _row_bytes(leaf: Array) -> int:
    return math.prod(leaf.shape[2:]) * leaf.dtype.itemsize


def _to_words(leaf: Array, unit: int) -> Array:
    """Return the bits of every slot as a row of unsigned integers of `unit` bytes."""
    word, size = jnp.dtype(f"uint{8 * unit}"), leaf.dtype.itemsize
    rows = leaf.reshape(*leaf.shape[:2], -1)
    if size < unit:
        rows = rows.reshape(*rows.shape[:2], -1, unit // size)
    return lax.bitcast_convert_type(rows, word).reshape(*leaf.shape[:2], -1)


def _from_words(words: Array, start: int, like: Array) -> Array:
    """Return the array whose bits begin at a word of every row."""
    unit, size = words.dtype.itemsize, like.dtype.itemsize
    if size > unit:
        part = words[..., start : start + _row_bytes(like) // unit]
        return lax.bitcast_convert_type(part.reshape(*part.shape[:2], -1, size // unit), like.dtype).reshape(like.shape)
    # The words of all arrays become numbers, which costs nothing; what takes a slice of numbers, XLA makes part of
    # what reads them. A slice of words is a copy.
    numbers = lax.bitcast_convert_type(words, like.dtype).reshape(*words.shape[:2], -1)
    first = start * (unit // size)
    return numbers[..., first : first + math.prod(like.shape[2:])].reshape(like.shape)


def _ragged(primitive, buffer: Array, sent: Array, received: Array, axis: Axes) -> Array:
    n, capacity = buffer.shape[:2]
    rows = buffer.reshape(n * capacity, *buffer.shape[2:])
    first_rows = jnp.arange(n, dtype=jnp.int32) * capacity
    at_receiver = jnp.full(n, lax.axis_index(axis) * capacity, jnp.int32)
    result = primitive(rows, jnp.zeros_like(rows), first_rows, sent, at_receiver, received, axis_name=axis)
    return result.reshape(buffer.shape)


def _emulated_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `lax.ragged_all_to_all` does, read off everybody's operands and offsets."""
    me = lax.axis_index(axis_name)
    operands = lax.all_gather(operand, axis_name)
    starts, sizes, targets = (lax.all_gather(a, axis_name)[:, me] for a in (input_offsets, send_sizes, output_offsets))
    row = jnp.arange(output.shape[0])[None, :]
    # The primitive wants both ends to agree; taking the smaller count makes a disagreement show.
    from_sender = (row >= targets[:, None]) & (row < (targets + jnp.minimum(sizes, recv_sizes))[:, None])
    sender = jnp.argmax(from_sender, axis=0)
    source = jnp.clip(starts[sender] + row[0] - targets[sender], 0, operand.shape[0] - 1)
    found = from_sender.any(axis=0).reshape(-1, *[1] * (operand.ndim - 1))
    return jnp.where(found, operands[sender, source], output)
