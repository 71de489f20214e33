"""The buffers of a pipeline: values of several micro-batches, one behind the other along a first axis."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree


def empty(depth: int, like: PyTree) -> PyTree:
    """Return a buffer of zeros for so many values like this one."""
    return jax.tree.map(lambda leaf: jnp.zeros((depth, *leaf.shape), leaf.dtype), like)


def read(buffer: PyTree, slot: Int[Array, ""]) -> PyTree:
    """Return the value in a slot; in that of a buffer with one, whatever its number."""

    def at(leaf: Array) -> Array:
        return leaf[0] if len(leaf) == 1 else lax.dynamic_index_in_dim(leaf, slot, 0, keepdims=False)

    return jax.tree.map(at, buffer)


def write(buffer: PyTree, value: PyTree, slot: Int[Array, ""]) -> PyTree:
    """Return the buffer with a value in a slot."""

    def put(leaf: Array, new: Array) -> Array:
        return new[None] if len(leaf) == 1 else lax.dynamic_update_index_in_dim(leaf, new, slot, 0)

    return jax.tree.map(put, buffer, value)


def write_in_branch(buffer: PyTree, value: PyTree, slot: Int[Array, ""]) -> PyTree:
    """Like `write`, in a branch, where others leave the buffer alone.

    One that a branch gives back unseen, XLA makes elsewhere, and then copies in all the others; so this one is looked
    at, by a condition that always holds: slots count from 0.
    """

    def put(leaf: Array, new: Array) -> Array:
        return jnp.where(slot < 0, leaf, new[None]) if len(leaf) == 1 else write(leaf, new, slot)

    return jax.tree.map(put, buffer, value)
