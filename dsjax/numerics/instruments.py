"""What quantization does to tensors, measured where it happens.

with observed() as found:
    y = fp8.linear(x, w)
found  # {("q_a", "input"): Statistics(...)}

Inside, functions that are traced add the statistics of every tensor that they quantize to what they compute; the
caller returns them from the function that it compiles. Layers in a `lax.scan` cannot be observed.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsjax.pallas.quantize.reference import LARGEST

Role = Literal["weight", "input", "gradient", "kept"]
"""Operands of products, but gradients of weights, which have other tiles; and what is kept for the backward pass."""


class Statistics(NamedTuple):
    """Of a tensor and its quantized form."""

    amax: Float[Array, ""]
    """Largest magnitude."""
    error: Float[Array, ""]
    """Norm of the difference over the norm of the tensor."""
    underflow: Float[Array, ""]
    """Of the numbers that are not zero, the share that became zero."""
    saturation: Float[Array, ""]
    """Of the same, the share whose code is E4M3's largest: one per tile is as it should be."""


class Counts(NamedTuple):
    """How many numbers of a tensor met what fate, float32: of large models there are more than an int32 counts."""

    there: Float[Array, "*d"]
    """Not zero."""
    to_zero: Float[Array, "*d"]
    """Of these, those whose code is zero: too small beside the largest of their tile."""
    largest: Float[Array, "*d"]
    """Codes at E4M3's largest. A tile's scale brings its largest number there, and nothing beyond: one per tile is as
    it should be, and more are the mark of saturation."""
    not_finite: Float[Array, "*d"]
    """Codes that are NaN."""


Observations = dict[tuple[str, Role], Statistics]
"""By the name of a weight, and what the tensor is to it."""
_found: ContextVar[Observations | None] = ContextVar("found", default=None)


@contextlib.contextmanager
def observed() -> Iterator[Observations]:
    """Give what is quantized inside."""
    found: Observations = {}
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


def observe(name: str, role: Role, x: Float[Array, "..."], codes: Array, near: Float[Array, "..."]) -> None:
    """Take note of a tensor that is quantized, if somebody observes.

    Args:
        near: what the codes stand for.
    """
    found = _found.get()
    if found is None:
        return
    new = statistics(x, codes, near)
    # A weight that is used more than once, and several MTP modules, which share names: the worst of each.
    found[name, role] = Statistics(*map(jnp.maximum, new, found.get((name, role), new)))


def is_observed() -> bool:
    """Return whether somebody observes."""
    return _found.get() is not None


def counts(x: Float[Array, "*d"], codes: Array) -> Counts:
    """Return what became of a tensor's numbers, in one reading of both."""

    def count(what: Bool[Array, "*d"]) -> Float[Array, ""]:
        return what.sum(-1, dtype=jnp.int32).astype(jnp.float32).sum()

    # By the bits of E4M3 without the sign, for on a CPU its numbers are slow to read: 0 is 0, 126 is 448, 127 is NaN.
    there, bits = x != 0, jax.lax.bitcast_convert_type(codes, jnp.uint8) & 0x7F
    return Counts(count(there), count(there & (bits == 0)), count(bits == 0x7E), count(bits == 0x7F))


def statistics(x: Float[Array, "..."], codes: Array, near: Float[Array, "..."]) -> Statistics:
    """Return what became of a tensor."""
    x = x.astype(jnp.float32)
    there, size = x != 0, jnp.linalg.norm(x.ravel())
    count = jnp.maximum(there.sum(), 1)  # not the rows of padding
    return Statistics(
        amax=jnp.abs(x).max(),
        error=jnp.linalg.norm((near - x).ravel()) / jnp.maximum(size, jnp.finfo(jnp.float32).tiny),
        underflow=(there & (near == 0)).sum() / count,
        saturation=(jnp.abs(codes.astype(jnp.float32)) == LARGEST).sum() / count,
    )
