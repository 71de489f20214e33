"""Redundant experts in programs: the right ones, evenly used, and the same answers."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redundancy import (
    ALL,
    DEVICES,
    EXCHANGES,
    MODEL,
    D,
    E,
    K,
    P,
    T,
    check_equal,
    inputs,
    loads_of,
    on_mesh,
    on_one_device,
    placement_for,
    skewed_routing,
    small_model,
    with_padding,
    without_redundancy,
)

from dsjax.inference.replicas import (
    exchange_over_replicas,
    exchange_with_shared,
    in_slots,
    loads_with_shared,
    shared_as_routed,
    slots_in_turn,
    tables_of,
)
from dsjax.model.context import Context
from dsjax.model.dispatch import exchange_locally
from dsjax.model.ffn import feed_forward
from dsjax.model.moe import RoutedExperts, moe
from dsjax.model.transformer import initial_parameters
from dsjax.numerics.weights import quantize_weights
from dsjax.parallel.mesh import EXPERT_AXES
from dsjax.parallel.placement import plan_placement
from dsjax.runtime import DEEPSEEK, Runtime

first_layer = functools.partial(jax.tree.map, lambda leaf: leaf[0])


@functools.cache
def program(inner):
    def on_device(x, weights, experts, indices, tables):
        exchange = exchange_over_replicas(EXCHANGES[inner], tables, EXPERT_AXES)
        return exchange(RoutedExperts(experts, Runtime()), x, indices, weights, E)[0]

    return on_mesh(on_device, (ALL, ALL, ALL, ALL, P()))


@pytest.mark.parametrize("inner", EXCHANGES)
@pytest.mark.parametrize("padding", [False, True], ids=["all real", "padding"])
def test_every_placement_gives_the_same(inner, padding):
    """One program for all of them: another placement of as many slots is another argument."""
    x, weights, experts = inputs()
    indices = with_padding(skewed_routing(0)) if padding else skewed_routing(0)
    expected = on_one_device(x, weights, first_layer(experts), indices)
    run = program(inner)
    before = run._cache_size()
    for placement in (placement_for(indices), placement_for(skewed_routing(5))):
        tables = tables_of(placement)
        held = first_layer(in_slots(experts, tables.experts))
        check_equal(run(x, weights, held, jnp.asarray(indices), first_layer(tables)), expected)
    assert run._cache_size() <= before + 1


def test_without_redundancy():
    x, weights, experts = inputs()
    indices, tables = skewed_routing(0), first_layer(tables_of(without_redundancy()))
    found = program("direct")(x, weights, first_layer(experts), jnp.asarray(indices), tables)
    check_equal(found, on_one_device(x, weights, first_layer(experts), indices))


def test_on_one_device():
    x, weights, experts = inputs()
    indices = skewed_routing(0)
    tables = jax.tree.map(jnp.asarray, first_layer(tables_of(placement_for(indices))))
    held = {name: w[0][tables.experts] for name, w in experts.items()}
    exchange = exchange_over_replicas(exchange_locally, tables)
    found, _ = exchange(RoutedExperts(held, Runtime()), x, jnp.asarray(indices), weights, E)
    check_equal(found, on_one_device(x, weights, first_layer(experts), indices))


@given(st.integers(0, 2**31 - 1), st.integers(0, 40), st.integers(1, 16))
def test_replicas_take_turns(seed, first, extra):
    """A choice's slot holds its expert, replicas differ by one token at most, and padding goes nowhere."""
    rng = np.random.default_rng(seed)
    slots = 16 + 8 * extra
    placement = plan_placement(rng.gamma(0.5, size=(1, E)), slots, DEVICES, policy="global")
    tables = first_layer(tables_of(placement))
    indices = with_padding(skewed_routing(seed, tokens=40), seed)
    found = np.asarray(slots_in_turn(jnp.asarray(indices), jax.tree.map(jnp.asarray, tables), first))
    np.testing.assert_array_equal(found == slots, indices == E)
    real = indices < E
    np.testing.assert_array_equal(tables.experts[found[real]], indices[real])
    tokens = np.bincount(found[real], minlength=slots)
    for expert, load in enumerate(loads_of(indices)[0]):
        share = tokens[tables.experts == expert]
        assert share.sum() == load
        assert share.max() - share.min() <= 1


def test_devices_begin_with_different_replicas():
    """One token per device and expert: together they must use all replicas, not the first of each alone."""
    placement = plan_placement(np.ones((1, E)), 32, DEVICES, policy="global")
    tables = jax.tree.map(jnp.asarray, first_layer(tables_of(placement)))
    indices = jnp.arange(E, dtype=jnp.int32)[:, None]
    found = np.concatenate([slots_in_turn(indices, tables, rank) for rank in range(DEVICES)]).ravel()
    np.testing.assert_array_equal(np.bincount(found, minlength=32), DEVICES * E // 32)


@functools.cache
def layer():
    """Parameters of one MoE layer, and a router bias that makes loads skewed."""
    params, _ = jax.jit(lambda: initial_parameters(MODEL, 0))()
    bias = -0.1 * jnp.arange(E, dtype=jnp.float32)
    return first_layer(params["moe"]["moe"]), Context(jnp.ones((1, 1)), jnp.ones((1, 1)), router_bias=bias)


@pytest.mark.parametrize("recipe", [None, DEEPSEEK], ids=["fp32", "fp8"])
@pytest.mark.parametrize("inner", EXCHANGES)
def test_the_shared_expert_as_a_routed_one(inner, recipe):
    params, ctx = layer()
    x = jax.random.normal(jax.random.key(3), (DEVICES, T, D))
    params = quantize_weights(params, recipe)
    expected, aux = moe(params, x, ctx, config=MODEL, runtime=Runtime())

    loads = loads_with_shared(np.asarray(aux.loads)[None], K)
    assert loads[0, E] == DEVICES * T
    placement = plan_placement(loads, 32, DEVICES, policy="global")
    assert placement.replicas[0, E] == placement.replicas.max() > 1
    tables = first_layer(tables_of(placement))
    routed = shared_as_routed(params, MODEL)
    if recipe is not None:  # tokens that travel have scales that are powers of two, and others have not
        with_ninth = Runtime(exchange=exchange_with_shared(exchange_locally))
        plain, (expected, _) = expected, moe(routed, x, ctx, config=MODEL, runtime=with_ninth)
        assert np.linalg.norm(plain - expected) < 0.05 * np.linalg.norm(plain)
    routed["experts"] = jax.tree.map(lambda leaf: leaf[tables.experts], routed["experts"])

    def on_device(experts, x, tables):
        exchange = exchange_with_shared(exchange_over_replicas(EXCHANGES[inner], tables, EXPERT_AXES))
        layer = {name: part for name, part in routed.items() if name != "experts"} | {"experts": experts}
        return moe(layer, x, ctx, config=MODEL, runtime=Runtime(exchange=exchange))[0]

    check_equal(on_mesh(on_device, (ALL, ALL, P()))(routed["experts"], x, tables), expected)


@pytest.mark.parametrize("inner", [*EXCHANGES, None])
def test_tokens_that_are_not_real(inner):
    """They change nothing for the others, count for no load, and get nothing from routed experts."""
    params, ctx = layer()
    x = jax.random.normal(jax.random.key(4), (DEVICES, T, D))
    real = jax.random.bernoulli(jax.random.key(5), 0.6, (DEVICES, T))
    full, _ = moe(params, x, ctx, config=MODEL, runtime=Runtime())
    _, aux = moe(params, x[real][None], ctx, config=MODEL, runtime=Runtime())
    assert aux.loads.sum() == K * real.sum()

    def on_device(experts, x, real):
        runtime = Runtime(exchange=EXCHANGES[inner] if inner else None)
        own = params | {"experts": experts}
        y, aux = moe(own, x, replace(ctx, real=real), config=MODEL, runtime=runtime)
        return y, jax.lax.psum(aux.loads, EXPERT_AXES) if inner else aux.loads

    run = on_mesh(on_device, (ALL, ALL, ALL), (ALL, P())) if inner else jax.jit(on_device)
    y, loads = run(params["experts"], x, real)
    check_equal(y[real], full[real])
    check_equal(y[~real], feed_forward(params["shared"], x[~real]))
    np.testing.assert_array_equal(loads, aux.loads)


def test_padding_has_no_shared_expert():
    seen = {}

    def inner(experts, x, indices, weights, num_experts):
        seen.update(indices=np.asarray(indices), weights=np.asarray(weights), num_experts=num_experts)
        return x, jnp.ones((), jnp.int32)

    indices = jnp.asarray([[2, 0, 5], [E, E, E]], jnp.int32)
    exchange_with_shared(inner)(None, jnp.zeros((2, D)), indices, jnp.full((2, K), 0.5), E)
    np.testing.assert_array_equal(seen["indices"], [[2, 0, 5, E], [E + 1] * 4])
    np.testing.assert_array_equal(seen["weights"], [[0.5, 0.5, 0.5, 1]] * 2)
    assert seen["num_experts"] == E + 1


def test_stacked_layers_become_routed_too():
    params, _ = jax.jit(lambda: initial_parameters(small_model(num_hidden_layers=3), 0))()
    stacked = params["moe"]["moe"]
    found = shared_as_routed(stacked, MODEL)
    assert "shared" not in found
    for name in ("gate_up", "down"):
        np.testing.assert_array_equal(found["experts"][name][:, :E], stacked["experts"][name])
        np.testing.assert_array_equal(found["experts"][name][:, E], stacked["shared"][name])


def test_what_cannot_be():
    with pytest.raises(ValueError, match="n_shared_experts = 2: should be 1"):
        shared_as_routed(layer()[0], small_model(n_shared_experts=2))
    with pytest.raises(ValueError, match="tables for 1 replicas of an expert: the placement has 3 of one"):
        tables_of(plan_placement(np.asarray([[9.0, 1.0]]), 4, 2), 1)
