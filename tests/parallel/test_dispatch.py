"""Dispatch and combine over a mesh: transposes of each other, for payloads of any kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.config import Config, DispatchConfig, MeshConfig, ModelConfig, TrainConfig
from dsjax.model.dispatch import combine, dispatch
from dsjax.parallel.dispatch import Courier, Route, active_rounds, line_up, queues_to_nodes
from dsjax.parallel.exchange import bytes_of_round, route_of
from dsjax.parallel.mesh import EXPERT_AXES, make_mesh
from dsjax.settings import load_model_config

T, K, E, D = 10, 3, 16, 5
ROUTE = Route(nodes=2, devices=4, num_experts=E, node_capacity=6, device_capacity=9, transport="padded")
ALL = P(EXPERT_AXES)


def on_mesh(function, *arguments):
    """Run a function of a device's part on the mesh of `ROUTE`."""
    mesh = make_mesh(MeshConfig(node=ROUTE.nodes, local=ROUTE.devices))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(ALL,) * len(arguments), out_specs=ALL, check_vma=False)
    return jax.jit(mapped)(*arguments)


@pytest.fixture(scope="module")
def indices():
    rng = np.random.default_rng(0)
    return jnp.asarray(np.stack([rng.choice(E, K, replace=False) for _ in range(8 * T)]), jnp.int32)


def courier(indices, rounds=(0, 0)):
    return Courier(queues_to_nodes(ROUTE, indices), indices, *rounds, ROUTE, alignment=2)


@pytest.mark.parametrize("rounds", [(0, 0), (1, 0)])
def test_dispatch_and_combine_are_transposes(indices, rounds):
    rng = np.random.default_rng(1)
    rows = 4 * 9 + 2 * 1  # 4 senders, 9 slots each, and a row of padding for each of 2 experts
    x, w, dy, dw = (  # whole numbers, whose sums are exact
        jnp.asarray(rng.integers(-9, 9, shape), jnp.float32)
        for shape in ((8 * T, D), (8 * T, K), (8 * rows, D), (8 * rows,))
    )

    def there_and_back(indices, x, w, dy, dw):
        def there(x, w):
            plan, *arrived = dispatch(courier(indices, rounds), x, w)
            return arrived, plan

        (x_there, w_there), back, plan = jax.vjp(there, x, w, has_aux=True)
        y_back, there_again = jax.vjp(lambda rows: combine(plan, rows), dy)
        return x_there, *back([dy, dw]), y_back, there_again(x)[0], w_there

    x_there, dx, dw_back, y_back, drows, w_there = on_mesh(there_and_back, indices, x, w, dy, dw)
    assert jnp.vdot(x_there, dy) == jnp.vdot(x, y_back)
    np.testing.assert_array_equal(dx, y_back)
    np.testing.assert_array_equal(drows, x_there)
    assert jnp.vdot(w_there, dw) == jnp.vdot(w, dw_back)
    assert jnp.abs(x_there).sum() > 0


def test_rounds_together_carry_every_choice_once(indices):
    """With experts that do nothing, the rounds add up to each token times the number of its experts."""
    rounds1, rounds2 = ROUTE.rounds(T, K)
    x = jnp.asarray(np.random.default_rng(2).integers(-8, 8, (8 * T, D)), jnp.float32)

    def all_rounds(indices, x):
        active = active_rounds(ROUTE, queues_to_nodes(ROUTE, indices), indices)
        parts = jnp.stack(
            [
                combine(plan, rows)
                for i in range(rounds1)
                for j in range(rounds2)
                for plan, rows, _ in [dispatch(courier(indices, (i, j)), x, jnp.ones(indices.shape))]
            ]
        ).reshape(rounds1, rounds2, *x.shape)
        return parts.sum((0, 1)), jnp.abs(parts).sum((2, 3))[None], active[None]

    total, sizes, active = on_mesh(all_rounds, indices, x)
    np.testing.assert_array_equal(total, K * x)
    assert (active == active[0]).all() and 1 < active[0].sum() < active[0].size
    np.testing.assert_array_equal(sizes.sum(0) > 0, active[0])


def test_payloads_are_trees_of_any_type(indices):
    codes = jnp.asarray(np.random.default_rng(3).integers(0, 255, (8 * T, 4)), jnp.uint8)
    scales = jnp.arange(8 * T, dtype=jnp.bfloat16)

    def there(indices, codes, scales):
        values = codes.view(jnp.float8_e4m3fn)
        tokens = {"codes": values, "scale": scales}
        plan, arrived, _ = courier(indices).send(tokens, jnp.ones(indices.shape))
        found, again = plan.expand(arrived), plan.expand(plan.again(tokens))
        return found["codes"].view(jnp.uint8), found["scale"], again["codes"].view(jnp.uint8), again["scale"]

    found_codes, found_scales, codes_again, scales_again = on_mesh(there, indices, codes, scales)
    np.testing.assert_array_equal(found_codes, codes_again)
    np.testing.assert_array_equal(found_scales, scales_again)
    in_use = np.flatnonzero(found_scales)
    assert len(in_use) > 4 * T
    np.testing.assert_array_equal(found_codes[in_use], codes[np.asarray(found_scales[in_use], int)])


def test_queues():
    queues = line_up(jnp.asarray([2, 0, 3, 2, 0, 2], jnp.int32), 3)
    np.testing.assert_array_equal(queues.order, [1, 4, 0, 3, 5, 2])
    np.testing.assert_array_equal(queues.counts, [2, 0, 3])
    np.testing.assert_array_equal(queues.place[jnp.asarray([0, 1, 3, 4, 5])], [0, 0, 1, 1, 2])
    assert queues.place[2] >= 6
    with pytest.raises(ValueError, match=r"below 2\^31"):
        jax.eval_shape(lambda peer: line_up(peer, 8), jax.ShapeDtypeStruct((2**28,), jnp.int32))


def test_sizes_of_the_released_model():
    """Buffers of 0.6 T per node and 1.25 T per device, as four of eight nodes and eight experts of a token ask for."""
    config = Config(
        model=load_model_config("v3_671b"),
        train=TrainConfig(steps=1, batch_size=64),
        mesh=MeshConfig(node=8, local=8),
    )
    route = route_of(config, 4096)
    assert (route.node_capacity, route.device_capacity) == (2464, 5120)
    assert route.rounds(4096, 8) == (2, 31)
    to_nodes, to_devices = bytes_of_round(route, config.model, 2)
    assert to_nodes == 7 * 2464 * (4 * 7168 * 2 + 8 * 10) and to_devices == 7 * 5120 * (4 * 7168 * 2 + 10)


def test_a_token_needs_no_more_nodes_than_its_groups():
    def nodes(**changes):
        model = ModelConfig(
            **{
                "name": "m", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "first_k_dense_replace": 1,
                "intermediate_size": 8, "moe_intermediate_size": 8, "num_attention_heads": 1, "kv_lora_rank": 8,
                "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 64,
                "num_experts_per_tok": 6, "n_group": 8, "topk_group": 2, **changes,
            }
        )  # fmt: skip
        config = Config(
            model=model,
            train=TrainConfig(steps=1, batch_size=8),
            mesh=MeshConfig(node=8),
            dispatch=DispatchConfig(node_slack=1.0),
        )
        return route_of(config, 6400).node_capacity / 800

    assert nodes() == 2
    assert nodes(n_group=4) == 6, "a group spans two nodes"
    assert nodes(n_group=1, topk_group=1) == 6
    assert nodes(num_experts_per_tok=1, n_group=1, topk_group=1) == 1
