"""The experts of all MoE layers as one array: a pass takes those of a layer from where they are.

A loop over stacked layers may cut a copy of each layer's weights out of the stack. A layer's experts are most of its
weights, of which a token uses few: copying them would be most of decoding's time, and those of several layers that are
compiled together most of its memory. So they stay in one row, in which expert e of layer l is number l E + e. Tokens
travel and line up as ever, among the E experts of their layer; only then are the groups numbered through.

On several devices E is the number of those that a device has.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, PyTree, Shaped

from dsjax.model.grouped_matmul import Groups
from dsjax.runtime import Courier, Exchange, ExpertFunction, Plan, target_platform

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


def exchange_within_row(inner: Exchange, layer: Int[Array, ""] | int, layers: int, *, in_blocks: bool) -> Exchange:
    """Return the exchange of one of `layers` MoE layers, for parameters of the experts of all.

    Args:
        inner: the exchange of a layer for itself.
        layer: its number.
        in_blocks: whether groups are as large as the experts' own products want them; otherwise they have no more rows
            than a pass of few tokens is quick with. This is for products by XLA, on a single device.
    """

    def exchange(
        experts: ExpertFunction,
        x: Float[Array, "T D"],
        indices: Int[Array, "T K"],
        weights: Float[Array, "T K"],
        num_experts: int,
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        # Groups of a row or two need no padding; larger ones are faster in whole blocks.
        small = ALIGNED if indices.size >= ALIGNED // 2 * num_experts else 1
        within = _WithinRow(experts, layer, layers, experts.alignment if in_blocks else small)
        return inner(within, x, indices, weights, num_experts)

    return exchange


@dataclass(frozen=True)
class _WithinRow:
    """The experts of one layer as an `ExpertFunction`, by one that has those of all."""

    whole: ExpertFunction
    layer: Int[Array, ""] | int
    layers: int
    alignment: int

    def __call__(
        self, courier: Courier, x: Float[Array, "T D"], weights: Float[Array, "T K"], *, named: bool = True
    ) -> tuple[Float[Array, "T D"], Plan]:
        return self.whole(_Courier(courier, self.layer, self.layers), x, weights, named=named)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inner", "layer"], meta_fields=["layers"])
@dataclass(frozen=True)
class _Courier:
    """A `runtime.Courier` whose plan has groups for the experts of all layers."""

    inner: Courier
    layer: Int[Array, ""] | int
    layers: int

    def send(
        self, tokens: PyTree[Shaped[Array, "T ..."]], weights: Float[Array, "T K"]
    ) -> tuple[Plan, PyTree[Shaped[Array, "S ..."]], Float[Array, "*S"]]:
        """See `runtime.Courier`."""
        plan, arrived, arrived_weights = self.inner.send(tokens, weights)

        def numbered(part: Groups | Array) -> Groups | Array:
            return numbered_through(part, self.layer, self.layers) if isinstance(part, Groups) else part

        plan = jax.tree.map(numbered, plan, is_leaf=lambda part: isinstance(part, Groups))
        return plan, arrived, arrived_weights


def numbered_through(groups: Groups, layer: Int[Array, ""] | int, layers: int) -> Groups:
    """Return the same rows as groups of all layers' experts: those of other layers have none."""
    count = groups.sizes.shape[0]
    first = layer * count

    def in_row(sizes: Int32[Array, " G"]) -> Int32[Array, " LG"]:
        return lax.dynamic_update_slice(jnp.zeros(layers * count, sizes.dtype), sizes, (first,))

    return replace(
        groups,
        sizes=in_row(groups.sizes),
        padded_sizes=in_row(groups.padded_sizes),
        group_of_tile=jnp.where(groups.group_of_tile < count, first + groups.group_of_tile, layers * count),
        blocks=tuple((start, first + group, in_use) for start, group, in_use in groups.blocks),
    )
