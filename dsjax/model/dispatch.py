"""Tokens to the rows of their experts and back, as a pair of linear maps; and how a single device does it.

`dispatch` and `combine` are each the derivative of the other, whatever courier takes the tokens there. All is gathers
in both directions, because a row belongs to one token and a token knows its rows: nothing is ever scattered or added
atomically, so the bits are the same every time. No token is dropped, whatever the router does.

Dimensions: T tokens, k experts per token, R rows (see `grouped_matmul`), E experts, D width.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32, PyTree, Shaped

from dsjax.model.grouped_matmul import Groups, buffer_rows, group_rows
from dsjax.runtime import Courier, ExpertFunction, Plan


def dispatch(
    courier: Courier, x: Float[Array, "T D"], weights: Float[Array, "T K"], *, named: bool = True
) -> tuple[Plan, Float[Array, "R D"], Float[Array, "R"]]:
    """Send each token to the rows of its experts, and the router's weight of each choice to its row.

    Padding rows are zero, and have no weight.

    Returns:
        Also the plan, by which results come back.
    """
    with jax.named_scope("dispatch"):
        return _dispatch(courier, x, weights, named)


def combine(plan: Plan, rows: Float[Array, "R D"]) -> Float[Array, "T D"]:
    """Return the sum of each token's rows, in the type of `rows`; sums within a device or node are in float32."""
    with jax.named_scope("combine"):
        return _combine(plan, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(courier, x, weights, named):
    plan, arrived, arrived_weights = courier.send(x, weights)
    return plan, plan.expand(arrived), plan.expand_weights(arrived_weights)


def _dispatch_forward(courier, x, weights, named):
    plan, rows, row_weights = _dispatch(courier, x, weights, named)
    if named:
        plan, row_weights = jax.tree.map(lambda leaf: checkpoint_name(leaf, "plan"), (plan, row_weights))
    return (plan, rows, row_weights), plan


def _dispatch_backward(named, plan, cotangents):
    _, drows, dweights = cotangents
    return None, *plan.back_with_weights(drows, dweights)


@jax.custom_vjp
def _combine(plan, rows):
    return plan.back(rows)


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)
_combine.defvjp(lambda plan, rows: (_combine(plan, rows), plan), lambda plan, dy: (None, plan.expand(plan.again(dy))))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["groups", "slot_of_row", "row_of_slot"], meta_fields=[]
)
@dataclass(frozen=True)
class LocalPlan:
    """Who goes where, on one device. A slot is a choice of a token: t * k + j is the j-th expert of token t.

    A `runtime.Plan`: what arrives is what was sent.
    """

    groups: Groups
    """The rows, one group per expert."""
    slot_of_row: Int32[Array, "R"]
    """Slot that each row serves; T * k for padding."""
    row_of_slot: Int32[Array, "T k"]
    """Row of each slot; R for a slot without an expert."""

    def again(self, tokens: PyTree[Shaped[Array, "T ..."]]) -> PyTree[Shaped[Array, "T ..."]]:
        return tokens

    def row_sources(self) -> Int32[Array, "R"]:
        return self.slot_of_row // self.row_of_slot.shape[1]

    def expand(self, arrived: PyTree[Shaped[Array, "T ..."]]) -> PyTree[Shaped[Array, "R ..."]]:
        return jax.tree.map(lambda leaf: take_or_zero(leaf, self.row_sources()), arrived)

    def expand_weights(self, arrived: Float[Array, "T k"]) -> Float[Array, "R"]:
        return take_or_zero(arrived.reshape(-1), self.slot_of_row)

    def back(self, rows: PyTree[Float[Array, "R ..."]]) -> PyTree[Float[Array, "T ..."]]:
        return jax.tree.map(lambda leaf: sum_of_rows(leaf, self.row_of_slot), rows)

    def back_with_weights(
        self, rows: Float[Array, "R ..."], of_rows: Float[Array, "R"]
    ) -> tuple[Float[Array, "T ..."], Float[Array, "T k"]]:
        return self.back(rows), take_or_zero(of_rows, self.row_of_slot)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["indices"], meta_fields=["num_experts", "alignment"])
@dataclass(frozen=True)
class LocalCourier:
    """Takes tokens to experts on the same device; a `runtime.Courier`."""

    indices: Int32[Array, "T k"]
    """The experts of each token."""
    num_experts: int
    alignment: int
    """Of the rows, see `group_rows`."""

    def send(
        self, tokens: PyTree[Shaped[Array, "T ..."]], weights: Float[Array, "T k"]
    ) -> tuple[LocalPlan, PyTree[Shaped[Array, "T ..."]], Float[Array, "T k"]]:
        return sort_by_expert(self.indices, self.num_experts, self.alignment), tokens, weights


def exchange_locally(
    experts: ExpertFunction,
    x: Float[Array, "T D"],
    indices: Int32[Array, "T k"],
    weights: Float[Array, "T k"],
    num_experts: int,
) -> tuple[Float[Array, "T D"], Int32[Array, ""]]:
    """The `Exchange` of a single device, which holds all experts: sort, run them, sum each token's results."""
    y, _ = experts(LocalCourier(indices, num_experts, experts.alignment), x, weights)
    return y, jnp.ones((), jnp.int32)


def sort_by_expert(indices: Int32[Array, "T k"], num_experts: int, alignment: int) -> LocalPlan:
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
    return LocalPlan(groups, slot_of_row, row_of_slot.reshape(tokens, k))


def take_or_zero(x: Array, index: Int32[Array, "*shape"]) -> Array:
    """Return x[index], and zeros where `index` is behind the last row."""
    return x.at[index].get(mode="fill", fill_value=0)


def sum_of_rows(x: Float[Array, "R ..."], index: Int32[Array, "T k"]) -> Float[Array, "T ..."]:
    """Return the sum over k of x[index], in float32 and then in the type of `x`; an index of R counts for nothing."""
    # One term per k and not a sum over an axis, so that XLA makes a single pass without a [T, k, ...] in between.
    parts = [take_or_zero(x, index[:, j]).astype(jnp.float32) for j in range(index.shape[1])]
    return sum(parts[1:], parts[0]).astype(x.dtype)
