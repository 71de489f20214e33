"""Where every array of a run lives on the mesh: one table of rules, and what follows from it.

A training state lives as ZeRO-1 has it (arXiv 1910.02054): each device keeps a part of the master weights and moments,
gathers the weights of a step from the parts, and gets its part of the gradients by reduce-scatter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from dsjax.parallel.mesh import BATCH_AXES, EXPERT_AXES


@dataclass(frozen=True)
class Rule:
    """How arrays of a kind are divided."""

    owned: tuple[str, ...]
    """Axes that divide the axis of experts: each device computes with its own part only."""
    zero: tuple[str, ...]
    """Axes over whose devices the array is the same in computation; they divide its master weight and moments."""


RULES = {
    "experts": Rule(owned=EXPERT_AXES, zero=("data",)),
    "": Rule(owned=(), zero=BATCH_AXES),
}
"""By a name in an array's path; "" holds for all others."""

EXPERT_AXIS = {"gate_up": -4, "down": -3}
"""Axis of experts in [..., E, 2, F, D] and [..., E, D, F], whatever is stacked in front."""

STACKS = ("dense", "moe", "mtp")
"""First names of paths to arrays of stacked layers, whose axis 0 counts layers."""


@dataclass(frozen=True)
class Partition:
    """How one array is divided."""

    stages: tuple[str, ...]
    """Mesh axes that divide its axis 0, the layers."""
    owned: tuple[str, ...]
    """Mesh axes that divide it in computation too."""
    owned_axis: int | None
    """Axis of the array that they divide; None where there are none."""
    zero: tuple[str, ...]
    """Mesh axes that divide it between steps only."""
    zero_axis: int | None
    """Axis of the array that they divide; None where there are none."""
    copies: tuple[str, ...]
    """Mesh axes of the batch along which it is whole even between steps, though its gradients come from all of them."""

    def spec(self, rank: int) -> PartitionSpec:
        """Return how an array of `rank` axes is divided between steps."""
        axes: list[tuple[str, ...] | None] = [None] * rank
        if self.stages:
            axes[0] = self.stages
        for axis, names in ((self.owned_axis, self.owned), (self.zero_axis, self.zero)):
            if axis is not None:
                axes[axis] = names
        return PartitionSpec(*axes)

    def of_layer(self) -> "Partition":
        """Return how one layer of an array of stacked layers is divided."""
        axes = {
            name: axis if (axis := getattr(self, name)) is None else axis - 1 for name in ("owned_axis", "zero_axis")
        }
        return replace(self, stages=(), **axes)


def partition(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> Partition:
    """Return how the array at `path` of a tree of parameters is divided.

    ZeRO divides the longest axis that it can over all of its mesh axes; where none is divisible, over the mesh axes
    that are left without the outermost; arrays too small for any stay whole. Stacked MoE layers are divided over the
    stages of a pipeline; the other stacked arrays are used at its ends and are the same along it. Canonical arrays,
    which no computation uses, are divided along it by ZeRO.

    Args:
        path: of a tree in either layout of parameters.
    """
    names = [key.key for key in path]
    stacked = names[0] in STACKS and not names[1].isdigit()  # the canonical layout has mtp/0/..., mtp/1/...
    rule = RULES["experts" if "experts" in names else ""]
    zero = ("pipe", *rule.zero) if names[0] == "layers" else rule.zero
    owned, zero, stages = (
        tuple(axis for axis in axes if mesh.shape[axis] > 1)
        for axes in (rule.owned, zero, ("pipe",) if names[0] == "moe" else ())
    )
    expert_axis = len(shape) + EXPERT_AXIS[names[-1]] if rule.owned else None
    free = [axis for axis in range(int(stacked), len(shape)) if axis != expert_axis]
    owned_axis = expert_axis if owned else None
    for first in range(len(zero)):
        parts = math.prod(mesh.shape[axis] for axis in zero[first:])
        if divisible := [axis for axis in free if shape[axis] % parts == 0]:
            longest = max(divisible, key=lambda axis: shape[axis])
            return Partition(stages, owned, owned_axis, zero[first:], longest, zero[:first])
    return Partition(stages, owned, owned_axis, (), None, zero)


def partitions(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return the `Partition` of every array of a tree of parameters, or of their moments or gradients."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: partition(path, leaf.shape, mesh), tree)


def specs(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return the `PartitionSpec` of every array of a tree of parameters, as they live between steps."""
    return jax.tree.map(lambda leaf, at: at.spec(len(leaf.shape)), tree, partitions(tree, mesh))


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return the `NamedSharding` of every array of a tree of parameters, as they live between steps."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh))


def batch_spec(rank: int, axis: int) -> PartitionSpec:
    """Return how an array whose `axis` counts sequences is divided."""
    axes: list[tuple[str, ...] | None] = [None] * rank
    axes[axis] = BATCH_AXES
    return PartitionSpec(*axes)


def place(rows: Callable[[int, int], np.ndarray], shape: tuple[int, ...], axis: int, mesh: Mesh) -> Array:
    """Return an array of sequences, divided over the mesh, of which this process reads what its devices hold.

    Args:
        rows: `rows(first, count)` are that many sequences of the whole array, from `first` on along `axis`.
        shape: of the whole array.
    """

    def part(index: tuple[slice, ...]) -> np.ndarray:
        first, stop, _ = index[axis].indices(shape[axis])
        return rows(first, stop - first)

    return jax.make_array_from_callback(shape, NamedSharding(mesh, batch_spec(len(shape), axis)), part)


def gather(params: PyTree, partitions: PyTree) -> PyTree:
    """Inside `shard_map`: return the weights that a device computes with, from the parts that its peers keep."""

    def one(part: Array, at: Partition) -> Array:
        return part if at.zero_axis is None else lax.all_gather(part, at.zero, axis=at.zero_axis, tiled=True)

    return jax.tree.map(one, params, partitions)


def reduce_scatter(grads: PyTree, partitions: PyTree) -> PyTree:
    """Inside `shard_map`: return each device's part of the sum, in float32, of all gradients of a weight."""

    def one(grad: Array, at: Partition) -> Array:
        grad = grad.astype(jnp.float32)
        if at.zero_axis is not None:
            grad = lax.psum_scatter(grad, at.zero, scatter_dimension=at.zero_axis, tiled=True)
        return lax.psum(grad, at.copies) if at.copies else grad

    return jax.tree.map(one, grads, partitions)
