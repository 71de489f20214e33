"""From one placement of experts towards another: which devices trade places, and which single moves help most.

Dimensions: L layers, E experts, R slots, D devices; A of the layers.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy.optimize import linear_sum_assignment

from dsjax.parallel.eplb import count, device_loads


def counts_by(held: Int[np.ndarray, "L R"], experts: int, parts: int) -> Float32[np.ndarray, "L P E"]:
    """How often each of `parts` equal parts of the slots holds each expert."""
    layers = held.shape[0]
    return (
        count(held.reshape(layers * parts, held.shape[1] // parts), experts)
        .reshape(layers, parts, experts)
        .astype(np.float32)
    )


def renumbered(
    current: Int[np.ndarray, "L R"],
    planned: Int[np.ndarray, "L R"],
    experts: int,
    devices: int,
    nodes: int,
    exchangeable: int,
) -> Int[np.ndarray, "L R"]:
    """Give the devices of `planned` the numbers that leave most experts in place.

    Among equals, those that take fewest experts from one of the `nodes` to another. Devices trade places within
    `exchangeable` nodes, and these trade places as a whole.
    """
    layers, slots = current.shape
    new = counts_by(planned, experts, devices)
    on_device = counts_by(current, experts, devices) > 0
    on_node = counts_by(current, experts, nodes) > 0
    stay = new @ on_device.astype(np.float32).transpose(0, 2, 1)
    near = np.repeat(new @ on_node.astype(np.float32).transpose(0, 2, 1), devices // nodes, axis=2)
    gain = stay.astype(np.float64) * (slots + 1) + near
    per_node = devices // exchangeable
    gain = gain.reshape(layers, exchangeable, per_node, exchangeable, per_node).transpose(0, 1, 3, 2, 4)
    device_at = np.empty((layers, exchangeable, per_node), np.int64)
    for layer in range(layers):
        every = range(exchangeable)
        pairs = [[linear_sum_assignment(gain[layer, a, b], maximize=True) for b in every] for a in every]
        worth = [[gain[layer, a, b][pairs[a][b]].sum() for b in every] for a in every]
        for a, b in zip(*linear_sum_assignment(worth, maximize=True), strict=True):
            ours, theirs = pairs[a][b]
            device_at[layer, b, theirs] = a * per_node + ours
    by_device = planned.reshape(layers, devices, slots // devices)
    moved = by_device[np.arange(layers)[:, None], device_at.reshape(layers, devices)]
    return reordered(current, moved.reshape(layers, slots), devices)


def reordered(current: Int[np.ndarray, "L R"], held: Int[np.ndarray, "L R"], devices: int) -> Int[np.ndarray, "L R"]:
    """Order the slots of each device so that those keep their expert that can."""
    old, new = (x.reshape(len(x) * devices, x.shape[1] // devices) for x in (current, held))
    slots = np.arange(old.shape[1])

    def occurrence(x: Int[np.ndarray, "X S"]) -> Int[np.ndarray, "X S"]:
        return ((x[:, :, None] == x[:, None, :]) & (slots[:, None] > slots)).sum(axis=2)

    # The k-th replica of an expert on a device meets the k-th that was there before.
    same = (new[:, :, None] == old[:, None, :]) & (occurrence(new)[:, :, None] == occurrence(old)[:, None, :])
    # Old slots that are free, and new experts without a place, pair up in order.
    free, placed = ~same.any(axis=1), same.any(axis=2)
    target = np.where(placed, same.argmax(axis=2), 0)
    target[~placed] = np.broadcast_to(slots, old.shape)[free]
    result = np.empty_like(new)
    np.put_along_axis(result, target, new, axis=1)
    return result.reshape(held.shape)


class Step(NamedTuple):
    """Placements of some of the layers, A of them."""

    layers: Int[np.ndarray, " A"]
    held: Int[np.ndarray, "A R"]
    moved: Int[np.ndarray, " A"]
    """Experts on devices that are not their home."""
    fullest: Float[np.ndarray, " A"]
    """Load of the fullest device."""


def least(steps: Iterable[Step], cost: float, most_moved: Int[np.ndarray, " L"]) -> Int[np.ndarray, "L R"]:
    """For each layer the placement of the least fullest + cost * moved, and of these the one that moves least.

    The first step has all layers. What moves more than `most_moved` is left out.
    """
    steps = iter(steps)
    first = next(steps)
    held, moved, objective = first.held.copy(), first.moved.copy(), first.fullest + cost * first.moved
    for step in steps:
        value, at = step.fullest + cost * step.moved, step.layers
        better = (value < objective[at]) | ((value == objective[at]) & (step.moved < moved[at]))
        better &= step.moved <= most_moved[at]
        at = at[better]
        held[at], moved[at], objective[at] = step.held[better], step.moved[better], value[better]
    return held


def evaluated(
    layers: Int[np.ndarray, " A"],
    held: Int[np.ndarray, "A R"],
    loads: Float[np.ndarray, "A E"],
    home: Bool[np.ndarray, "A D E"],
) -> Step:
    devices, experts = home.shape[1:]
    device = np.arange(held.shape[1]) // (held.shape[1] // devices)
    moved = (~home[np.arange(len(held))[:, None], device, held]).sum(axis=1)
    return Step(layers, held, moved, device_loads(held, loads / count(held, experts), devices).max(axis=1))


def descent(
    start: Int[np.ndarray, "L R"],
    loads: Float[np.ndarray, "L E"],
    home: Bool[np.ndarray, "L D E"],
    nodes: int,
    limit: int,
) -> Iterator[Step]:
    """From `start`, which is the first, relieve the fullest device of each layer, step by step while there is help."""
    layers, held = np.arange(len(start)), start
    yield evaluated(layers, held, loads, home)
    for _ in range(limit if len(layers) else 0):
        held, helped = _relieved(held, loads, home, nodes)
        if not helped.all():
            layers, held, loads, home = layers[helped], held[helped], loads[helped], home[helped]
        if not len(layers):
            return
        yield evaluated(layers, held, loads, home)


def _power(load: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """load ** 8. The sum over devices sees the fullest almost alone, but progress also while several are as full."""
    square = load * load
    square *= square
    square *= square
    return square


def _relieved(
    held: Int[np.ndarray, "L R"],
    loads: Float[np.ndarray, "L E"],
    home: Bool[np.ndarray, "L D E"],
    nodes: int,
) -> tuple[Int[np.ndarray, "L R"], Bool[np.ndarray, " L"]]:
    """Make the change that lowers the sum of powers of the device loads most per expert moved; tell where there is one.

    Either an expert of the fullest device changes places with one of another device, or a spare replica, wherever it
    is, becomes one more replica of an expert of the fullest device. Both within the node of the fullest device.

    Dimensions: S slots of the fullest device, B slots of its node, K of them with spare replicas.
    """
    (layers, slots), (_, devices, experts) = held.shape, home.shape
    per_device, per_node = slots // devices, slots // nodes
    every = np.arange(layers)
    row, rows = every[:, None], every[:, None, None]
    counts = count(held, experts)
    shared = loads / counts
    load = device_loads(held, shared, devices)
    power = _power(load)

    fullest = load.argmax(axis=1)
    ours = fullest[:, None] * per_device + np.arange(per_device)
    theirs = (fullest * per_device // per_node * per_node)[:, None] + np.arange(per_node)
    device = theirs // per_device
    a, b = held[row, ours], held[row, theirs]
    share_a, share_b = shared[row, a], shared[row, b]
    away_b = ~home[row, device, b]

    # Exchange: [L, S, B].
    less = share_a[:, :, None] - share_b[:, None, :]
    gain = (power[every, fullest][:, None] + power[row, device])[:, None, :]
    gain = gain - _power(load[every, fullest][:, None, None] - less) - _power(load[row, device][:, None, :] + less)
    gain[np.broadcast_to((device == fullest[:, None])[:, None, :], gain.shape)] = 0
    a_away_there = ~home[rows, device[:, None, :], a[:, :, None]]
    more = (~home[row, fullest[:, None], b]).astype(np.int64)[:, None, :] - away_b[:, None, :] + a_away_there
    more = more - (~home[row, fullest[:, None], a])[:, :, None]
    exchange = gain / np.maximum(more, 1)

    # Replace: [L, S, K], with the loads of all devices [L, S, K, D], because every replica's share changes.
    spare = counts[row, b] > 1
    at = np.argsort(~spare, axis=1, kind="stable")[:, : spare.sum(axis=1).max()]
    spare, f, device_f, share_f = spare[row, at], b[row, at], device[row, at], share_b[row, at]
    less_a, more_f = share_a / (counts[row, a] + 1), share_f / np.maximum(counts[row, f] - 1, 1)
    by_device = held.reshape(layers, devices, per_device)
    drop = (by_device[:, None] == a[:, :, None, None]).sum(axis=3) * less_a[:, :, None]
    rise = (by_device[:, None] == f[:, :, None, None]).sum(axis=3) * more_f[:, :, None]
    new_load = (load[:, None, :] - drop)[:, :, None, :] + rise[:, None, :, :]
    here = np.take_along_axis(new_load, device_f[:, None, :, None], axis=3)[..., 0]
    new_here = here + (share_a - less_a)[:, :, None] - (share_f + more_f)[:, None, :]
    gain = power.sum(axis=1)[:, None, None] - _power(new_load).sum(axis=3) + _power(here) - _power(new_here)
    gain[(a[:, :, None] == f[:, None, :]) | ~spare[:, None, :]] = 0
    more = (~home[rows, device_f[:, None, :], a[:, :, None]]).astype(np.int64) - away_b[row, at][:, None, :]
    replace = gain / np.maximum(more, 1)

    rate = np.concatenate([exchange, replace], axis=2)
    best = rate.reshape(layers, -1).argmax(axis=1)
    i, j = np.divmod(best, rate.shape[2])
    # What rounding makes of no gain is none: steps that undo each other would go on for ever.
    helped = rate[every, i, j] > 1e-9 * power.sum(axis=1)
    result = held.copy()
    swap = every[helped & (j < per_node)]
    result[swap, ours[swap, i[swap]]] = b[swap, j[swap]]
    result[swap, theirs[swap, j[swap]]] = a[swap, i[swap]]
    turn = every[helped & (j >= per_node)]
    result[turn, theirs[turn, at[turn, j[turn] - per_node]]] = a[turn, i[turn]]
    return result, helped
