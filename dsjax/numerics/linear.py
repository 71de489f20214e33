"""Linear maps and feed-forward networks in FP8: three products each, all of E4M3, with faces in 16 or 32 bits.

    y = x w^T      x in 1 x 128, w in 128 x 128
    dx = dy w      dy in 1 x 128, w in 128 x 128
    dw = dy^T x    both in 128 x 1; the result is float32

Every function is one unit of differentiation, whose gradients of inputs and of weights are equations of their own, so
that a pipeline can put off the latter. docs/fp8.md has a table of what is kept in which format.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsjax.numerics.quantized import (
    activated,
    activations,
    activations_transposed,
    dequantized,
    gradients,
    gradients_transposed,
    named,
    product,
    swiglu,
)
from dsjax.numerics.weights import Fp8Weight
from dsjax.pallas.quantize import api as quantizers
from dsjax.runtime import Recipe


def linear(x: Float[Array, "*batch I"], w: Fp8Weight) -> Float[Array, "*batch O"]:
    """Return x w^T in the type of `x`. Keeps `x`, which is cheaply made again where a norm comes before."""
    return _linear(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _linear(x, w):
    return forward_product(x, w)


def _linear_backward(residuals, dy):
    x, w = residuals
    return input_gradient(dy, w), w.gradient(weight_gradient(dy, x, w))


_linear.defvjp(lambda x, w: (forward_product(x, w), (x, w.kept())), _linear_backward)


def output_projection(x: Float[Array, "*batch I"], w: Fp8Weight) -> Float[Array, "*batch O"]:
    """Return x w^T as `linear` does; keeps `x` in 12 bits (E5M6), for the backward pass of attention is not made
    again."""
    return _output_projection(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _output_projection(x, w):
    return forward_product(x, w)


def _output_projection_forward(x, w):
    return forward_product(x, w), (kept_in_12_bits(x, w.recipe), w.kept())


def _output_projection_backward(residuals, dy):
    packed, w = residuals
    x = from_12_bits(packed, dy.dtype, w.recipe)
    return input_gradient(dy, w), w.gradient(weight_gradient(dy, x, w))


_output_projection.defvjp(_output_projection_forward, _output_projection_backward)


def feed_forward(x: Float[Array, "*batch D"], gate_up: Fp8Weight, down: Fp8Weight) -> Float[Array, "*batch D"]:
    """Return down (silu(gate x) * up x) in the type of `x`. Keeps `x`, and the input of the SwiGLU in FP8."""
    return _feed_forward(x.reshape(-1, x.shape[-1]), gate_up, down).reshape(x.shape)


@jax.custom_vjp
def _feed_forward(x, gate_up, down):
    return _feed_forward_forward(x, gate_up, down)[0]


def _feed_forward_forward(x, gate_up, down):
    hidden = forward_product(x, gate_up)
    ones = jnp.ones(len(x), jnp.float32)
    y = product(
        swiglu(hidden, ones, down.recipe, of=down.name),
        down.forward,
        down.recipe,
        x.dtype,
        b_rows=down.recipe.weight_rows,
    )
    kept = named(activations(hidden, gate_up.recipe, of=down.name, role="kept"), "gate_up")
    return y, (x, kept, gate_up.kept(), down.kept())


def _feed_forward_backward(residuals, dy):
    x, kept, gate_up, down = residuals
    hidden = dequantized(kept, gate_up.recipe).astype(dy.dtype)
    ones = jnp.ones(len(x), jnp.float32)
    d_hidden, _ = quantizers.swiglu_backward(hidden, ones, input_gradient(dy, down), **down.recipe.kernels)
    return (
        input_gradient(d_hidden, gate_up),
        gate_up.gradient(weight_gradient(d_hidden, x, gate_up)),
        down.gradient(weight_gradient(dy, activated(hidden, ones), down)),
    )


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)


def kept_in_12_bits(x: Float[Array, "M I"], recipe: Recipe) -> tuple[Array, Array]:
    """Return what a backward pass keeps of the output of attention, under its name."""
    return named(quantizers.pack_e5m6(x, **recipe.kernels), "attention_out")


def from_12_bits(packed: tuple[Array, Array], dtype: DTypeLike, recipe: Recipe) -> Float[Array, "M I"]:
    """Return what `kept_in_12_bits` kept."""
    return quantizers.unpack_e5m6(*packed, dtype=dtype, **recipe.kernels)


def forward_product(x: Float[Array, "M I"], w: Fp8Weight) -> Float[Array, "M O"]:
    """Return x w^T in the type of `x`; not differentiable, as the two below."""
    return product(activations(x, w.recipe, of=w.name), w.forward, w.recipe, x.dtype, b_rows=w.recipe.weight_rows)


def input_gradient(dy: Float[Array, "M O"], w: Fp8Weight) -> Float[Array, "M I"]:
    """Return dy w in the type of `dy`."""
    return product(gradients(dy, w.recipe, of=w.name), w.backward(), w.recipe, dy.dtype, b_rows=w.recipe.weight_rows)


def weight_gradient(dy: Float[Array, "M O"], x: Float[Array, "M I"], w: Fp8Weight) -> Float[Array, "O I"]:
    """Return dy^T x, float32."""
    dy_t, x_t = gradients_transposed(dy, w.recipe), activations_transposed(x, w.recipe)
    return product(dy_t, x_t, w.recipe, jnp.float32, b_rows=1)
