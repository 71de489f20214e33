"""The small parts that every layer is made of: weights, linear maps, RMSNorm, SwiGLU."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from dsjax.config import ModelConfig
from dsjax.numerics import linear as fp8
from dsjax.numerics.weights import Fp8Weight


class RouterBias(nnx.Variable):
    """Bias of a router: steered by the loads (report section 2.1.2), never by a gradient."""


def weight(config: ModelConfig, rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """Return a float32 weight drawn with standard deviation `initializer_range`; matrices are [out, in]."""
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32))


def embedding(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Param:
    """Return the float32 embedding, [V, D]."""
    std = config.embedding_initializer_range or config.initializer_range
    return nnx.Param(std * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32))


def norm_weight(width: int) -> nnx.Param:
    """Return the gain of an RMSNorm, at 1."""
    return nnx.Param(jnp.ones(width, jnp.float32))


def embedded(table: Float[Array, "V D"], tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Return the embeddings of tokens.

    Behind a barrier: XLA would look them up anew wherever they are read, and keep a table that was gathered for this.
    """
    return jax.lax.optimization_barrier(table[tokens])


def linear(x: Float[Array, "*batch I"], w: Float[Array, "O I"] | Fp8Weight) -> Float[Array, "*batch O"]:
    """Return x w^T, in x's format."""
    if isinstance(w, Fp8Weight):
        return fp8.linear(x, w)
    return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*batch D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """Return x over its root mean square, times `gain`; computed in float32, returned in x's format.

    The backward pass has of it x and the root mean square. JAX's own would keep float32 products of both.
    """
    return _rms_norm_forward(x, gain, eps)[0]


def _rms_norm_forward(x: Array, gain: Array, eps: float) -> tuple[Array, tuple[Array, Array, Array]]:
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * gain).astype(x.dtype), (x, gain, inverse_rms)


def _rms_norm_backward(eps: float, kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array]:
    x, gain, inverse_rms = kept
    normalized, dy = x.astype(jnp.float32) * inverse_rms, dy.astype(jnp.float32)
    d_normalized = dy * gain
    along = jnp.mean(d_normalized * normalized, axis=-1, keepdims=True)  # leaves the root mean square as it is
    d_gain = jnp.sum(dy * normalized, axis=range(dy.ndim - 1))
    return ((d_normalized - along * normalized) * inverse_rms).astype(x.dtype), d_gain.astype(gain.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def swiglu(gate_up: Float[Array, "*batch F2"]) -> Float[Array, "*batch F"]:
    """Return silu(gate) * up of a [gate | up] pair, in its format."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def gate_up_matrix(w: Float[Array, "*experts 2 F D"]) -> Float[Array, "*experts F2 D"]:
    """Return the pair of gate and up weights as the one matrix that a single product multiplies by."""
    *experts, two, width, hidden = w.shape
    return w.reshape(*experts, two * width, hidden)


KEPT_IN_FLOAT32 = ("norm", "router")
"""Endings of the names of parameters that are used in float32 whatever the compute format: gains and router weights."""


def cast_weights(params: PyTree, dtype: DTypeLike) -> PyTree:
    """Cast the weights of matrix products to `dtype`; gains and router weights stay float32 (report section 3.3.1)."""

    def cast(path: tuple, leaf: Array) -> Array:
        return leaf if path[-1].key.endswith(KEPT_IN_FLOAT32) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
