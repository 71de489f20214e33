"""The two programs of inference: `prefill` reads a piece of a prompt, `decode` one token; both choose the token after.

Both are `extend` with other shapes: new tokens attend to the cache and to themselves, in the absorbed form, and are
added to the cache in one write behind the last layer. Shapes are static and the cache is donated, so a program is
compiled once per shape and writes in place; layers are one loop, so its compile time does not grow with depth.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dsjax.config import ModelConfig
from dsjax.inference.cache import LatentCache, extended
from dsjax.inference.experts import apart, are_few, exchange_within_row
from dsjax.inference.sampling import Choice, sample
from dsjax.model.attention import absorbed_attention, latents
from dsjax.model.context import Context
from dsjax.model.ffn import feed_forward
from dsjax.model.layers import rms_norm
from dsjax.model.moe import moe
from dsjax.model.rope import rotation
from dsjax.model.transformer import logits
from dsjax.runtime import Runtime, full_precision

program = functools.partial(jax.jit, static_argnames=("config", "runtime"), donate_argnames="cache")


@program
def prefill(
    params: PyTree,
    biases: PyTree,
    cache: LatentCache,
    tokens: Int[Array, "B N"],
    counts: Int[Array, " B"],
    choice: Choice,
    first: Bool[Array, "#B V"],
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Int[Array, " B"], LatentCache]:
    """Read a piece of each prompt; return the token chosen behind it, and the cache.

    Args:
        params: stacked, weights in the compute format.
        biases: router biases, stacked.
        cache: given away.
        tokens: the pieces, padded to one length.
        counts: tokens of each piece, at least 1.
        choice: how to choose.
        first: which tokens may be chosen.
    """
    hidden, cache = extend(params, biases, cache, tokens, counts, config=config, runtime=runtime)
    last = jnp.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)[:, 0]
    scores = jnp.where(first, logits(params, last), -jnp.inf)
    return sample(scores, choice, cache.lengths), cache


@program
def decode(
    params: PyTree,
    biases: PyTree,
    cache: LatentCache,
    tokens: Int[Array, " B"],
    choice: Choice,
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Int[Array, " B"], LatentCache]:
    """Read one token of each sequence; return the token chosen behind it, and the cache, which is given away."""
    counts = jnp.ones_like(tokens)
    hidden, cache = extend(params, biases, cache, tokens[:, None], counts, config=config, runtime=runtime)
    return sample(logits(params, hidden[:, 0]), choice, cache.lengths), cache


@full_precision()
def extend(
    params: PyTree,
    biases: PyTree,
    cache: LatentCache,
    tokens: Int[Array, "B N"],
    counts: Int[Array, " B"],
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Float[Array, "B N D"], LatentCache]:
    """Run new tokens behind those in the cache; return their states after the final norm, and the longer cache.

    Args:
        params: stacked, weights in the compute format.
        biases: router biases, stacked.
        tokens: the next tokens of each sequence, padded to one length.
        counts: how many of them are real; states of the others mean nothing.
    """
    index = jnp.arange(tokens.shape[1])
    ctx = Context(*rotation(config, cache.lengths[:, None] + index))
    read = jnp.arange(cache.capacity) < cache.lengths[:, None, None]
    read = jnp.broadcast_to(read, (*tokens.shape, cache.capacity))
    causal = (index <= index[:, None])[None]

    def attend(
        x: Float[Array, "B N D"], params: PyTree, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N W"]]:
        normalized = rms_norm(x, params["attention_norm"], config.rms_norm_eps)
        new = jnp.concatenate(latents(params["attention"], normalized, ctx, config=config), axis=-1)
        memory = [(cache.entries[layer], read), (new, causal)]
        return x + absorbed_attention(params["attention"], normalized, memory, ctx, config=config), new

    x, new = params["embed"][tokens], []
    dense, sparse = config.first_k_dense_replace, config.num_hidden_layers - config.first_k_dense_replace
    for i in range(dense):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["dense"])
        x, entries = attend(x, layer, i)
        x += feed_forward(layer["ffn"], rms_norm(x, layer["ffn_norm"], config.rms_norm_eps))
        new.append(entries[None])

    if sparse:
        layers, shared = params["moe"], {}
        in_row = runtime.exchange is None and are_few(tokens.size, config.num_experts_per_tok, config.n_routed_experts)
        if in_row:
            layers, row = apart(layers)
            shared = {"experts": row}

        def moe_layer(x: Array, scanned: tuple[PyTree, PyTree, Array]) -> tuple[Array, Array]:
            layer, bias, i = scanned
            x, entries = attend(x, layer, dense + i)
            normalized = rms_norm(x, layer["ffn_norm"], config.rms_norm_eps)
            machine = replace(runtime, exchange=exchange_within_row(i, sparse)) if in_row else runtime
            layer_ctx = ctx.for_layer(bias["moe"]["bias"] if bias else None)
            y, _ = moe(layer["moe"] | shared, normalized, layer_ctx, config=config, runtime=machine)
            return x + y, entries

        x, entries = jax.lax.scan(moe_layer, x, (layers, biases.get("moe", {}), jnp.arange(sparse)))
        new.append(entries)
    return rms_norm(x, params["norm"], config.rms_norm_eps), extended(cache, jnp.concatenate(new), counts)
