"""A training step on many devices against the same step on one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Config, DataConfig, DispatchConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from dsjax.runtime import Runtime
from dsjax.training.state import initial_state
from dsjax.training.step import accumulated_loss_and_grads

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
MTP_WEIGHT = jnp.float32(0.3)


@pytest.fixture(scope="module")
def run() -> Config:
    return Config(
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
            n_routed_experts=16,
            num_experts_per_tok=3,
            n_group=8,
            topk_group=3,
            routed_scaling_factor=2.5,
            initializer_range=0.05,
            num_nextn_predict_layers=1,
        ),
        data=DataConfig(sequence_length=16),
        train=TrainConfig(steps=100, batch_size=16, micro_batch_size=8, balance_weight=0.01, remat="report"),
        optimizer=OptimizerConfig(moment_dtype="fp32", clip_norm=0.5),
        precision="fp32",
    )


@pytest.fixture(scope="module")
def micro_batches():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 64, (2, 8, 17)), jnp.int32)


def found_on(run, micro_batches):
    """Losses and gradients of a run's mesh, as arrays of NumPy."""
    state = initial_state(run)
    loss_and_grads = jax.jit(accumulated_loss_and_grads(run, Runtime(remat="report")))
    return jax.device_get(loss_and_grads(state.params, state.biases, micro_batches, MTP_WEIGHT))


@pytest.fixture(scope="module")
def alone(run, micro_batches):
    return found_on(run, micro_batches)


@pytest.mark.parametrize("name", list(MESHES))
def test_losses_loads_and_every_gradient_are_those_of_one_device(run, micro_batches, alone, name):
    mesh, dispatch = MESHES[name]
    losses, grads = found_on(replace(run, mesh=mesh, dispatch=dispatch), micro_batches)
    expected, expected_grads = alone
    np.testing.assert_allclose(losses.main, expected.main, rtol=1e-6)
    np.testing.assert_allclose(losses.mtp, expected.mtp, rtol=1e-6)
    np.testing.assert_allclose(losses.aux.balance_loss, expected.aux.balance_loss, rtol=1e-6)
    np.testing.assert_array_equal(losses.aux.loads, expected.aux.loads)
    assert (losses.aux.rounds > 2).any() == (dispatch is TIGHT and mesh.expert_shards > 1)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        want = expected_grads
        for key in path:
            want = want[key.key]
        np.testing.assert_allclose(grad, want, atol=1e-5 * np.abs(want).max(), err_msg=jax.tree_util.keystr(path))
