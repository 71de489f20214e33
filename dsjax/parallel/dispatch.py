"""Tokens to the experts of other devices, and their results back: dispatch and combine in two hops.

    token --hop 1: node--> forwarder --hop 2: local--> owner --sort--> row of its expert

A token crosses to a node once, whatever the number of its experts there, to the device with its own place in the node;
that forwarder sends one copy to the owner of each expert. Results come back the same way and are added up, in float32,
inside the node before they cross again (report section 3.2.2). All of it is gathers and all-to-alls between buffers of
fixed size; what a buffer does not hold is left for the next round, in which the same code runs with another plan.

`dispatch` and `combine` are linear and each the other's transpose, by construction: one is the other's derivative, with
the same plan. They know nothing of what they carry: a payload is any pytree of arrays [T, ...].

Dimensions: T tokens of a device, K experts of a token, N nodes, L devices of a node, C slots of a buffer for one peer,
S = N C slots at a forwarder, R rows of expert inputs.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree

from dsjax.config import Transport
from dsjax.model import dispatch as within_device
from dsjax.model.dispatch import sort_by_expert, sum_of_rows, take_or_zero
from dsjax.parallel.mesh import EXPERT_AXES
from dsjax.parallel.transport import move


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["peer", "order", "first", "counts", "place"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Queues:
    """Items in line for the peers they go to."""

    peer: Int32[Array, "I"]
    """Peer that an item goes to; n for one that goes nowhere."""
    order: Int32[Array, "I"]
    """Items by peer, in their own order within one; those that go nowhere last."""
    first: Int32[Array, "n"]
    """Where each peer's queue begins in `order`."""
    counts: Int32[Array, "n"]
    """Its length."""
    place: Int32[Array, "I"]
    """Place of an item in its queue; for one that goes nowhere larger than any."""


def line_up(peer: Int32[Array, "I"], peers: int) -> Queues:
    """Return the queues of items that go to `peer`, which is `peers` for one that goes nowhere."""
    items = peer.shape[0]
    if items * (peers + 1) >= 2**31:
        raise ValueError(f"{items} items for {peers} devices: should be below 2^31, use smaller micro-batches")
    index = jnp.arange(items, dtype=jnp.int32)
    order = jnp.sort(peer * items + index) % items
    counts = (peer[:, None] == jnp.arange(peers)).sum(0, dtype=jnp.int32)
    first = jnp.cumsum(counts) - counts
    behind_first = index - jnp.take(first, peer[order], mode="fill", fill_value=-items)
    place = jnp.zeros(items, jnp.int32).at[order].set(behind_first, unique_indices=True, mode="promise_in_bounds")
    return Queues(peer, order, first, counts, place)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["item_of_slot", "slot_of_item", "sent", "received"],
    meta_fields=["axis", "transport"],
)
@dataclass(frozen=True)
class Hop:
    """One all-to-all of a round: which item lies in which slot of the buffer. A row of the payload has f items."""

    item_of_slot: Int32[Array, "n C"]
    """Item r * f + j is the j-th of row r; T * f for a slot that is not in use."""
    slot_of_item: Int32[Array, "T f"]
    """n * C for an item that does not travel in this round."""
    sent: Int32[Array, "n"]
    """Slots in use, by receiver."""
    received: Int32[Array, "n"]
    """The same at the other end, by sender."""
    axis: str
    """Of the mesh."""
    transport: Transport

    def rows_there(self, payload: PyTree[Array, "T ..."]) -> PyTree[Array, "nC ..."]:
        """Send a copy of its row with every item; unused slots are zero."""
        row_of_slot = self.item_of_slot // self.slot_of_item.shape[1]
        return jax.tree.map(lambda leaf: self._move(take_or_zero(leaf, row_of_slot)), payload)

    def rows_back(self, payload: PyTree[Array, "nC ..."]) -> PyTree[Array, "T ..."]:
        """Return the sum over each row's items of what lies in their slots: the transpose of `rows_there`."""
        return jax.tree.map(lambda leaf: sum_of_rows(self._move_back(leaf), self.slot_of_item), payload)

    def items_there(self, items: Array) -> Array:
        """Send a number [T, f] of every item."""
        return self._move(take_or_zero(items.reshape(-1), self.item_of_slot))

    def items_back(self, items: Array) -> Array:
        """The transpose of `items_there`."""
        return take_or_zero(self._move_back(items), self.slot_of_item)

    def _move(self, buffer: Array) -> Array:
        moved = move(buffer, self.sent, self.received, axis=self.axis, transport=self.transport)
        return moved.reshape(-1, *moved.shape[2:])

    def _move_back(self, slots: Array) -> Array:
        buffer = slots.reshape(*self.item_of_slot.shape, *slots.shape[1:])
        moved = move(buffer, self.received, self.sent, axis=self.axis, transport=self.transport)
        return moved.reshape(-1, *moved.shape[2:])


def hop(
    queues: Queues, rows: int, capacity: int, round_: Int[Array, ""] | int, *, axis: str, transport: Transport
) -> Hop:
    """Return the hop that carries places `round_ * capacity` to `(round_ + 1) * capacity - 1` of every queue.

    Args:
        rows: of the payload, T; the queues hold T * f items.
        capacity: C.
    """
    start = round_ * capacity
    place = start + jnp.arange(capacity, dtype=jnp.int32)
    item = queues.order.at[queues.first[:, None] + place].get(mode="clip")
    item_of_slot = jnp.where(place < queues.counts[:, None], item, queues.peer.size)
    travels = (queues.place >= start) & (queues.place < start + capacity)
    slot = queues.peer * capacity + queues.place - start
    slot_of_item = jnp.where(travels, slot, queues.counts.size * capacity).reshape(rows, -1)
    sent = jnp.clip(queues.counts - start, 0, capacity)
    received = lax.all_to_all(sent, axis, 0, 0, tiled=True) if transport == "ragged" else sent
    return Hop(item_of_slot, slot_of_item, sent, received, axis, transport)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["to_node", "to_device", "within_device"], meta_fields=[]
)
@dataclass(frozen=True)
class Plan:
    """The way of one round's tokens to their experts."""

    to_node: Hop | None
    """Hop 1, a token per node; None where all experts are in one node."""
    to_device: Hop
    """Hop 2, one slot per expert of a token."""
    within_device: within_device.Plan
    """From the slots of hop 2 to rows grouped by expert."""


def dispatch(plan: Plan, payload: PyTree[Array, "T ..."]) -> PyTree[Array, "R ..."]:
    """Copy what each token brings to the rows of its experts; padding rows are zero."""
    return jax.tree.map(lambda leaf: _dispatch(plan, leaf), payload)


def combine(plan: Plan, rows: PyTree[Float[Array, "R ..."]]) -> PyTree[Float[Array, "T ..."]]:
    """Return the sum of each token's rows; the transpose of `dispatch`.

    Rows of a node are added in float32 and sent in their own type, then the sums of the nodes are.
    """
    return jax.tree.map(lambda leaf: _combine(plan, leaf), rows)


def dispatch_weights(plan: Plan, weights: Float[Array, "T K"]) -> Float[Array, "R"]:
    """Bring the router's weight of each choice to its row; padding rows get zero."""
    return _dispatch_weights(plan, weights)


@jax.custom_vjp
def _dispatch(plan, x):
    if plan.to_node is not None:
        x = plan.to_node.rows_there(x)
    return within_device.dispatch(plan.within_device, plan.to_device.rows_there(x))


@jax.custom_vjp
def _combine(plan, rows):
    y = plan.to_device.rows_back(within_device.combine(plan.within_device, rows))
    return y if plan.to_node is None else plan.to_node.rows_back(y)


@jax.custom_vjp
def _dispatch_weights(plan, weights):
    if plan.to_node is not None:
        weights = plan.to_node.rows_there(weights)
    slots = plan.to_device.items_there(weights)
    return within_device.dispatch_weights(plan.within_device, slots[:, None])


def _weights_back(plan, of_rows):
    slots = take_or_zero(of_rows, plan.within_device.row_of_slot[:, 0])
    weights = plan.to_device.items_back(slots)
    return weights if plan.to_node is None else plan.to_node.rows_back(weights)


_dispatch.defvjp(lambda plan, x: (_dispatch(plan, x), plan), lambda plan, dy: (None, _combine(plan, dy)))
_combine.defvjp(lambda plan, rows: (_combine(plan, rows), plan), lambda plan, dy: (None, _dispatch(plan, dy)))
_dispatch_weights.defvjp(
    lambda plan, weights: (_dispatch_weights(plan, weights), plan), lambda plan, dy: (None, _weights_back(plan, dy))
)


@dataclass(frozen=True)
class Route:
    """The sizes of both hops. Expert e lives on device e // (num_experts / (N L)) of the N L, node after node."""

    nodes: int
    """N."""
    devices: int
    """L, of each node."""
    num_experts: int
    """E, of the layer; divisible by N L."""
    node_capacity: int
    """Slots C of a round's buffer to a node."""
    device_capacity: int
    """Slots C of a round's buffer to a device."""
    transport: Transport

    @property
    def experts_of_node(self) -> int:
        return self.num_experts // self.nodes

    @property
    def experts_of_device(self) -> int:
        return self.num_experts // (self.nodes * self.devices)

    def rounds(self, tokens: int, k: int) -> tuple[int, int]:
        """Return how many rounds hop 1, and in each of them hop 2, take at most, whatever the routing."""
        if self.nodes == 1:
            return 1, _ceil_div(tokens * k, self.device_capacity)
        slots = self.nodes * self.node_capacity
        return _ceil_div(tokens, self.node_capacity), _ceil_div(slots * k, self.device_capacity)


def _ceil_div(a: Any, b: int) -> Any:
    return -(-a // b)


def queues_to_nodes(route: Route, indices: Int32[Array, "T K"]) -> Queues | None:
    """Return the queues of hop 1, whose items are (token, node) pairs; None where there is one node."""
    if route.nodes == 1:
        return None
    node = jnp.arange(route.nodes, dtype=jnp.int32)
    goes = (indices[:, :, None] // route.experts_of_node == node).any(axis=1)
    return line_up(jnp.where(goes, node, route.nodes).reshape(-1), route.nodes)


def active_rounds(route: Route, queues: Queues | None, indices: Int32[Array, "T K"]) -> Bool[Array, "rounds1 rounds2"]:
    """Return which rounds any device of the N L needs; the same on all of them.

    Counted before anything travels: a device knows how many of its tokens go to each owner in each round of hop 1, and
    a forwarder adds what its senders tell it.
    """
    tokens, k = indices.shape
    rounds1, rounds2 = route.rounds(tokens, k)
    node = indices // route.experts_of_node
    device = indices % route.experts_of_node // route.experts_of_device
    if queues is None:
        needed1 = jnp.ones((), jnp.int32)
        round1 = jnp.zeros_like(node)
    else:
        needed1 = _ceil_div(queues.counts.max(), route.node_capacity)
        place = jnp.take_along_axis(queues.place.reshape(tokens, route.nodes), node, axis=1)
        round1 = place // route.node_capacity
    counts = jnp.zeros((route.nodes, rounds1, route.devices), jnp.int32).at[node, round1, device].add(1)
    if queues is not None:
        counts = lax.all_to_all(counts, "node", 0, 0, tiled=True).sum(axis=0, keepdims=True)
    needed2 = _ceil_div(counts[0].max(axis=-1), route.device_capacity)
    needed1, needed2 = lax.pmax((needed1, needed2), EXPERT_AXES)
    first, second = jnp.arange(rounds1)[:, None], jnp.arange(rounds2)
    return (first < needed1) & (second < needed2[:, None])


def plan_round(
    route: Route,
    queues: Queues | None,
    indices: Int32[Array, "T K"],
    round1: Int[Array, ""] | int,
    round2: Int[Array, ""] | int,
    alignment: int,
) -> Plan:
    """Return the way of the tokens that travel in round `round1` of hop 1 and, of these, `round2` of hop 2.

    Args:
        indices: the experts of each token.
        alignment: of the rows, see `group_rows`.
    """
    # Experts travel as numbers from 1, so that the zeros of unused slots mean none.
    experts = (indices + 1).astype(jnp.int16 if route.num_experts < 2**15 else jnp.int32)
    to_node = None
    if queues is not None:
        to_node = hop(queues, len(indices), route.node_capacity, round1, axis="node", transport=route.transport)
        experts = to_node.rows_there(experts)
    expert = experts.astype(jnp.int32) - 1
    first = lax.axis_index("node") * route.experts_of_node
    here = (expert >= first) & (expert < first + route.experts_of_node)
    device = jnp.where(here, (expert - first) // route.experts_of_device, route.devices)
    to_device = hop(
        line_up(device.reshape(-1), route.devices),
        len(experts),
        route.device_capacity,
        round2,
        axis="local",
        transport=route.transport,
    )
    expert = to_device.items_there(experts).astype(jnp.int32) - 1
    own = expert - first - lax.axis_index("local") * route.experts_of_device
    own = jnp.where(expert < 0, route.experts_of_device, own)
    return Plan(to_node, to_device, sort_by_expert(own[:, None], route.experts_of_device, alignment))
