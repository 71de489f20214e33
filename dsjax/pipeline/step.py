"""Loss and gradients of a step through a pipeline, on one device of the mesh.

One copy of every weight is kept, divided over the mesh. From it a step makes what its schedule needs: a bidirectional
pipeline's second copy comes from the mirror rank, and goes back as gradients; ranks with odd numbers hold their two
stages the other way round, so that in steady state all ranks do the same (see `pipeline.program`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from dsjax.config import Config
from dsjax.model.context import Context, context
from dsjax.model.layers import cast_weights
from dsjax.model.moe import MoEAux
from dsjax.model.transformer import dense_layers, predictions
from dsjax.numerics.weights import apart, quantize_weights, together
from dsjax.parallel.sharding import gather, reduce_scatter
from dsjax.pipeline import executor
from dsjax.pipeline.executor import AXIS
from dsjax.pipeline.program import Program, compile_program
from dsjax.pipeline.stages import (
    FIRST,
    LAST,
    StageContext,
    places_of,
    run_layers,
    run_stage,
    schedule_of,
    stage_layout,
    with_stand_ins,
)
from dsjax.runtime import Runtime


class DeviceLosses(NamedTuple):
    """What one device has of a step's losses, summed over micro-batches; zero where another rank has the last stage."""

    main: Float[Array, ""]
    mtp: Float[Array, ""]
    layers: MoEAux | None
    """Of the rank's rows of MoE layers."""
    mtp_modules: MoEAux | None


@functools.lru_cache(maxsize=16)
def program_of(config: Config, micro_batches: int) -> Program:
    """Return the program of a step of so many micro-batches."""
    return compile_program(schedule_of(config, micro_batches))


def loss_and_grads_of_device(
    config: Config,
    runtime: Runtime,
    divided: PyTree,
    parts: PyTree,
    biases: PyTree,
    micro_batches: Int[Array, "A b S1"],
    segments: Int[Array, "A b S"] | None,
    mtp_weight: Float[Array, ""],
) -> tuple[DeviceLosses, PyTree]:
    """Return the losses and the gradients of one device, inside `shard_map`, summed over micro-batches.

    The losses are those of the device's own sequences and stages. The gradients are summed over all devices, and
    divided as `parts` are.

    Args:
        divided: how the parameters are divided, see `parallel.sharding`.
        parts: the device's parts of the parameters, stacked, float32; rows of MoE layers as `stages.rows_of` has them.
        biases: router biases; those of MoE layers are the rank's rows.
        segments: documents of the tokens, where attention stops at their borders.
    """
    model, ranks = config.model, config.mesh.pipe
    sequences, length = micro_batches.shape[1], micro_batches.shape[2] - 1
    program = program_of(config, micro_batches.shape[0])
    route = program.schedule.route
    layout = stage_layout(model, route.stages)
    slots = _Slots(route.kind, ranks, layout.places)
    cast = cast_weights(parts, runtime.compute_dtype)
    edges = {name: part for name, part in cast.items() if name != "moe"}

    def gathered(held: PyTree) -> PyTree:
        return gather(held, {name: divided[name] for name in held})

    def reduced(grads: PyTree) -> PyTree:
        return reduce_scatter(grads, {name: divided[name] for name in grads})

    present = jnp.asarray([[layout.present(stage) for stage in stages] for stages in program.stages], bool)
    present = present[lax.axis_index(AXIS)]
    stages = [gather(slot, divided.get("moe", {})) for slot in slots.open(cast.get("moe", {}))]
    slot_biases = slots.open(biases.get("moe", {}))
    if ranks == 1:
        run, weights, edges = run_layers, tuple(stages), gathered(edges)
    else:
        run = run_stage
        weights = tuple(
            with_stand_ins(places_of(stage, layout.places), present[slot]) for slot, stage in enumerate(stages)
        )

    # Quantized once per step, but at the ends of a pipeline, whose weights are gathered where they are used.
    weights, quantized = zip(*[apart(quantize_weights(w, runtime.recipe)) for w in weights], strict=True)
    if ranks == 1:
        edges, quantized_edges = apart(quantize_weights(edges, runtime.recipe))

    def ready(edges: PyTree) -> PyTree:
        if ranks > 1:
            return quantize_weights(edges, runtime.recipe)
        return together(edges, {name: quantized_edges[name] for name in edges})

    def ctx_of(micro_batch: Int[Array, ""]) -> Context:
        documents = None if segments is None else segments[micro_batch]
        return context(model, length, segments=documents, balance_weight=config.train.balance_weight)

    def embed(edges: PyTree, micro_batch: Int[Array, ""]) -> Float[Array, "b S D"]:
        x = edges["embed"][micro_batches[micro_batch, :, :-1]]
        return dense_layers(ready(edges), x, ctx_of(micro_batch), config=model, runtime=runtime)

    def finish(edges: PyTree, y: Float[Array, "b S D"], micro_batch: Int[Array, ""]):
        tokens, ctx = micro_batches[micro_batch], ctx_of(micro_batch)
        main, mtp, aux = predictions(ready(edges), biases, y, tokens, ctx, config=model, runtime=runtime)
        return main + mtp_weight * mtp, (main, mtp, aux)

    results = executor.run(
        program,
        executor.Model(
            chunk=functools.partial(run, config=model, runtime=runtime),
            context=lambda slot, micro_batch: StageContext(
                ctx_of(micro_batch), slot_biases[slot], present[slot], quantized[slot]
            ),
            embed=embed,
            finish=finish,
            # A single rank uses its edges all the time, and has gathered them for the whole step.
            gather=gathered if ranks > 1 else lambda edges: edges,
            reduce=reduced if ranks > 1 else lambda grads: grads,
            first=tuple(name for name in FIRST if name in edges),
            last=tuple(name for name in LAST if name in edges),
        ),
        weights,
        edges,
        jax.ShapeDtypeStruct((sequences, length, model.hidden_size), runtime.compute_dtype),
    )
    if ranks == 1:
        stacked, grads = results.grads, reduced(results.edge_grads)
    else:
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *places) for places in results.grads]
        grads = lax.psum(results.edge_grads, AXIS)
    if "moe" in divided:
        grads["moe"] = slots.close([reduce_scatter(grad, divided["moe"]) for grad in stacked])
    main, mtp, mtp_modules = results.report
    return DeviceLosses(main, mtp, slots.close(list(results.aux)), mtp_modules), grads


class _Slots:
    """From the rows that a rank keeps to the stages in its physical slots, and back with their gradients."""

    def __init__(self, kind: str, ranks: int, places: int):
        self.kind, self.places = kind, places
        self.mirror = [(rank, ranks - 1 - rank) for rank in range(ranks)]

    def open(self, rows: PyTree) -> tuple[PyTree, ...]:
        """Return what each physical slot holds, [places, ...], from the rows of this rank."""
        match self.kind:
            case "single":
                return (rows,)
            case "bidirectional":
                slots = rows, self._from_mirror(rows)
            case "vee":
                parts = (slice(self.places), slice(self.places, None))
                slots = tuple(jax.tree.map(lambda leaf, part=part: leaf[part], rows) for part in parts)
        return self._swapped(slots)

    def close(self, slots: list[PyTree]) -> PyTree:
        """The transpose of `open`: add what belongs to the same rows."""
        if self.kind == "single":
            return slots[0]
        near, far = self._swapped(tuple(slots))
        if self.kind == "bidirectional":
            return jax.tree.map(jnp.add, near, self._from_mirror(far))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), near, far)

    def _from_mirror(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, AXIS, self.mirror), tree)

    def _swapped(self, slots: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        odd = lax.axis_index(AXIS) % 2 == 1
        return tuple(
            jax.tree.map(lambda own, other: jnp.where(odd, other, own), slots[i], slots[1 - i]) for i in (0, 1)
        )
