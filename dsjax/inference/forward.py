"""The layers of the model, for new tokens behind a cache.

New tokens attend to the cache and to themselves; what the cache is to keep of them comes back, for one write behind the
last layer. Layers are one loop, so compile time does not grow with depth.

On a unit of several devices each has its share of the tokens between the parts of layers (`machine`). In two
micro-batches, half of the requests compute while the tokens of the other half are on the network (report section 3.4):
the components of both take turns as those of a pipeline's pairs do.

Letters of shapes beside those of `cache`:
    B requests   N new tokens of each   b n a device's share of them
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dsjax.config import ModelConfig
from dsjax.inference.attention import expanded_attention, is_expansion_cheaper
from dsjax.inference.cache import PagedCache, read
from dsjax.inference.experts import apart, are_few, exchange_within_row
from dsjax.inference.machine import Machine
from dsjax.inference.sampling import Choice
from dsjax.model.attention import absorbed_attention, compressed, latents
from dsjax.model.context import Context
from dsjax.model.dispatch import exchange_locally
from dsjax.model.ffn import feed_forward
from dsjax.model.layers import rms_norm
from dsjax.model.moe import MoEAux, moe
from dsjax.model.rope import rotation
from dsjax.model.transformer import bias_of
from dsjax.numerics.weights import Fp8Weight
from dsjax.pallas.choice import resolve
from dsjax.pipeline.equations import without_gradient_rules
from dsjax.pipeline.overlap import interleaved
from dsjax.runtime import Exchange, full_precision

BLOCK = 1024
"""Known tokens that are expanded at once."""
MOST_LAYERS = 4
"""Of two micro-batches, that are compiled together: at the end of each such group there is nothing to hide behind."""


class Batch(NamedTuple):
    """The requests of a pass."""

    slots: Int[Array, " B"]
    tables: Int[Array, "B M"]
    """Their pages; 0 behind the last."""
    lengths: Int[Array, " B"]
    """Tokens of each that the cache has; a speculative `decode` takes those of the state instead."""
    choice: Choice
    ends: Int[Array, " B"] | None = None
    """Most tokens of each, answer and all; only for speculation, which must not write behind a request's last page."""


class Read(NamedTuple):
    """What came of reading tokens."""

    hidden: Float[Array, "B N D"]
    """States after the final norm."""
    entries: Float[Array, "L B N W"]
    """What the cache is to keep."""
    loads: Int[Array, "sparse E"]
    """Tokens that chose each expert, without padding; on several devices those of this one."""


@full_precision()
def forward(
    params: PyTree,
    biases: PyTree,
    cache: PagedCache,
    batch: Batch,
    tokens: Int[Array, "B N"],
    counts: Int[Array, " B"],
    *,
    config: ModelConfig,
    runtime: Machine,
    expanded: bool | None = None,
) -> Read:
    """Run new tokens behind those in the cache.

    Args:
        params: stacked, weights in the compute format.
        biases: router biases, stacked.
        tokens: the next tokens of each sequence, padded to one length.
        counts: how many of them are real; states of the others mean nothing.
        expanded: whether attention expands keys and values; by default where that is less work.
    """
    parts = _parts(batch, tokens, counts, config, runtime)
    xs, entries, loads = [params["embed"][runtime.share(part.tokens)] for part in parts], [], []
    dense, sparse = config.first_k_dense_replace, config.num_hidden_layers - config.first_k_dense_replace
    how = {"config": config, "runtime": runtime, "expanded": expanded}
    for i in range(dense):
        layer, found = jax.tree.map(lambda leaf, i=i: leaf[i], params["dense"]), []
        for at, part in enumerate(parts):
            x, new = cached_attention(layer, xs[at], cache, i, part.batch, part.ctx, **how)
            xs[at] = x + feed_forward(layer["ffn"], rms_norm(x, layer["ffn_norm"], config.rms_norm_eps))
            found.append(new)
        entries.append(jnp.concatenate(found)[None])

    if sparse:
        layers, network = moe_networks(params["moe"], sparse, tokens.size, config=config, runtime=runtime)

        def moe_layer(
            part: _Part, x: Array, weights: tuple[PyTree, PyTree], i: Int[Array, ""]
        ) -> tuple[Array, tuple[Array, Array]]:
            layer, bias = weights
            x, new = cached_attention(layer, x, cache, dense + i, part.batch, part.ctx, **how)
            y, aux = network(x, layer, i, part.ctx.for_layer(bias_of(bias)))
            return y, (new, aux.loads)

        stacked = layers, biases.get("moe", {})
        run = _one_by_one if len(parts) == 1 else _in_turns
        xs, new, loads = run(moe_layer, parts, xs, stacked, sparse)
        entries.append(new)
    states = [
        runtime.together(rms_norm(x, params["norm"], config.rms_norm_eps), part.tokens.shape)
        for x, part in zip(xs, parts, strict=True)
    ]
    none = jnp.zeros((0, config.n_routed_experts), jnp.int32)
    return Read(jnp.concatenate(states), jnp.concatenate(entries), loads if sparse else none)


class _Part(NamedTuple):
    """A micro-batch."""

    batch: Batch
    tokens: Int[Array, "B N"]
    ctx: Context


def _parts(batch: Batch, tokens: Array, counts: Array, config: ModelConfig, machine: Machine) -> list[_Part]:
    whole = batch, tokens, counts
    halves = machine.layout.micro_batches if len(tokens) % machine.layout.micro_batches == 0 else 1
    size = len(tokens) // halves
    cut = [jax.tree.map(lambda leaf, i=i: leaf[i * size : (i + 1) * size], whole) for i in range(halves)]
    parts = []
    for rows, ids, own_counts in cut:
        index = jnp.arange(ids.shape[1])
        ctx = Context(*rotation(config, rows.lengths[:, None] + index))
        if machine.is_divided:
            ctx = replace(ctx, real=machine.share((index < own_counts[:, None]) & are_requests(rows)[:, None]))
        parts.append(_Part(rows, ids, ctx))
    return parts


def are_requests(batch: Batch) -> Bool[Array, " B"]:
    """Return which rows of a batch are no padding: page 0 is nobody's."""
    return batch.tables[:, 0] > 0


Layer = Callable[[_Part, Array, PyTree, Int[Array, ""]], tuple[Array, tuple[Array, Array]]]
"""From a micro-batch, its states, a layer's weights and its number to states, and entries of the cache and loads."""


def _one_by_one(
    layer: Layer, parts: Sequence[_Part], xs: Sequence[Array], stacked: PyTree, count: int
) -> tuple[list[Array], Array, Array]:
    (part,), (x,) = parts, xs
    x, (entries, loads) = jax.lax.scan(lambda x, each: layer(part, x, *each), x, (stacked, jnp.arange(count)))
    return [x], entries, loads


def _in_turns(
    layer: Layer, parts: Sequence[_Part], xs: Sequence[Array], stacked: PyTree, count: int
) -> tuple[list[Array], Array, Array]:
    """Run the layers of two micro-batches, some at once, so that one computes while the other's tokens travel."""

    def some_layers(
        xs: tuple[Array, ...], start: Int[Array, ""] | int, *, size: int
    ) -> tuple[tuple[Array, ...], list[PyTree]]:
        weights = [_layer_of(stacked, start + j) for j in range(size)]
        ends, made = [], []
        for name, part, x in zip("FB", parts, xs, strict=True):
            with jax.named_scope(name):
                found = []
                for j in range(size):
                    # Else XLA would read what the cache has for all of these layers, and both halves, at once.
                    x, number = jax.lax.optimization_barrier((x, start + j))
                    x, new = layer(part, x, weights[j], number)
                    found.append(new)
            ends.append(x)
            made.append(found)
        return tuple(ends), made

    def turn(
        xs: tuple[Array, ...], start: Int[Array, ""] | int, size: int
    ) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        xs, (first, second) = interleaved(without_gradient_rules(partial(some_layers, size=size)))(xs, start)
        pairs = list(zip(first, second, strict=True))
        entries = jnp.stack([jnp.concatenate([a, b]) for (a, _), (b, _) in pairs])
        return xs, (entries, jnp.stack([a + b for (_, a), (_, b) in pairs]))

    def step(carry: tuple[Array, tuple[Array, ...], tuple[Array, Array]]) -> tuple:
        number, xs, found = carry
        xs, new = turn(xs, number * size, size)
        return number + 1, xs, put(found, new, number * size)

    def put(found: tuple[Array, ...], new: tuple[Array, ...], start: Int[Array, ""] | int) -> tuple[Array, ...]:
        return jax.tree.map(partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0), found, new)

    xs, size = tuple(xs), min(MOST_LAYERS, count)
    turns, rest = divmod(count, size)  # V3 has 58 = 14 * 4 + 2
    made = jax.eval_shape(partial(turn, size=size), xs, 0)[1]
    found = tuple(jnp.zeros((count, *part.shape[1:]), part.dtype) for part in made)
    # Not a scan, whose numbers of layers are data: see `_layer_of`.
    _, xs, found = jax.lax.while_loop(lambda carry: carry[0] < turns, step, (0, xs, found))
    if rest:
        xs, new = turn(xs, turns * size, rest)
        found = put(found, new, turns * size)
    entries, loads = found
    return list(xs), entries, loads


def _layer_of(stacked: PyTree, i: Int[Array, ""]) -> PyTree:
    """Cut a layer out of a stack.

    Where `i` is computed from a loop's counter alone, XLA's products on GPUs read the weights where they are: the host
    knows their addresses. Otherwise it copies them.
    """

    def cut(leaf: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False, allow_negative_indices=False)

    return jax.tree.map(cut, stacked)


def moe_networks(
    layers: PyTree, count: int, tokens: int, *, config: ModelConfig, runtime: Machine
) -> tuple[PyTree, Callable[[Array, PyTree, Int[Array, ""] | int, Context], tuple[Array, MoEAux]]]:
    """Return stacked MoE layers to be cut, and `(x, layer, i, ctx) -> (y, aux)`: the second half of one of them.

    Args:
        layers: with `tables`, see `replicas`, where experts have several slots.
        count: how many layers there are.
        tokens: of a pass.
    """
    layers, row = apart(layers)
    few = are_few(tokens, config.num_experts_per_tok, config.n_routed_experts)
    in_blocks = runtime.is_divided or not few or _by_kernels(row["down"])

    def exchange(layer: PyTree, i: Int[Array, ""] | int) -> Exchange:
        divided = runtime.is_divided
        inner = runtime.exchange_of_layer(config, layer.get("tables")) if divided else exchange_locally
        return exchange_within_row(inner, i, count, in_blocks=in_blocks)

    def network(x: Array, layer: PyTree, i: Int[Array, ""] | int, ctx: Context) -> tuple[Array, MoEAux]:
        normalized = rms_norm(x, layer["ffn_norm"], config.rms_norm_eps)
        machine = replace(runtime, exchange=exchange(layer, i))
        y, aux = moe(layer["moe"] | {"experts": row}, normalized, ctx, config=config, runtime=machine)
        return x + y, aux

    return layers, network


def _by_kernels(weight: Array | Fp8Weight) -> bool:
    """Whether products are the FP8 kernels', whose groups of rows begin at multiples of 128."""
    return isinstance(weight, Fp8Weight) and resolve(weight.recipe.impl) != "xla"


Form = Callable[[Float[Array, "B N Q"], Float[Array, "B N W"], ModelConfig], Float[Array, "B N D"]]
"""Attention over memory and new tokens, from what queries are made of, and the entries of the new tokens."""


def first_half(
    params: PyTree, x: Float[Array, "b n D"], ctx: Context, form: Form, *, config: ModelConfig, runtime: Machine
) -> tuple[Float[Array, "b n D"], Float[Array, "B N W"]]:
    """Return the first half of a layer for new tokens, and what the cache is to keep of them.

    Args:
        params: of the layer.
    """
    own = params["attention"]
    parts = compressed(own, rms_norm(x, params["attention_norm"], config.rms_norm_eps), config=config)
    to_queries, to_latents = runtime.together(parts, ctx.cos.shape[:2])
    new = jnp.concatenate(latents(own, to_latents, ctx, config=config), axis=-1)
    return x + runtime.summed(form(to_queries, new, runtime.heads(config))), new


def cached_attention(
    params: PyTree,
    x: Float[Array, "b n D"],
    cache: PagedCache,
    layer: Int[Array, ""] | int,
    batch: Batch,
    ctx: Context,
    *,
    config: ModelConfig,
    runtime: Machine,
    expanded: bool | None = None,
    first: int = 0,
) -> tuple[Float[Array, "b n D"], Float[Array, "B N W"]]:
    """Return the first half of a layer for new tokens behind those in the cache, and what that is to keep of them.

    Args:
        params: of the layer.
        layer: its place in the cache.
        expanded: see `forward`.
        first: the first token of a sequence that the layer knows; those before it see just themselves.
    """
    width = ctx.cos.shape[1]
    expanded = is_expansion_cheaper(config, width) if expanded is None else expanded
    index = jnp.arange(width)
    visible = (index <= index[:, None])[None]
    if first:
        visible &= (batch.lengths[:, None, None] + index >= first) | (index == index[:, None])

    def form(to_queries: Array, new: Array, config: ModelConfig) -> Array:
        attend = _expanded if expanded else _absorbed
        return attend(params["attention"], to_queries, new, visible, cache, layer, batch, first, ctx, config)

    return first_half(params, x, ctx, form, config=config, runtime=runtime)


def _absorbed(params, to_queries, new, visible, cache, layer, batch, first, ctx, config):
    memory = read(cache, layer, batch.tables, batch.lengths, new.dtype)
    known = places_known(jnp.arange(memory.shape[1]), batch, first)
    pieces = [(memory, jnp.broadcast_to(known[:, None], (*new.shape[:2], memory.shape[1]))), (new, visible)]
    return absorbed_attention(params, to_queries, pieces, ctx, config=config)


def places_known(places: Int[Array, " S"], batch: Batch, first: int) -> Bool[Array, "B S"]:
    """Return which places of each sequence a layer has in the cache."""
    known = places < batch.lengths[:, None]
    return known & (places >= first) if first else known


def _expanded(params, to_queries, new, visible, cache, layer, batch, first, ctx, config):
    pages = min(max(1, BLOCK // cache.page_size), batch.tables.shape[1])
    blocks = -(-batch.tables.shape[1] // pages)
    tables = jnp.pad(batch.tables, ((0, 0), (0, blocks * pages - batch.tables.shape[1])))

    def block(i: Int[Array, ""]) -> tuple[Float[Array, "B S W"], Bool[Array, "B S"]]:
        start = i * pages * cache.page_size
        part = jax.lax.dynamic_slice_in_dim(tables, i * pages, pages, axis=1)
        known = places_known(start + jnp.arange(pages * cache.page_size), batch, first)
        return read(cache, layer, part, batch.lengths, new.dtype, start), known

    return expanded_attention(params, to_queries, new, visible, block, blocks, ctx, config=config)
