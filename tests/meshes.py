"""Meshes and routings under which a model must learn the same, and the comparison."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config, DataConfig, DispatchConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from dsjax.runtime import Runtime
from dsjax.training.state import initial_state
from dsjax.training.step import accumulated_loss_and_grads

SMALL = Config(
    model=ModelConfig(
        name="small",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=32,
        num_experts_per_tok=3,
        routed_scaling_factor=2.5,
        initializer_range=0.05,
        num_nextn_predict_layers=1,
    ),
    data=DataConfig(sequence_length=16),
    train=TrainConfig(steps=100, batch_size=16, micro_batch_size=8, balance_weight=0.01),
    optimizer=OptimizerConfig(moment_dtype="fp32", clip_norm=0.5),
    precision="fp32",
)
"""One dense and two MoE layers of four experts per device, one MTP module, two micro-batches of eight sequences."""
ROOMY = DispatchConfig(node_slack=8, device_slack=8)
TIGHT = DispatchConfig(node_slack=0.4, device_slack=0.3)
"""Buffers that overflow under nearly any routing."""
MESHES = {
    "2x4": (MeshConfig(node=2, local=4), ROOMY),
    "4x2": (MeshConfig(node=4, local=2), TIGHT),
    "8x1": (MeshConfig(node=8), ROOMY),
    "1x8": (MeshConfig(local=8), TIGHT),
    "data 2 x EP 2x2": (MeshConfig(data=2, node=2, local=2), TIGHT),
    "data 8": (MeshConfig(data=8), ROOMY),
}
EXPERTS = 32
ROUTINGS = {
    "free": np.zeros(EXPERTS),
    "two nodes": np.where(np.arange(EXPERTS) % 16 < 8, 10.0, 0.0),
    "one device": np.where(np.arange(EXPERTS) < 3, 10.0, 0.0),
    "skewed": -0.02 * np.arange(EXPERTS),
}
"""Router biases that steer every layer; with the first two experts are chosen freely, there within some nodes."""
MTP_WEIGHT = jnp.float32(0.3)


def steered(biases, routing):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.asarray(ROUTINGS[routing], jnp.float32), leaf.shape), biases)


def found_on(run, micro_batches, routings, fetch=jax.device_get):
    """Losses and gradients of a run's mesh for some routings, as arrays of NumPy; compiled once."""
    state = initial_state(run)
    loss_and_grads = jax.jit(accumulated_loss_and_grads(run, Runtime(remat="report")))
    return {
        name: fetch(loss_and_grads(state.params, steered(state.biases, name), micro_batches, MTP_WEIGHT))
        for name in routings
    }


def check_equal(found, expected):
    """Losses, loads and every gradient: 1e-5 of the largest of an array."""
    losses, grads = found
    expected_losses, expected_grads = expected
    np.testing.assert_allclose(losses.main, expected_losses.main, rtol=1e-6)
    np.testing.assert_allclose(losses.mtp, expected_losses.mtp, rtol=1e-6)
    np.testing.assert_allclose(losses.aux.balance_loss, expected_losses.aux.balance_loss, rtol=1e-6)
    np.testing.assert_array_equal(losses.aux.loads, expected_losses.aux.loads)
    assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
    for (path, grad), want in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        np.testing.assert_allclose(grad, want, atol=1e-5 * np.abs(want).max(), err_msg=jax.tree_util.keystr(path))
