"""Attention of a long piece of a prompt over the cache: keys and values of all heads are expanded from the latents.

Per pair of a new and a known token the absorbed form multiplies 2 kv_lora_rank + qk_rope_head_dim numbers, 1088 in V3,
the expanded one qk_nope_head_dim + qk_rope_head_dim + v_head_dim, 320, but it expands every known token first. So one
new token is read in the absorbed form, and a piece of a few hundred in the expanded one (DeepSeek-V2 report, appendix).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dsjax.config import ModelConfig
from dsjax.model.attention import keys_and_values, queries
from dsjax.model.context import Context
from dsjax.model.layers import linear
from dsjax.model.rope import softmax_scale


def is_expansion_cheaper(config: ModelConfig, new_tokens: int) -> bool:
    """Whether so many new tokens per sequence make up for expanding the known ones."""
    expanded = config.qk_nope_head_dim + config.v_head_dim
    return new_tokens * (2 * config.kv_lora_rank - expanded) > config.kv_lora_rank * expanded


def expanded_attention(
    params: PyTree,
    to_queries: Float[Array, "B N Q"],
    new: Float[Array, "B N W"],
    visible: Bool[Array, "#B N N"],
    block: Callable[[Int[Array, ""]], tuple[Float[Array, "B S W"], Bool[Array, "B S"]]],
    blocks: int,
    ctx: Context,
    *,
    config: ModelConfig,
) -> Float[Array, "B N D"]:
    """Return attention of new tokens over those known and themselves.

    Known tokens come in blocks, whose scores alone exist at a time: the softmax is that of FlashAttention, with a
    running maximum and sum.

    Args:
        to_queries: what `compressed` gives for queries, of the new tokens.
        new: latents and turned keys of the new tokens.
        visible: which of them each of them sees; at least itself.
        block: gives those of a block of known tokens, and which there are.
        blocks: how many.
    """
    query = jnp.concatenate(queries(params, to_queries, ctx, config=config), axis=-1)

    def expand(entries: Float[Array, "B S W"]) -> tuple[Float[Array, "B S H _"], Float[Array, "B S H v"]]:
        latent, key = jnp.split(entries, [config.kv_lora_rank], axis=-1)
        k, v = keys_and_values(params, latent, config=config)
        key = jnp.broadcast_to(key[:, :, None], (*k.shape[:3], key.shape[-1]))
        return jnp.concatenate([k, key], axis=-1), v

    def scores(k: Float[Array, "B S H _"], visible: Bool[Array, "#B #N S"]) -> Float[Array, "B H N S"]:
        products = jnp.einsum("bqhw,bshw->bhqs", query, k, preferred_element_type=jnp.float32)
        return jnp.where(visible[:, None], products * softmax_scale(config), -jnp.inf)

    def weighted(shares: Float[Array, "B H N S"], v: Float[Array, "B S H v"]) -> Float[Array, "B H N v"]:
        return jnp.einsum("bhqs,bshv->bhqv", shares.astype(new.dtype), v, preferred_element_type=jnp.float32)

    # A token sees itself, so the maximum is finite from the start.
    k, v = expand(new)
    first = scores(k, visible)
    largest = first.max(axis=-1, keepdims=True)
    shares = jnp.exp(first - largest)
    state = largest, shares.sum(axis=-1, keepdims=True), weighted(shares, v)

    def add(state: tuple[Array, Array, Array], i: Int[Array, ""]) -> tuple[tuple[Array, Array, Array], None]:
        largest, total, out = state
        entries, known = block(i)
        k, v = expand(entries)
        found = scores(k, known[:, None])
        higher = jnp.maximum(largest, found.max(axis=-1, keepdims=True))
        shares, shrink = jnp.exp(found - higher), jnp.exp(largest - higher)
        return (higher, total * shrink + shares.sum(axis=-1, keepdims=True), out * shrink + weighted(shares, v)), None

    (_, total, out), _ = jax.lax.scan(add, state, jnp.arange(blocks))
    out = (out / total).astype(new.dtype).transpose(0, 2, 1, 3)
    return linear(out.reshape(*out.shape[:2], -1), params["o"])
