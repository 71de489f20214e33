"""The local exchange against a dense loop over experts, for routings that a trained router never makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experts import TanhExperts
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.model.dispatch import LocalCourier, combine, dispatch, exchange_locally, sort_by_expert

T, K, E, D, F = 24, 3, 8, 6, 5


def routing(kind):
    rng = np.random.default_rng(1)
    match kind:
        case "uniform":
            return np.stack([rng.permutation(E)[:K] for _ in range(T)])
        case "same experts for all":
            return np.tile([5, 0, 7], (T, 1))
        case "one expert for all, some of it twice":
            return np.full((T, K), 2)
        case "skewed":
            return np.stack(
                [rng.choice(E, K, replace=False, p=2.0 ** -np.arange(1, 9) / (1 - 2.0**-8)) for _ in range(T)]
            )


KINDS = ["uniform", "same experts for all", "one expert for all, some of it twice", "skewed"]


def check_plan(indices, plan, alignment):
    """Every choice has a row of its own, in its expert's range; the two maps are each other's inverse."""
    indices, rows = np.asarray(indices), np.asarray(plan.row_of_slot).reshape(-1)
    starts, padded = np.asarray(plan.groups.starts), np.asarray(plan.groups.padded_sizes)
    assert len(set(rows)) == rows.size
    assert np.all(starts % alignment == 0)
    expert = indices.reshape(-1)
    assert np.all((starts[expert] <= rows) & (rows < (starts + padded)[expert]))
    slot_of_row = np.full(plan.groups.rows, rows.size)
    slot_of_row[rows] = np.arange(rows.size)
    np.testing.assert_array_equal(plan.slot_of_row, slot_of_row)
    np.testing.assert_array_equal(plan.groups.sizes, np.bincount(expert, minlength=len(starts)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, E - 1), min_size=T * K, max_size=T * K))
def test_every_choice_gets_a_row(choices):
    indices = jnp.asarray(choices, jnp.int32).reshape(T, K)
    check_plan(indices, sort_by_expert(indices, E, 4), 4)


@pytest.mark.parametrize("alignment", [1, 4, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_plans(kind, alignment):
    indices = jnp.asarray(routing(kind), jnp.int32)
    check_plan(indices, sort_by_expert(indices, E, alignment), alignment)


@pytest.mark.parametrize("kind", KINDS)
def test_dispatch_and_combine_are_transposes(kind):
    rng = np.random.default_rng(2)
    courier = LocalCourier(jnp.asarray(routing(kind), jnp.int32), E, 4)
    x, weights = (jnp.asarray(rng.normal(size=(T, n)), jnp.float32) for n in (D, K))
    (x_there, w_there), back, plan = jax.vjp(
        lambda x, w: (dispatch(courier, x, w)[1:], dispatch(courier, x, w)[0]), x, weights, has_aux=True
    )
    rows, of_rows = (jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in (x_there, w_there))
    y, there = jax.vjp(lambda rows: combine(plan, rows), rows)
    np.testing.assert_allclose(jnp.vdot(x_there, rows), jnp.vdot(x, y), rtol=1e-4)
    dx, dweights = back((rows, of_rows))
    np.testing.assert_array_equal(dx, y)
    np.testing.assert_array_equal(there(x)[0], x_there)
    np.testing.assert_allclose(combine(plan, x_there), K * x, rtol=1e-6)
    np.testing.assert_allclose(jnp.vdot(w_there, of_rows), jnp.vdot(weights, dweights), rtol=1e-4)


def test_payloads_are_trees_of_any_type():
    courier = LocalCourier(jnp.asarray(routing("uniform"), jnp.int32), E, 4)
    payload = {"codes": jnp.arange(T * 2).reshape(T, 2), "scale": jnp.ones(T, jnp.bfloat16)}
    plan, arrived, _ = courier.send(payload, jnp.ones((T, K)))
    rows = plan.expand(arrived)
    assert rows["codes"].dtype == jnp.int32 and rows["scale"].dtype == jnp.bfloat16
    assert int(rows["codes"].sum()) == K * int(payload["codes"].sum())


def test_bfloat16_rows_are_summed_in_float32():
    """256 + 1 + 1 is 258 in float32; bfloat16 would lose both ones on the way."""
    plan = sort_by_expert(jnp.asarray([[0, 1, 2]], jnp.int32), 3, 1)
    rows = jnp.asarray([[256.0], [1.0], [1.0]], jnp.bfloat16)
    assert float(combine(plan, rows)[0, 0]) == 258.0


@pytest.mark.parametrize("kind", KINDS)
def test_experts_equal_a_dense_loop(kind):
    """Output and every gradient of a small expert network, against all experts on all tokens in float64."""
    rng = np.random.default_rng(3)
    indices = jnp.asarray(routing(kind), jnp.int32)
    x, weights = rng.normal(size=(T, D)), rng.uniform(0.1, 1, size=(T, K))
    up, down, dy = rng.normal(size=(E, F, D)), rng.normal(size=(E, D, F)), rng.normal(size=(T, D))

    def exchanged(x, weights, up, down):
        return exchange_locally(TanhExperts(up, down, alignment=4), x, indices, weights, E)[0]

    def dense(x, weights, up, down):
        chosen = jax.nn.one_hot(indices, E, dtype=x.dtype)
        all_experts = jnp.einsum("tef,edf->ted", jnp.tanh(jnp.einsum("td,efd->tef", x, up)), down)
        return jnp.einsum("ted,tke,tk->td", all_experts, chosen, weights)

    arguments = [np.asarray(a) for a in (x, weights, up, down)]
    y, transpose = jax.vjp(jax.jit(exchanged), *(jnp.asarray(a, jnp.float32) for a in arguments))
    got = y, *transpose(jnp.asarray(dy, jnp.float32))
    with jax.enable_x64(True):
        want_y, transpose = jax.vjp(dense, *(jnp.asarray(a, jnp.float64) for a in arguments))
        want = want_y, *transpose(jnp.asarray(dy, jnp.float64))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()) + 1e-6)


def test_too_many_choices():
    with pytest.raises(ValueError, match=r"below 2\^31"):
        jax.eval_shape(lambda i: sort_by_expert(i, 256, 128), jax.ShapeDtypeStruct((2**20, 8), jnp.int32))
