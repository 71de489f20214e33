"""Losses through a pipeline without gradients: sequences follow each other through the stages."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from dsjax.config import Config
from dsjax.model.context import Context, context
from dsjax.model.layers import cast_weights, embedded
from dsjax.model.layout import layers_of
from dsjax.model.transformer import dense_layers, predictions
from dsjax.numerics.weights import apart, quantize_weights
from dsjax.parallel.sharding import gather
from dsjax.pipeline.executor import AXIS
from dsjax.pipeline.stages import (
    FIRST,
    LAST,
    PlaceContext,
    places_of,
    route_of,
    run_place,
    stage_layout,
)
from dsjax.runtime import Runtime


def losses_of_device(
    config: Config,
    runtime: Runtime,
    divided: PyTree,
    parts: PyTree,
    biases: PyTree,
    tokens: Int[Array, "b S1"],
    segments: Int[Array, "b S"] | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the main and the MTP loss of a device's sequences, inside `shard_map`: zero but on the last stage's rank.

    See `pipeline.step.loss_and_grads_of_device` for the arguments.
    """
    model, ranks, count = config.model, config.mesh.pipe, tokens.shape[0]
    route, rank = route_of(config), lax.axis_index(AXIS)
    layout = stage_layout(model, route.stages)
    cast = cast_weights(parts, runtime.compute_dtype)
    # A bidirectional pipeline's second copy has nothing to do here.
    slots = range(2 if route.kind == "vee" else 1)
    stage = [rank, route.stages - 1 - rank]

    def rows(tree: PyTree, slot: int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[slot * layout.places : (slot + 1) * layout.places], tree)

    weights = [places_of(gather(rows(cast["moe"], slot), divided["moe"]), layout.places) for slot in slots]
    weights = [[apart(quantize_weights(place, runtime.recipe)) for place in of_slot] for of_slot in weights]
    place_biases = [places_of(rows(biases.get("moe", {}), slot), layout.places) for slot in slots]
    edges = {name: part for name, part in cast.items() if name != "moe"}

    def gathered(names: tuple[str, ...]) -> PyTree:
        whole = {name: gather(edges[name], divided[name]) for name in names if name in edges}
        return quantize_weights(whole, runtime.recipe)

    def ctx_of(sequence: Int[Array, ""]) -> Context:
        documents = None if segments is None else segments[sequence][None]
        return context(model, tokens.shape[1] - 1, segments=documents)

    def run_layers_of(slot: int, x: Array, ctx: Context) -> Array:
        for place, (params, quantized) in enumerate(weights[slot]):
            place_ctx = PlaceContext(ctx, place_biases[slot][place], quantized)

            def run(x: Array, params: PyTree = params, place_ctx: PlaceContext = place_ctx) -> Array:
                return run_place(params, x, place_ctx, config=model, runtime=runtime)[0]

            x = lax.cond(jnp.asarray(layout.counts)[stage[slot]] > place, run, lambda x: x, x)
        return x

    def tick(carry: tuple, number: Int[Array, ""]) -> tuple[tuple, None]:
        arrived, totals = carry
        left = []
        for slot in slots:
            sequence = number - stage[slot]
            in_use = (sequence >= 0) & (sequence < count)
            sequence = jnp.clip(sequence, 0, count - 1)
            window, ctx = tokens[sequence][None], ctx_of(sequence)

            def embed(window=window, ctx=ctx) -> Array:
                own = gathered(FIRST)
                dense = layers_of(own.get("dense", {}), model.first_k_dense_replace)
                return dense_layers(dense, embedded(own["embed"], window[:, :-1]), ctx, config=model, runtime=runtime)

            x = lax.cond(stage[slot] == 0, embed, lambda slot=slot: arrived[slot])
            y = run_layers_of(slot, x, ctx)

            def finish(y=y, window=window, ctx=ctx) -> tuple[Array, Array]:
                found = predictions(gathered(LAST), biases, y, window, ctx, config=model, runtime=runtime)
                return found.main, found.mtp

            zeros = (jnp.float32(0), jnp.float32(0))
            found = lax.cond((stage[slot] == route.stages - 1) & in_use, finish, lambda zeros=zeros: zeros)
            totals = jax.tree.map(jnp.add, totals, found)
            left.append(y)
        right = [(r, r + 1) for r in range(ranks - 1)]
        coming = [lax.ppermute(left[0], AXIS, right)]
        if route.kind == "vee":
            back = lax.ppermute(left[1], AXIS, [(b, a) for a, b in right])
            coming.append(jnp.where(rank == ranks - 1, left[0], back))
        return (tuple(coming), totals), None

    nothing = jnp.zeros((1, tokens.shape[1] - 1, model.hidden_size), runtime.compute_dtype)
    start = (tuple(nothing for _ in slots), (jnp.float32(0), jnp.float32(0)))
    (_, (main, mtp)), _ = lax.scan(tick, start, jnp.arange(count + route.stages - 1))
    return main / count, mtp / count
