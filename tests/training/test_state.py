"""The state and its canonical form."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.training.state import abstract_state, from_canonical, initial_state, to_canonical


def test_canonical_form_and_back(start, small_run):
    state = start()
    canonical = to_canonical(state, small_run)
    assert set(canonical["params"]["layers"]) == {"0", "1", "2"} and set(canonical["params"]["mtp"]) == {"0"}
    assert set(canonical["moments"]) == {"count", "first", "second"}
    assert jax.tree.structure(canonical["moments"]["first"]) == jax.tree.structure(canonical["params"])
    again = from_canonical(canonical, small_run)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_abstract_state_is_that_of_the_real_one(start, small_run):
    def check(abstract, real):
        assert (abstract.shape, abstract.dtype) == (real.shape, real.dtype)
        assert abstract.sharding.is_equivalent_to(real.sharding, real.ndim)

    jax.tree.map(check, abstract_state(small_run), to_canonical(start(), small_run))


def test_seed_makes_the_state(start, small_run):
    """The same one every time; counters and moments begin at zero."""
    state, again = start(), initial_state(small_run)
    jax.tree.map(np.testing.assert_array_equal, state, again)
    counters = (state.step, state.skipped, state.skipped_in_a_row, state.moments.count)
    assert all(counter == 0 and counter.dtype == jnp.int32 for counter in counters)
    assert not any(leaf.any() for leaf in jax.tree.leaves((state.moments, state.biases)))
