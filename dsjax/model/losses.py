"""Cross-entropy that never holds the logits of a whole micro-batch."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.model.layers import linear

PRODUCT_BYTES = 2**28
"""Of the head's gradient for a chunk of tokens, how much is made at once before it is added to that of others."""


def cross_entropy(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    weights: Float[Array, " T"],
    *,
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, " T"]]:
    """Return the weighted sum of -log softmax(head hidden)[target], float32, and each token's own, without weight.

    Float32 logits exist for `chunk` tokens at a time. Under differentiation the gradients are made in the same pass as
    the loss, so that no logits are kept or computed twice: three products instead of four. The losses of tokens have no
    gradient, and the head has one for all tokens: losses that have different weights in the end are one call.

    Args:
        weights: weight of each token's loss; 0 leaves the token out.
        chunk: tokens at a time.
    """
    tokens = hidden.shape[0]
    chunk = min(chunk, tokens)
    if padding := -tokens % chunk:
        hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
        targets, weights = jnp.pad(targets, (0, padding)), jnp.pad(weights, (0, padding))
    total, losses = _cross_entropy(hidden, head, targets, weights, chunk)
    return total, losses[:tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array]:
    def body(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        _, log_normalizer, target_logit = _logits(*part[:2], head)
        losses = log_normalizer - target_logit
        return total + jnp.sum(part[2] * losses), losses

    total, losses = _over_chunks(body, jnp.float32(0), (hidden, targets, weights), chunk)
    return total, losses.reshape(-1)


def _cross_entropy_forward(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int):
    def body(carry: tuple[Array, Array], part: tuple[Array, Array, Array]):
        total, d_head = carry
        part_hidden, part_targets, part_weights = part
        logits, log_normalizer, target_logit = _logits(part_hidden, part_targets, head)
        losses = log_normalizer - target_logit
        d_logits = jnp.exp(logits - log_normalizer[:, None]) - _one_hot(part_targets, head.shape[0])
        d_logits = (d_logits * part_weights[:, None]).astype(head.dtype)
        d_hidden = d_logits @ head
        d_head = _add_product(d_head, d_logits, part_hidden)
        return (total + jnp.sum(part_weights * losses), d_head), (d_hidden, losses)

    start = jnp.float32(0), jnp.zeros(head.shape, jnp.float32)
    (total, d_head), (d_hidden, losses) = _over_chunks(body, start, (hidden, targets, weights), chunk)
    losses = losses.reshape(-1)
    # Rounded now: XLA would keep it in float32 until somebody reads it, MTP modules' backward pass over.
    d_head, d_hidden = jax.lax.optimization_barrier((d_head.astype(head.dtype), d_hidden))
    return (total, losses), (d_hidden.reshape(hidden.shape), d_head, losses)


def _cross_entropy_backward(chunk: int, residuals: tuple[Array, Array, Array], cotangents: tuple[Array, Array]):
    (d_hidden, d_head, losses), (dy, _) = residuals, cotangents
    return d_hidden * dy.astype(d_hidden.dtype), d_head * dy.astype(d_head.dtype), None, losses * dy


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _add_product(d_head: Array, d_logits: Array, hidden: Array) -> Array:
    """Return d_head + d_logits^T hidden, in blocks of rows where it is large: the product is never there as a whole."""
    rows = next(r for r in _divisors(d_head.shape[0]) if r * d_head.shape[1] * 4 <= PRODUCT_BYTES)

    def add(d_head: Array, first: Array | int) -> tuple[Array, None]:
        part = jax.lax.dynamic_slice_in_dim(d_logits, first, rows, axis=1)
        product = jnp.einsum("tv,td->vd", part, hidden, preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_slice_in_dim(d_head, first, rows)
        return jax.lax.dynamic_update_slice_in_dim(d_head, before + product, first, axis=0), None

    if rows == d_head.shape[0]:
        return d_head + jnp.einsum("tv,td->vd", d_logits, hidden, preferred_element_type=jnp.float32)
    return jax.lax.scan(add, d_head, jnp.arange(0, d_head.shape[0], rows))[0]


def _divisors(n: int) -> list[int]:
    """Return the divisors of a number, the largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]


def _logits(hidden: Array, targets: Array, head: Array) -> tuple[Array, Array, Array]:
    """Return the float32 logits of a chunk, the logarithm of their normalizer, and the target's logit."""
    logits = linear(hidden, head).astype(jnp.float32)
    target_logit = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return logits, jax.nn.logsumexp(logits, axis=-1), target_logit


def _one_hot(targets: Array, width: int) -> Array:
    return (targets[:, None] == jnp.arange(width)).astype(jnp.float32)


def _over_chunks(body, start, parts: tuple[Array, ...], chunk: int):
    """Scan over chunks of tokens; a single chunk runs without a loop."""
    count = parts[0].shape[0] // chunk
    if count == 1:
        return body(start, parts)
    return jax.lax.scan(body, start, jax.tree.map(lambda p: p.reshape(count, chunk, *p.shape[1:]), parts))
