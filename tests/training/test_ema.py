"""The host's moving average against the recursion, beside steps that take the memory of the weights it averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.training.ema import HostEma
from dsjax.training.step import Knobs

DECAY = 0.9


def test_average_of_donated_weights(start, train_step, tokens):
    """Each step writes over the weights that the average was just given; the average is that of all of them."""
    state = start()
    ema = HostEma(state.params, DECAY)
    want = jax.tree.map(np.float64, state.params)
    for _ in range(8):
        state, _ = train_step(state, tokens[None], Knobs(1e-2, 0.3, 1e-3))
        # A copy of our own, made before the average may see the weights.
        kept = jax.tree.map(jnp.copy, state.params)
        ema.update(state.params)
        want = jax.tree.map(lambda average, w: DECAY * average + (1 - DECAY) * np.float64(w), want, kept)
    got = ema.value()
    assert jax.tree.structure(got) == jax.tree.structure(state.params)
    for a, b, last in zip(*map(jax.tree.leaves, (got, want, kept)), strict=True):
        assert a.dtype == np.float32 and a.sharding.is_equivalent_to(last.sharding, a.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert np.abs(a - last).max() > 1e-4, "an average of weights that do not move shows nothing"


def weights(seed):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(300, 40)), jnp.float32),
        "b": {"c": jnp.asarray(rng.normal(size=3), jnp.float32)},
    }


def test_resumes_to_the_bit():
    whole = HostEma(weights(0), DECAY)
    for seed in range(1, 7):
        whole.update(weights(seed))
        if seed == 3:
            saved = whole.value()
    resumed = HostEma(saved, DECAY)
    for seed in range(4, 7):
        resumed.update(weights(seed))
    jax.tree.map(np.testing.assert_array_equal, resumed.value(), whole.value())


def test_values_are_copies():
    """Neither what the average began with nor what it returned follows it."""
    first = weights(0)
    ema = HostEma(first, DECAY)
    value = ema.value()
    kept = jax.tree.map(np.array, value)
    ema.update(weights(1))
    ema.update(weights(2))
    after = ema.value()
    jax.tree.map(np.testing.assert_array_equal, value, kept)
    jax.tree.map(np.testing.assert_array_equal, first, kept)
    assert not np.array_equal(after["a"], value["a"])


def test_an_error_of_the_thread_is_not_lost():
    ema = HostEma(weights(0), DECAY)
    ema.update({"a": weights(0)["a"], "b": {"c": jnp.ones(4)}})
    with pytest.raises(ValueError, match="broadcast"):
        ema.value()


@pytest.mark.parametrize("moved", [False, jnp.zeros((), bool)], ids=["host", "device"])
def test_a_skipped_step_leaves_the_average(moved):
    ema = HostEma(weights(0), DECAY)
    ema.update(weights(1))
    before = ema.value()
    ema.update(weights(2), moved)
    jax.tree.map(np.testing.assert_array_equal, ema.value(), before)
