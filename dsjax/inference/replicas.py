"""Redundant experts inside programs: which replica of its expert a token goes to.

Devices hold slots, each with a copy of an expert (`parallel.placement`). Programs are given tables of who is where, as
arrays of one size, so that another placement needs no other program. What is here turns a router's choices of experts
into choices of slots, and leaves carrying the tokens to any exchange that there is.

In all of it, an expert beyond the last stands for nobody: the choices of tokens that only fill up a batch.

Dimensions: L layers, E experts, R slots, M most replicas of an expert, T tokens, K experts of a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32, PyTree

from dsjax.config import ModelConfig
from dsjax.parallel.dispatch import line_up
from dsjax.parallel.mesh import Axes
from dsjax.parallel.placement import Placement
from dsjax.runtime import Exchange, ExpertFunction


class Tables(NamedTuple):
    """Who is where, int32; of all layers, or of one."""

    slots: Int32[Array, "*L E M"] | Int32[np.ndarray, "*L E M"]
    """Slots of each expert in ascending order, then -1."""
    counts: Int32[Array, "*L E"] | Int32[np.ndarray, "*L E"]
    """How many these are, at least 1."""
    experts: Int32[Array, "*L R"] | Int32[np.ndarray, "*L R"]
    """The expert of each slot."""


def tables_of(placement: Placement, most: int | None = None) -> Tables:
    """Return the tables of all layers, on the host.

    Args:
        most: M; by default as many as any placement of these sizes can need, R - E + 1.

    Raises:
        ValueError: an expert has more replicas.
    """
    table, least = placement.slots_of_expert, int(placement.replicas.max(initial=1))
    most = placement.slots - placement.experts + 1 if most is None else most
    if least > most:
        raise ValueError(f"tables for {most} replicas of an expert: the placement has {least} of one")
    slots = np.pad(table, ((0, 0), (0, 0), (0, most - least)), constant_values=-1)
    return Tables(slots, np.array(placement.replicas), np.array(placement.expert_of_slot))


def in_slots(experts: PyTree, expert_of_slot: Int[Array, "L R"] | Int[np.ndarray, "L R"]) -> PyTree:
    """Return the weights of all slots, [L, R, ...], from those of all experts, [L, E, ...].

    On many devices, to be called in a program that says how its result is divided.
    """
    held = jnp.asarray(expert_of_slot)
    return jax.tree.map(lambda leaf: jax.vmap(lambda layer, held: layer[held])(leaf, held), experts)


def exchange_over_replicas(inner: Exchange, tables: Tables, axes: Axes = ()) -> Exchange:
    """Return the exchange that spreads the tokens of an expert evenly over its replicas.

    Args:
        inner: carries tokens to slots, as if each were an expert.
        tables: of one layer.
        axes: of the mesh, along which the devices are.
    """

    def exchange(
        experts: ExpertFunction,
        x: Float[Array, "T D"],
        indices: Int32[Array, "T K"],
        weights: Float[Array, "T K"],
        num_experts: int,
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        slots = slots_in_turn(indices, tables, lax.axis_index(axes))
        return inner(experts, x, slots, weights, tables.experts.shape[0])

    return exchange


def slots_in_turn(indices: Int32[Array, "T K"], tables: Tables, first: Int[Array, ""] | int) -> Int32[Array, "T K"]:
    """Return the slot of each choice: the replicas of an expert take turns, in the order of its tokens.

    Args:
        indices: experts; E for nobody, which becomes R.
        first: the replica to begin with, modulo their number: another one on each device, so that what does not divide
            falls to different ones. (DeepSeek's kernels take replica (rank + 23333 * token) % count.)
    """
    places = line_up(indices.reshape(-1), tables.counts.shape[0]).place.reshape(indices.shape)
    counts = tables.counts.at[indices].get(mode="fill", fill_value=1)
    return slot_of_replica(indices, (places + first) % counts, tables)


def slot_of_replica(indices: Int32[Array, "T K"], replicas: Int32[Array, "T K"], tables: Tables) -> Int32[Array, "T K"]:
    """Return the slot of a replica of each expert, counted from 0; R for nobody."""
    return tables.slots.at[indices, replicas].get(mode="fill", fill_value=tables.experts.shape[0])


def exchange_with_shared(inner: Exchange) -> Exchange:
    """Return the exchange in which every token also goes, with weight 1, to expert E: the shared one.

    The report's decoding takes it for a routed expert that is always chosen (section 3.4.2). For parameters from
    `shared_as_routed`; `inner` is given E + 1 experts.
    """

    def exchange(
        experts: ExpertFunction,
        x: Float[Array, "T D"],
        indices: Int32[Array, "T K"],
        weights: Float[Array, "T K"],
        num_experts: int,
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        nobody = indices == num_experts
        routed = jnp.where(nobody, num_experts + 1, indices)
        shared = jnp.where(nobody.all(axis=1), num_experts + 1, num_experts)
        indices = jnp.concatenate([routed, shared[:, None].astype(indices.dtype)], axis=1)
        weights = jnp.concatenate([weights, jnp.ones((len(x), 1), weights.dtype)], axis=1)
        return inner(experts, x, indices, weights, num_experts + 1)

    return exchange


def shared_as_routed(params: PyTree, config: ModelConfig) -> PyTree:
    """Return parameters of a mixture of experts whose shared expert is number E of its routed ones.

    Args:
        params: of one layer or of several stacked ones, weights in any format.

    Raises:
        ValueError: the shared experts are not one of a routed one's width.
    """
    if config.n_shared_experts != 1:
        raise ValueError(
            f"n_shared_experts = {config.n_shared_experts}: should be 1 for the shared expert to be a routed one"
        )
    axis = params["router"].ndim - 2  # of the experts, behind that of layers
    routed, structure = jax.tree.flatten(params["experts"])
    shared = jax.tree.leaves(params["shared"])
    both = [jnp.concatenate([leaf, jnp.expand_dims(one, axis)], axis) for leaf, one in zip(routed, shared, strict=True)]
    rest = {name: part for name, part in params.items() if name != "shared"}
    return rest | {"experts": structure.unflatten(both)}


def loads_with_shared(loads: Float[np.ndarray, "L E"] | Int[np.ndarray, "L E"], per_token: int) -> np.ndarray:
    """Return the loads of E + 1 experts, the last of which every token chooses beside `per_token` others."""
    return np.concatenate([loads, loads.sum(axis=1, keepdims=True) / per_token], axis=1)
