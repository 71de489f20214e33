"""Where the experts of each MoE layer live: how often each is replicated, on which device, and what it costs to move.

The report (section 3.4) deploys redundant experts: R slots for E experts, the busiest experts in several of them.
`plan_placement` decides as DeepSeek's EPLB does (github.com/deepseek-ai/EPLB), and can weigh moves against balance.
Everything is NumPy on the host, for all layers at once.

Dimensions: L layers, E experts, R slots ("physical experts"), D devices, N nodes, S = R/D slots of a device, M replicas
of the most replicated expert. Slots are numbered device by device, devices node by node.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int32, Real

from dsjax.parallel.descent import counts_by, descent, evaluated, least, renumbered, reordered
from dsjax.parallel.eplb import count, device_loads, eplb

Policy = Literal["auto", "hierarchical", "global"]


@dataclass(frozen=True, eq=False)
class Placement:
    """Which expert each slot holds. The arrays are read-only.

    Raises:
        ValueError: counts that do not divide, an expert that does not exist, or one without a slot.
    """

    expert_of_slot: Int32[np.ndarray, "L R"]
    """EPLB's `phy2log`."""
    experts: int
    """E."""
    devices: int
    """D."""
    nodes: int = 1
    """N: devices of a node are joined by the faster network."""

    def __post_init__(self) -> None:
        held = np.array(self.expert_of_slot)
        if held.ndim != 2 or held.dtype.kind not in "iu":
            raise ValueError(f"expert_of_slot: {held.dtype} of shape {held.shape}, should be integers [layers, slots]")
        _check_counts(held.shape[1], self.experts, self.devices, self.nodes)
        if held.size and not 0 <= held.min() <= held.max() < self.experts:
            wrong = held.min() if held.min() < 0 else held.max()
            raise ValueError(f"expert_of_slot holds expert {wrong}, should be from 0 to {self.experts - 1}")
        held = held.astype(np.int32)
        held.flags.writeable = False
        object.__setattr__(self, "expert_of_slot", held)
        if (self.replicas == 0).any():
            layer, expert = np.argwhere(self.replicas == 0)[0]
            raise ValueError(f"expert_of_slot: expert {expert} of layer {layer} has no slot, should have at least one")

    @property
    def layers(self) -> int:
        """L."""
        return self.expert_of_slot.shape[0]

    @property
    def slots(self) -> int:
        """R."""
        return self.expert_of_slot.shape[1]

    @property
    def slots_per_device(self) -> int:
        """S."""
        return self.slots // self.devices

    @cached_property
    def replicas(self) -> Int32[np.ndarray, "L E"]:
        """Slots of each expert, at least one; EPLB's `logcnt`."""
        counts = count(self.expert_of_slot, self.experts)
        counts.flags.writeable = False
        return counts

    @cached_property
    def slots_of_expert(self) -> Int32[np.ndarray, "L E M"]:
        """Slots of each expert in ascending order, then -1; EPLB's `log2phy`, which has them in order of creation."""
        held = self.expert_of_slot
        slot = np.argsort(held, axis=1, kind="stable")
        expert = np.take_along_axis(held, slot, axis=1)
        first = np.cumsum(self.replicas, axis=1) - self.replicas
        replica = np.arange(self.slots) - np.take_along_axis(first, expert, axis=1)
        table = np.full((self.layers, self.experts, self.replicas.max(initial=1)), -1, np.int32)
        table[np.arange(self.layers)[:, None], expert, replica] = slot
        table.flags.writeable = False
        return table

    def device_loads(self, loads: Real[np.ndarray, "L E"]) -> Float[np.ndarray, "L D"]:
        """Load of each device, float64, where the load of an expert is shared evenly by its replicas."""
        loads = _checked_loads(loads)
        if loads.shape != self.replicas.shape:
            raise ValueError(f"loads have shape {loads.shape}, should be {self.replicas.shape} as the placement's")
        return device_loads(self.expert_of_slot, loads / self.replicas, self.devices)

    def imbalance(self, loads: Real[np.ndarray, "L E"]) -> Float[np.ndarray, " L"]:
        """Load of the fullest device over that of the mean one, at least 1; 1 in a layer without load."""
        per_device = self.device_loads(loads)
        mean = per_device.mean(axis=1)
        return np.divide(per_device.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0)


@dataclass(frozen=True, eq=False)
class Migration:
    """What leads from one placement to another: `new_weights[slot] = old_weights[source[slot]]`."""

    source: Int32[np.ndarray, "L R"]
    """Slot of the old placement that each slot takes its expert from: itself if it holds it already, else the nearest:
    of the same device, else of the same node, else of any; the first of several."""
    devices: int
    nodes: int

    def _crosses(self, parts: int) -> Bool[np.ndarray, "L R"]:
        size = self.source.shape[1] // parts
        return self.source // size != np.arange(self.source.shape[1]) // size

    @property
    def changed(self) -> Bool[np.ndarray, "L R"]:
        """Slots whose expert changes."""
        return self._crosses(self.source.shape[1])

    @property
    def between_devices(self) -> Bool[np.ndarray, "L R"]:
        """Slots whose expert comes from another device: what `plan_placement` counts as moved."""
        return self._crosses(self.devices)

    @property
    def between_nodes(self) -> Bool[np.ndarray, "L R"]:
        """Slots whose expert comes from another node; part of `between_devices`."""
        return self._crosses(self.nodes)

    def bytes_between_devices(self, bytes_per_expert: int) -> int:
        """Bytes that devices receive from others, those of other nodes included."""
        return int(self.between_devices.sum()) * bytes_per_expert

    def bytes_between_nodes(self, bytes_per_expert: int) -> int:
        """Bytes that devices receive from other nodes."""
        return int(self.between_nodes.sum()) * bytes_per_expert


def migration(current: Placement, planned: Placement) -> Migration:
    """Describe how to get from one placement to another.

    Raises:
        ValueError: they differ in layers, slots, experts, devices or nodes.
    """
    _check_same_shape(current, planned)
    old, new, slots = current.expert_of_slot, planned.expert_of_slot, current.slots
    source = np.take_along_axis(current.slots_of_expert[..., 0], new, axis=1)
    rows = np.arange(current.layers)[:, None]
    for parts in (current.nodes, current.devices, slots):
        # The first slot of each part that holds the expert. Backwards, because the last write stays.
        part = np.arange(slots) // (slots // parts)
        nearest = np.full((current.layers, parts * current.experts), -1, np.int32)
        nearest[rows, (part * current.experts + old)[:, ::-1]] = np.arange(slots)[::-1]
        found = nearest[rows, part * current.experts + new]
        source = np.where(found >= 0, found, source)
    return Migration(source.astype(np.int32), current.devices, current.nodes)


def plan_placement(
    loads: Real[np.ndarray, "L E"],
    slots: int,
    devices: int,
    nodes: int = 1,
    groups: int = 1,
    *,
    policy: Policy = "auto",
    refine: int = 0,
    current: Placement | None = None,
    cost: float = 0.0,
) -> Placement:
    """Place E experts with the given loads into `slots` slots, so that devices are equally loaded.

    `hierarchical` keeps the experts of a routing group on one node (a token reaches few nodes: prefilling), `global`
    ignores groups and nodes (decoding); `auto` is hierarchical where nodes divide groups. Without `current` and
    `refine`, the result is EPLB's `phy2log`. Like EPLB's, decisions are made in float32; ties go to the lower index
    (EPLB leaves the order of equal loads to torch's unstable sort).

    With a `current` placement, devices are renumbered (within nodes, and nodes as a whole, if hierarchical) and slots
    of a device reordered so that as few experts as possible move; this changes no load. With a `cost` as well, each
    layer gets the placement, among `current`, EPLB's, and the steps of a descent from `current`, that has the least

        load of the fullest device / mean load of a device + cost * slots whose expert their device did not hold before

    Descent never takes an expert to a node that does not hold it, if hierarchical. What it visits does not depend on
    the cost, and what moves more experts than EPLB's is left out: so a higher cost never moves more.

    Args:
        loads: tokens per expert, counted or predicted, in any unit; a mean over time where single counts are noisy.
        slots: R, replicas included.
        groups: routing groups of experts (`n_group`), equal and contiguous.
        refine: at most so many steps of descent (two experts exchanged, or a replica of one made one of another) in
            each layer of what EPLB decides. 0 is EPLB. It helps devices with few slots and much redundancy (512 slots
            on 256 devices: max/mean 1.11 instead of 1.20), and not where EPLB reaches its bounds, such as 288 slots.
        current: the placement to start from, of equal shape.
        cost: of one moved expert, as a fraction of a layer's mean device load: at 0.001, a move has to lower the
            fullest device by 0.1 % of the mean. Copies within a device are free. At 0 only EPLB's is considered.

    Raises:
        ValueError: loads that are negative or not finite, counts that do not divide, a placement of another shape.
    """
    loads = _checked_loads(loads)
    experts = loads.shape[1]
    _check_counts(slots, experts, devices, nodes)
    if groups < 1 or experts % groups:
        raise ValueError(f"groups = {groups}: should divide the {experts} experts")
    if policy not in get_args(Policy):
        raise ValueError(f"policy = {policy!r}: should be one of {', '.join(get_args(Policy))}")
    if policy == "hierarchical" and groups % nodes:
        raise ValueError(f"nodes = {nodes}: should divide the {groups} groups for the hierarchical policy")
    if refine < 0:
        raise ValueError(f"refine = {refine}: should be 0 or more steps")
    if not (cost >= 0 and math.isfinite(cost)):
        raise ValueError(f"cost = {cost}: should be 0 or more, a fraction of the mean device load")
    if cost and current is None:
        raise ValueError(f"cost = {cost}: should be 0 without a current placement")

    if policy == "global" or groups % nodes:
        within, held = 1, eplb(loads.astype(np.float32), slots, 1, 1, devices)
    else:
        within, held = nodes, eplb(loads.astype(np.float32), slots, groups, nodes, devices)
    # In units of the mean device load. A layer without load is balanced as it is.
    mean = loads.sum(axis=1, keepdims=True) / devices
    relative = np.divide(loads, mean, out=np.zeros_like(loads), where=mean > 0)
    no_limit = np.full(len(loads), slots)
    if refine:
        anywhere = np.ones((len(loads), devices, experts), bool)
        held = least(descent(held, relative, anywhere, within, refine), 0.0, no_limit)
    if current is not None:
        _check_same_shape(current, Placement(held, experts, devices, nodes))
        old = current.expert_of_slot
        held = renumbered(old, held, experts, devices, nodes, within)
        if cost:
            home = counts_by(old, experts, devices) > 0
            fresh = evaluated(np.arange(len(held)), held, relative, home)
            between = descent(old, relative, home, within, slots)
            held = reordered(old, least(itertools.chain(between, [fresh]), cost, fresh.moved), devices)
    return Placement(held, experts, devices, nodes)


def _check_counts(slots: int, experts: int, devices: int, nodes: int) -> None:
    if nodes < 1 or devices < 1 or devices % nodes:
        raise ValueError(f"devices = {devices}: should be a multiple of nodes = {nodes}, both at least 1")
    if slots % devices:
        raise ValueError(f"slots = {slots}: should be a multiple of devices = {devices}")
    if slots < experts:
        raise ValueError(f"slots = {slots}: should be at least as many as the {experts} experts")


def _check_same_shape(current: Placement, planned: Placement) -> None:
    for name in ("layers", "experts", "slots", "devices", "nodes"):
        old, new = getattr(current, name), getattr(planned, name)
        if old != new:
            raise ValueError(f"the current placement has {name} = {old}, should be {new} as planned")


def _checked_loads(loads: Real[np.ndarray, "L E"]) -> Float[np.ndarray, "L E"]:
    """The same in float64."""
    loads = np.asarray(loads)
    if loads.ndim != 2 or loads.shape[1] == 0 or loads.dtype.kind == "c":
        raise ValueError(f"loads: {loads.dtype} of shape {loads.shape}, should be numbers [layers, experts]")
    loads = loads.astype(np.float64)
    wrong = ~(np.isfinite(loads) & (loads >= 0))
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0]
        raise ValueError(f"loads[{layer}, {expert}] = {loads[layer, expert]}: should be finite and at least 0")
    total = loads.sum(axis=1).max(initial=0)
    if total > np.finfo(np.float32).max:
        raise ValueError(f"loads: a layer's sum is {total:.3g}, should be within float32; use another unit")
    return loads
