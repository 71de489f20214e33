"""The experts of all MoE layers as one array, for passes of few tokens.

A loop over stacked layers cuts a copy of each layer's weights out of the stack. That is nothing beside a prompt's work,
but a token uses few of the experts, and copying all would be most of its time. So they stay where they are: the layers'
experts are numbered through, and a token of layer l goes to expert l E + e.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from dsjax.model.dispatch import LocalCourier
from dsjax.runtime import Exchange, ExpertFunction, target_platform

ALIGNED = 8
"""Rows of a block, in passes in which experts have several rows."""


def are_few(tokens: int, per_token: int, num_experts: int) -> bool:
    """Whether a pass is so small that most experts of a layer are not, or only just, used; on a CPU every one is, whose
    products read each expert where it is."""
    return target_platform() == "cpu" or tokens * per_token <= num_experts


def apart(layers: PyTree) -> tuple[PyTree, PyTree]:
    """Return stacked MoE layers without their experts, and the experts of all layers in one row."""
    rest = {name: part for name, part in layers["moe"].items() if name != "experts"}
    row = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), layers["moe"]["experts"])
    return {**layers, "moe": rest}, row


def exchange_within_row(layer: Int[Array, ""] | int, layers: int) -> Exchange:
    """Return the exchange of one of `layers` MoE layers, whose experts are those of all layers."""

    def exchange(
        experts: ExpertFunction,
        x: Float[Array, "T D"],
        indices: Int[Array, "T K"],
        weights: Float[Array, "T K"],
        num_experts: int,
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        numbers = jnp.where(indices < num_experts, layer * num_experts + indices, layers * num_experts)
        # Groups of a row or two need no padding; larger ones are faster in whole blocks.
        alignment = ALIGNED if indices.size >= ALIGNED // 2 * num_experts else 1
        y, _ = experts(LocalCourier(numbers, layers * num_experts, alignment), x, weights)
        return y, jnp.ones((), jnp.int32)

    return exchange
