"""The expert exchange on a single device: tokens to the rows of their experts, and back.

`dispatch` and `combine` are linear, and each is the other's transpose. Both are gathers in both directions, because a
row belongs to one token and a token knows its rows: nothing is ever scattered or added atomically, so the bits are the
same every time. No token is dropped, whatever the router does.

Dimensions: T tokens, k experts per token, R rows (see `grouped_matmul`), E experts, D width.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32, PyTree

from dsjax.model.grouped_matmul import Groups, buffer_rows, default_alignment, group_rows
from dsjax.runtime import ExpertFunction, target_platform


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["groups", "slot_of_row", "row_of_slot"], meta_fields=[]
)
@dataclass(frozen=True)
class Plan:
    """Who goes where. A slot is one choice of one token: slot t * k + j is the j-th expert of token t."""

    groups: Groups
    """The rows, one group per expert."""
    slot_of_row: Int32[Array, "R"]
    """Slot that each row serves; T * k for padding."""
    row_of_slot: Int32[Array, "T k"]
    """Row of each slot; R for a slot without an expert."""


def exchange_locally(
    experts: ExpertFunction,
    x: Float[Array, "T D"],
    indices: Int32[Array, "T k"],
    weights: Float[Array, "T k"],
    num_experts: int,
) -> tuple[Float[Array, "T D"], Int32[Array, ""]]:
    """The `Exchange` of a single device, which holds all experts: sort, run them, sum each token's results."""
    plan = sort_by_expert(indices, num_experts, default_alignment(target_platform()))
    plan = jax.tree.map(lambda leaf: checkpoint_name(leaf, "plan"), plan)
    rows = experts(dispatch(plan, x), checkpoint_name(dispatch_weights(plan, weights), "plan"), plan.groups)
    return combine(plan, rows), jnp.ones((), jnp.int32)


def sort_by_expert(indices: Int32[Array, "T k"], num_experts: int, alignment: int) -> Plan:
    """Give every (token, expert) choice a row, expert after expert, in the order of the tokens within an expert.

    Args:
        indices: the experts of each token, in [0, num_experts); `num_experts` for none.
        num_experts: E.
        alignment: every expert's rows begin at a multiple of it.

    Raises:
        ValueError: more choices than int32 sort keys can number.
    """
    tokens, k = indices.shape
    slots = tokens * k
    if slots * (num_experts + 1) >= 2**31:
        raise ValueError(
            f"{tokens} tokens x {k} experts x {num_experts}: should be below 2^31, use smaller micro-batches"
        )
    expert = indices.reshape(-1)
    # One sort of one int32 array: the expert in the high part, the slot in the low part, which also makes it stable.
    order = jnp.sort(expert * slots + jnp.arange(slots, dtype=jnp.int32)) % slots
    sizes = (expert[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    groups = group_rows(sizes, buffer_rows(slots, num_experts, alignment), alignment)

    # An expert's rows are its part of `order`, moved to where its group starts.
    shift = groups.starts - (jnp.cumsum(sizes) - sizes)
    expert_of_order = expert[order]
    row_in_order = jnp.arange(slots, dtype=jnp.int32) + jnp.take(shift, expert_of_order, mode="clip")
    row_of_slot = (
        jnp.zeros(slots, jnp.int32)
        .at[order]
        .set(
            jnp.where(expert_of_order < num_experts, row_in_order, groups.rows),
            unique_indices=True,
            mode="promise_in_bounds",
        )
    )
    row = jnp.arange(groups.rows, dtype=jnp.int32)
    group = jnp.minimum(jnp.repeat(groups.group_of_tile, alignment), num_experts - 1)
    in_use = row - groups.starts[group] < sizes[group]
    slot_of_row = jnp.where(in_use, jnp.take(order, row - shift[group], mode="clip"), slots)
    return Plan(groups, slot_of_row, row_of_slot.reshape(tokens, k))


def dispatch(plan: Plan, payload: PyTree[Array, "T ..."]) -> PyTree[Array, "R ..."]:
    """Copy what each token brings to the rows of its experts; padding rows are zero."""
    return jax.tree.map(lambda leaf: _dispatch(plan, leaf), payload)


def combine(plan: Plan, rows: PyTree[Float[Array, "R ..."]]) -> PyTree[Float[Array, "T ..."]]:
    """Sum the k rows of each token, in float32; the result has the type of `rows`."""
    return jax.tree.map(lambda leaf: _combine(plan, leaf), rows)


def dispatch_weights(plan: Plan, weights: Float[Array, "T k"]) -> Float[Array, "R"]:
    """Bring the router's weight of each choice to its row; padding rows get zero."""
    return _dispatch_weights(plan, weights)


@jax.custom_vjp
def _dispatch(plan, x):
    return take_or_zero(x, plan.slot_of_row // plan.row_of_slot.shape[1])


@jax.custom_vjp
def _combine(plan, rows):
    return sum_of_rows(rows, plan.row_of_slot)


@jax.custom_vjp
def _dispatch_weights(plan, weights):
    return take_or_zero(weights.reshape(-1), plan.slot_of_row)


_dispatch.defvjp(lambda plan, x: (_dispatch(plan, x), plan), lambda plan, dy: (None, _combine(plan, dy)))
_combine.defvjp(lambda plan, rows: (_combine(plan, rows), plan), lambda plan, dy: (None, _dispatch(plan, dy)))
_dispatch_weights.defvjp(
    lambda plan, weights: (_dispatch_weights(plan, weights), plan),
    lambda plan, dy: (None, take_or_zero(dy, plan.row_of_slot)),
)


def take_or_zero(x: Array, index: Int32[Array, "*shape"]) -> Array:
    """Return x[index], and zeros where `index` is behind the last row."""
    return x.at[index].get(mode="fill", fill_value=0)


def sum_of_rows(x: Float[Array, "R ..."], index: Int32[Array, "T k"]) -> Float[Array, "T ..."]:
    """Return the sum over k of x[index], in float32 and then in the type of `x`; an index of R counts for nothing."""
    # One term per k and not a sum over an axis, so that XLA makes a single pass without a [T, k, ...] in between.
    parts = [take_or_zero(x, index[:, j]).astype(jnp.float32) for j in range(index.shape[1])]
    return sum(parts[1:], parts[0]).astype(x.dtype)
