"""A small run whose compiled steps the tests of this folder share."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import SMALL

from dsjax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from dsjax.runtime import Runtime
from dsjax.training.state import initial_state
from dsjax.training.step import make_train_step


@pytest.fixture(scope="session")
def small_run() -> Config:
    """One dense and two MoE layers and one MTP module; float32 moments and no clipping, so that they show gradients."""
    return Config(
        model=replace(SMALL.model, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2),
        data=DataConfig(sequence_length=16),
        train=TrainConfig(steps=100, batch_size=4, balance_weight=0.01),
        optimizer=OptimizerConfig(moment_dtype="fp32", clip_norm=0.0),
        precision="fp32",
    )


@pytest.fixture(scope="session")
def tokens(small_run):
    """Four sequences, as int32[4, S + 1]."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 64, (4, small_run.data.sequence_length + 1)), jnp.int32)


@pytest.fixture(scope="session")
def start(small_run):
    """Return a new copy of the first state at each call, because a step takes its state's memory."""
    state = initial_state(small_run)
    return lambda: jax.tree.map(jnp.copy, state)


@pytest.fixture(scope="session")
def train_step(small_run):
    return make_train_step(small_run, Runtime())
