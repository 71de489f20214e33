"""One optimizer step: losses, gradients, AdamW, router biases."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dsjax.config import Config
from dsjax.model.router import updated_bias
from dsjax.model.transformer import Losses, losses
from dsjax.runtime import Runtime, full_precision
from dsjax.training import optimizer
from dsjax.training.state import TrainState


class Knobs(NamedTuple):
    """What the schedule sets for a step; arguments of the compiled program, so that they compile nothing anew."""

    learning_rate: Float[Array, ""] | float
    mtp_weight: Float[Array, ""] | float
    bias_speed: Float[Array, ""] | float


LossAndGrads = Callable[[PyTree, PyTree, Int[Array, "A B S1"], Float[Array, ""]], tuple[Losses, PyTree]]
"""`(params, biases, micro_batches, mtp_weight) -> (losses, gradients)`: losses averaged over the step's micro-batches,
loads added up, gradients float32."""

TrainStep = Callable[[TrainState, Int[Array, "A B S1"], Knobs], tuple[TrainState, dict[str, Array]]]


def segment_ids(tokens: Int[Array, "*B S"], end_of_document: int) -> Int[Array, "*B S"]:
    """Return the number of the document of each token; the token that ends a document belongs to it."""
    ends = (tokens == end_of_document).astype(jnp.int32)
    return jnp.cumsum(ends, axis=-1) - ends


def _segments(config: Config, tokens: Array, end_of_document: int | None) -> Array | None:
    """Return the documents of a window's input tokens where attention is to stop at their borders."""
    if not config.data.document_mask:
        return None
    if end_of_document is None:
        raise ValueError("data.document_mask = True: needs the token that ends a document, which data.tokenizer has")
    return segment_ids(tokens[:, :-1], end_of_document)


def accumulated_loss_and_grads(config: Config, runtime: Runtime, end_of_document: int | None = None) -> LossAndGrads:
    """Return the loss and gradients of a step on one device: micro-batches one after another, added in float32.

    Args:
        end_of_document: the token that ends a document, needed where `data.document_mask` is set.
    """

    def objective(params: PyTree, biases: PyTree, tokens: Array, mtp_weight: Array) -> tuple[Array, Losses]:
        parts = losses(
            params,
            biases,
            tokens,
            config=config.model,
            runtime=runtime,
            segments=_segments(config, tokens, end_of_document),
            balance_weight=config.train.balance_weight,
        )
        return parts.main + mtp_weight * parts.mtp, parts

    grad = jax.grad(objective, has_aux=True)

    def loss_and_grads(params: PyTree, biases: PyTree, micro_batches: Array, mtp_weight: Array):
        def one(tokens: Array) -> tuple[PyTree, Losses]:
            return grad(params, biases, tokens, mtp_weight)

        count = micro_batches.shape[0]
        if count == 1:
            grads, parts = one(micro_batches[0])
            return parts, grads

        def body(total: tuple[PyTree, Losses], tokens: Array) -> tuple[tuple[PyTree, Losses], None]:
            return jax.tree.map(jnp.add, total, one(tokens)), None

        shapes = jax.eval_shape(one, micro_batches[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, parts), _ = jax.lax.scan(body, zeros, micro_batches)
        grads = jax.tree.map(lambda g: g / count, grads)
        return _mean_losses(parts, count), grads

    return loss_and_grads


def _mean_losses(total: Losses, count: int) -> Losses:
    """Divide summed losses by the number of micro-batches; loads stay sums."""
    aux = total.aux
    if aux is not None:
        aux = aux._replace(balance_loss=aux.balance_loss / count)
    return Losses(total.main / count, total.mtp / count, aux)


def make_train_step(
    config: Config,
    runtime: Runtime,
    loss_and_grads: LossAndGrads | None = None,
    end_of_document: int | None = None,
) -> TrainStep:
    """Return the compiled `(state, micro_batches, knobs) -> (state, metrics)`; it takes over the state's memory.

    A step whose loss or gradient norm is not finite changes nothing but the counters. Metrics are float32 scalars
    `loss`, `loss_mtp`, `loss_balance` (before its weight, mean over layers), `grad_norm`, the boolean `finite`, and
    `loads`, int32[MoE layers + MTP modules, E].

    Args:
        loss_and_grads: how gradients are made; by default `accumulated_loss_and_grads`.
    """
    loss_and_grads = loss_and_grads or accumulated_loss_and_grads(config, runtime, end_of_document)

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
        return state, _metrics(parts, norm, finite)

    return jax.jit(step, donate_argnums=0)


def _update_biases(biases: PyTree, parts: Losses, speed: Float[Array, ""]) -> PyTree:
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


def _metrics(parts: Losses, norm: Array, finite: Array) -> dict[str, Array]:
    metrics = {"loss": parts.main, "loss_mtp": parts.mtp, "grad_norm": norm, "finite": finite}
    if parts.aux is not None:
        metrics |= {"loss_balance": parts.aux.balance_loss.mean(), "loads": parts.aux.loads}
    return metrics


def make_evaluate(
    config: Config, runtime: Runtime, end_of_document: int | None = None
) -> Callable[[PyTree, PyTree, Int[Array, "B S1"]], dict[str, Float[Array, ""]]]:
    """Return the compiled `(params, biases, tokens) -> {"loss", "loss_mtp"}`, means over the batch, in nats."""

    @jax.jit
    @full_precision()
    def evaluate(params: PyTree, biases: PyTree, tokens: Array) -> dict[str, Array]:
        segments = _segments(config, tokens, end_of_document)
        parts = losses(params, biases, tokens, config=config.model, runtime=runtime, segments=segments)
        return {"loss": parts.main, "loss_mtp": parts.mtp}

    return evaluate
