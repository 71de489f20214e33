"""One optimizer step: losses, gradients, AdamW, router biases."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from dsjax.config import Config
from dsjax.model.layers import cast_weights
from dsjax.model.moe import MoEAux
from dsjax.model.router import updated_bias
from dsjax.model.transformer import losses
from dsjax.numerics.instruments import Counts
from dsjax.parallel.exchange import exchange_of
from dsjax.parallel.mesh import AXES, BATCH_AXES, make_mesh
from dsjax.parallel.sharding import batch_spec, gather, partitions, specs
from dsjax.pipeline.evaluate import losses_of_device
from dsjax.pipeline.stages import rows_of
from dsjax.pipeline.step import DeviceLosses, loss_and_grads_of_device
from dsjax.runtime import Runtime, full_precision
from dsjax.training import optimizer
from dsjax.training.state import TrainState, state_shardings


class Knobs(NamedTuple):
    """What the schedule sets for a step; arguments of the compiled program, so that they compile nothing anew."""

    learning_rate: Float[Array, ""] | float
    mtp_weight: Float[Array, ""] | float
    bias_speed: Float[Array, ""] | float


class StepLosses(NamedTuple):
    """What the micro-batches of a step reported together."""

    main: Float[Array, ""]
    """Cross-entropy of the next token, nats."""
    mtp: Float[Array, ""]
    """Mean over the MTP modules; 0 without them."""
    aux: MoEAux | None
    """Of the MoE layers, then of the MTP modules; None where there are neither."""
    fp8: dict[str, Counts] | None = None
    """What FP8 did to the step's weights, by their kind."""


LossAndGrads = Callable[[PyTree, PyTree, Int[Array, "A B S1"], Float[Array, ""]], tuple[StepLosses, PyTree]]
"""`(params, biases, micro_batches, mtp_weight) -> (losses, gradients)`: losses averaged over the step's micro-batches,
loads and rounds added up, gradients float32 and divided over the mesh as the parameters are."""

TrainStep = Callable[[TrainState, Int[Array, "A B S1"], Knobs], tuple[TrainState, dict[str, Array]]]


def segment_ids(tokens: Int[Array, "*B S"], end_of_document: int) -> Int[Array, "*B S"]:
    """Return the number of the document of each token; the token that ends a document belongs to it."""
    ends = (tokens == end_of_document).astype(jnp.int32)
    return jnp.cumsum(ends, axis=-1) - ends


def _in_order(aux: MoEAux, config: Config) -> MoEAux:
    """Return the report of layers in their order, from rows as a pipeline holds them."""
    rows = rows_of(config)
    if rows is None:
        return aux
    order = [rows.index(layer) for layer in range(sum(row is not None for row in rows))]
    order += range(len(rows), len(rows) + config.model.num_nextn_predict_layers)
    return jax.tree.map(lambda leaf: leaf[jnp.asarray(order)], aux)


def _segments(config: Config, tokens: Array, end_of_document: int | None) -> Array | None:
    """Return the documents of a window's input tokens where attention is to stop at their borders."""
    if not config.data.document_mask:
        return None
    if end_of_document is None:
        raise ValueError("data.document_mask = True: needs the token that ends a document, which data.tokenizer has")
    return segment_ids(tokens[..., :-1], end_of_document)


def accumulated_loss_and_grads(
    config: Config, runtime: Runtime, mesh: Mesh | None = None, end_of_document: int | None = None
) -> LossAndGrads:
    """Return the loss and gradients of a step on a mesh: micro-batches in the order of the run's schedule, added up.

    Each device gathers the weights once, works on its own sequences, and reduces its gradients once, at the end; with a
    pipeline those of its ends for every micro-batch. Parameters and gradients are divided as `parallel.sharding` has
    it, the rows of a micro-batch over the mesh.

    Args:
        mesh: by default one of `config.mesh` and the first devices.
        end_of_document: the token that ends a document, needed where `data.document_mask` is set.
    """
    mesh, runtime = mesh or make_mesh(config.mesh), on_mesh(runtime, config)

    def loss_and_grads(params: PyTree, biases: PyTree, micro_batches: Array, mtp_weight: Array):
        divided, count = partitions(params, mesh), micro_batches.shape[0]

        def on_device(parts: PyTree, biases: PyTree, micro_batches: Array, mtp_weight: Array):
            segments = _segments(config, micro_batches, end_of_document)
            losses, grads = loss_and_grads_of_device(
                config, runtime, divided, parts, biases, micro_batches, segments, mtp_weight
            )
            # A device's objective is the mean of its own sequences, the step's is the mean of all of them.
            scale = 1 / (count * config.mesh.batch_shards)
            return jax.tree.map(lambda leaf: leaf[None], losses), jax.tree.map(lambda g: g * scale, grads)

        divided_specs = specs(params, mesh)
        losses, grads = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(divided_specs, bias_specs(biases), batch_spec(3, axis=1), PartitionSpec()),
            out_specs=(PartitionSpec(AXES), divided_specs),
            check_vma=False,
        )(params, biases, micro_batches, mtp_weight)
        return _over_devices(losses, count, mesh), grads

    return loss_and_grads


def bias_specs(biases: PyTree) -> PyTree:
    """Return how a step divides router biases: those of MoE layers over the stages that have them."""
    return {name: PartitionSpec("pipe" if name == "moe" else None) for name in biases}


def on_mesh(runtime: Runtime, config: Config) -> Runtime:
    """Return the runtime with the expert exchange that the run's mesh needs, unless it has one."""
    return replace(runtime, exchange=runtime.exchange or exchange_of(config))


def _over_devices(losses: DeviceLosses, count: int, mesh: Mesh) -> StepLosses:
    """Return the losses of a step of `count` micro-batches from each device's, [devices, ...].

    Outside of `shard_map`, where a sum is over all devices and nothing else: the routers' biases must move by the same
    counts everywhere.
    """
    losses = jax.tree.map(lambda leaf: leaf.reshape(mesh.shape["pipe"], -1, *leaf.shape[1:]), losses)

    def over_rows(aux: MoEAux) -> MoEAux:
        per_rank = MoEAux(aux.loads.sum(axis=1), aux.balance_loss.mean(axis=1) / count, aux.rounds.max(axis=1))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), per_rank)

    at_end = jax.tree.map(lambda leaf: leaf.sum(axis=0, keepdims=True), losses.mtp_modules)
    every = [over_rows(aux) for aux in (losses.layers, at_end) if aux is not None]
    # Rows of all ranks meet here: divided, XLA would move them by all-to-alls.
    every = jax.lax.with_sharding_constraint(every, NamedSharding(mesh, PartitionSpec()))
    aux = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *every) if every else None
    main, mtp = (of_devices.sum(axis=0).mean() / count for of_devices in (losses.main, losses.mtp))
    return StepLosses(main, mtp, aux, jax.tree.map(jnp.sum, losses.fp8))


def make_train_step(
    config: Config,
    runtime: Runtime,
    mesh: Mesh | None = None,
    loss_and_grads: LossAndGrads | None = None,
    end_of_document: int | None = None,
) -> TrainStep:
    """Return the compiled `(state, micro_batches, knobs) -> (state, metrics)`; it takes over the state's memory.

    A step whose loss or gradient norm is not finite changes nothing but the counters. Metrics are float32 scalars
    `loss`, `loss_mtp`, `loss_balance` (before its weight, mean over layers), `grad_norm`, the boolean `finite`, and of
    the MoE layers and MTP modules `loads`, int32[layers, E], and `rounds`, int32[layers], of all micro-batches. In FP8
    `fp8` says what it did to the weights (`numerics.instruments.Counts`, by kind).

    Args:
        mesh: by default one of `config.mesh` and the first devices.
        loss_and_grads: how gradients are made; by default `accumulated_loss_and_grads`.
    """
    mesh = mesh or make_mesh(config.mesh)
    loss_and_grads = loss_and_grads or accumulated_loss_and_grads(config, runtime, mesh, end_of_document)

    everywhere = NamedSharding(mesh, PartitionSpec())

    @full_precision()
    def step(state: TrainState, micro_batches: Array, knobs: Knobs) -> tuple[TrainState, dict[str, Array]]:
        parts, grads = loss_and_grads(state.params, state.biases, micro_batches, jnp.float32(knobs.mtp_weight))
        params, moments, norm = optimizer.apply(
            state.params, state.moments, grads, knobs.learning_rate, config.optimizer
        )
        biases = _update_biases(state.biases, parts, knobs.bias_speed)
        finite = jnp.isfinite(parts.main) & jnp.isfinite(parts.mtp) & jnp.isfinite(norm)
        moved = replace(state, params=params, biases=biases, moments=moments)
        state = _unless_finite(finite, moved, state)
        state = jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))
        return state, jax.lax.with_sharding_constraint(_metrics(parts, norm, finite, config), everywhere)

    return jax.jit(step, donate_argnums=0)


def _update_biases(biases: PyTree, parts: StepLosses, speed: Float[Array, ""]) -> PyTree:
    """Move every router bias once, MTP modules' too, by the loads of the whole step."""
    if not biases:
        return biases
    leaves, structure = jax.tree.flatten(biases)
    # Loads come in the order of the stacked tree's keys: "moe" before "mtp".
    splits = jnp.split(parts.aux.loads, [leaf.shape[0] for leaf in leaves[:-1]])
    return structure.unflatten([updated_bias(b, loads, speed) for b, loads in zip(leaves, splits, strict=True)])


def _unless_finite(finite: Bool[Array, ""], moved: TrainState, state: TrainState) -> TrainState:
    """Return the moved state, or the old one where the step was not finite; the counters move in any case."""
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
    return replace(
        kept,
        step=state.step + 1,
        skipped=state.skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )


def _metrics(parts: StepLosses, norm: Array, finite: Array, config: Config) -> dict[str, Array]:
    metrics = {"loss": parts.main, "loss_mtp": parts.mtp, "grad_norm": norm, "finite": finite}
    if parts.aux is not None:
        aux = _in_order(parts.aux, config)
        metrics |= {"loss_balance": aux.balance_loss.mean(), "loads": aux.loads, "rounds": aux.rounds}
    return metrics | ({"fp8": parts.fp8} if parts.fp8 else {})


def make_evaluate(
    config: Config, runtime: Runtime, mesh: Mesh | None = None, end_of_document: int | None = None
) -> Callable[[PyTree, PyTree, Int[Array, "B S1"]], dict[str, Float[Array, ""]]]:
    """Return the compiled `(params, biases, tokens) -> {"loss", "loss_mtp"}`, means over the batch, in nats."""
    mesh, runtime = mesh or make_mesh(config.mesh), on_mesh(runtime, config)

    @jax.jit
    @full_precision()
    def evaluate(params: PyTree, biases: PyTree, tokens: Array) -> dict[str, Array]:
        divided = partitions(params, mesh)

        def on_device(parts: PyTree, biases: PyTree, tokens: Array) -> dict[str, Array]:
            segments = _segments(config, tokens, end_of_document)
            if config.mesh.pipe > 1:
                main, mtp = losses_of_device(config, runtime, divided, parts, biases, tokens, segments)
                main, mtp = jax.lax.psum((main, mtp), "pipe")
            else:
                weights = gather(cast_weights(parts, runtime.compute_dtype), divided)
                found = losses(weights, biases, tokens, config=config.model, runtime=runtime, segments=segments)
                main, mtp = found.main, found.mtp
            return {"loss": main[None], "loss_mtp": mtp[None]}

        found = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs(params, mesh), bias_specs(biases), batch_spec(2, axis=0)),
            out_specs=PartitionSpec(BATCH_AXES),
            check_vma=False,
        )(params, biases, tokens)
        return jax.tree.map(jnp.mean, found)

    return evaluate
