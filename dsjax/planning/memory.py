"""Every byte of a training run on each of its devices, before it runs: read off the program that would be compiled.

One program runs on all devices, so all need the same; ranks of a pipeline differ in how much of it they use. What waits
between operations is exact. What exists only while an operation works is an estimate (see `planning.liveness`).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import PyTree

from dsjax.config import Config
from dsjax.parallel.mesh import AXES
from dsjax.parallel.sharding import batch_spec, partitions, specs
from dsjax.pipeline.executor import Executor
from dsjax.pipeline.schedule import Kind
from dsjax.pipeline.simulate import peak_activations, peak_deferred
from dsjax.pipeline.step import executor_of_device
from dsjax.planning.liveness import Peak, peak
from dsjax.runtime import Runtime
from dsjax.training.state import TrainState, drawn_state, state_shardings
from dsjax.training.step import bias_specs, on_mesh

CATEGORIES = {
    "master_weights": "float32, each device its part (ZeRO-1)",
    "moments": "of AdamW",
    "router_biases": "and counters",
    "weights_fp8": "codes and scales, of all layers that the device computes",
    "weights_16bit": "what is not in FP8",
    "second_copy": "weights and gradients of the other direction, in DualPipe",
    "gradients": "float32, summed over micro-batches",
    "edges": "embedding, dense layers, MTP, head: a part, and its gradients",
    "activations": "what forward passes keep for backward passes, of all micro-batches in flight",
    "deferred_gradients": "what weight gradients that wait will read",
    "messages": "between stages",
    "tokens": "of a step",
    "communication_buffers": "of the expert exchange, while an op works (estimate)",
    "working_set": "other intermediate results, while an op works (estimate)",
}
"""What takes memory on a device, in the order in which it is shown."""


@dataclass(frozen=True)
class Memory:
    """What a device of a run holds, in bytes."""

    device: dict[str, int]
    """By `CATEGORIES`."""
    host: dict[str, int]
    """In the memory of its host, per device."""
    used_by_rank: list[dict[str, int]] = field(default_factory=list)
    """For each rank of the pipeline, of those categories that ranks fill differently, what it fills."""
    residuals_per_token: float = 0.0
    """Bytes that a layer keeps per token of the device."""
    activation_bytes: int = 0
    """Of what passes from stage to stage."""

    @property
    def total(self) -> int:
        return sum(self.device.values())


def nbytes(tree: PyTree) -> int:
    """Return the bytes of arrays, tracers or shapes."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def abstract_mesh(config: Config) -> AbstractMesh:
    """Return the mesh of a run, without devices."""
    mesh = config.mesh
    return AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def state_bytes(config: Config) -> dict[str, int]:
    """Return what the training state takes on each device between steps, by category."""
    state = jax.eval_shape(lambda: drawn_state(config))
    shardings = state_shardings(state, abstract_mesh(config))
    part = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(at.shard_shape(leaf.shape), leaf.dtype), state, shardings)
    of = {"master_weights": part.params, "moments": (part.moments.first, part.moments.second)}
    found = {name: nbytes(tree) for name, tree in of.items()}
    return found | {"router_biases": nbytes(part) - sum(found.values())}


def memory_of(config: Config, runtime: Runtime) -> Memory:
    """Return what each device of a run holds in a step of the full batch.

    Traced for the platform that `runtime.made_for` says; `runtime` may have kernels for it.
    """
    train, mesh = config.train, abstract_mesh(config)
    micro_batch = train.micro_batch_size or train.batch_size
    shape = train.batch_size // micro_batch, micro_batch, config.data.sequence_length + 1
    found: dict[str, Any] = {}

    def on_device(parts: PyTree, biases: PyTree, micro_batches: jax.Array, mtp_weight: jax.Array) -> jax.Array:
        segments = jnp.zeros_like(micro_batches[..., 1:]) if config.data.document_mask else None
        executor, *_ = executor_of_device(
            config, on_mesh(runtime, config), divided, parts, biases, micro_batches, segments, mtp_weight
        )
        found["device"] = _held(executor, config)
        found["working"] = _working_set(executor)
        found["ranks"] = _used(executor)
        found["kept"] = nbytes(executor.pieces.residual_avals), nbytes(executor.x)
        return mtp_weight

    state: TrainState = jax.eval_shape(lambda: drawn_state(config))
    divided = partitions(state.params, mesh)
    step = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs(state.params, mesh), bias_specs(state.biases), batch_spec(3, axis=1), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    jax.eval_shape(step, state.params, state.biases, tokens, jax.ShapeDtypeStruct((), jnp.float32))

    working: Peak = found["working"]
    buffers = sum(working.by_scope.get(scope, 0) for scope in _EXCHANGE)
    device = state_bytes(config) | found["device"]
    device |= {"tokens": nbytes(tokens) // config.mesh.batch_shards}
    device |= {"communication_buffers": buffers, "working_set": working.nbytes - buffers}
    kept, x = found["kept"]
    layers = 1 if config.mesh.pipe > 1 else max(1, config.model.num_hidden_layers - config.model.first_k_dense_replace)
    per_device = micro_batch * config.data.sequence_length // config.mesh.batch_shards
    average = device["master_weights"] if train.ema_decay else 0
    return Memory(
        device={name: device.get(name, 0) for name in CATEGORIES},
        host={"moving_average": average, "copy_to_host": average},
        used_by_rank=found["ranks"],
        residuals_per_token=kept / layers / per_device,
        activation_bytes=x,
    )


_EXCHANGE = ("dispatch", "combine", "overflow")


def _held(executor: Executor, config: Config) -> dict[str, int]:
    """Return what waits between the ops of a step."""
    state, copies = executor.empty(), 2 if config.pipeline.schedule == "dualpipe" and config.mesh.pipe > 1 else 1
    none, fp8, sixteen = jnp.zeros((), jnp.int32), 0, 0
    for slot, places in enumerate(executor.weights):
        for place, weights in enumerate(places):
            quantized = executor.model.context(slot, place, none).quantized
            fp8 += nbytes(quantized)
            # Masters of quantized weights are zeros that nothing reads.
            sixteen += sum(nbytes(leaf) for leaf in _unquantized(weights, quantized))
    gradients = nbytes(state.results.grads)
    of_one_copy = {"weights_fp8": fp8, "weights_16bit": sixteen, "gradients": gradients}
    held = {name: size // copies for name, size in of_one_copy.items()}
    return held | {
        "second_copy": sum(of_one_copy.values()) - sum(held.values()),
        # In a pipeline they are used from the masters' parts; without, they are gathered for the whole step.
        "edges": (nbytes(executor.edges) if config.mesh.pipe == 1 else 0) + nbytes(state.results.edge_grads),
        "activations": nbytes(state.residuals),
        "deferred_gradients": nbytes(state.tapes),
        "messages": nbytes((state.activations, state.gradients)),
    }


def _unquantized(weights: PyTree, quantized: PyTree) -> Iterable[Any]:
    """Return the parameters of a layer that have no quantized form beside them."""
    paths = {jax.tree_util.keystr(path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(quantized) if path}
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return [leaf for path, leaf in leaves if jax.tree_util.keystr(path) not in paths]


def _used(executor: Executor) -> list[dict[str, int]]:
    """Return of each rank how much of what it holds its own layers fill."""
    schedule, pieces = executor.program.schedule, executor.pieces
    in_flight, waiting = peak_activations(schedule), peak_deferred(schedule)
    used = []
    for rank, counts in enumerate(executor.counts):
        layers = sum(counts) / len(counts)
        used.append(
            {
                "activations": math.ceil(in_flight[rank] * layers * nbytes(pieces.residual_avals)),
                "deferred_gradients": math.ceil(waiting[rank] * layers * nbytes(pieces.tape_avals)),
            }
        )
    return used


def _working_set(executor: Executor) -> Peak:
    """Return the largest peak of the intermediate results of any op of a step."""
    state, table = executor.empty(), jnp.asarray(executor.program.table)
    worst = Peak(0, {})
    branches = [
        branch
        for segment in executor.program.segments
        for phase in range(len(segment.phases))
        for branch in executor.branches(segment, phase)[0]
    ]
    # A pair of a forward and a backward pass has the intermediate results of both; alone they have less.
    pairs = [branch for branch in branches if len({kind.role for kind, _ in branch.opcode} & {Kind.F, Kind.B}) == 2]
    # Layers follow one another, so that one of each stage has as much at once as all.
    ones = (branch._replace(counts=tuple(min(count, 1) for count in branch.counts)) for branch in pairs or branches)
    for branch in dict.fromkeys(ones):
        jaxpr = jax.make_jaxpr(executor.branch(branch))(state, table[0, 0]).jaxpr
        worst = max(worst, peak(jaxpr, _EXCHANGE), key=lambda found: found.nbytes)
    return worst
