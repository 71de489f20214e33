"""A small model with everything in it, for tests that need one."""

from dataclasses import replace

import jax
import pytest
from meshes import SMALL

from dsjax.config import ModelConfig
from dsjax.model.transformer import initial_parameters


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    """One dense and three MoE layers, two MTP modules, node-limited routing."""
    return replace(
        SMALL.model,
        num_hidden_layers=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=2,
    )


@pytest.fixture(scope="session")
def small_parameters(small):
    """Its parameters and router biases, stacked; norms and biases are not at their initial 1 and 0."""
    params, biases = jax.jit(lambda: initial_parameters(small, 0))()
    key = jax.random.key(1)

    def away(leaf):
        return leaf + 0.05 * jax.random.normal(key, leaf.shape)

    return jax.jit(lambda: jax.tree.map(away, (params, biases)))()
