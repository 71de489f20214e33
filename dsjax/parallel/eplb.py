"""DeepSeek's load balancer for redundant experts, EPLB (github.com/deepseek-ai/EPLB), for all layers at once.

Dimensions: L layers, E experts, R slots, D devices; X rows of items I that are packed or replicated independently.
"""

import numpy as np
from jaxtyping import Float, Float32, Int, Int32


def balanced_packing(
    weights: Float32[np.ndarray, "X I"], packs: int
) -> tuple[Int[np.ndarray, "X I"], Int[np.ndarray, "X I"]]:
    """Put I items into packs of equally many: the heaviest first, each into the lightest pack that has room.

    Returns the pack of each item, and its rank among the pack's items.
    """
    rows, items = weights.shape
    room = items // packs
    if room == 1:
        return np.broadcast_to(np.arange(items), weights.shape), np.zeros(weights.shape, np.int64)
    # Items and packs by flat position: indexing by (row, column) pairs takes twice the time.
    order = np.argsort(-weights, axis=1, kind="stable") + np.arange(rows)[:, None] * items
    order = np.ascontiguousarray(order.T)
    sorted_weights, first = weights.ravel()[order], np.arange(rows) * packs
    totals, counts = np.zeros((rows, packs), np.float32), np.zeros(rows * packs, np.int64)
    flat_totals = totals.ravel()
    chosen, rank = np.empty((2, items, rows), np.int64)
    for i in range(items):
        pack = totals.argmin(axis=1)
        pack += first
        chosen[i], count = pack, counts[pack]
        rank[i] = count
        # A full pack weighs infinitely much.
        flat_totals[pack] = np.where(count == room - 1, np.float32(np.inf), flat_totals[pack] + sorted_weights[i])
        counts[pack] = count + 1
    pack_of_item, rank_of_item = np.empty((2, rows * items), np.int64)
    pack_of_item[order], rank_of_item[order] = chosen - first, rank
    return pack_of_item.reshape(rows, items), rank_of_item.reshape(rows, items)


def replicate_experts(
    weights: Float32[np.ndarray, "X I"], slots: int
) -> tuple[Int[np.ndarray, "X P"], Float32[np.ndarray, "X I"]]:
    """Give each expert a replica, then one more to the one whose replicas are busiest, until there are P = `slots`.

    Returns the expert of each replica, and how many replicas each expert has.
    """
    rows, experts = weights.shape
    expert = np.broadcast_to(np.arange(slots), (rows, slots)).copy()
    counts, per_replica, every = np.ones_like(weights), weights.copy(), np.arange(rows)
    for i in range(experts, slots):
        busiest = per_replica.argmax(axis=1)
        expert[:, i] = busiest
        counts[every, busiest] += 1
        per_replica[every, busiest] = weights[every, busiest] / counts[every, busiest]
    return expert, counts


def eplb(
    loads: Float32[np.ndarray, "L E"], slots: int, groups: int, nodes: int, devices: int
) -> Int[np.ndarray, "L R"]:
    """Groups to nodes, replicas within nodes, replicas to devices; the global policy is one group on one node."""
    layers, experts = loads.shape
    every = np.arange(layers)[:, None]
    # Tokens are counted in integers, whose sums are exact; others in float64, so that their order matters least.
    size = experts // groups
    group_loads = loads.reshape(layers, groups, size).sum(axis=2, dtype=np.float64).astype(np.float32)
    node, rank = balanced_packing(group_loads, nodes)
    group_at = np.empty((layers, groups), np.int64)
    group_at[every, node * (groups // nodes) + rank] = np.arange(groups)
    expert_at = (group_at[:, :, None] * size + np.arange(size)).reshape(layers, experts)

    # From here on, a row is a node.
    of_node = loads[every, expert_at].reshape(layers * nodes, experts // nodes)
    replica, counts = replicate_experts(of_node, slots // nodes)
    device, rank = balanced_packing(np.take_along_axis(of_node / counts, replica, axis=1), devices // nodes)
    held = np.empty_like(replica)
    np.put_along_axis(held, device * (slots // devices) + rank, replica, axis=1)
    held = held.reshape(layers, nodes, slots // nodes) + np.arange(nodes)[:, None] * (experts // nodes)
    return expert_at[every, held.reshape(layers, slots)]


def count(held: Int[np.ndarray, "L R"], experts: int) -> Int32[np.ndarray, "L E"]:
    """How many slots hold each expert."""
    layers = held.shape[0]
    flat = held + np.arange(layers)[:, None] * experts
    return np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts).astype(np.int32)


def device_loads(
    held: Int[np.ndarray, "L R"], per_replica: Float[np.ndarray, "L E"], devices: int
) -> Float[np.ndarray, "L D"]:
    """The load of every device, from that of one replica of each expert."""
    layers, slots = held.shape
    return np.take_along_axis(per_replica, held, axis=1).reshape(layers, devices, slots // devices).sum(axis=2)
