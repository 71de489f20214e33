"""Experts of all layers in one row, beside a layer that has its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.inference.experts import apart, exchange_within_row
from dsjax.model.dispatch import exchange_locally
from dsjax.model.moe import RoutedExperts
from dsjax.numerics.weights import quantize_weights
from dsjax.runtime import DEEPSEEK, Runtime

LAYERS, EXPERTS, TOKENS, WIDTH, INNER = 3, 4, 6, 16, 8


def experts_of(params, form):
    return RoutedExperts(params, Runtime(grouped_matmul="auto" if form == "fp8" else form))


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("form", ["tiles", "batched", "ragged", "fp8"])
def test_a_layer_finds_its_experts_in_the_row(form, in_blocks):
    """Whatever multiplies; also where a choice is nobody's, and an expert of the layer has no token."""
    keys = jax.random.split(jax.random.key(0), 4)
    stacked = {
        "gate_up": jax.random.normal(keys[0], (LAYERS, EXPERTS, 2, INNER, WIDTH)),
        "down": jax.random.normal(keys[1], (LAYERS, EXPERTS, WIDTH, INNER)),
    }
    if form == "fp8":
        stacked = quantize_weights({"experts": stacked}, DEEPSEEK)["experts"]
        stacked = {name: weight.kept() for name, weight in stacked.items()}
    _, row = apart({"moe": {"experts": stacked}})
    x, weights = jax.random.normal(keys[2], (TOKENS, WIDTH)), jax.random.uniform(keys[3], (TOKENS, 2))
    indices = jnp.array([[0, 2], [2, 3], [3, 0], [0, EXPERTS], [2, 0], [EXPERTS, EXPERTS]])
    for layer in range(LAYERS):
        own = experts_of(jax.tree.map(lambda leaf, i=layer: leaf[i], stacked), form)
        expected, _ = exchange_locally(own, x, indices, weights, EXPERTS)
        exchange = exchange_within_row(exchange_locally, jnp.int32(layer), LAYERS, in_blocks=in_blocks)
        found, _ = jax.jit(lambda exchange=exchange: exchange(experts_of(row, form), x, indices, weights, EXPERTS))()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(expected[:-1]).max(axis=1).min() > 0 and not np.any(found[-1])
