"""Bytes that the expert exchange of DeepSeek-V3 sends between nodes, counted in the compiled program.

    python -m dsjax.benchmarks.dispatch_bytes

An MoE layer of `v3_671b` on 8 nodes of 8 devices, 4096 tokens each, forward, in BF16: dispatch and combine, with the
numbers and weights of experts that travel along, first round. Beside it the same with one flat all-to-all over all 64
devices, which sends a token once per expert, and with as much slack. Prints JSON; a unit is the size of a device's
tokens, 4096 x 7168 x 2 bytes. Devices are simulated, nothing runs.
"""

import json
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.config import Config, MeshConfig, TrainConfig
from dsjax.model.moe import RoutedExperts
from dsjax.parallel.exchange import exchange_in_rounds, route_of
from dsjax.parallel.mesh import EXPERT_AXES, make_mesh
from dsjax.planning.hlo import collectives
from dsjax.runtime import Runtime
from dsjax.settings import load_model_config

TOKENS = 4096
"""Of a device."""
DEVICES_OF_NODE = 8


def compiled_exchange(config: Config, tokens: int, options: dict[str, Any] | None = None) -> str:
    """Return the optimized program of an MoE layer's routed experts on the config's mesh, forward, in BF16.

    Args:
        options: of the compiler.
    """
    model, mesh = config.model, make_mesh(config.mesh)
    divided = PartitionSpec(EXPERT_AXES)

    def on_device(x, indices, weights, params):
        experts = RoutedExperts(params, Runtime())
        return exchange_in_rounds(route_of(config, tokens), experts, x, indices, weights)[0]

    def array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, divided))

    everyone, width, inner = tokens * config.mesh.expert_shards, model.hidden_size, model.moe_intermediate_size
    arguments = (
        array(jnp.bfloat16, everyone, width),
        array(jnp.int32, everyone, model.num_experts_per_tok),
        array(jnp.float32, everyone, model.num_experts_per_tok),
        {
            "gate_up": array(jnp.bfloat16, model.n_routed_experts, 2, inner, width),
            "down": array(jnp.bfloat16, model.n_routed_experts, width, inner),
        },
    )
    exchange = jax.shard_map(on_device, mesh=mesh, in_specs=(divided,) * 4, out_specs=divided, check_vma=False)
    return jax.jit(exchange).lower(*arguments).compile(options).as_text()


def bytes_between(config: Config, tokens: int, devices_of_node: int) -> dict[str, float]:
    """Return the bytes that a device sends to other nodes, and within its node, in the first round."""
    first_round = [c for c in collectives(compiled_exchange(config, tokens)) if "/overflow/" not in c.op_name]
    moves = [c for c in first_round if c.kind == "all-to-all"]

    def other_node(a: int, b: int) -> bool:
        return a // devices_of_node != b // devices_of_node

    def same_node(a: int, b: int) -> bool:
        return a != b and not other_node(a, b)

    return {
        "between_nodes": sum(c.bytes_sent(other_node) for c in moves),
        "within_node": sum(c.bytes_sent(same_node) for c in moves),
        "all_to_alls": len(moves),
    }


def main() -> None:
    """Count, and print JSON."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 64)
    model = load_model_config("v3_671b")
    train = TrainConfig(steps=1, batch_size=64)
    two_hops = Config(model=model, train=train, mesh=MeshConfig(node=8, local=8))
    # On a single node of 64 there is one hop, a slot per expert; which devices share a node is for the count to say.
    flat = replace(two_hops, mesh=MeshConfig(node=1, local=64))
    unit = TOKENS * model.hidden_size * 2
    result = {"unit_bytes": unit}
    for name, config in (("two_hops", two_hops), ("flat", flat)):
        started = time.perf_counter()
        counted = bytes_between(config, TOKENS, DEVICES_OF_NODE)
        result[name] = {
            "between_nodes_units": round(counted["between_nodes"] / unit, 3),
            "within_node_units": round(counted["within_node"] / unit, 3),
            "all_to_alls": counted["all_to_alls"],
            "seconds": round(time.perf_counter() - started, 1),
        }
    ratio = result["flat"]["between_nodes_units"] / result["two_hops"]["between_nodes_units"]
    result["flat_over_two_hops"] = round(ratio, 2)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
