"""Moving experts from one device to another while the model is in use.

The experts that a layer is to get arrive, a piece at a time, in a waiting room beside the weights: as many slots as a
device has of one layer. When all are there, one program puts them in their slots and gives the layer its new tables. So
at any moment every table says where its experts are, and no pass sees a layer between two placements.

A piece is one expert for each device at most, from any other, and its program knows nothing of from where. It takes two
all-to-alls: first every device deals the expert that it gives away out to all, a part for each; then each of them sends
the parts on to whom they are for. Whatever the moves, each device sends as much as one expert twice over, and holds no
more. (One all-to-all alone would need room for an expert from every device.)

Dimensions: L layers, N devices, S slots of a device, R = N S slots, E experts, M most replicas of one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Int32, PyTree, Shaped

from dsjax.inference.layout import put
from dsjax.inference.replicas import Tables
from dsjax.model.dispatch import take_or_zero
from dsjax.parallel.mesh import Axes
from dsjax.parallel.transport import move


class Piece(NamedTuple):
    """What one piece moves, int32; a device's number is its place along the axes of the experts."""

    gives: Int32[np.ndarray, " N"]
    """Slot of each device whose expert it sends, counted within the device."""
    giver: Int32[np.ndarray, " N"]
    """Device from which each device gets an expert; N for none."""
    place: Int32[np.ndarray, " N"]
    """Slot that this is for, counted within the device."""


def pieces_of(source: Int[np.ndarray, " R"], devices: int) -> list[Piece]:
    """Return what brings a layer's experts to the devices that do not have them.

    In a piece, a device sends one expert, to one device or to several, and gets one. The busiest receivers come first.

    Args:
        source: the slot that each slot takes its expert from, see `parallel.placement.Migration`.
        devices: N.
    """
    per_device = len(source) // devices
    receiver, giver = np.arange(len(source)) // per_device, source // per_device
    waiting = [int(slot) for slot in np.flatnonzero(receiver != giver)]
    pieces = []
    while waiting:
        piece = Piece(np.zeros(devices, np.int32), np.full(devices, devices, np.int32), np.zeros(devices, np.int32))
        left, given = np.bincount(receiver[waiting], minlength=devices), dict[int, int]()
        for slot in sorted(waiting, key=lambda slot: -left[receiver[slot]]):
            to, by = receiver[slot], giver[slot]
            if piece.giver[to] == devices and given.setdefault(by, source[slot]) == source[slot]:
                piece.giver[to], piece.place[to], piece.gives[by] = by, slot % per_device, source[slot] % per_device
                waiting.remove(slot)
        pieces.append(piece)
    return pieces


class Migrator:
    """The two programs, compiled once each, and the waiting room.

    Attributes:
        axes: of the mesh, along which experts are divided.
        devices: N, along these.
    """

    def __init__(self, experts: PyTree[Shaped[Array, "L R ..."]], mesh: Mesh, axes: Axes):
        """Makes an empty waiting room.

        Args:
            experts: weights of all slots, in any format, divided along their second axis.
        """
        self.axes = axes
        names = (axes,) if isinstance(axes, str) else axes
        self.devices = math.prod(mesh.shape[axis] for axis in names)
        whole, of_weights, of_room = PartitionSpec(), PartitionSpec(None, axes), PartitionSpec(axes)

        def mapped(function: Callable, specs: tuple, result: Any, donated: tuple[int, ...]) -> Any:
            on_mesh = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)
            return jax.jit(on_mesh, donate_argnums=donated)

        bring = functools.partial(_bring, axes=axes)
        self.bring_program = mapped(bring, (of_weights, of_room, whole, whole), of_room, (1,))
        specs = (of_weights, of_room, whole, whole, of_room, of_room, whole)
        self.settle_program = mapped(_settle, specs, (of_weights, whole), (0,))
        self._replicated = NamedSharding(mesh, whole)
        self._of_slots = NamedSharding(mesh, of_room)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), experts)
        room = jax.jit(
            lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), out_shardings=self._of_slots
        )
        self.room = room()

    def on_devices(self, tables: Tables) -> Tables:
        """Return tables on all devices."""
        return put(tables, self._replicated)

    def bring(self, experts: PyTree[Shaped[Array, "L R ..."]], layer: int, piece: Piece) -> None:
        """Bring the experts of a piece to the waiting room."""
        self.room = self.bring_program(experts, self.room, *self._put((np.int32(layer), piece)))

    def settle(
        self,
        experts: PyTree[Shaped[Array, "L R ..."]],
        tables: Tables,
        layer: int,
        source: Int[np.ndarray, " R"],
        new: Tables,
    ) -> tuple[PyTree[Shaped[Array, "L R ..."]], Tables]:
        """Put what has arrived into the slots of a layer, and switch its tables; return all weights and tables.

        Args:
            experts: given away.
            source: as for `pieces_of`, all of whose pieces have been brought.
            new: the layer's tables afterwards.
        """
        per_device = len(source) // self.devices
        arrived = source // per_device != np.arange(len(source)) // per_device
        within = put((arrived, (source % per_device).astype(np.int32)), self._of_slots)
        return self.settle_program(experts, self.room, tables, *self._put((np.int32(layer),)), *within, self._put(new))

    def _put(self, tree: PyTree) -> PyTree:
        return put(tree, self._replicated)


def _bring(experts: PyTree, room: PyTree, layer: Int[Array, ""], piece: Piece, *, axes: Axes) -> PyTree:
    """Of a device: experts [L, S, ...], room [S, ...]."""
    devices, me = lax.axis_size(axes), lax.axis_index(axes)

    def all_to_all(parts: PyTree) -> PyTree:
        everything = jnp.ones(devices, jnp.int32)
        return move(parts, everything, everything, axis=axes, transport="padded")

    def in_parts(leaf: Array) -> Array:
        one = leaf[layer, piece.gives[me]].ravel()
        return jnp.pad(one, (0, -one.size % devices)).reshape(devices, 1, -1)

    dealt = all_to_all(jax.tree.map(in_parts, experts))
    found = all_to_all(jax.tree.map(lambda parts: take_or_zero(parts, piece.giver), dealt))
    gets = piece.giver[me] < devices

    def put(leaf: Array, parts: Array) -> Array:
        one = parts.reshape(-1)[: math.prod(leaf.shape[1:])].reshape(leaf.shape[1:])
        return leaf.at[jnp.where(gets, piece.place[me], len(leaf))].set(one, mode="drop")

    return jax.tree.map(put, room, found)


def _settle(
    experts: PyTree,
    room: PyTree,
    tables: Tables,
    layer: Int[Array, ""],
    arrived: Bool[Array, " S"],
    within: Int32[Array, " S"],
    new: Tables,
) -> tuple[PyTree, Tables]:
    def put(leaf: Array, waiting: Array) -> Array:
        old = lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
        mask = arrived.reshape(-1, *[1] * (old.ndim - 1))
        return lax.dynamic_update_index_in_dim(leaf, jnp.where(mask, waiting, old[within]), layer, axis=0)

    switched = jax.tree.map(lambda table, row: table.at[layer].set(row), tables, new)
    return jax.tree.map(put, experts, room), switched
