"""What waits between the ticks of a pipeline: values of several micro-batches, one behind the other along a first axis.

XLA writes a buffer in place if nothing reads any more what it held before, and copies it if it cannot tell. So the
order of reads and writes is part of the program, told by optimization barriers.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree


class Results(NamedTuple):
    """What one device has of a step."""

    grads: tuple[tuple[PyTree, ...], ...]
    """Of the weights of each slot and place, float32, summed over micro-batches; zero in places that are empty."""
    edge_grads: PyTree
    """Of the edges as they are held, float32; zero but on ranks that have the first or the last stage."""
    aux: tuple[tuple[PyTree, ...], ...]
    """What the chunks of each slot and place reported, summed over micro-batches."""
    report: PyTree
    """What `finish` reported, summed over micro-batches."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a device holds between ticks."""

    activations: PyTree
    """Inputs of stages."""
    gradients: PyTree
    """Of their outputs."""
    residuals: tuple[tuple[Array, ...], ...]
    """Of every place, see `chunk`."""
    tapes: tuple[Array, ...]
    """Of all places, place by place. So writing one is an update of a part even where each has room for one: what is
    replaced as a whole, XLA copies in every branch that leaves it alone."""
    results: Results


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


def with_grads(state: State, slot: int, place: int, grads: PyTree) -> State:
    """Return the state with other gradients of a place."""
    results = state.results
    all_grads = with_item(results.grads, slot, with_item(results.grads[slot], place, grads))
    return replace(state, results=results._replace(grads=all_grads))


def with_residuals(state: State, place: int, residuals: tuple[Array, ...]) -> State:
    """Return the state with another buffer of residuals of a place."""
    return replace(state, residuals=with_item(state.residuals, place, residuals))


def with_item[T](values: tuple[T, ...], at: int, value: T) -> tuple[T, ...]:
    """Return a tuple with another item in a place."""
    return (*values[:at], value, *values[at + 1 :])


def before_arrivals[T](state: State, taken: T, *, wait_for_grads: bool) -> tuple[State, T]:
    """Keep what is taken from activations and gradients before what neighbours send: that comes when a tick ends.

    Args:
        wait_for_grads: whether to wait for the gradients of ticks before as well.
    """
    arriving = state.activations, state.gradients
    waited_for = state.results.grads if wait_for_grads else None
    taken, (activations, gradients), grads = lax.optimization_barrier((taken, arriving, waited_for))
    state = replace(state, activations=activations, gradients=gradients)
    return replace(state, results=state.results._replace(grads=grads)) if wait_for_grads else state, taken


def after_residuals(state: State, place: int, value: PyTree) -> tuple[State, PyTree]:
    """Make what reads `value` wait until the residuals of a place are written."""
    written, value = lax.optimization_barrier((state.residuals[place], value))
    return with_residuals(state, place, written), value


def after_tapes(state: State, value: PyTree) -> tuple[State, PyTree]:
    """Make what reads `value` wait until tapes are written."""
    written, value = lax.optimization_barrier((state.tapes, value))
    return replace(state, tapes=written), value


def after_grads(state: State, slot: int, place: int, value: PyTree) -> tuple[State, PyTree]:
    """Make what reads `value` wait until the gradients of a place are added up."""
    added, value = lax.optimization_barrier((state.results.grads[slot][place], value))
    return with_grads(state, slot, place, added), value
