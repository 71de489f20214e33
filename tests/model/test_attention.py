"""Latent attention: the absorbed form that decoding uses equals the expanded one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import YarnConfig
from dsjax.model.attention import Attention, absorbed_attention, attention, compressed, latents
from dsjax.model.context import context
from dsjax.model.transformer import split
from dsjax.runtime import Runtime


@pytest.mark.parametrize("variant", ["v3", "v3 with yarn", "v2-lite"])
def test_absorbed_equals_expanded(small, variant):
    changes = {
        "v3": {},
        "v3 with yarn": {"rope_scaling": YarnConfig(factor=4.0, original_max_position_embeddings=16)},
        "v2-lite": {"q_lora_rank": 0},
    }
    config = replace(small, initializer_range=0.3, **changes[variant])
    params, _ = split(Attention(config, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1 * rng.normal(size=leaf.shape), jnp.float32), params)
    x = jnp.asarray(rng.normal(size=(2, 24, 32)), jnp.float32)

    @jax.jit
    def both(params, x):
        ctx = context(config, 24)
        visible = jnp.tril(jnp.ones((1, 24, 24), bool))
        to_queries, to_latents = compressed(params, x, config=config)
        memory = jnp.concatenate(latents(params, to_latents, ctx, config=config), -1)
        pieces = [(memory[:, :9], visible[..., :9]), (memory[:, 9:], visible[..., 9:])]
        expanded = attention(params, x, ctx, config=config, runtime=Runtime())
        return expanded, absorbed_attention(params, to_queries, pieces, ctx, config=config), memory

    expanded, absorbed, memory = both(params, x)
    np.testing.assert_allclose(absorbed, expanded, atol=1e-5 * float(jnp.abs(expanded).max()))
    assert float(jnp.std(expanded, axis=1).min()) > 0.01, "attention does nothing"
    assert memory.shape == (2, 24, 16 + 8), "a cache holds the latent and one key per token"
