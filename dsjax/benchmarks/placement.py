"""How well, how fast and at which price of moved experts redundant experts are placed; EPLB's loops as the baseline.

`python -m dsjax.benchmarks.placement` prints JSON.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dsjax.parallel.placement import Placement, migration, plan_placement

LAYERS, EXPERTS, SLOTS, GROUPS = 58, 256, 288, 8
SETTINGS = {
    "prefill_ep32": {"devices": 32, "nodes": 4, "groups": GROUPS, "policy": "hierarchical"},
    "decode_ep144": {"devices": 144, "nodes": 18, "groups": GROUPS, "policy": "global"},
}
"""DeepSeek-V3's deployments (2025-02): 58 MoE layers, 256 routed experts and 32 redundant ones."""


def balanced_packing(weights: Sequence[float], packs: int, number: Callable = float) -> list[tuple[int, int]]:
    """(pack, rank in it) of each item: the heaviest first, into the lightest pack with room, ties to the first."""
    room = len(weights) // packs
    if room == 1:
        return [(item, 0) for item in range(len(weights))]
    total, count = [number(0)] * packs, [0] * packs
    place = [(-1, -1)] * len(weights)
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        pack = min((pack for pack in range(packs) if count[pack] < room), key=total.__getitem__)
        place[item] = (pack, count[pack])
        total[pack] += weights[item]
        count[pack] += 1
    return place


def replicate_experts(weights: Sequence[float], slots: int) -> tuple[list[int], list[int]]:
    """The expert of each replica, and the replicas of each expert: one more for the busiest, until slots are full."""
    expert, count = list(range(len(weights))), [1] * len(weights)
    for _ in range(slots - len(weights)):
        busiest = max(range(len(weights)), key=lambda e: weights[e] / count[e])
        expert.append(busiest)
        count[busiest] += 1
    return expert, count


def eplb(
    loads: np.ndarray, slots: int, groups: int, nodes: int, devices: int, number: Callable = float
) -> tuple[list[list[int]], list[list[int]]]:
    """DeepSeek's EPLB, one layer, node, replica and device after the other.

    Args:
        number: the type to calculate with: np.float32 decides as EPLB does, float is the fastest in Python.

    Returns:
        phy2log [L, R], logcnt [L, E].
    """
    if groups % nodes:
        groups = nodes = 1
    experts, per_device, phy2log, logcnt = loads.shape[1], slots // devices, [], []
    size, of_node = experts // groups, experts // nodes
    for layer in loads:
        weights = [number(weight) for weight in layer]
        in_groups = [number(math.fsum(weights[g * size : (g + 1) * size])) for g in range(groups)]
        order = [0] * experts
        for group, (node, rank) in enumerate(balanced_packing(in_groups, nodes, number)):
            for i in range(size):
                order[node * of_node + rank * size + i] = group * size + i
        slot_expert, replicas = [0] * slots, [0] * experts
        for node in range(nodes):
            here = order[node * of_node : (node + 1) * of_node]
            replica, count = replicate_experts([weights[e] for e in here], slots // nodes)
            shares = [weights[here[e]] / count[e] for e in replica]
            for e, (device, rank) in zip(replica, balanced_packing(shares, devices // nodes, number), strict=True):
                slot_expert[(node * (devices // nodes) + device) * per_device + rank] = here[e]
            for e, n in zip(here, count, strict=True):
                replicas[e] = n
        phy2log.append(slot_expert)
        logcnt.append(replicas)
    return phy2log, logcnt


def draw_loads(seed: int) -> np.ndarray:
    """Loads [L, E] as uneven as those of a served model: Gamma(0.5)."""
    return np.random.default_rng(seed).gamma(0.5, size=(LAYERS, EXPERTS))


def _median_seconds(call: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(statistics.mean(values), 4), "max": round(max(values), 4)}


def measure(seeds: int = 20, costs: Sequence[float] = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)) -> dict[str, Any]:
    """Imbalance (max / mean device load, mean of the layers; mean and max of the seeds), times, and what moving costs.

    Seconds are medians, for all layers, of the first seed's loads.
    """
    result: dict[str, Any] = {"layers": LAYERS, "experts": EXPERTS, "slots": SLOTS, "seeds": seeds}
    for name, options in SETTINGS.items():
        all_loads = [draw_loads(seed) for seed in range(seeds)]
        plain = partial(plan_placement, slots=SLOTS, **options)
        refined = partial(plain, refine=100)
        devices, nodes = options["devices"], options["nodes"]
        groups, within = (GROUPS, nodes) if options["policy"] == "hierarchical" else (1, 1)
        one = all_loads[0]
        ours = _median_seconds(partial(plain, one), 7)
        loops = _median_seconds(partial(eplb, one, SLOTS, groups, within, devices), 3)
        result[name] = {
            **options,
            "imbalance": _spread([plain(x).imbalance(x).mean() for x in all_loads]),
            "imbalance_refined": _spread([refined(x).imbalance(x).mean() for x in all_loads]),
            "seconds": ours,
            "seconds_loops": loops,
            "ratio": loops / ours,
            "seconds_refined": _median_seconds(partial(refined, one), 3),
            "moves": {f"drift {drift}": _moves(plain, one, drift, costs) for drift in (0.1, 1.0)},
        }
    return result


def _moves(
    plan: Callable[..., Placement], loads: np.ndarray, drift: float, costs: Sequence[float]
) -> list[dict[str, Any]]:
    """What follows when a share `drift` of the loads is drawn anew: keep the placement, make a new one, or weigh."""
    current, new_loads = plan(loads), (1 - drift) * loads + drift * draw_loads(10_000)
    choices = {"keep": lambda: current, "EPLB": partial(plan, new_loads)}
    choices |= {f"cost {cost}": partial(plan, new_loads, current=current, cost=cost) for cost in costs}
    rows = []
    for choice, call in choices.items():
        begin = time.perf_counter()
        planned = call()
        seconds = time.perf_counter() - begin
        moves = migration(current, planned)
        rows.append(
            {
                "choice": choice,
                "imbalance": round(planned.imbalance(new_loads).mean(), 4),
                "moved_per_layer": round(moves.between_devices.sum() / LAYERS, 2),
                "of_these_between_nodes": round(moves.between_nodes.sum() / LAYERS, 2),
                "seconds": seconds,
            }
        )
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
