"""The small parts of a layer against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.layers import rms_norm

EPS = 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (3, 5, 64)])
def test_rms_norm_and_its_gradients(shape, dtype):
    """Against the definition and its differences, in float64. Its backward pass keeps x, and a number for every row."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=shape) * 3, dtype) for _ in "xy")
    gain = jnp.asarray(rng.normal(size=64), jnp.float32)

    def defined(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * gain

    def along(vary, direction, step=1e-5):
        """The derivative of <y, dy> in a direction."""
        ends = [(defined(*vary(sign * step * direction)) * np.float64(dy)).sum() for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)

    y, vjp = jax.vjp(lambda x, gain: rms_norm(x, gain, EPS), x, gain)
    dx, d_gain = (np.float64(d) for d in vjp(dy))
    x64, gain64 = np.float64(x), np.float64(gain)
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-8
    assert y.dtype == dtype
    np.testing.assert_allclose(np.float64(y), defined(x64, gain64), rtol=tolerance)
    for direction in rng.normal(size=(4, *shape)):
        expected = along(lambda d: (x64 + d, gain64), direction)
        np.testing.assert_allclose((dx * direction).sum(), expected, atol=tolerance * np.abs(dx * direction).sum())
    for direction in rng.normal(size=(4, 64)):
        expected = along(lambda d: (x64, gain64 + d), direction)
        np.testing.assert_allclose((d_gain * direction).sum(), expected, rtol=1e-5)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) == x.nbytes + gain.nbytes + 4 * x.size // 64
