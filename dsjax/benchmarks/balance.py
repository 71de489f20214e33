"""How evenly replicas of experts are used, beside the best there is, and what dividing the tokens costs.

    python -m dsjax.benchmarks.balance [RUN ...]

Loads are drawn from Gamma(0.5), as uneven as those of a served model, for the report's deployments; and, for trained
runs, counted: their routers' choices on Python's standard library. Experts are placed for other loads than those that
then come, as in service. Prints JSON.
"""

import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Real
from scipy.optimize import linprog
from scipy.sparse import coo_array

from dsjax.config import DataConfig
from dsjax.data.sources import source_files
from dsjax.inference.balance import ends_of_replicas, loads_of_slots, slots_of_places
from dsjax.inference.load import Model, load_model
from dsjax.inference.replicas import tables_of
from dsjax.model.context import context
from dsjax.model.dispatch import exchange_locally
from dsjax.model.moe import RoutedExperts
from dsjax.model.transformer import hidden_states
from dsjax.parallel.placement import Placement, plan_placement
from dsjax.runtime import Runtime

EXPERTS, PER_TOKEN = 256, 8


class Deployment(NamedTuple):
    """Of a layer's experts."""

    slots: int
    devices: int
    nodes: int
    policy: str
    groups: int = 8


DEPLOYMENTS = {
    "prefill, 32 x 9": Deployment(288, 32, 4, "hierarchical"),
    "prefill, 32 x 16": Deployment(512, 32, 4, "hierarchical"),
    "32 x 16, any node": Deployment(512, 32, 4, "global"),
    "decode, 144 x 2": Deployment(288, 144, 18, "global"),
    "144 x 4": Deployment(576, 144, 18, "global"),
    "decode, 320 x 1": Deployment(320, 320, 40, "global"),
}
"""The report's and DeepSeek's online ones, and two with more room."""


def least_fullest(loads: Real[np.ndarray, " E"], held: Int[np.ndarray, " R"], devices: int) -> float:
    """Return the least possible load of the fullest device, if tokens could be split: a linear program, solved by
    HiGHS."""
    slots, experts = len(held), len(loads)
    each, one = np.arange(slots), np.ones(slots)
    device = each // (slots // devices)
    everything = coo_array((one, (held, each)), shape=(experts, slots + 1)).tocsr()
    rows, columns = np.concatenate([device, np.arange(devices)]), np.concatenate([each, np.full(devices, slots)])
    fullest = coo_array((np.concatenate([one, -np.ones(devices)]), (rows, columns)), shape=(devices, slots + 1))
    cost = np.append(np.zeros(slots), 1)
    found = linprog(cost, fullest.tocsr(), np.zeros(devices), everything, loads, method="highs")
    assert found.success, found.message
    return float(found.fun)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _division(loads, tables, devices, active):
    ends = ends_of_replicas(loads, tables, devices, active)
    return loads_of_slots(ends, tables).reshape(devices, -1)


def compare(placement: Placement, loads: Int[np.ndarray, "L E"]) -> dict[str, list[float]]:
    """Return, for each layer, the fullest device's load over the mean: with replicas used evenly, with the division
    that programs make, and at best."""
    tables = tables_of(placement)
    found: dict[str, list[float]] = {"even": placement.imbalance(loads).tolist(), "dynamic": [], "best": []}
    for layer, row in enumerate(loads):
        mean = row.sum() / placement.devices
        one = jax.tree.map(lambda table, layer=layer: jnp.asarray(table[layer]), tables)
        per_device = _division(jnp.asarray(row, jnp.int32), one, placement.devices, None).sum(axis=1)
        found["dynamic"].append(float(per_device.max()) / mean)
        found["best"].append(least_fullest(row, placement.expert_of_slot[layer], placement.devices) / mean)
    return found


def _summary(found: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    columns = {name: [value for one in found for value in one[name]] for name in found[0]}
    over = [a / b for a, b in zip(columns["dynamic"], columns["best"], strict=True)]
    means = {name: round(statistics.mean(values), 4) for name, values in columns.items()}
    return means | {"dynamic_over_best": round(statistics.mean(over), 4), "worst": round(max(over), 4)}


def _draw(name: str, tokens: int, drift: float, seed: int) -> tuple[Placement, Int[np.ndarray, "1 E"]]:
    """Return a placement for Gamma(0.5) loads, and loads of which a share `drift` has since been drawn anew."""
    slots, devices, nodes, policy, groups = DEPLOYMENTS[name]
    rng = np.random.default_rng(seed)
    planned = rng.gamma(0.5, size=(1, EXPERTS))
    p = (1 - drift) * planned + drift * rng.gamma(0.5, size=(1, EXPERTS))
    loads = rng.multinomial(tokens * PER_TOKEN * devices, p[0] / p.sum())[None]
    return plan_placement(planned, slots, devices, nodes, groups, policy=policy), loads


def drawn(seeds: int = 8) -> list[dict[str, Any]]:
    """Compare for drawn loads of one layer."""
    rows = []
    for name, tokens, drift in itertools.product(DEPLOYMENTS, (4096, 128), (0.0, 0.3)):
        found = [compare(*_draw(name, tokens, drift, seed)) for seed in range(seeds)]
        rows.append({"deployment": name, "tokens_per_device": tokens, "drift": drift} | _summary(found))
    return rows


def limited(seeds: int = 8, tokens: int = 4096, drift: float = 0.3) -> list[dict[str, Any]]:
    """Return how full the fullest of 32 devices is that use so many of their 16 experts, and how many they do use."""
    rows = []
    for name, active in itertools.product(("prefill, 32 x 16", "32 x 16, any node"), (9, 10, 12, 16)):
        over, used = [], []
        for seed in range(seeds):
            placement, loads = _draw(name, tokens, drift, seed)
            one = jax.tree.map(lambda table: jnp.asarray(table[0]), tables_of(placement))
            slots = np.asarray(_division(jnp.asarray(loads[0], jnp.int32), one, placement.devices, active))
            over.append(float(slots.sum(axis=1).max() / slots.sum(axis=1).mean()))
            used.append(int((slots > 0).sum(axis=1).max()))
        summary = {"dynamic": round(statistics.mean(over), 4), "worst": round(max(over), 4), "most_used": max(used)}
        rows.append({"deployment": name, "active": active} | summary)
    return rows


def router_loads(model: Model, tokens: int, windows: int) -> Int[np.ndarray, "W L E"]:
    """Return how many of `tokens` tokens chose each expert, in consecutive windows of the standard library's text."""
    length = min(model.context, 128)

    @jax.jit
    def loads(batch):
        ctx, x = context(model.config, length), model.params["embed"][batch]
        _, aux = hidden_states(model.params, model.biases, x, ctx, config=model.config, runtime=model.runtime)
        return aux.loads

    text = _text(model)
    batches = ([next(text) for _ in range(tokens)] for _ in range(windows))
    return np.stack([loads(jnp.asarray(batch, jnp.int32).reshape(-1, length)) for batch in batches])


def _text(model: Model) -> Iterator[int]:
    files = source_files(DataConfig(source="python-stdlib"))
    for at in np.random.default_rng(0).permutation(len(files)):
        (ids,) = model.tokenizer.encode([files[at].path.read_text(encoding="utf-8", errors="replace")])
        yield from ids


def traced(path: str, devices: int = 8, tokens: int = 4096, windows: int = 40) -> list[dict[str, Any]]:
    """Compare for a run's routers: placed for the first half of the windows, used in the second."""
    model = load_model(path)
    loads = router_loads(model, tokens, windows)
    before, after = loads[: windows // 2].sum(axis=0), loads[windows // 2 :]
    experts, rows = model.config.n_routed_experts, []
    plain = Placement(np.tile(np.arange(experts), (len(before), 1)), experts, devices)
    common = {"run": model.origin, "experts": experts, "devices": devices, "tokens_per_device": tokens // devices}
    for slots in sorted({experts, experts + devices, 2 * experts, 3 * experts}):
        placement = plain if slots == experts else plan_placement(before, slots, devices, policy="global")
        found = [compare(placement, window) for window in after]
        rows.append(common | {"slots": slots} | _summary(found))
    return rows


def _microseconds(call: Callable[..., Any], *arguments: Any, times: int = 30) -> float:
    jax.block_until_ready(call(*arguments))
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - begin)
    return round(statistics.median(seconds) * 1e6, 1)


@functools.partial(jax.jit, static_argnames="experts")
def _layer(x, indices, weights, experts):
    return exchange_locally(RoutedExperts(weights, Runtime()), x, indices, jnp.ones(indices.shape), experts)[0]


def cost(name: str, width: int = 1024, inner: int = 512) -> dict[str, Any]:
    """Time the division of a layer's tokens, the choice of a slot for each, and the products, on one device.

    Args:
        width, inner: of the experts, a seventh and a quarter of V3's by default.
    """
    rng, tokens = np.random.default_rng(0), 4096 if name.startswith("prefill") else 128
    placement, drawn_loads = _draw(name, tokens, 0.3, 0)
    devices, loads = placement.devices, jnp.asarray(drawn_loads[0], jnp.int32)
    tables = jax.tree.map(lambda table: jnp.asarray(table[0]), tables_of(placement))
    chosen = jnp.asarray(rng.random((tokens, EXPERTS)).argsort(axis=1)[:, :PER_TOKEN], jnp.int32)
    divide = jax.jit(ends_of_replicas, static_argnums=2).lower(loads, tables, devices).compile()
    ends, in_front = divide(loads, tables), jnp.zeros(EXPERTS, jnp.int32)

    held, some = placement.slots_per_device, min(tokens, 512)
    keys = jax.random.split(jax.random.key(0), 3)
    experts = {
        "gate_up": jax.random.normal(keys[0], (held, 2, inner, width)),
        "down": jax.random.normal(keys[1], (held, width, inner)),
    }
    x = jax.random.normal(keys[2], (some, width))
    here = jnp.asarray(rng.integers(0, held, (some, PER_TOKEN)), jnp.int32)
    return {
        "deployment": name,
        "tokens_per_device": tokens,
        "most_replicas": tables.slots.shape[1],
        "operations": int(divide.cost_analysis()["flops"]),
        "division_us": _microseconds(divide, loads, tables),
        "choice_us": _microseconds(jax.jit(slots_of_places), chosen, in_front, ends, tables),
        "products_us": round(_microseconds(_layer, x, here, experts, held, times=5) * tokens / some, 1),
    }


def main(argv: Sequence[str]) -> None:
    """Measure, and print JSON."""
    traces = [row for path in argv for row in traced(path)]
    print(
        json.dumps(
            {"drawn": drawn(), "limited": limited(), "traces": traces, "costs": [cost(name) for name in DEPLOYMENTS]},
            indent=2,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
