"""AdamW as the report runs it: float32 weights and arithmetic, BF16 moments, decay of matrices only."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from dsjax.config import OptimizerConfig


class Moments(NamedTuple):
    """State of Adam."""

    count: Int[Array, ""]
    """Updates so far, int32."""
    first: PyTree
    """Decayed mean of the gradients."""
    second: PyTree
    """Decayed mean of their squares."""


def scale_by_adam(beta1: float, beta2: float, eps: float, moment_dtype: DTypeLike) -> optax.GradientTransformation:
    """Return Adam's preconditioning (arXiv 1412.6980) with both moments stored in `moment_dtype`, computed in float32.

    optax stores only the first moment in a format of choice.
    """

    def init(params: PyTree) -> Moments:
        def zeros() -> PyTree:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, moment_dtype), params)

        return Moments(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads: PyTree, state: Moments, params: PyTree | None = None) -> tuple[PyTree, Moments]:
        count = state.count + 1
        steps = count.astype(jnp.float32)
        first = jax.tree.map(lambda g, m: beta1 * m.astype(jnp.float32) + (1 - beta1) * g, grads, state.first)
        second = jax.tree.map(lambda g, v: beta2 * v.astype(jnp.float32) + (1 - beta2) * g * g, grads, state.second)

        def direction(m: Array, v: Array) -> Array:
            return m / (1 - beta1**steps) / (jnp.sqrt(v / (1 - beta2**steps)) + eps)

        def stored(moment: PyTree) -> PyTree:
            return jax.tree.map(lambda leaf: leaf.astype(moment_dtype), moment)

        return jax.tree.map(direction, first, second), Moments(count, stored(first), stored(second))

    return optax.GradientTransformation(init, update)


def initial_moments(params: PyTree, config: OptimizerConfig) -> Moments:
    """Return zero moments."""
    return _adam(config).init(params)


def apply(
    params: PyTree, moments: Moments, grads: PyTree, learning_rate: Float[Array, ""] | float, config: OptimizerConfig
) -> tuple[PyTree, Moments, Float[Array, ""]]:
    """Take one step of AdamW; return the parameters, the moments, and the norm of the gradients before clipping."""
    norm = optax.tree.norm(grads)
    if config.clip_norm:
        shrink = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-16))
        grads = jax.tree.map(lambda g: g * shrink, grads)
    updates, moments = _adam(config).update(grads, moments)

    def move(path: tuple, p: Array, update: Array) -> Array:
        decay = config.weight_decay if is_decayed(path) else 0.0
        return p - learning_rate * (update + decay * p)

    return jax.tree_util.tree_map_with_path(move, params, updates), moments, norm


def is_decayed(path: tuple) -> bool:
    """Return whether weight decay applies to the parameter at a path of the tree: to all but the gains of norms.

    By name, because the stacked layout gives vectors a second axis.
    """
    return not path[-1].key.endswith("norm")


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    dtype = jnp.bfloat16 if config.moment_dtype == "bf16" else jnp.float32
    return scale_by_adam(config.beta1, config.beta2, config.eps, dtype)
