"""A mixture of experts on eight devices, skewed loads, and where its redundant experts are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.config import Config, MeshConfig, ModelConfig, TrainConfig
from dsjax.model.dispatch import exchange_locally
from dsjax.model.moe import RoutedExperts
from dsjax.parallel.direct import direct_exchange
from dsjax.parallel.exchange import exchange_of
from dsjax.parallel.mesh import EXPERT_AXES, make_mesh
from dsjax.parallel.placement import Placement, plan_placement
from dsjax.runtime import Runtime

DEVICES, NODES, T, K, E, D, F = 8, 2, 12, 3, 16, 16, 8
"""T tokens on each device."""
ALL = P(EXPERT_AXES)
MODEL = ModelConfig(
    name="skewed",
    vocab_size=64,
    hidden_size=D,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=32,
    moe_intermediate_size=F,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=E,
    num_experts_per_tok=K,
    routed_scaling_factor=2.5,
    initializer_range=0.2,
)
CONFIG = Config(model=MODEL, train=TrainConfig(steps=1, batch_size=8), mesh=MeshConfig(node=NODES, local=4))
EXCHANGES = {"direct": direct_exchange(EXPERT_AXES), "two hops": exchange_of(CONFIG)}


def mesh():
    return make_mesh(CONFIG.mesh)


def on_mesh(function, in_specs, out_specs=ALL):
    return jax.jit(jax.shard_map(function, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False))


def divided(tree, spec):
    return jax.device_put(tree, NamedSharding(mesh(), spec))


def skewed_routing(seed, tokens=DEVICES * T, experts=E, k=K, sharpness=1.4):
    """Distinct experts of each token, some far busier than others."""
    rng = np.random.default_rng(seed)
    p = sharpness ** -rng.permutation(experts)
    return np.stack([rng.choice(experts, k, replace=False, p=p / p.sum()) for _ in range(tokens)]).astype(np.int32)


def with_padding(indices, seed=0, share=0.3, experts=E):
    indices = indices.copy()
    indices[np.random.default_rng(seed).random(len(indices)) < share] = experts
    return indices


def loads_of(indices, experts=E):
    return np.bincount(indices.ravel(), minlength=experts + 1)[None, :experts]


def placement_for(indices, slots=24, experts=E):
    return plan_placement(loads_of(indices, experts), slots, DEVICES, NODES, policy="global")


def without_redundancy(experts=E, layers=1):
    return Placement(np.tile(np.arange(experts), (layers, 1)), experts, DEVICES, NODES)


def inputs(seed=0, layers=1):
    """Tokens, weights of choices, and experts of stacked layers."""
    keys = jax.random.split(jax.random.key(seed), 4)
    experts = {
        "gate_up": jax.random.normal(keys[2], (layers, E, 2, F, D)) / 2,
        "down": jax.random.normal(keys[3], (layers, E, D, F)) / 2,
    }
    tokens = DEVICES * T
    weights = jax.random.uniform(keys[1], (tokens, K), minval=0.1)
    return jax.random.normal(keys[0], (tokens, D)), weights, experts


def on_one_device(x, weights, experts, indices):
    return exchange_locally(RoutedExperts(experts, Runtime()), x, jnp.asarray(indices), weights, E)[0]


def check_equal(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))


def small_model(**changes):
    return replace(MODEL, **changes)
