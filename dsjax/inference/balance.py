"""Dynamic redundancy: which replica a token goes to is decided anew in every layer, by what all devices are about to
send.

Devices host more experts than they need. Before a layer's tokens leave, every device learns how many chose each expert,
and all of them compute the same division of each expert's tokens among its replicas, such that the fullest device has
as few as possible. The report names this as future work (section 3.4.1: 16 experts hosted, 9 of them active).

The division is the fixed point of a proportional scaling: each device has a weight, an expert's tokens are divided in
proportion to the weights of its devices, and a device with more than the mean gets less weight. What it tends to is not
only the least maximum, but of all these the one whose next fullest device is least full, and so on. It needs no flow
algorithm, whose every step waits for the one before: 20 rounds of sums over a few hundred slots suffice.

If a device is to use few of its experts, because reading their weights is what takes time, each gives up those that are
needed least before the tokens are divided. Which to give up best is a hard problem, and this a rule of thumb.

Dimensions: E experts, R slots, M most replicas of an expert, N devices, S slots of a device, T tokens of a device,
K experts of a token.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, Shaped

from dsjax.inference.replicas import Tables, slot_of_replica
from dsjax.model.router import expert_loads
from dsjax.parallel.dispatch import line_up
from dsjax.parallel.mesh import Axes
from dsjax.runtime import Exchange, ExpertFunction

ROUNDS = 20
"""Of scaling. The fullest device is then, as a rule, within 0.5 % of the least possible, see docs/benchmarks.md."""
STEP, MOMENTUM = 1.5, 0.6
"""A device's weight changes by its load to the power of -STEP, times a part of its last change. Two devices that share
all their experts would swing for ever at a STEP of 2 (1 + MOMENTUM); much less is slow where load has to move through
many devices, whose experts overlap like links of a chain."""
OFFERS, SPARE = 2, 8
"""Rounds in which devices offer to give up a slot: for each that they should, and beside these."""
LEAST = 1e-3
"""Load, in means, at which a device counts that has none."""


def exchange_in_balance(inner: Exchange, tables: Tables, axes: Axes, active: int | None = None) -> Exchange:
    """Return the exchange that divides the tokens of each expert among its replicas so that devices are equally full.

    For use inside `shard_map`. The results are those of any other choice of replicas.

    Args:
        inner: carries tokens to slots, as if each were an expert.
        tables: of one layer.
        axes: of the mesh, along which the devices are.
        active: experts that a device uses at most, see `ends_of_replicas`; by default all that it has.
    """

    def exchange(
        experts: ExpertFunction,
        x: Float[Array, "T D"],
        indices: Int32[Array, "T K"],
        weights: Float[Array, "T K"],
        num_experts: int,
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        with jax.named_scope("balance"):
            slots = slots_in_balance(indices, tables, axes, active)
        return inner(experts, x, slots, weights, tables.experts.shape[0])

    return exchange


def slots_in_balance(
    indices: Int32[Array, "T K"], tables: Tables, axes: Axes, active: int | None = None
) -> Int32[Array, "T K"]:
    """Return the slot of each choice, such that devices are equally full; R for nobody.

    The tokens of an expert stand in line, device by device, and the replicas take theirs from it in the order of their
    slots: so many tokens stay near where they are.
    """
    num_experts = tables.counts.shape[0]
    by_device = lax.all_gather(expert_loads(indices, num_experts), axes)
    in_front = (by_device * (jnp.arange(len(by_device)) < lax.axis_index(axes))[:, None]).sum(axis=0)
    ends = ends_of_replicas(by_device.sum(axis=0), tables, len(by_device), active)
    return slots_of_places(indices, in_front, ends, tables)


def slots_of_places(
    indices: Int32[Array, "T K"], in_front: Int32[Array, " E"], ends: Int32[Array, "E M"], tables: Tables
) -> Int32[Array, "T K"]:
    """Return the slot of each choice, from its place in line.

    Args:
        in_front: tokens of each expert that stand in line before those of this device.
        ends: from `ends_of_replicas`.
    """
    places = line_up(indices.reshape(-1), len(in_front)).place.reshape(indices.shape)
    places += in_front.at[indices].get(mode="fill", fill_value=0)
    replicas = (ends.at[indices].get(mode="clip") <= places[:, :, None]).sum(axis=-1, dtype=jnp.int32)
    return slot_of_replica(indices, replicas, tables)


def ends_of_replicas(
    loads: Int[Array, " E"], tables: Tables, devices: int, active: int | None = None, rounds: int = ROUNDS
) -> Int32[Array, "E M"]:
    """Return the place in line, of each expert's tokens, behind the last that goes to each of its replicas.

    The same bits on all devices that have the same loads: sums are over axes, never by scattering.

    Args:
        loads: tokens of each expert, of all devices together, below 2^24.
        devices: N, which divides R; slots are numbered device by device.
        active: slots of a device that get tokens, at most; some devices may have one more, where there are hardly more
            such slots than experts. Balance suffers little where there are a quarter more, see docs/benchmarks.md.
        rounds: of scaling.

    Raises:
        ValueError: N does not divide R.
    """
    slots = tables.experts.shape[0]
    if slots % devices:
        raise ValueError(f"{slots} slots: should be a multiple of {devices} devices")
    everything = jnp.ones((devices, slots // devices), bool)
    shares = _shares(loads, tables, everything, rounds)
    if active is not None:
        in_use = _needed(loads, shares, tables, everything, active)
        shares = _shares(loads, tables, in_use, rounds)
    ends = jnp.round(jnp.cumsum(shares, axis=1) * loads[:, None]).astype(jnp.int32)
    # Rounding must not take a token from the last replica, nor let an end be in front of the one before.
    used = shares > 0
    is_last = jnp.cumsum(used, axis=1) >= used.sum(axis=1, keepdims=True)
    loads = loads[:, None].astype(jnp.int32)
    return lax.cummax(jnp.where(is_last, loads, jnp.minimum(ends, loads)), axis=1)


def _shares(loads: Int[Array, " E"], tables: Tables, in_use: Bool[Array, "N S"], rounds: int) -> Float[Array, "E M"]:
    """Return the share of each expert's tokens that its replicas get, of those that are in use."""
    devices, per_device = in_use.shape
    exists = _of_replicas(in_use, tables, False)
    load_of_slot = loads.astype(jnp.float32)[tables.experts].reshape(devices, per_device)
    mean = jnp.maximum(loads.astype(jnp.float32).sum(), 1) / devices

    def of_experts(weight: Float[Array, " N"]) -> tuple[Float[Array, "E M"], Float[Array, " E"]]:
        """Return the logarithms of the weights of an expert's replicas, and of their sum."""
        replicas = jnp.where(exists, weight[jnp.maximum(tables.slots, 0) // per_device], -jnp.inf)
        return replicas, jax.nn.logsumexp(replicas, axis=1)

    def scale(_: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, change = state
        _, total = of_experts(weight)
        shares = jnp.exp(weight[:, None] - total[tables.experts].reshape(devices, per_device))
        load = (load_of_slot * jnp.where(in_use, shares, 0)).sum(axis=1)
        change = MOMENTUM * change - STEP * jnp.log(jnp.maximum(load / mean, LEAST))
        return weight + change, change

    weight, _ = lax.fori_loop(0, rounds, scale, (jnp.zeros(devices), jnp.zeros(devices)))
    replicas, total = of_experts(weight)
    return jnp.exp(replicas - total[:, None])


def _of_replicas(of_slots: Shaped[Array, "N S"], tables: Tables, otherwise: float | bool) -> Shaped[Array, "E M"]:
    """Return what the slots of each expert's replicas have."""
    return jnp.where(tables.slots >= 0, of_slots.reshape(-1)[tables.slots], otherwise)


def _needed(
    loads: Int[Array, " E"],
    shares: Float[Array, "E M"],
    tables: Tables,
    in_use: Bool[Array, "N S"],
    active: int,
) -> Bool[Array, "N S"]:
    """Return the slots to be used, at most `active` of a device.

    In each round, every device that has too many offers the one that is needed least: whose tokens are few, and whose
    expert would not have many for each of its other replicas. Of an expert's replicas one at a time is taken out of
    use, that of the device with most, and never its last.
    """
    devices, per_device = in_use.shape
    tokens = (shares * loads[:, None]).astype(jnp.float32)
    # The share of slot s stands where the table of its expert has s.
    replica = (tables.slots[tables.experts] == jnp.arange(devices * per_device)[:, None]).argmax(axis=1)
    of_slot = tokens[tables.experts, replica].reshape(devices, per_device)
    load = of_slot.sum(axis=1)

    def step(_: Int[Array, ""], in_use: Bool[Array, "N S"]) -> Bool[Array, "N S"]:
        left = _of_replicas(in_use, tables, False).sum(axis=1)
        per_other = (loads / jnp.maximum(left - 1, 1))[tables.experts].reshape(devices, per_device)
        may_go = in_use & (left > 1)[tables.experts].reshape(devices, per_device)
        need = jnp.where(may_go, per_other + of_slot, jnp.inf)
        count = in_use.sum(axis=1)
        offers = (jnp.arange(per_device) == need.argmin(axis=1)[:, None]) & may_go & (count > active)[:, None]
        fullness = count + load / (load.sum() + 1)
        offered = _of_replicas(jnp.where(offers, fullness[:, None], 0), tables, 0)
        taken = jnp.take_along_axis(tables.slots, offered.argmax(axis=1)[:, None], axis=1)[:, 0]
        out = jnp.where(offered.max(axis=1) > 0, taken, devices * per_device)
        return in_use.reshape(-1).at[out].set(False, mode="drop").reshape(in_use.shape)

    # More rounds than are needed as a rule, but a fixed number: a GPU would ask its host whether a loop has ended.
    surplus = per_device - active
    return lax.fori_loop(0, OFFERS * surplus + SPARE if surplus > 0 else 0, step, in_use)


def loads_of_slots(ends: Int32[Array, "E M"], tables: Tables) -> Int32[Array, " R"]:
    """Return how many tokens go to each slot, from `ends_of_replicas`."""
    tokens = jnp.diff(ends, axis=1, prepend=0)
    where = jnp.where(tables.slots >= 0, tables.slots, tables.experts.shape[0])
    return jnp.zeros(tables.experts.shape, jnp.int32).at[where].set(tokens, mode="drop")
