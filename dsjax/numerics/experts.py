"""Routed experts in FP8, with the exchange of tokens around them: one unit of differentiation.

Tokens are quantized before they are sent, once, and multiplied as they arrive; so are the gradients of results, which
take the same way (report section 3.3.2). Results, and gradients of tokens, travel in 16 bits. Scales of what is sent
are powers of two, because it is quantized again for the gradients of weights.
"""

import functools

import jax
from jaxtyping import Array, Float

from dsjax.numerics.quantized import (
    activated,
    activations,
    activations_transposed,
    dequantized,
    gradients,
    gradients_transposed,
    grouped_product,
    grouped_sum,
    regrouped,
    swiglu,
)
from dsjax.numerics.quantized import named as with_name
from dsjax.numerics.weights import Fp8Weight
from dsjax.pallas.quantize import api as quantizers
from dsjax.runtime import Courier, Plan

ALIGNMENT = 128
"""Of rows: tiles of 128 x 1 are of one expert."""


def routed_experts(
    courier: Courier,
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Fp8Weight,
    down: Fp8Weight,
    *,
    named: bool = True,
) -> tuple[Float[Array, "T D"], Plan]:
    """Take tokens to their experts and back; see `runtime.ExpertFunction`.

    Keeps the tokens as they arrived and the inputs of the SwiGLU, both in FP8.
    """
    return _routed(courier, x, weights, gate_up, down, named)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _routed(courier, x, weights, gate_up, down, named):
    return _forward(courier, x, weights, gate_up, down, named)[0]


def _forward(courier, x, weights, gate_up, down, named):
    recipe = gate_up.recipe

    def name(tree, what):
        return with_name(tree, what) if named else tree

    with jax.named_scope("dispatch"):
        plan, arrived, arrived_weights = courier.send(
            activations(x, recipe, power_of_two=True, of=gate_up.name), weights
        )
        plan, row_weights = name((plan, plan.expand_weights(arrived_weights)), "plan")
        arrived = name(arrived, "dispatched")
        rows = plan.expand(arrived)
    hidden = grouped_product(rows, gate_up.forward, plan.groups, recipe, x.dtype)
    kept = name(activations(hidden, recipe, of=down.name, role="kept"), "gate_up")
    products = swiglu(hidden, row_weights, recipe, of=down.name)
    results = grouped_product(products, down.forward, plan.groups, recipe, x.dtype)
    with jax.named_scope("combine"):
        y = plan.back(results)
    return (y, plan), (plan, arrived, row_weights, kept, gate_up.kept(), down.kept())


def _backward(named, residuals, cotangents):
    plan, arrived, row_weights, kept, gate_up, down = residuals
    dy, _ = cotangents
    recipe, groups = gate_up.recipe, plan.groups
    with jax.named_scope("combine"):
        d_results = plan.expand(plan.again(gradients(dy, recipe, power_of_two=True, of=down.name)))
    d_activated = grouped_product(d_results, down.backward(), groups, recipe, dy.dtype)
    hidden = dequantized(kept, recipe).astype(dy.dtype)
    d_hidden, d_row_weights = quantizers.swiglu_backward(hidden, row_weights, d_activated, **recipe.kernels)
    d_rows = grouped_product(gradients(d_hidden, recipe, of=gate_up.name), gate_up.backward(), groups, recipe, dy.dtype)
    with jax.named_scope("dispatch"):
        dx, d_weights = plan.back_with_weights(d_rows, d_row_weights)

    inputs = activations_transposed(activated(hidden, row_weights), recipe)
    d_down = grouped_sum(regrouped(d_results, recipe), inputs, groups, recipe)
    tokens = regrouped(arrived, recipe, plan.row_sources())
    d_gate_up = grouped_sum(gradients_transposed(d_hidden, recipe), tokens, groups, recipe)
    return None, dx, d_weights, gate_up.gradient(d_gate_up), down.gradient(d_down)


_routed.defvjp(_forward, _backward)
