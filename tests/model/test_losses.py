"""The chunked cross-entropy against the plain one, and what exists in memory while it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsjax.model import losses
from dsjax.model.losses import cross_entropy

T, D, V = 22, 8, 50


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=(n, D)), dtype) for n in (T, V))
    targets = jnp.asarray(rng.integers(0, V, T), jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 1, T) * (np.arange(T) % 5 > 0), jnp.float32)
    return hidden, head, targets, weights


def plain(hidden, head, targets, weights):
    logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32).T
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


@pytest.mark.parametrize("chunk, rows", [(1, V), (5, 10), (11, V), (16, 1), (22, 25), (1000, V)])
def test_chunks_equal_the_plain_loss(chunk, rows, monkeypatch):
    """Loss and gradients of hidden states, head and weights, whether the chunks divide the tokens or not.

    The gradient of the head is made by so many rows at a time.
    """
    monkeypatch.setattr(losses, "PRODUCT_BYTES", rows * D * 4)
    hidden, head, targets, weights = problem()

    def chunked(hidden, head, weights):
        return 3 * cross_entropy(hidden, head, targets, weights, chunk=chunk)[0]

    def reference(hidden, head, weights):
        return 3 * plain(hidden, head, targets, weights)

    np.testing.assert_allclose(chunked(hidden, head, weights), reference(hidden, head, weights), rtol=1e-6)
    value, grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1, 2)))(hidden, head, weights)
    want, want_grads = jax.value_and_grad(reference, argnums=(0, 1, 2))(hidden, head, weights)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for got, expected in zip(grads, want_grads, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(grads[0][weights == 0], 0)


def test_tokens_without_weight_do_not_count():
    hidden, head, targets, weights = problem()
    present = np.asarray(weights) > 0
    loss, of_tokens = cross_entropy(hidden, head, targets, weights, chunk=5)
    alone = cross_entropy(hidden[present], head, targets[present], weights[present], chunk=5)[0]
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(of_tokens * weights), loss, rtol=1e-6)


def test_large_logits_do_not_overflow():
    hidden, head, targets, weights = problem()
    (value, _), grad = jax.value_and_grad(cross_entropy, has_aux=True)(hidden * 1e4, head, targets, weights, chunk=5)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_bfloat16_has_float32_sums():
    """1024 equal tokens: the gradient of the head is their sum, which bfloat16 could not hold while adding."""
    hidden, head = jnp.ones((1024, 1), jnp.bfloat16), jnp.zeros((2, 1), jnp.bfloat16)
    targets, weights = jnp.zeros(1024, jnp.int32), jnp.full(1024, 2.0)
    (loss, _), grad = jax.value_and_grad(cross_entropy, argnums=1, has_aux=True)(
        hidden, head, targets, weights, chunk=1
    )
    assert loss.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, 2048 * np.log(2), rtol=1e-4)
    np.testing.assert_array_equal(np.asarray(grad, np.float32), [[-1024], [1024]])


def largest_intermediate(jaxpr):
    """Elements of the largest array that any equation makes, those of inner functions and loops too."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars]
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                sizes.append(largest_intermediate(inner))
    return max(sizes)


@pytest.mark.parametrize("differentiated", [False, True])
def test_logits_of_all_tokens_never_exist(differentiated):
    tokens, width, vocabulary, chunk = 4096, 4, 1000, 64
    function = jax.value_and_grad(cross_entropy, argnums=(0, 1), has_aux=True) if differentiated else cross_entropy
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, width), (vocabulary, width))]
    arguments += [jax.ShapeDtypeStruct((tokens,), kind) for kind in (jnp.int32, jnp.float32)]
    jaxpr = jax.make_jaxpr(lambda *a: function(*a, chunk=chunk))(*arguments).jaxpr
    assert largest_intermediate(jaxpr) == chunk * vocabulary
