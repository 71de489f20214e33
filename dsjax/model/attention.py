"""Multi-head latent attention (report section 2.1.1).

Queries and keys have a part without position (`nope`) and a part that RoPE turns (`rope`); the latter is one key for
all heads. Keys and values come from a latent of `kv_lora_rank` values per token, which is all that a cache keeps.
"""

import functools
import math
from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PyTree

from dsjax.config import ModelConfig
from dsjax.model.causal_attention import causal_attention, chunked_backward, chunked_forward, resolve
from dsjax.model.context import Context
from dsjax.model.layers import linear, norm_weight, rms_norm, weight
from dsjax.model.rope import rotate, softmax_scale
from dsjax.numerics import linear as fp8
from dsjax.numerics.weights import Fp8Weight
from dsjax.runtime import Runtime, target_platform


class Attention(nnx.Module):
    """Parameters of multi-head latent attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        hidden, heads = config.hidden_size, config.num_attention_heads
        query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank:
            self.q_a = weight(config, rngs, config.q_lora_rank, hidden)
            self.q_norm = norm_weight(config.q_lora_rank)
            self.q_b = weight(config, rngs, query, config.q_lora_rank)
        else:
            self.q = weight(config, rngs, query, hidden)
        self.kv_a = weight(config, rngs, config.kv_lora_rank + config.qk_rope_head_dim, hidden)
        self.kv_norm = norm_weight(config.kv_lora_rank)
        self.kv_b = weight(config, rngs, heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
        self.o = weight(config, rngs, hidden, heads * config.v_head_dim)


def attention(
    params: PyTree, x: Float[Array, "B S D"], ctx: Context, *, config: ModelConfig, runtime: Runtime
) -> Float[Array, "B S D"]:
    """Return causal attention over each sequence of normalized hidden states."""
    to_queries, to_latents = compressed(params, x, config=config)
    q_nope, q_rope = queries(params, to_queries, ctx, config=config)
    latent, k_rope = latents(params, to_latents, ctx, config=config)
    k_nope, v = keys_and_values(params, latent, config=config)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], config.qk_rope_head_dim))
    q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, k_rope], -1)
    in_fp8 = isinstance(params["o"], Fp8Weight)
    if in_fp8 and resolve(runtime.attention, target_platform(), q.dtype) == "chunked":
        return _attended_and_projected(q, k, v, ctx.segments, params["o"], softmax_scale(config))
    out = causal_attention(q, k, v, scale=softmax_scale(config), segments=ctx.segments, impl=runtime.attention)
    project = fp8.output_projection if in_fp8 else linear
    return project(out.reshape(*x.shape[:2], -1), params["o"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attended_and_projected(q, k, v, segments, o, scale):
    """Attention and output projection in one, which keep what is between them once, in 12 bits."""
    return _attend_and_project(q, k, v, segments, o, scale)[0]


def _attend_and_project(q, k, v, segments, o, scale):
    out, lse = chunked_forward(q, k, v, segments, scale)
    rows = out.reshape(-1, math.prod(out.shape[2:]))
    y = fp8.forward_product(rows, o).reshape(*out.shape[:2], -1)
    return y, (q, k, v, segments, fp8.kept_in_12_bits(rows, o.recipe), lse, o.kept())


def _attend_and_project_backward(scale, residuals, dy):
    q, k, v, segments, packed, lse, o = residuals
    rows, dy = fp8.from_12_bits(packed, v.dtype, o.recipe), dy.reshape(-1, dy.shape[-1])
    out, dout = (array.reshape(*q.shape[:3], -1) for array in (rows, fp8.input_gradient(dy, o)))
    dq, dk, dv = chunked_backward(q, k, v, segments, out, lse, dout, scale)
    return dq, dk, dv, None, o.gradient(fp8.weight_gradient(dy, rows, o))


_attended_and_projected.defvjp(_attend_and_project, _attend_and_project_backward)


def compressed(
    params: PyTree, x: Float[Array, "*batch D"], *, config: ModelConfig
) -> tuple[Float[Array, "*batch Q"], Float[Array, "*batch W"]]:
    """Return what queries, and what keys and values are made of, few values of each token whatever the heads: the
    normalized latent of the queries, or the states where there is none, and the others' latent with the shared key."""
    to_latents = checkpoint_name(linear(x, params["kv_a"]), "latent")
    if not config.q_lora_rank:
        return x, to_latents
    to_queries = checkpoint_name(linear(x, params["q_a"]), "latent")
    return rms_norm(to_queries, params["q_norm"], config.rms_norm_eps), to_latents


def queries(
    params: PyTree, to_queries: Float[Array, "B S Q"], ctx: Context, *, config: ModelConfig
) -> tuple[Float[Array, "B S H nope"], Float[Array, "B S H rope"]]:
    """Return every head's query, its part without position and its turned part, of what `compressed` gives for them."""
    q = linear(to_queries, params["q_b" if config.q_lora_rank else "q"])
    q = q.reshape(*to_queries.shape[:2], config.num_attention_heads, -1)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, rotate(q_rope, ctx.cos, ctx.sin)


def latents(
    params: PyTree, to_latents: Float[Array, "B S W"], ctx: Context, *, config: ModelConfig
) -> tuple[Float[Array, "B S kv"], Float[Array, "B S rope"]]:
    """Return what a cache keeps of each token, of what `compressed` gives for it: the normalized latent and the turned
    shared key (576 values in V3)."""
    latent, k_rope = jnp.split(to_latents, [config.kv_lora_rank], axis=-1)
    k_rope = rotate(k_rope[:, :, None], ctx.cos, ctx.sin)[:, :, 0]
    return rms_norm(latent, params["kv_norm"], config.rms_norm_eps), k_rope


def keys_and_values(
    params: PyTree, latent: Float[Array, "B S kv"], *, config: ModelConfig
) -> tuple[Float[Array, "B S H nope"], Float[Array, "B S H v"]]:
    """Expand latents to every head's key without position and value."""
    kv = linear(latent, params["kv_b"]).reshape(*latent.shape[:2], config.num_attention_heads, -1)
    k_nope, v = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
    return k_nope, v


def absorbed_attention(
    params: PyTree,
    to_queries: Float[Array, "B N Q"],
    memory: Sequence[tuple[Float[Array, "B _ W"], Bool[Array, "#B N _"]]],
    ctx: Context,
    *,
    config: ModelConfig,
) -> Float[Array, "B N D"]:
    """Return attention of new tokens over latents, without expanding keys and values.

    The up-projection of the keys is applied to the query, that of the values to the result (DeepSeek-V2 report,
    section 2.1.2), so a token of memory costs `kv_lora_rank + qk_rope_head_dim` values per product whatever the heads.

    Args:
        to_queries: what `compressed` gives for queries, of the new tokens.
        memory: pieces of what there is to attend to, which need not lie together: `latents` of tokens side by side,
            and which of them each new token may see; at least one in all.
    """
    q_nope, q_rope = queries(params, to_queries, ctx, config=config)
    up = params["kv_b"].astype(to_queries.dtype).reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    k_up, v_up = jnp.split(up, [config.qk_nope_head_dim], axis=1)
    query = jnp.concatenate([jnp.einsum("bqhn,hnc->bqhc", q_nope, k_up), q_rope], -1)

    def scores(piece: Array, visible: Array) -> Array:
        products = jnp.einsum("bqhw,bsw->bhqs", query, piece, preferred_element_type=jnp.float32)
        return jnp.where(visible[:, None], products * softmax_scale(config), -jnp.inf)

    every = jnp.concatenate([scores(*piece) for piece in memory], -1)
    probabilities = nnx.softmax(every, axis=-1).astype(to_queries.dtype)
    ends = list(accumulate(piece.shape[1] for piece, _ in memory))
    shares = jnp.split(probabilities, ends[:-1], axis=-1)
    # The turned keys are summed along, and then cut off: to cut them off before would copy the memory.
    attended = sum(jnp.einsum("bhqs,bsw->bqhw", p, piece) for p, (piece, _) in zip(shares, memory, strict=True))
    out = jnp.einsum("bqhc,hvc->bqhv", attended[..., : config.kv_lora_rank], v_up)
    return linear(out.reshape(*out.shape[:2], -1), params["o"])
