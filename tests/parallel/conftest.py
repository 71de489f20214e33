"""A small model whose experts divide over eight devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


@pytest.fixture(scope="package")
def run() -> Config:
    """One dense and two MoE layers of four experts per device, one MTP module, two micro-batches of eight sequences."""
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


@pytest.fixture(scope="package")
def micro_batches():
    """Tokens of a step, int32[2, 8, S + 1]."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 64, (2, 8, 17)), jnp.int32)
