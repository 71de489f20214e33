"""Moving experts: each to its slot to the bit, none before its layer's tables know, and never all of them at once."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redundancy import DEVICES, NODES, D, E, F, P, divided, inputs, mesh

from dsjax.inference.migrate import Migrator, pieces_of
from dsjax.inference.replicas import in_slots, tables_of
from dsjax.numerics.weights import quantize_weights
from dsjax.parallel.mesh import EXPERT_AXES
from dsjax.parallel.placement import migration, plan_placement
from dsjax.planning.hlo import collectives
from dsjax.runtime import DEEPSEEK

LAYERS, SLOTS = 2, 32
OF_SLOTS = P(None, EXPERT_AXES)


def placements(seed, slots=SLOTS, layers=LAYERS):
    """Two that have little to do with each other."""
    rng = np.random.default_rng(seed)
    loads = rng.gamma(0.5, size=(2, layers, E))
    return [plan_placement(some, slots, DEVICES, NODES, policy="global") for some in loads]


@given(st.integers(0, 2**31 - 1))
def test_pieces_bring_all_that_is_missing(seed):
    """Each device gives one expert and gets one, in so few pieces as the busiest device needs and hardly more."""
    current, planned = placements(seed, layers=1)
    source = migration(current, planned).source[0]
    per_device = SLOTS // DEVICES
    brought = {}
    pieces = pieces_of(source, DEVICES)
    for piece in pieces:
        for to in np.flatnonzero(piece.giver < DEVICES):
            slot = to * per_device + piece.place[to]
            assert slot not in brought
            brought[slot] = piece.giver[to] * per_device + piece.gives[piece.giver[to]]
    missing = np.flatnonzero(source // per_device != np.arange(SLOTS) // per_device)
    assert brought == {slot: source[slot] for slot in missing}
    gets = np.bincount(missing // per_device, minlength=DEVICES)
    gives = [len({source[slot] for slot in missing if source[slot] // per_device == d}) for d in range(DEVICES)]
    assert len(pieces) <= 2 * max(gets.max(), *gives)


def weights_of(placement, recipe):
    _, _, experts = inputs(layers=LAYERS)
    if recipe is not None:
        # Quantized as they are stored: without what gradients are of.
        experts = jax.tree.map(lambda leaf: leaf, quantize_weights(experts, recipe))
        experts = {name: weight.kept() for name, weight in experts.items()}
    held = in_slots(experts, placement.expert_of_slot)
    return divided(held, OF_SLOTS), held


def bits(tree):
    return [np.asarray(leaf).view(np.uint8) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("recipe", [None, DEEPSEEK], ids=["fp32", "fp8"])
def test_every_expert_arrives_to_the_bit(recipe):
    current, planned = placements(0)
    experts, _ = weights_of(current, recipe)
    moves, old, new = migration(current, planned), tables_of(current), tables_of(planned)
    migrator = Migrator(experts, mesh(), EXPERT_AXES)
    tables = migrator.on_devices(old)
    for layer in range(LAYERS):
        for piece in pieces_of(moves.source[layer], DEVICES):
            before = bits(experts)
            migrator.bring(experts, layer, piece)
            # Until the layer is settled, nothing has changed for those who use the weights.
            for a, b in zip(bits(experts), before, strict=True):
                np.testing.assert_array_equal(a, b)
        given_away = jax.tree.leaves(experts)
        row = jax.tree.map(lambda table, layer=layer: table[layer], new)
        experts, tables = migrator.settle(experts, tables, layer, moves.source[layer], row)
        assert all(leaf.is_deleted() for leaf in given_away)
        for found, want, was in zip(tables, new, old, strict=True):
            np.testing.assert_array_equal(found[: layer + 1], want[: layer + 1])
            np.testing.assert_array_equal(found[layer + 1 :], was[layer + 1 :])
    for a, b in zip(bits(experts), bits(weights_of(planned, recipe)[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert migrator.bring_program._cache_size() == migrator.settle_program._cache_size() == 1


def test_memory_and_traffic_are_those_of_few_experts():
    """No array with the experts of a whole layer, nor a second copy of a device's own, appears in either program."""
    current, planned = placements(0)
    experts, _ = weights_of(current, None)
    migrator = Migrator(experts, mesh(), EXPERT_AXES)
    source, tables = migration(current, planned).source[0], tables_of(planned)
    piece = pieces_of(source, DEVICES)[0]
    one = 4 * (2 * F * D + D * F)  # bytes of an expert
    own = SLOTS // DEVICES  # experts of a device in a layer

    bring = migrator.bring_program.lower(experts, migrator.room, np.int32(0), piece).compile()
    moves = collectives(bring.as_text())
    assert [move.kind for move in moves] == ["all-to-all"] * 2
    assert all(move.nbytes == one for move in moves)
    row = jax.tree.map(lambda table: table[0], tables)
    arrived, within = np.zeros(SLOTS, bool), np.arange(SLOTS, dtype=np.int32) % own
    arguments = experts, migrator.room, tables, np.int32(0), arrived, within, row
    settle = migrator.settle_program.lower(*arguments).compile()
    assert not collectives(settle.as_text())

    largest = max(math.prod(leaf.shape[2:]) for leaf in jax.tree.leaves(experts))
    for program, most in ((bring, 6 * one), (settle, 4 * own * one)):
        shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", program.as_text())]
        # A device's own weights are LAYERS x own experts, and there is nothing larger: SLOTS is four times as many.
        assert max(map(math.prod, shapes)) == LAYERS * own * largest < SLOTS * largest
        assert program.memory_analysis().temp_size_in_bytes <= most
    assert bring.memory_analysis().alias_size_in_bytes >= own * one
    assert settle.memory_analysis().alias_size_in_bytes >= LAYERS * own * one


def test_sizes_that_do_not_divide_by_the_devices():
    """An expert of 3 x 5 BF16 numbers is dealt out to eight devices."""
    current, planned = placements(1, slots=16)
    weights = jnp.arange(LAYERS * E * 15, dtype=jnp.float32).reshape(LAYERS, E, 3, 5).astype(jnp.bfloat16)
    experts = divided(in_slots(weights, current.expert_of_slot), OF_SLOTS)
    migrator = Migrator(experts, mesh(), EXPERT_AXES)
    tables, source = migrator.on_devices(tables_of(current)), migration(current, planned).source
    for layer in range(LAYERS):
        for piece in pieces_of(source[layer], DEVICES):
            migrator.bring(experts, layer, piece)
        row = jax.tree.map(lambda table, layer=layer: table[layer], tables_of(planned))
        experts, tables = migrator.settle(experts, tables, layer, source[layer], row)
    np.testing.assert_array_equal(experts, in_slots(weights, planned.expert_of_slot))
