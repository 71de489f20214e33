"""Loss and gradients of a step through a pipeline, on one device of the mesh.

One copy of every weight is kept, divided over the mesh. From it a step makes what its schedule needs: a bidirectional
pipeline's second copy comes from the mirror rank, and goes back as gradients; ranks with odd numbers hold their two
stages the other way round, so that in steady state all ranks do the same (see `pipeline.program`).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from dsjax.config import Config
from dsjax.model.context import Context, context
from dsjax.model.layers import cast_weights, embedded
from dsjax.model.layout import layers_of
from dsjax.model.moe import MoEAux
from dsjax.model.transformer import dense_layers, predictions
from dsjax.numerics.instruments import Counts
from dsjax.numerics.weights import apart, counts_of_weights, quantize_weights, together, with_recipe
from dsjax.parallel.sharding import Partition, gather, reduce_scatter
from dsjax.pipeline.executor import AXIS, Executor, Model
from dsjax.pipeline.program import Program, compile_program
from dsjax.pipeline.stages import (
    FIRST,
    LAST,
    PlaceContext,
    places_of,
    run_layers,
    run_place,
    schedule_of,
    stage_layout,
)
from dsjax.runtime import Runtime

PIECE = 2**29
"""Bytes in float32 of a gradient at an end of the pipeline that are reduced at once; V3's head has 3.7 GB."""


class DeviceLosses(NamedTuple):
    """What one device has of a step's losses, summed over micro-batches; zero where another rank has the last stage."""

    main: Float[Array, ""]
    mtp: Float[Array, ""]
    layers: MoEAux | None
    """Of the rank's rows of MoE layers."""
    mtp_modules: MoEAux | None
    fp8: dict[str, Counts]
    """What FP8 did to the weights that are quantized once; of the step, not of a micro-batch."""


@functools.lru_cache(maxsize=16)
def program_of(config: Config, micro_batches: int) -> Program:
    """Return the program of a step of so many micro-batches."""
    schedule = schedule_of(config, micro_batches)
    if config.pipeline.overlap:
        return compile_program(schedule)
    one_by_one = tuple(tuple((op,) for action in actions for op in action) for actions in schedule.lists)
    return compile_program(replace(schedule, lists=one_by_one), bundled=False)


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
    executor, slots, fp8 = executor_of_device(
        config, runtime, divided, parts, biases, micro_batches, segments, mtp_weight
    )
    results = executor.run()
    if config.mesh.pipe == 1:
        ((moe,),), ((layers,),) = results.grads, results.aux
        grads = results.edge_grads | ({"moe": moe} if "moe" in divided else {})
        grads = reduce_scatter(grads, {name: divided[name] for name in grads})
    else:
        of_layer = jax.tree.map(Partition.of_layer, divided["moe"])
        layers = slots.close(results.aux)
        grads = lax.psum(results.edge_grads, AXIS)
        grads["moe"] = slots.close(results.grads, lambda grad: reduce_scatter(grad, of_layer))
    main, mtp, mtp_modules = results.report
    return DeviceLosses(main, mtp, layers, mtp_modules, fp8), grads


def executor_of_device(
    config: Config,
    runtime: Runtime,
    divided: PyTree,
    parts: PyTree,
    biases: PyTree,
    micro_batches: Int[Array, "A b S1"],
    segments: Int[Array, "A b S"] | None,
    mtp_weight: Float[Array, ""],
) -> tuple[Executor, "_Slots", dict[str, Counts]]:
    """Return what runs a step on one device, weights gathered and quantized, and what that did to them.

    For arguments see above.
    """
    model, ranks = config.model, config.mesh.pipe
    sequences, length = micro_batches.shape[1], micro_batches.shape[2] - 1
    program = program_of(config, micro_batches.shape[0])
    route = program.schedule.route
    layout = stage_layout(model, route.stages)
    slots = _Slots(route.kind, ranks, layout.places)
    edges = {name: part for name, part in parts.items() if name != "moe"}
    rows = cast_weights(parts.get("moe", {}), runtime.compute_dtype)
    stages = [gather(slot, divided.get("moe", {})) for slot in slots.open(rows)]
    slot_biases = slots.open(biases.get("moe", {}))
    if ranks == 1:
        run, counts = run_layers, [(1,)]
        edges = gather(cast_weights(edges, runtime.compute_dtype), {name: divided[name] for name in edges})
        weights, place_biases = (tuple((stage,) for stage in trees) for trees in (stages, slot_biases))
    else:
        run, counts = run_place, [tuple(layout.counts[stage] for stage in own) for own in program.stages]
        weights, place_biases = (
            tuple(places_of(stage, layout.places) for stage in trees) for trees in (stages, slot_biases)
        )

    # Quantized once per step, but at the ends of a pipeline, whose weights are gathered where they are used.
    weights = [[quantize_weights(place, runtime.recipe) for place in slot] for slot in weights]
    if ranks == 1:
        edges = quantize_weights(edges, runtime.recipe)
    fp8 = counts_of_weights(weights, edges)
    pairs = [[apart(place) for place in slot] for slot in weights]
    weights, quantized = (tuple(tuple(pair[part] for pair in slot) for slot in pairs) for part in (0, 1))
    if ranks == 1:
        edges, quantized_edges = apart(edges)
    if fp8:
        # Counted now: XLA would do it last, and keep the weights of all layers in 16 bits for the whole step.
        quantized, fp8 = lax.optimization_barrier((quantized, fp8))

    def ctx_of(micro_batch: Int[Array, ""]) -> Context:
        documents = None if segments is None else segments[micro_batch]
        return context(model, length, segments=documents, balance_weight=config.train.balance_weight)

    def model_with(runtime: Runtime) -> Model:
        def in_use(parts: PyTree, at: PyTree) -> PyTree:
            return quantize_weights(_in_use(parts, at, runtime.compute_dtype), runtime.recipe)

        def ready(edges: PyTree) -> Mapping[str, PyTree]:
            """Return edges as layers use them: a single rank has gathered and quantized them for the whole step."""
            if ranks == 1:
                return together(edges, {name: quantized_edges[name] for name in edges})
            return _WhenRead(
                {name: lambda one=name: in_use({one: edges[one]}, {one: divided[one]})[one] for name in edges}
            )

        def embed(edges: PyTree, micro_batch: Int[Array, ""]) -> Float[Array, "b S D"]:
            own, ctx = ready(edges), ctx_of(micro_batch)
            x = embedded(own["embed"], micro_batches[micro_batch, :, :-1])
            run = functools.partial(dense_layers, ctx=ctx, config=model, runtime=runtime)
            if ranks == 1:
                return run(layers_of(own.get("dense", {}), model.first_k_dense_replace), x)
            at = jax.tree.map(Partition.of_layer, divided.get("dense", {}))
            for parts in layers_of(edges.get("dense", {}), model.first_k_dense_replace):
                # One by one: a layer is gathered when its turn comes, and its gradients are sent before the next.
                parts, x = lax.optimization_barrier((parts, x))
                x = run([in_use(parts, at)], x)
            return x

        def finish(edges: PyTree, y: Float[Array, "b S D"], micro_batch: Int[Array, ""]):
            tokens, ctx = micro_batches[micro_batch], ctx_of(micro_batch)
            found = predictions(
                ready(edges), biases, y, tokens, ctx, config=model, runtime=runtime, mtp_weight=mtp_weight
            )
            return found.objective, (found.main, found.mtp, found.aux)

        return Model(
            chunk=functools.partial(run, config=model, runtime=runtime),
            context=lambda slot, place, micro_batch: PlaceContext(
                ctx_of(micro_batch), place_biases[slot][place], with_recipe(quantized[slot][place], runtime.recipe)
            ),
            embed=embed,
            finish=finish,
            first=tuple(name for name in FIRST if name in edges),
            last=tuple(name for name in LAST if name in edges),
        )

    def executor_with(runtime: Runtime, in_pairs: Executor | None = None) -> Executor:
        x = jax.ShapeDtypeStruct((sequences, length, model.hidden_size), runtime.compute_dtype)
        return Executor(program, model_with(runtime), weights, counts, edges, x, in_pairs)

    sms = config.kernels.communication_sms
    return executor_with(runtime, executor_with(runtime.leaving(sms)) if sms else None), slots, fp8


class _WhenRead(Mapping[str, PyTree]):
    """Weights that are gathered where they are read: what is read last can be let go, and its gradient sent, first."""

    def __init__(self, made: Mapping[str, Callable[[], PyTree]]):
        self.made = made

    def __getitem__(self, name: str) -> PyTree:
        return self.made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


def _in_use(parts: PyTree, divided: PyTree, dtype: DTypeLike) -> PyTree:
    """Return weights as they compute from a device's parts of the masters; the parts get float32 gradients, summed."""

    @jax.custom_vjp
    def in_use(parts: PyTree) -> PyTree:
        return gather(cast_weights(parts, dtype), divided)

    def backward(_: None, grads: PyTree) -> tuple[PyTree]:
        return (jax.tree.map(_reduced_in_pieces, grads, divided),)

    in_use.defvjp(lambda parts: (in_use(parts), None), backward)
    return in_use(parts)


def _reduced_in_pieces(grad: Array, at: Partition) -> Array:
    """Return `reduce_scatter` of a gradient, of so much at once that the float32 which it sends is at most `PIECE`."""
    free = [axis for axis in range(grad.ndim) if axis != at.zero_axis]
    if 4 * grad.size <= PIECE or not free:
        return reduce_scatter(grad, at)
    axis = max(free, key=lambda axis: grad.shape[axis])
    count = next(n for n in range(1, grad.shape[axis] + 1) if not grad.shape[axis] % n and 4 * grad.size <= n * PIECE)
    parts: list[Array] = []
    for piece in jnp.split(grad, count, axis):
        if parts:
            parts[-1], piece = lax.optimization_barrier((parts[-1], piece))
        parts.append(reduce_scatter(piece, at))
    return jnp.concatenate(parts, axis)


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

    def close(
        self, slots: Sequence[Sequence[PyTree]], reduced: Callable[[PyTree], PyTree] = lambda of_place: of_place
    ) -> PyTree:
        """The transpose of `open`: add what belongs to the same row, and stack the rows.

        Place after place: all at once, as XLA would do it, needs a second copy of everything.

        Args:
            slots: what each physical slot has of its places.
            reduced: what to do first with each of them.
        """
        rows: list[tuple[PyTree, ...]] = []
        for of_place in zip(*slots, strict=True):
            if rows:
                rows[-1], of_place = lax.optimization_barrier((rows[-1], of_place))
            rows.append(self._closed(tuple(map(reduced, of_place))))
        in_order = [row for of_slot in zip(*rows, strict=True) for row in of_slot]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_order)

    def _closed(self, slots: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        if self.kind == "single":
            return slots
        near, far = self._swapped(slots)
        if self.kind == "bidirectional":
            return (jax.tree.map(jnp.add, near, self._from_mirror(far)),)
        return near, far

    def _from_mirror(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, AXIS, self.mirror), tree)

    def _swapped(self, slots: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        odd = lax.axis_index(AXIS) % 2 == 1
        return tuple(
            jax.tree.map(lambda own, other: jnp.where(odd, other, own), slots[i], slots[1 - i]) for i in (0, 1)
        )
