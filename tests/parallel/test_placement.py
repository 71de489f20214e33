"""Redundant experts: exactly EPLB's decisions, layer by layer and in loops, and laws for moves."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.benchmarks.placement import LAYERS, SETTINGS, SLOTS, draw_loads, eplb
from dsjax.parallel.placement import Placement, migration, plan_placement

README = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)


@st.composite
def problems(draw):
    """Loads and counts for `plan_placement`: many ties, zeros, real numbers, groups that divide and that do not."""
    nodes, per_node, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    experts, devices = groups * draw(st.integers(1, 4)), nodes * per_node
    fewest = -(-experts // devices)
    slots = devices * draw(st.integers(fewest, fewest + 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 4)), experts)
    match draw(st.sampled_from(["few values", "tokens", "gamma", "zero"])):
        case "few values":
            loads = rng.integers(0, 4, shape)
        case "tokens":
            loads = rng.integers(0, 100_000, shape)
        case "gamma":
            loads = rng.gamma(0.5, size=shape).astype(np.float32)
        case "zero":
            loads = np.zeros(shape)
    return loads, {"slots": slots, "devices": devices, "nodes": nodes, "groups": groups}


def counted(placement):
    """Replicas of each expert by a loop."""
    return [[list(row).count(e) for e in range(placement.experts)] for row in placement.expert_of_slot]


def objective(placement, current, loads, cost):
    """What `plan_placement` lowers, of each layer, from its definition."""
    per_device = placement.slots_per_device
    moved = [
        sum(e not in old[slot // per_device * per_device :][:per_device] for slot, e in enumerate(new))
        for old, new in zip(current.expert_of_slot.tolist(), placement.expert_of_slot.tolist(), strict=True)
    ]
    per_device_loads = placement.device_loads(loads)
    mean = per_device_loads.mean(axis=1)
    fullest = np.divide(per_device_loads.max(axis=1), mean, out=np.zeros_like(mean), where=mean > 0)
    return fullest + cost * np.array(moved)


def test_example_of_the_readme():
    plan = plan_placement(README, slots=16, devices=8, nodes=2, groups=4)
    assert plan.expert_of_slot.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert plan.replicas.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert plan.device_loads(README)[0].tolist() == [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]
    assert plan.slots_of_expert[0, :6].tolist() == [[12, -1], [13, 15], [11, -1], [6, -1], [5, 7], [0, 2]]
    assert plan.imbalance(README)[0] == 156 / (README[0].sum() / 8)


@settings(max_examples=300)
@given(problems())
def test_same_as_the_loops(problem):
    loads, counts = problem
    plan = plan_placement(loads, **counts)
    phy2log, logcnt = eplb(loads, number=np.float32, **counts)
    assert plan.expert_of_slot.tolist() == phy2log
    assert plan.replicas.tolist() == logcnt == counted(plan)


@pytest.mark.parametrize("name", SETTINGS)
def test_same_as_the_loops_at_full_size(name):
    """And within the balance that EPLB is known for."""
    options = SETTINGS[name]
    loads = draw_loads(0)[:6]
    plan = plan_placement(loads, SLOTS, **options)
    groups, nodes = (8, 4) if options["policy"] == "hierarchical" else (1, 1)
    phy2log, logcnt = eplb(loads, SLOTS, groups, nodes, options["devices"], number=np.float32)
    assert plan.expert_of_slot.tolist() == phy2log and plan.replicas.tolist() == logcnt
    over_seeds = [plan_placement(x, SLOTS, **options).imbalance(x).mean() for x in map(draw_loads, range(20))]
    assert np.mean(over_seeds) <= {"prefill_ep32": 1.08, "decode_ep144": 1.52}[name]


@given(problems())
def test_slots_of_expert_is_the_inverse(problem):
    loads, counts = problem
    plan = plan_placement(loads, **counts)
    for layer in range(plan.layers):
        for expert in range(plan.experts):
            slots = np.flatnonzero(plan.expert_of_slot[layer] == expert)
            row = plan.slots_of_expert[layer, expert].tolist()
            assert row == [*slots, *[-1] * (plan.replicas.max() - len(slots))]
    total = plan.device_loads(loads).sum(axis=1)
    np.testing.assert_allclose(total, loads.sum(axis=1, dtype=np.float64), rtol=1e-12)
    assert (plan.imbalance(loads) >= 1 - 1e-12).all()


@given(problems())
def test_hierarchical_keeps_groups_on_one_node(problem):
    loads, counts = problem
    groups, nodes = counts["groups"], counts["nodes"]
    if groups % nodes:
        with pytest.raises(ValueError, match=f"nodes = {nodes}: should divide the {groups} groups"):
            plan_placement(loads, **counts, policy="hierarchical")
        return
    current = plan_placement(loads, **counts, policy="hierarchical")
    plans = [current, plan_placement(loads, **counts, policy="hierarchical", refine=20)]
    plans.append(plan_placement(loads[:, ::-1], **counts, policy="hierarchical", current=current, cost=0.01))
    for plan in plans:
        group_of_slot = plan.expert_of_slot // (plan.experts // groups)
        for layer in group_of_slot.reshape(plan.layers, nodes, -1):
            on_node = [set(node) for node in layer.tolist()]
            assert sum(map(len, on_node)) == groups


@settings(max_examples=50)
@given(problems())
def test_refining_never_makes_it_worse(problem):
    loads, counts = problem
    plain = plan_placement(loads, **counts)
    refined = plan_placement(loads, **counts, refine=20)
    assert (refined.imbalance(loads) <= plain.imbalance(loads) + 1e-9).all()
    assert (refined.replicas >= 1).all()


def test_refining_helps_where_devices_have_few_slots():
    loads = draw_loads(0)[:8]
    plain, refined = (plan_placement(loads, 512, 256, refine=steps) for steps in (0, 100))
    assert refined.imbalance(loads).mean() < plain.imbalance(loads).mean() - 0.05


@settings(max_examples=100)
@given(problems())
def test_migration_is_a_gather_from_the_nearest_slot(problem):
    loads, counts = problem
    old, new = (plan_placement(x, **counts) for x in (loads, np.random.default_rng(0).permuted(loads, axis=1)))
    moves = migration(old, new)
    assert np.array_equal(np.take_along_axis(old.expert_of_slot, moves.source, axis=1), new.expert_of_slot)
    assert np.array_equal(moves.changed, old.expert_of_slot != new.expert_of_slot)
    for parts, crosses in ((old.devices, moves.between_devices), (old.nodes, moves.between_nodes)):
        size = old.slots // parts
        for layer, slot in np.ndindex(*crosses.shape):
            before = old.expert_of_slot[layer, slot // size * size :][:size]
            assert crosses[layer, slot] == (new.expert_of_slot[layer, slot] not in before)
    assert moves.bytes_between_devices(10) == 10 * moves.between_devices.sum()
    assert moves.bytes_between_nodes(10) == 10 * moves.between_nodes.sum() <= moves.bytes_between_devices(10)
    assert not migration(old, old).changed.any()


@settings(max_examples=100)
@given(problems(), st.integers(0, 2**32 - 1))
def test_renumbering_undoes_a_permutation(problem, seed):
    """Nodes, devices of a node and slots of a device in another order: nothing has to move, and no load changes."""
    loads, counts = problem
    plan = plan_placement(loads, **counts)
    rng = np.random.default_rng(seed)
    held = plan.expert_of_slot.reshape(plan.layers, plan.nodes, plan.devices // plan.nodes, -1)
    held = rng.permuted(held, axis=3)[:, rng.permutation(plan.nodes)][:, :, rng.permutation(held.shape[2])]
    current = Placement(held.reshape(plan.expert_of_slot.shape), plan.experts, plan.devices, plan.nodes)
    again = plan_placement(loads, **counts, current=current)
    assert not migration(current, again).between_devices.any()
    if (np.diff(np.sort(held, axis=3), axis=3) > 0).all():
        assert not migration(current, again).changed.any(), "unless a device holds an expert twice"


@settings(max_examples=100)
@given(problems(), st.floats(0, 1))
def test_without_cost_only_the_numbers_of_devices_change(problem, drift):
    loads, counts = problem
    current = plan_placement(loads, **counts)
    drifted = (1 - drift) * loads + drift * np.random.default_rng(0).permuted(loads, axis=1)
    plan, fresh = (plan_placement(drifted, **counts, current=c) for c in (current, None))
    nodes, devices = plan.nodes if counts["groups"] % plan.nodes == 0 else 1, plan.devices

    def contents(placement):
        held = placement.expert_of_slot.reshape(placement.layers, nodes, devices // nodes, -1).tolist()
        return [sorted(sorted(map(sorted, node)) for node in layer) for layer in held]

    assert contents(plan) == contents(fresh)
    assert migration(current, plan).between_devices.sum() <= migration(current, fresh).between_devices.sum()


@settings(max_examples=60)
@given(problems(), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_higher_costs_move_fewer_experts(problem, drift, seed):
    """And are never worse than to keep the placement, or to make a fresh one."""
    loads, counts = problem
    current = plan_placement(loads, **counts)
    drifted = (1 - drift) * loads + drift * np.random.default_rng(seed).permuted(loads, axis=1)
    fresh = plan_placement(drifted, **counts, current=current)
    moved = migration(current, fresh).between_devices.sum(axis=1)
    for cost in (1e-6, 1e-3, 0.01, 0.1, 1.0, 1e9):
        plan = plan_placement(drifted, **counts, current=current, cost=cost)
        value = objective(plan, current, drifted, cost)
        assert (value <= objective(current, current, drifted, cost) * (1 + 1e-12)).all()
        assert (value <= objective(fresh, current, drifted, cost) * (1 + 1e-12)).all()
        now = migration(current, plan).between_devices.sum(axis=1)
        assert (now <= moved).all()
        moved = now
    assert not moved.any()


@pytest.mark.parametrize("name", SETTINGS)
def test_few_moves_gain_most(name):
    """After a tenth of the load has changed, a tenth of EPLB's moves regain most of the balance."""
    options, loads = SETTINGS[name], draw_loads(0)
    current = plan_placement(loads, SLOTS, **options)
    drifted = 0.9 * loads + 0.1 * draw_loads(1)
    fresh, thrifty = (plan_placement(drifted, SLOTS, **options, current=current, cost=c) for c in (0, 1e-3))
    keep, best, reached = (p.imbalance(drifted).mean() for p in (current, fresh, thrifty))
    assert keep - reached > 0.75 * (keep - best)
    moved, all_moved = (migration(current, p).between_devices.sum() / LAYERS for p in (thrifty, fresh))
    assert moved < 0.1 * all_moved


def test_from_a_placement_of_another_policy():
    """Experts that are on several nodes now: kept at a high price, gathered at a low one."""
    loads = draw_loads(0)[:4]
    current = plan_placement(loads, SLOTS, 32, 4, 8, policy="global")
    kept = plan_placement(loads, SLOTS, 32, 4, 8, current=current, cost=1.0)
    assert not migration(current, kept).changed.any()
    free = plan_placement(loads, SLOTS, 32, 4, 8, current=current)
    assert np.allclose(
        np.sort(free.device_loads(loads)), np.sort(plan_placement(loads, SLOTS, 32, 4, 8).device_loads(loads))
    )


def test_layers_without_load_and_no_layers():
    loads = np.zeros((2, 8))
    plan = plan_placement(loads, 12, 4)
    assert plan.imbalance(loads).tolist() == [1, 1]
    assert not migration(plan, plan_placement(loads, 12, 4, current=plan, cost=0.1)).changed.any()
    none = plan_placement(np.zeros((0, 8)), 12, 4)
    assert none.slots_of_expert.shape == (0, 8, 1) and none.imbalance(np.zeros((0, 8))).shape == (0,)
    assert plan_placement(np.zeros((0, 8)), 12, 4, refine=5, current=none, cost=0.1).expert_of_slot.shape == (0, 12)


def test_placements_do_not_change():
    held = np.arange(4)[None]
    plan = Placement(held, experts=4, devices=2)
    held[:] = 0
    assert plan.expert_of_slot.tolist() == [[0, 1, 2, 3]] and plan.expert_of_slot.dtype == np.int32
    for array in (plan.expert_of_slot, plan.replicas, plan.slots_of_expert):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    with pytest.raises(FrozenInstanceError):
        plan.devices = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 14}, "slots = 14: should be a multiple of devices = 4"),
        ({"slots": 4}, "slots = 4: should be at least as many as the 8 experts"),
        ({"devices": 6, "nodes": 4}, "devices = 6: should be a multiple of nodes = 4"),
        ({"devices": 0}, "devices = 0: should be"),
        ({"nodes": 0}, "nodes = 0, both at least 1"),
        ({"groups": 3}, "groups = 3: should divide the 8 experts"),
        ({"groups": 0}, "groups = 0: should divide"),
        ({"groups": 1, "policy": "hierarchical"}, "nodes = 2: should divide the 1 groups"),
        ({"policy": "best"}, "policy = 'best': should be one of auto, hierarchical, global"),
        ({"loads": np.full((1, 8), -1.0)}, r"loads\[0, 0\] = -1.0: should be finite and at least 0"),
        ({"loads": np.array([[1.0] * 7 + [np.nan]])}, r"loads\[0, 7\] = nan: should be finite"),
        ({"loads": np.full((1, 8), np.inf)}, r"loads\[0, 0\] = inf: should be finite"),
        ({"loads": np.full((1, 8), 1e38)}, "a layer's sum is 8e.38, should be within float32"),
        ({"loads": np.ones((1, 0))}, r"loads: float64 of shape \(1, 0\), should be numbers \[layers, experts\]"),
        ({"refine": -1}, "refine = -1: should be 0 or more steps"),
        ({"cost": 0.1}, "cost = 0.1: should be 0 without a current placement"),
        ({"cost": -0.1}, "cost = -0.1: should be 0 or more"),
        ({"cost": float("nan")}, "cost = nan: should be 0 or more"),
        ({"current": Placement(np.arange(12)[None] % 8, 8, 2, 2)}, "has devices = 2, should be 4 as planned"),
        ({"current": Placement(np.arange(8)[None], 8, 4, 2)}, "has slots = 8, should be 12 as planned"),
    ],
)
def test_wrong_arguments(change, message):
    given = {"loads": np.ones((1, 8)), "slots": 12, "devices": 4, "nodes": 2, "groups": 4} | change
    with pytest.raises(ValueError, match=message):
        plan_placement(**given)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([[0, 1, 2, 4]], "holds expert 4, should be from 0 to 3"),
        ([[0, 1, -1, 3]], "holds expert -1, should be from 0 to 3"),
        ([[0, 1, 2, 3], [0, 1, 1, 3]], "expert 2 of layer 1 has no slot"),
        ([0, 1, 2, 3], r"int64 of shape \(4,\), should be integers \[layers, slots\]"),
        ([[0.0, 1.0, 2.0, 3.0]], "float64 of shape"),
        ([[0, 1, 2, 3, 0]], "slots = 5: should be a multiple of devices = 2"),
    ],
)
def test_wrong_placements(held, message):
    with pytest.raises(ValueError, match=message):
        Placement(np.array(held), experts=4, devices=2)


def test_loads_of_another_shape():
    with pytest.raises(ValueError, match=r"loads have shape \(2, 8\), should be \(1, 8\)"):
        plan_placement(np.ones((1, 8)), 12, 4).device_loads(np.ones((2, 8)))
