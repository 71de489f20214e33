"""Weights in FP8 beside their masters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import SMALL

from dsjax.model.transformer import initial_parameters
from dsjax.numerics.weights import PRODUCTS, Fp8Weight, apart, quantize_weights, together
from dsjax.pallas.quantize.reference import dequantize
from dsjax.runtime import DEEPSEEK, MXFP8


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: initial_parameters(SMALL.model, 0))()[0]


def is_quantized(leaf):
    return isinstance(leaf, Fp8Weight)


@pytest.mark.parametrize("recipe", [DEEPSEEK, MXFP8], ids=["1x128", "1x32"])
def test_what_is_quantized_and_what_is_not(params, recipe):
    """All products of layers; not embedding, head, router, norms and MTP's projection (report section 3.3.1)."""
    quantized = quantize_weights(params, recipe)
    for path, leaf in jax.tree_util.tree_leaves_with_path(quantized, is_leaf=is_quantized):
        assert is_quantized(leaf) == (path[-1].key in PRODUCTS), path
        if is_quantized(leaf):
            assert leaf.codes.dtype == jnp.float8_e4m3fn and leaf.scales.dtype == jnp.float32
            matrix = leaf.master.reshape(leaf.codes.shape)
            for found, expected in (
                (leaf.forward, matrix),
                (leaf.backward(), matrix.swapaxes(-1, -2)),
            ):
                near = dequantize(*found, rows=recipe.weight_rows, tile=recipe.tile)
                largest = np.abs(expected).max()
                np.testing.assert_allclose(near, expected, rtol=2**-4, atol=largest * 2**-9)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert names - set(PRODUCTS) >= {"embed", "head", "router", "norm", "proj"}
    assert quantize_weights(params, None) is params


def test_apart_and_together(params):
    quantized = quantize_weights(params, DEEPSEEK)
    masters, rest = apart(quantized)
    assert jax.tree.structure(masters) == jax.tree.structure(params)
    again = together(masters, rest)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(again, is_leaf=is_quantized),
        jax.tree.leaves(quantized, is_leaf=is_quantized),
        strict=True,
    ):
        if is_quantized(a):
            np.testing.assert_array_equal(a.codes.view(jnp.uint8), b.codes.view(jnp.uint8))
            assert a.master.dtype == jnp.float32 and not a.master.any() and a.master.shape == b.master.shape
        else:
            np.testing.assert_array_equal(a, b, err_msg=str(path))
    # Without a recipe nothing is apart.
    masters, rest = apart(params)
    assert jax.tree.leaves(rest) == []
    jax.tree.map(np.testing.assert_array_equal, together(masters, rest), params)


def test_gradients_have_the_type_of_the_master():
    w = jnp.ones((2, 8, 16), jnp.bfloat16)
    weight = quantize_weights({"gate_up": w}, DEEPSEEK)["gate_up"]
    assert weight.codes.shape == (16, 16)
    gradient = weight.kept().gradient(jnp.ones((16, 16), jnp.float32))
    assert (gradient.master.shape, gradient.master.dtype, gradient.codes) == (w.shape, jnp.bfloat16, None)
    _, rest = apart({"gate_up": weight})
    assert rest["gate_up"].gradient(jnp.ones((16, 16), jnp.float32)).master.dtype == jnp.float32
