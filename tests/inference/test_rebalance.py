"""Placing experts anew while a model answers: the same answers at every step, and evener devices afterwards."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from redundancy import (
    ALL,
    DEVICES,
    EXCHANGES,
    NODES,
    D,
    E,
    P,
    check_equal,
    divided,
    inputs,
    mesh,
    on_mesh,
    on_one_device,
    skewed_routing,
    with_padding,
)

from dsjax.inference import rebalance
from dsjax.inference.balance import exchange_in_balance
from dsjax.inference.rebalance import LiveLoads, Rebalancer, RebalanceSettings
from dsjax.inference.replicas import exchange_over_replicas, in_slots
from dsjax.model.moe import RoutedExperts
from dsjax.model.router import expert_loads
from dsjax.parallel.mesh import EXPERT_AXES
from dsjax.parallel.placement import plan_placement
from dsjax.runtime import Runtime

LAYERS, SLOTS = 3, 32
QUICK = RebalanceSettings(steps=3, planning_steps=2, half_life=2.0, cost=0.0, policy="global")


def start(seed=0):
    return plan_placement(np.random.default_rng(seed).gamma(0.5, size=(LAYERS, E)), SLOTS, DEVICES, NODES)


def weights_for(placement):
    x, weights, experts = inputs(layers=LAYERS)
    return x, weights, experts, divided(in_slots(experts, placement.expert_of_slot), P(None, EXPERT_AXES))


def layers_program(exchange_of_layer):
    """Three MoE layers in a loop, each with its own routing; returns also the loads."""

    def on_device(x, weights, experts, indices, tables):
        def layer(x, scanned):
            experts, indices, tables = scanned
            exchange = exchange_of_layer(EXCHANGES["direct"], tables, EXPERT_AXES)
            y, _ = exchange(RoutedExperts(experts, Runtime()), x, indices, weights, E)
            return x + y / jnp.float32(D), jax.lax.psum(expert_loads(indices, E), EXPERT_AXES)

        return jax.lax.scan(layer, x, (experts, indices, tables))

    layered = P(None, EXPERT_AXES)
    return on_mesh(on_device, (ALL, ALL, layered, layered, P()), (ALL, P()))


def reference(x, weights, experts, indices):
    for layer in range(LAYERS):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], experts)
        x = x + on_one_device(x, weights, own, indices[layer]) / D
    return x


@pytest.mark.parametrize("exchange", [exchange_over_replicas, exchange_in_balance])
def test_answers_do_not_change_through_a_rebalance(exchange):
    placement = start()
    x, weights, experts, held = weights_for(placement)
    indices = np.stack([with_padding(skewed_routing(seed), seed) for seed in range(LAYERS)])
    expected = reference(x, weights, experts, indices)
    run = layers_program(exchange)
    rebalancer = Rebalancer(placement, held, mesh(), EXPERT_AXES, QUICK)
    counted = np.stack([np.bincount(layer.ravel(), minlength=E + 1)[:E] for layer in indices])
    first = placement.imbalance(counted)

    migrating, mixed = 0, 0
    for _ in range(60):
        found, loads = run(x, weights, held, jnp.asarray(indices), rebalancer.tables)
        check_equal(found, expected)
        np.testing.assert_array_equal(loads, counted)
        rebalancer.observe(np.asarray(loads))
        held = rebalancer.advance(held)
        migrating += rebalancer.is_migrating
        changed = (rebalancer.placement.expert_of_slot != placement.expert_of_slot).any(axis=1)
        mixed += 0 < changed.sum() < LAYERS
    rebalancer.close()
    assert migrating > LAYERS and mixed > 0 and rebalancer.moved > 0
    assert run._cache_size() == 1
    last = rebalancer.imbalance()
    np.testing.assert_allclose(last, rebalancer.placement.imbalance(counted))
    assert (last < first).all() and last.max() < 1.2 < 1.8 < first.min()
    np.testing.assert_array_equal(np.asarray(rebalancer.tables.experts), rebalancer.placement.expert_of_slot)


def followed(rebalancer, held, loads, steps):
    """What is moved at which step."""
    moved = []
    for _ in range(steps):
        rebalancer.observe(loads)
        held = rebalancer.advance(held)
        moved.append(rebalancer.moved)
    rebalancer.close()
    return np.diff([0, *moved])


def test_nothing_waits_for_the_plan(monkeypatch):
    """It is made in another thread; the step that takes it over is fixed beforehand, however long it took."""
    placement = start()
    *_, held = weights_for(placement)
    loads = np.random.default_rng(7).gamma(0.5, size=(LAYERS, E))
    threads, go, plan = [], threading.Event(), rebalance.plan_placement

    def slowly(*arguments, **options):
        threads.append(threading.current_thread())
        assert go.wait(60)
        return plan(*arguments, **options)

    monkeypatch.setattr(rebalance, "plan_placement", slowly)
    rebalancer = Rebalancer(placement, held, mesh(), EXPERT_AXES, QUICK)
    for _ in range(QUICK.steps + QUICK.planning_steps - 1):
        rebalancer.observe(loads)
        held = rebalancer.advance(held)
    assert not rebalancer.is_migrating and rebalancer.moved == 0
    go.set()
    held = rebalancer.advance(held)
    assert rebalancer.is_migrating
    assert threads and threads[0] is not threading.main_thread()
    rebalancer.close()


def test_the_same_steps_everywhere():
    """Two processes that see the same do the same: here two rebalancers, one of which is in a hurry."""
    placement = start()
    loads = np.random.default_rng(7).gamma(0.5, size=(LAYERS, E))
    found = []
    for _ in range(2):
        *_, held = weights_for(placement)
        rebalancer = Rebalancer(placement, held, mesh(), EXPERT_AXES, QUICK)
        found.append(followed(rebalancer, held, loads, 40))
    np.testing.assert_array_equal(*found)
    assert found[0].max() <= DEVICES  # one piece per step: at most one expert per device
    assert not found[0][: QUICK.steps + QUICK.planning_steps].any()


def test_a_cost_keeps_what_is_good_enough():
    placement = start()
    loads = np.random.default_rng(0).gamma(0.5, size=(LAYERS, E)) * 1.01
    *_, held = weights_for(placement)
    dear = RebalanceSettings(steps=3, planning_steps=1, half_life=1.0, cost=10.0, policy="global")
    assert not followed(Rebalancer(placement, held, mesh(), EXPERT_AXES, dear), held, loads, 20).any()


def test_nothing_seen_nothing_planned():
    placement = start()
    *_, held = weights_for(placement)
    assert not followed(Rebalancer(placement, held, mesh(), EXPERT_AXES, QUICK), held, np.zeros((LAYERS, E)), 20).any()


def test_seconds_and_steps_must_both_have_passed():
    placement, now = start(), [0.0]
    *_, held = weights_for(placement)
    settings = RebalanceSettings(steps=3, seconds=100, planning_steps=1, half_life=1.0, cost=0.0, policy="global")
    rebalancer = Rebalancer(placement, held, mesh(), EXPERT_AXES, settings, clock=lambda: now[0])
    rebalancer.observe(np.random.default_rng(7).gamma(0.5, size=(LAYERS, E)))
    for _ in range(10):
        held = rebalancer.advance(held)
    assert not rebalancer.is_migrating
    now[0] = 100.0
    for _ in range(2):
        held = rebalancer.advance(held)
    assert rebalancer.is_migrating
    rebalancer.close()


def test_the_average_forgets():
    live = LiveLoads(1, 2, half_life=1.0)
    for _ in range(30):
        live.add(np.asarray([[4, 0]]))
    np.testing.assert_allclose(live.average, [[4, 0]], atol=1e-6)
    live.add(np.asarray([[0, 4]]))
    np.testing.assert_allclose(live.average, [[2, 2]], atol=1e-6)
    with pytest.raises(ValueError, match=r"loads have shape \(1, 3\), should be \(1, 2\)"):
        live.add(np.asarray([[1, 2, 3]]))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="steps = 0: should be at least 1"):
        RebalanceSettings(steps=0)
    with pytest.raises(ValueError, match="half_life = 0: should be above 0 steps"):
        RebalanceSettings(half_life=0)
    other = plan_placement(np.ones((LAYERS, E)), SLOTS, 4)
    *_, held = weights_for(start())
    with pytest.raises(ValueError, match=r"the mesh has 8 devices along .*, the placement 4: should be the same"):
        Rebalancer(other, held, mesh(), EXPERT_AXES, QUICK)
