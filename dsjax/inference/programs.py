"""The two programs of inference: `prefill` reads a piece of a prompt, `decode` one token of each of a batch; both
choose the token after.

Both are `extend` with other shapes: new tokens attend to the cache and to themselves, and are added to the cache in one
write behind the last layer. Shapes are static and the state is donated, so a program is compiled once per shape and
writes in place; layers are one loop, so its compile time does not grow with depth.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dsjax.config import ModelConfig
from dsjax.inference.attention import expanded_attention, is_expansion_cheaper
from dsjax.inference.cache import PagedCache, read, write
from dsjax.inference.experts import apart, are_few, exchange_within_row
from dsjax.inference.sampling import Choice, Drawn, draw
from dsjax.model.attention import absorbed_attention, latents
from dsjax.model.context import Context
from dsjax.model.ffn import feed_forward
from dsjax.model.layers import rms_norm
from dsjax.model.moe import moe
from dsjax.model.rope import rotation
from dsjax.model.transformer import logits
from dsjax.runtime import Runtime, full_precision

BLOCK = 1024
"""Known tokens that are expanded at once."""


class State(NamedTuple):
    """What stays on the device from one pass to the next. A request has one of S slots; the last is for padding."""

    cache: PagedCache
    tokens: Int[Array, " S"]
    """The token chosen last, which `decode` reads."""
    seen: Bool[Array, "S V"]
    """Tokens of prompt and answer, for the repetition penalty; only kept where a request has one."""


class Batch(NamedTuple):
    """The requests of a pass."""

    slots: Int[Array, " B"]
    tables: Int[Array, "B M"]
    """Their pages; 0 behind the last."""
    lengths: Int[Array, " B"]
    """Tokens of each that the cache has."""
    choice: Choice


program = functools.partial(jax.jit, static_argnames=("config", "runtime"), donate_argnames="state")


@program
def prefill(
    params: PyTree,
    biases: PyTree,
    state: State,
    batch: Batch,
    tokens: Int[Array, "B N"],
    counts: Int[Array, " B"],
    first: Bool[Array, "#B V"],
    last: Bool[Array, " B"],
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Drawn, State]:
    """Read a piece of each prompt, and choose the token behind it.

    Args:
        params: stacked, weights in the compute format.
        biases: router biases, stacked.
        state: given away.
        tokens: the pieces, padded to one length.
        counts: tokens of each piece, at least 1.
        first: which tokens may be chosen.
        last: whether a piece is the last of its prompt; what is chosen behind others is of no account.
    """
    hidden, cache = extend(params, biases, state.cache, batch, tokens, counts, config=config, runtime=runtime)
    ends = jnp.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)[:, 0]
    return _drawn(logits(params, ends), batch, batch.lengths + counts, state._replace(cache=cache), first, last)


@program
def decode(
    params: PyTree, biases: PyTree, state: State, batch: Batch, *, config: ModelConfig, runtime: Runtime
) -> tuple[Drawn, State, Batch]:
    """Read the token chosen last of each request, and choose the next; return also the batch that continues.

    `state` is given away.
    """
    tokens, counts = state.tokens[batch.slots], jnp.ones_like(batch.slots)
    hidden, cache = extend(params, biases, state.cache, batch, tokens[:, None], counts, config=config, runtime=runtime)
    lengths = batch.lengths + 1
    drawn, state = _drawn(logits(params, hidden[:, 0]), batch, lengths, state._replace(cache=cache))
    return drawn, state, batch._replace(lengths=lengths)


def _drawn(
    scores: Float[Array, "B V"],
    batch: Batch,
    places: Int[Array, " B"],
    state: State,
    allowed: Bool[Array, "#B V"] | None = None,
    counts: Bool[Array, " B"] | bool = True,
) -> tuple[Drawn, State]:
    drawn = draw(scores, batch.choice, places, lambda: state.seen[batch.slots], allowed)
    seen = state.seen.at[batch.slots, drawn.tokens].max(counts)
    return drawn, state._replace(tokens=state.tokens.at[batch.slots].set(drawn.tokens), seen=seen)


@functools.partial(jax.jit, donate_argnames="state")
def mark_seen(state: State, slot: Int[Array, ""], tokens: Bool[Array, " V"]) -> State:
    """Return the state in which a slot has seen just these tokens."""
    return state._replace(seen=state.seen.at[slot].set(tokens))


@jax.jit
def read_page(cache: PagedCache, page: Int[Array, ""]) -> dict[str, Array]:
    """Return what is on a page."""
    return {name: array[:, page] for name, array in cache.arrays.items()}


@functools.partial(jax.jit, donate_argnames="state")
def write_page(state: State, page: Int[Array, ""], contents: dict[str, Array]) -> State:
    """Return the state with other contents of a page."""
    arrays = {name: array.at[:, page].set(contents[name]) for name, array in state.cache.arrays.items()}
    return state._replace(cache=PagedCache(arrays))


@full_precision()
def extend(
    params: PyTree,
    biases: PyTree,
    cache: PagedCache,
    batch: Batch,
    tokens: Int[Array, "B N"],
    counts: Int[Array, " B"],
    *,
    config: ModelConfig,
    runtime: Runtime,
    expanded: bool | None = None,
) -> tuple[Float[Array, "B N D"], PagedCache]:
    """Run new tokens behind those in the cache; return their states after the final norm, and the longer cache.

    Args:
        params: stacked, weights in the compute format.
        biases: router biases, stacked.
        tokens: the next tokens of each sequence, padded to one length.
        counts: how many of them are real; states of the others mean nothing.
        expanded: whether attention expands keys and values; by default where that is less work.
    """
    index = jnp.arange(tokens.shape[1])
    ctx = Context(*rotation(config, batch.lengths[:, None] + index))
    expanded = is_expansion_cheaper(config, tokens.shape[1]) if expanded is None else expanded
    form = _expanded if expanded else _absorbed

    def attend(
        x: Float[Array, "B N D"], params: PyTree, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N W"]]:
        normalized = rms_norm(x, params["attention_norm"], config.rms_norm_eps)
        new = jnp.concatenate(latents(params["attention"], normalized, ctx, config=config), axis=-1)
        return x + form(params["attention"], normalized, new, cache, layer, batch, ctx, config), new

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
    longer = write(cache, jnp.concatenate(new), batch.tables, batch.lengths, counts)
    return rms_norm(x, params["norm"], config.rms_norm_eps), longer


def _absorbed(params, x, new, cache, layer, batch, ctx, config):
    memory = read(cache, layer, batch.tables, batch.lengths, x.dtype)
    index, places = jnp.arange(x.shape[1]), jnp.arange(memory.shape[1])
    known = jnp.broadcast_to(places < batch.lengths[:, None, None], (*x.shape[:2], memory.shape[1]))
    pieces = [(memory, known), (new, (index <= index[:, None])[None])]
    return absorbed_attention(params, x, pieces, ctx, config=config)


def _expanded(params, x, new, cache, layer, batch, ctx, config):
    pages = min(max(1, BLOCK // cache.page_size), batch.tables.shape[1])
    blocks = -(-batch.tables.shape[1] // pages)
    tables = jnp.pad(batch.tables, ((0, 0), (0, blocks * pages - batch.tables.shape[1])))

    def block(i: Int[Array, ""]) -> tuple[Float[Array, "B S W"], Bool[Array, "B S"]]:
        first = i * pages * cache.page_size
        part = jax.lax.dynamic_slice_in_dim(tables, i * pages, pages, axis=1)
        known = first + jnp.arange(pages * cache.page_size) < batch.lengths[:, None]
        return read(cache, layer, part, batch.lengths, x.dtype, first), known

    return expanded_attention(params, x, new, block, blocks, ctx, config=config)
