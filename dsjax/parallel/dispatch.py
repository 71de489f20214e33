"""Tokens to the experts of other devices, and their results back: dispatch and combine in two hops.

    token --hop 1: node--> forwarder --hop 2: local--> owner --sort--> row of its expert

A token crosses to a node once, whatever the number of its experts there, to the device with its own place in the node;
that forwarder sends one copy to the owner of each expert. Results come back the same way and are added up, in float32,
inside the node before they cross again (report section 3.2.2). All of it is gathers and all-to-alls between buffers of
fixed size; what a buffer does not hold is left for the next round, in which the same code runs with another plan.

The ways there and back are linear and each the other's transpose, by construction; `model.dispatch` makes each the
other's derivative. They know nothing of what they carry: tokens are any pytree of arrays [T, ...].

Dimensions: T tokens of a device, K experts of a token, N nodes, L devices of a node, C slots of a buffer for one peer,
S = N C slots at a forwarder, R rows of expert inputs.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, Shaped

from dsjax.config import Transport
from dsjax.model import dispatch as within_device
from dsjax.model.dispatch import sort_by_expert, sum_of_rows, take_or_zero
from dsjax.model.grouped_matmul import Groups
from dsjax.parallel.mesh import EXPERT_AXES, Axes
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
    data_fields=["item_of_slot", "slot_of_item", "sent", "received", "waiting"],
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
    waiting: Bool[Array, ""]
    """Whether there are items for later rounds."""
    axis: Axes
    """Of the mesh."""
    transport: Transport

    def there(
        self, rows: PyTree[Shaped[Array, "T ..."]], items: PyTree[Shaped[Array, "T f"]] = ()
    ) -> tuple[PyTree[Shaped[Array, "nC ..."]], PyTree[Shaped[Array, "nC"]]]:
        """Send, with every item, a copy of its row and what is its own; unused slots are zero."""
        row_of_slot = self.item_of_slot // self.slot_of_item.shape[1]
        copies = jax.tree.map(lambda leaf: take_or_zero(leaf, row_of_slot), rows)
        own = jax.tree.map(lambda leaf: take_or_zero(leaf.reshape(-1), self.item_of_slot), items)
        moved = move((copies, own), self.sent, self.received, axis=self.axis, transport=self.transport)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), moved)

    def back(
        self, rows: PyTree[Shaped[Array, "nC ..."]], items: PyTree[Shaped[Array, "nC"]] = ()
    ) -> tuple[PyTree[Shaped[Array, "T ..."]], PyTree[Shaped[Array, "T f"]]]:
        """The transpose of `there`: of what lies in the slots of a row's items, the sum, and what is their own."""
        buffers = jax.tree.map(lambda leaf: leaf.reshape(*self.item_of_slot.shape, *leaf.shape[1:]), (rows, items))
        moved = move(buffers, self.received, self.sent, axis=self.axis, transport=self.transport)
        copies, own = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), moved)
        summed = jax.tree.map(lambda leaf: sum_of_rows(leaf, self.slot_of_item), copies)
        return summed, jax.tree.map(lambda leaf: take_or_zero(leaf, self.slot_of_item), own)


def hop(
    queues: Queues, rows: int, capacity: int, round_: Int[Array, ""] | int, *, axis: Axes, transport: Transport
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
    waiting = (queues.counts > start + capacity).any()
    return Hop(item_of_slot, slot_of_item, sent, received, waiting, axis, transport)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["to_node", "to_device", "within_device"], meta_fields=[]
)
@dataclass(frozen=True)
class Plan:
    """The way of one round's tokens to their experts, and back; see `runtime.Plan`."""

    to_node: Hop | None
    """Hop 1, a token per node; None where all experts are in one node."""
    to_device: Hop
    """Hop 2, one slot per expert of a token."""
    within_device: within_device.Plan
    """From the slots of hop 2 to rows grouped by expert."""

    @property
    def groups(self) -> Groups:
        return self.within_device.groups

    @property
    def waiting(self) -> Bool[Array, ""]:
        """Whether this device has tokens, or experts of tokens that came by, for later rounds."""
        return self.to_device.waiting if self.to_node is None else self.to_device.waiting | self.to_node.waiting

    def again(self, tokens: PyTree[Shaped[Array, "T ..."]]) -> PyTree[Shaped[Array, "S ..."]]:
        if self.to_node is not None:
            tokens, _ = self.to_node.there(tokens)
        return self.to_device.there(tokens)[0]

    def expand(self, arrived: PyTree[Shaped[Array, "S ..."]]) -> PyTree[Shaped[Array, "R ..."]]:
        return self.within_device.expand(arrived)

    def expand_weights(self, arrived: Float[Array, "S"]) -> Float[Array, "R"]:
        return self.within_device.expand_weights(arrived[:, None])

    def row_sources(self) -> Int32[Array, "R"]:
        return self.within_device.row_sources()

    def back(self, rows: PyTree[Float[Array, "R ..."]]) -> PyTree[Float[Array, "T ..."]]:
        slots, _ = self.to_device.back(self.within_device.back(rows))
        return slots if self.to_node is None else self.to_node.back(slots)[0]

    def back_with_weights(
        self, rows: Float[Array, "R ..."], of_rows: Float[Array, "R"]
    ) -> tuple[Float[Array, "T ..."], Float[Array, "T K"]]:
        tokens, weights = self.within_device.back_with_weights(rows, of_rows)
        tokens, weights = self.to_device.back(tokens, weights[:, 0])
        if self.to_node is None:
            return tokens, weights
        return self.to_node.back((tokens, weights))[0]


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
    axes: tuple[Axes, Axes] = EXPERT_AXES
    """Of the mesh: along which the nodes are, and along which the devices of each."""

    @property
    def all_axes(self) -> tuple[str, ...]:
        """Those along which all devices are."""
        return tuple(name for axes in self.axes for name in ((axes,) if isinstance(axes, str) else axes))

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
        counts = lax.all_to_all(counts, route.axes[0], 0, 0, tiled=True).sum(axis=0, keepdims=True)
    needed2 = _ceil_div(counts[0].max(axis=-1), route.device_capacity)
    needed1, needed2 = lax.pmax((needed1, needed2), route.all_axes)
    first, second = jnp.arange(rounds1)[:, None], jnp.arange(rounds2)
    return (first < needed1) & (second < needed2[:, None])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["queues", "indices", "round1", "round2"],
    meta_fields=["route", "alignment"],
)
@dataclass(frozen=True)
class Courier:
    """Takes the tokens that travel in round `round1` of hop 1 and, of these, `round2` of hop 2 to their experts."""

    queues: Queues | None
    """Of hop 1."""
    indices: Int32[Array, "T K"]
    """The experts of each token."""
    round1: Int[Array, ""] | int
    round2: Int[Array, ""] | int
    route: Route
    alignment: int
    """Of the rows, see `group_rows`."""

    def send(
        self, tokens: PyTree[Shaped[Array, "T ..."]], weights: Float[Array, "T K"]
    ) -> tuple[Plan, PyTree[Shaped[Array, "S ..."]], Float[Array, "S"]]:
        """Send all that a token brings, in one message per hop; see `runtime.Courier`."""
        route = self.route
        nodes, devices = route.axes
        # Experts travel as numbers from 1, so that the zeros of unused slots mean none.
        experts = (self.indices + 1).astype(jnp.int16 if route.num_experts < 2**15 else jnp.int32)
        to_node = None
        if self.queues is not None:
            to_node = hop(
                self.queues, len(experts), route.node_capacity, self.round1, axis=nodes, transport=route.transport
            )
            (tokens, weights, experts), _ = to_node.there((tokens, weights, experts))
        expert = experts.astype(jnp.int32) - 1
        first = lax.axis_index(nodes) * route.experts_of_node
        here = (expert >= first) & (expert < first + route.experts_of_node)
        device = jnp.where(here, (expert - first) // route.experts_of_device, route.devices)
        to_device = hop(
            line_up(device.reshape(-1), route.devices),
            len(experts),
            route.device_capacity,
            self.round2,
            axis=devices,
            transport=route.transport,
        )
        tokens, (weights, experts) = to_device.there(tokens, (weights, experts))
        expert = experts.astype(jnp.int32) - 1
        own = expert - first - lax.axis_index(devices) * route.experts_of_device
        own = jnp.where(expert < 0, route.experts_of_device, own)
        within = sort_by_expert(own[:, None], route.experts_of_device, self.alignment)
        return Plan(to_node, to_device, within), tokens, weights
