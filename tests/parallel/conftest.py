"""A small model whose experts divide over eight devices."""

import jax.numpy as jnp
import numpy as np
import pytest
from meshes import SMALL


@pytest.fixture(scope="package")
def run():
    return SMALL


@pytest.fixture(scope="package")
def micro_batches():
    """Tokens of a step, int32[2, 8, S + 1]."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 64, (2, 8, 17)), jnp.int32)
