"""AdamW against optax and against its equations; BF16 moments; what decays."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dsjax.config import OptimizerConfig
from dsjax.model.layout import stack
from dsjax.model.transformer import abstract_parameters
from dsjax.settings import load_model_config
from dsjax.training.optimizer import apply, initial_moments, is_decayed

CONFIG = OptimizerConfig(moment_dtype="fp32", clip_norm=1.0, weight_decay=0.1)
RATE = 0.01


def parameters():
    rng = np.random.default_rng(0)
    shapes = {"embed": (6, 4), "norm": (4,), "moe": {"router": (2, 3, 4), "attention_norm": (2, 4)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def gradients(steps, scale=1.0):
    """Gradients of some steps, of very different sizes."""
    rng = np.random.default_rng(1)
    like = parameters()
    for _ in range(steps):
        size = scale * 10.0 ** rng.integers(-3, 2)
        yield jax.tree.map(lambda p: jnp.asarray(size * rng.normal(size=p.shape), jnp.float32), like)  # noqa: B023


def run(config, grads, rate=RATE):
    params = parameters()
    moments = initial_moments(params, config)
    step = jax.jit(lambda p, m, g: apply(p, m, g, rate, config))
    norms = []
    for g in grads:
        params, moments, norm = step(params, moments, g)
        norms.append(norm)
    return params, moments, norms


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_equals_optax(clip_norm):
    config = replace(CONFIG, clip_norm=clip_norm)
    params, moments, norms = run(config, gradients(20))

    mask = {"embed": True, "norm": False, "moe": {"router": True, "attention_norm": False}}
    adamw = optax.adamw(RATE, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=0.1, mask=mask)
    theirs = optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw
    want = parameters()
    state = theirs.init(want)
    for g, norm in zip(gradients(20), norms, strict=True):
        np.testing.assert_allclose(norm, optax.tree.norm(g), rtol=1e-6)
        updates, state = jax.jit(theirs.update)(g, state, want)
        want = optax.apply_updates(want, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), params, want)
    assert moments.count == 20 and moments.count.dtype == jnp.int32


def test_bfloat16_moments_are_rounded_when_stored_and_only_then():
    """The equations in float64, with a rounding where the state is kept; the update uses moments before it."""
    config = replace(CONFIG, moment_dtype="bf16", clip_norm=0.0, weight_decay=0.0)
    params, moments, _ = run(config, gradients(10))
    p = np.float64(parameters()["embed"])
    m = v = np.zeros_like(p)
    for i, grads in enumerate(gradients(10), start=1):
        g = np.float64(grads["embed"])
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p -= RATE * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.95**i)) + 1e-8)
        m, v = (a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) for a in (m, v))
    np.testing.assert_allclose(params["embed"], p, rtol=1e-4, atol=1e-4)
    for stored, want in ((moments.first, m), (moments.second, v)):
        assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}
        # Float32 and float64 may fall on different sides of a rounding border, by one last place of bfloat16.
        np.testing.assert_allclose(np.float64(stored["embed"]), want, rtol=2**-7)
    # The first step of Adam moves every weight by the rate, unless the moments were rounded before they were used.
    first, *_ = run(config, gradients(1))
    np.testing.assert_allclose(np.abs(first["embed"] - parameters()["embed"]), RATE, rtol=1e-4)
    exact, *_ = run(replace(config, moment_dtype="fp32"), gradients(10))
    np.testing.assert_allclose(params["embed"], exact["embed"], atol=RATE / 10)
    assert not np.array_equal(params["embed"], exact["embed"])


def test_clipping_shrinks_gradients_to_the_norm():
    grads = next(gradients(1, scale=100.0))
    norm = float(optax.tree.norm(grads))
    assert norm > 10
    _, clipped, reported = run(CONFIG, [grads])
    np.testing.assert_allclose(reported[0], norm, rtol=1e-6)
    np.testing.assert_allclose(optax.tree.norm(clipped.first), 0.1, rtol=1e-5)
    _, whole, _ = run(replace(CONFIG, clip_norm=0.0), [grads])
    np.testing.assert_allclose(optax.tree.norm(whole.first), 0.1 * norm, rtol=1e-5)
    _, small, _ = run(replace(CONFIG, clip_norm=2 * norm), [grads])
    jax.tree.map(np.testing.assert_array_equal, small, whole)


def test_decay_is_decoupled_and_of_matrices_only():
    """Without gradients, matrices shrink by the rate times the decay and gains stay, stacked ones too."""
    zeros = jax.tree.map(jnp.zeros_like, parameters())
    params, *_ = run(CONFIG, [zeros, zeros])
    before = parameters()
    shrunk = (1 - RATE * 0.1) ** 2
    np.testing.assert_allclose(params["embed"], before["embed"] * shrunk, rtol=1e-6)
    np.testing.assert_allclose(params["moe"]["router"], before["moe"]["router"] * shrunk, rtol=1e-6)
    np.testing.assert_array_equal(params["norm"], before["norm"])
    np.testing.assert_array_equal(params["moe"]["attention_norm"], before["moe"]["attention_norm"])


@pytest.mark.parametrize("model", ["tiny", "v2_lite_16b", "v3_671b"])
def test_what_decays_is_what_is_no_vector(model):
    config = load_model_config(model)
    params, _ = abstract_parameters(config)
    decayed = {str(path) for path, leaf in jax.tree.leaves_with_path(params) if is_decayed(path)}
    assert decayed == {str(path) for path, leaf in jax.tree.leaves_with_path(params) if leaf.ndim > 1}
    stacked = {path[-1].key for path, _ in jax.tree.leaves_with_path(stack(params, config)) if is_decayed(path)}
    assert stacked == {path[-1].key for path, leaf in jax.tree.leaves_with_path(params) if leaf.ndim > 1}
