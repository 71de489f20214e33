"""Linear maps in FP8: exact where tensors are representable, and close where they are not."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.attention import attention
from dsjax.numerics import linear as fp8
from dsjax.numerics.weights import quantize_weights
from dsjax.runtime import DEEPSEEK, MXFP8, Recipe

BLOCKS = Recipe(gradient_blocks=True)


def representable(rng, rows, columns):
    """Whole numbers of at most 14, with one of 14 in every tile of either direction: codes of scale 2^-5."""
    numbers = rng.integers(-14, 15, (rows, columns))
    numbers[np.arange(rows)[:, None] % 32 == np.arange(columns) % 32] = 14
    return jnp.asarray(numbers, jnp.float32)


def error(found, expected):
    return float(jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


@pytest.mark.parametrize("recipe", [DEEPSEEK, MXFP8, BLOCKS], ids=["1x128", "1x32", "gradients in blocks"])
@pytest.mark.parametrize("shape", [(40, 64, 96), (256, 300, 160)])
def test_products_of_representable_tensors_are_exact(recipe, shape):
    tokens, out, into = shape
    rng = np.random.default_rng(0)
    x, w, dy = representable(rng, tokens, into), representable(rng, out, into), representable(rng, tokens, out)
    y, transpose = jax.vjp(lambda x, w: fp8.linear(x, quantize_weights({"q_a": w}, recipe)["q_a"]), x, w)
    dx, dw = transpose(dy)
    np.testing.assert_array_equal(y, x @ w.T)
    np.testing.assert_array_equal(dx, dy @ w)
    np.testing.assert_array_equal(dw, dy.T @ x)


@pytest.mark.parametrize("recipe", [DEEPSEEK, MXFP8, BLOCKS], ids=["1x128", "1x32", "gradients in blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_others_are_close(recipe, dtype):
    """Three bits of mantissa round by 2 % on average, the errors of 300 products cancel; faces keep their types."""
    keys, shapes = jax.random.split(jax.random.key(0), 3), ((3, 50, 300), (200, 300), (3, 50, 200))
    x, w, dy = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))

    def both(linear):
        y, transpose = jax.vjp(linear, x, w)
        return y, *transpose(dy)

    found = both(lambda x, w: fp8.linear(x, quantize_weights({"o": w}, recipe)["o"]))
    wide = (a.astype(jnp.float32) for a in (x, w, dy))
    x, w, dy = wide
    for a, b in zip(found, both(lambda x, w: x @ w.T), strict=True):
        assert a.dtype == dtype
        assert error(a, b) < 0.05


def test_output_projection_reads_twelve_bits_back():
    """Of representable tensors E5M6 loses nothing; what is kept has 1.5 bytes a number."""
    rng = np.random.default_rng(1)
    x, w, dy = representable(rng, 40, 128), representable(rng, 64, 128), representable(rng, 40, 64)
    y, transpose = jax.vjp(lambda x, w: fp8.output_projection(x, quantize_weights({"o": w}, DEEPSEEK)["o"]), x, w)
    dx, dw = transpose(dy)
    np.testing.assert_array_equal(y, x @ w.T)
    np.testing.assert_array_equal(dx, dy @ w)
    np.testing.assert_array_equal(dw, dy.T @ x)
    words, scales = fp8.kept_in_12_bits(x, DEEPSEEK)
    assert words.nbytes == 1.5 * x.size and scales.shape == (40, 1)


@pytest.mark.parametrize("recipe", [DEEPSEEK, MXFP8], ids=["1x128", "1x32"])
def test_feed_forward(recipe):
    """Wider than a tile, and of columns of very different sizes, so that scales of a neighbour would show."""
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = jnp.exp2(jnp.arange(300) // 32 * 3.0 % 7)
    gate_up = jax.random.normal(keys[0], (2, 300, 160)) / 13 * jnp.stack([jnp.ones(300), sizes])[:, :, None]
    down = jax.random.normal(keys[1], (160, 300)) / 10
    x, dy = (jax.random.normal(key, (64, 160)) for key in keys[2:])

    def in_fp8(x, gate_up, down):
        weights = quantize_weights({"gate_up": gate_up, "down": down}, recipe)
        return fp8.feed_forward(x, weights["gate_up"], weights["down"])

    def plain(x, gate_up, down):
        return (jax.nn.silu(x @ gate_up[0].T) * (x @ gate_up[1].T)) @ down.T

    y, transpose = jax.vjp(in_fp8, x, gate_up, down)
    expected, expected_transpose = jax.vjp(plain, x, gate_up, down)
    # Three bits of mantissa cost a product of random numbers 3.7 %; here results of products are multiplied again.
    assert error(y, expected) < 0.08
    for found, gradient in zip(transpose(dy), expected_transpose(dy), strict=True):
        assert found.shape == gradient.shape
        assert error(found, gradient) < 0.12


def inputs_of_products(jaxpr, found):
    """Types that operands of matrix products have been converted from, through layout changes."""
    origin = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("convert_element_type", "reshape", "transpose", "slice", "dynamic_slice", "pad"):
            source = eqn.invars[0]
            origin[eqn.outvars[0]] = origin.get(source, getattr(source.aval, "dtype", None))
        if eqn.primitive.name == "dot_general":
            found.append(tuple(str(origin.get(v, v.aval.dtype)) for v in eqn.invars))
        for inner in jex.jaxprs_in_params(eqn.params):
            inputs_of_products(inner, found)
    return found


def test_all_three_products_have_operands_in_e4m3():
    x, w = jnp.ones((128, 128), jnp.bfloat16), jnp.ones((128, 128), jnp.bfloat16)

    def loss(x, w):
        return fp8.linear(x, quantize_weights({"q": w}, DEEPSEEK)["q"]).astype(jnp.float32).sum()

    products = inputs_of_products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, w).jaxpr, [])
    assert products == 3 * [("float8_e4m3fn", "float8_e4m3fn")]


def test_attention_is_the_same_with_its_projection_inside(small, small_parameters):
    """One unit keeps the output once, in 12 bits; apart it is kept by both. Forward they are equal to the bit."""
    from dsjax.model.context import context
    from dsjax.runtime import Runtime

    params = jax.tree.map(lambda leaf: leaf[0], small_parameters[0]["moe"]["attention"])
    quantized = quantize_weights(params, DEEPSEEK)
    x = jax.random.normal(jax.random.key(0), (2, 24, small.hidden_size))
    ctx = context(small, 24)
    results = []
    for impl in ("chunked", "plain"):
        runtime = Runtime(attention=impl)
        y, transpose = jax.vjp(lambda x, r=runtime: attention(quantized, x, ctx, config=small, runtime=r), x)
        results.append((y, *transpose(jnp.cos(x))))
    for one, other in zip(*results, strict=True):
        assert error(one, other) < 0.02
