"""The routers of V3 and V2 against loops over tokens, groups and experts; loads, biases and the balance loss."""

from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import ModelConfig
from dsjax.model.router import add_loss, expert_loads, route, sequence_balance_loss, updated_bias

E, D = 16, 16
V3 = ModelConfig(
    name="router of V3",
    vocab_size=8,
    hidden_size=D,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    intermediate_size=8,
    moe_intermediate_size=8,
    num_attention_heads=1,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=E,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
V2 = replace(
    V3,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
)
LITE = replace(V2, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)
CONFIGS = {"v3": V3, "v3 without groups": replace(V3, n_group=1, topk_group=1), "v2": V2, "v2-lite": LITE}


def best(values, count):
    """Positions of the largest values, largest first, the lower position where they are equal."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def routed_by_loops(logits, bias, config):
    """Choose experts for each token: the definition, one token and one group at a time."""
    all_indices, all_weights = [], []
    for row in np.asarray(logits, np.float64):
        if config.scoring_func == "sigmoid":
            scores = 1 / (1 + np.exp(-row))
        else:
            scores = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        choice = scores if bias is None else scores + np.asarray(bias, np.float64)
        groups = np.split(np.arange(E), config.n_group)
        counted = 2 if config.topk_method == "noaux_tc" else 1
        group_scores = [sum(sorted(choice[group])[-counted:]) for group in groups]
        allowed = np.concatenate([groups[g] for g in best(group_scores, config.topk_group)])
        indices = best([choice[e] if e in allowed else -np.inf for e in range(E)], config.num_experts_per_tok)
        weights = scores[indices]
        if config.norm_topk_prob:
            weights = weights / weights.sum()
        all_indices.append(indices)
        all_weights.append(weights * config.routed_scaling_factor)
    return np.array(all_indices), np.array(all_weights)


def route_logits(logits, bias, config):
    """Route tokens whose router logits are given."""
    bias = None if bias is None else jnp.asarray(bias, jnp.float32)
    return jax.jit(route, static_argnums=3)(jnp.eye(E, D), bias, jnp.asarray(logits, jnp.float32), config)


def check(logits, bias, config):
    routing = route_logits(logits, bias, config)
    indices, weights = routed_by_loops(logits, bias, config)
    np.testing.assert_array_equal(routing.indices, indices)
    np.testing.assert_allclose(routing.weights, weights, rtol=2e-6)
    assert routing.weights.dtype == routing.scores.dtype == jnp.float32
    return routing


@pytest.mark.parametrize("name", CONFIGS)
def test_route_equals_loops(name):
    rng = np.random.default_rng(0)
    config = CONFIGS[name]
    bias = 0.3 * rng.normal(size=E) if config.topk_method == "noaux_tc" else None
    routing = check(rng.normal(size=(200, E)), bias, config)
    if config.norm_topk_prob:
        np.testing.assert_allclose(routing.weights.sum(-1), 2.5, rtol=1e-6)
    if config.n_group > 1:
        groups = [len(set(row // 4)) for row in np.asarray(routing.indices)]
        assert max(groups) == config.topk_group, "a token uses experts of too many groups"


@pytest.mark.parametrize("name", CONFIGS)
def test_ties_go_to_the_lower_index(name):
    """All equal; two values only, exact in any format; and equal groups."""
    rng = np.random.default_rng(1)
    config = CONFIGS[name]
    bias = np.zeros(E) if config.topk_method == "noaux_tc" else None
    np.testing.assert_array_equal(check(np.zeros((1, E)), bias, config).indices[0], np.arange(4))
    check(rng.integers(0, 2, size=(100, E)).astype(float), bias, config)
    check(np.tile(rng.normal(size=(50, E // 4)), (1, 4)), bias, config)


def test_experts_of_other_groups_lose_even_against_negative_scores():
    """With a mask of zeros in place of -inf, biased scores below zero would lose against forbidden experts."""
    rng = np.random.default_rng(2)
    bias = rng.normal(size=E) - 5
    routing = check(rng.normal(size=(100, E)), bias, V3)
    assert float((routing.scores + bias).max()) < 0


def test_a_group_counts_as_much_as_its_two_best():
    """Group 0 has the best expert, groups 2 and 3 the best pairs; V2, whose groups count by one expert, takes 0."""
    logits = np.full((1, E), -4.0)
    logits[0, [0, 8, 9, 12, 13]] = [3.0, 2.0, 1.9, 2.1, 1.8]
    assert set(np.asarray(check(logits, np.zeros(E), V3).indices)[0] // 4) == {2, 3}
    assert set(np.asarray(check(logits, None, V2).indices)[0] // 4) == {0, 3}


def test_bias_chooses_but_does_not_weigh():
    rng = np.random.default_rng(3)
    logits, bias = rng.normal(size=(20, E)), np.where(np.arange(E) % 4 == 0, 10.0, 0.0)
    routing = check(logits, bias, V3)
    assert (np.asarray(routing.indices)[:, :2] % 4 == 0).all()
    assert float(routing.weights.max()) <= 2.5

    def weights_of(bias):
        return route(jnp.eye(E, D), bias, jnp.asarray(logits, jnp.float32), V3).weights.sum(0)[0]

    np.testing.assert_array_equal(jax.grad(weights_of)(jnp.asarray(bias, jnp.float32)), 0)


def test_router_is_float32_whatever_comes_in():
    """In bfloat16 these two logits would be equal, and the tie would go to expert 0."""
    x = jnp.asarray(np.eye(1, D), jnp.bfloat16)
    router = jnp.zeros((E, D)).at[0, 0].set(1.0).at[1, 0].set(1.001)
    assert route(router, jnp.zeros(E), x, V3).indices[0, 0] == 1


def test_loads_are_counts():
    rng = np.random.default_rng(4)
    indices = np.array([rng.permutation(E)[:4] for _ in range(1000)])
    loads = expert_loads(jnp.asarray(indices), E)
    assert loads.dtype == jnp.int32
    np.testing.assert_array_equal(loads, np.bincount(indices.ravel(), minlength=E))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=E, max_size=E), st.sampled_from([(1, 0), (2**24, 1), (2**24, 2)]))
def test_bias_moves_by_the_sign_of_the_load(counts, large):
    """Also for the loads of a large step, which float32 would round; equal to the mean means exactly equal."""
    loads = [count * large[0] + large[1] * (e % 2) for e, count in enumerate(counts)]
    mean = Fraction(sum(loads), E)
    bias = np.linspace(-1, 1, E).astype(np.float32)
    signs = np.array([(load > mean) - (load < mean) for load in loads], np.float32)
    moved = updated_bias(jnp.asarray(bias), jnp.asarray(loads, jnp.int32), 0.001)
    np.testing.assert_array_equal(moved, bias - np.float32(0.001) * signs)


def test_bias_stays_where_the_load_is_the_mean():
    loads = jnp.asarray([[1, 2, 3], [7, 7, 7], [0, 0, 1]], jnp.int32)
    moved = updated_bias(jnp.zeros((3, 3)), loads, 0.5)
    np.testing.assert_array_equal(moved, [[0.5, 0, -0.5], [0, 0, 0], [0.5, 0.5, -0.5]])


def balance_by_loops(scores, config):
    """Report equations 17 to 20 without alpha, one sequence and one expert at a time."""
    per_sequence = []
    for sequence in np.asarray(scores, np.float64):
        length = len(sequence)
        chosen = [best(list(row), config.num_experts_per_tok) for row in sequence]
        total = 0.0
        for e in range(E):
            f = E / (config.num_experts_per_tok * length) * sum(e in row for row in chosen)
            p = sum(row[e] / row.sum() for row in sequence) / length
            total += f * p
        per_sequence.append(total)
    return np.mean(per_sequence)


@pytest.mark.parametrize("name", ["v3", "v2"])
def test_balance_loss_is_the_reports(name):
    rng = np.random.default_rng(5)
    scores = jax.nn.sigmoid(jnp.asarray(rng.normal(size=(3, 11, E)) + np.linspace(-1, 1, E), jnp.float32))
    loss = sequence_balance_loss(scores, CONFIGS[name])
    np.testing.assert_allclose(loss, balance_by_loops(scores, CONFIGS[name]), rtol=1e-6)
    even = sequence_balance_loss(jnp.ones((2, 11, E)), CONFIGS[name])
    np.testing.assert_allclose(even, 1.0, rtol=1e-6)


def test_added_loss_has_the_gradient_of_the_weighted_sum():
    rng = np.random.default_rng(6)
    logits = jnp.asarray(rng.normal(size=(2, 9, E)), jnp.float32)
    alpha = jnp.float32(0.37)

    def objective(y):
        return jnp.sum(jnp.sin(y) * y)

    def balance(logits):
        return sequence_balance_loss(jax.nn.sigmoid(logits), V3)

    value, got = jax.value_and_grad(lambda x: objective(add_loss(x * 2, balance(x), alpha)))(logits)
    want = jax.grad(lambda x: objective(x * 2) + alpha * balance(x))(logits)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert value == objective(logits * 2)
    assert np.abs(got - jax.grad(lambda x: objective(x * 2))(logits)).max() > 1e-4, "the loss has no gradient"
