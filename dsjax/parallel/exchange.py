"""The expert exchange of a mesh: rounds of dispatch, experts and combine until every token has been served.

The first round is straight-line code with buffers for even routing and some slack. What a very uneven routing leaves
over follows in further rounds behind one predicate; they reuse the first one's memory, and keep nothing for the
backward pass. So shapes are static, no token is ever dropped, and the usual step pays for one round.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Int32

from dsjax.config import Config, ModelConfig
from dsjax.parallel import dispatch as hops
from dsjax.parallel.dispatch import Courier, Plan, Route
from dsjax.parallel.mesh import EXPERT_AXES, Axes
from dsjax.runtime import Exchange, ExpertFunction, Recipe


def exchange_of(config: Config, axes: tuple[Axes, Axes] = EXPERT_AXES) -> Exchange | None:
    """Return the exchange that a run's mesh needs, for use inside `shard_map`; None where a device has all experts.

    Args:
        axes: of the mesh that the program runs on: along which are nodes, and along which the devices of each.
    """
    if config.mesh.expert_shards == 1:
        return None

    def exchange(
        experts: ExpertFunction,
        x: Float[Array, "T D"],
        indices: Int32[Array, "T K"],
        weights: Float[Array, "T K"],
        num_experts: int,
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        route = replace(route_of(config, len(x), num_experts, indices.shape[1]), axes=axes)
        return exchange_in_rounds(route, experts, x, indices, weights)

    return exchange


def route_of(config: Config, tokens: int, num_experts: int | None = None, k: int | None = None) -> Route:
    """Return the sizes of the hops of a run's mesh, for `tokens` tokens per device.

    Args:
        num_experts: by default the model's; with replicas there are more.
        k: experts of a token; by default the model's.
    """
    model, mesh, settings = config.model, config.mesh, config.dispatch
    num_experts, k = num_experts or model.n_routed_experts, k or model.num_experts_per_tok
    # A token's experts lie in at most `topk_group` groups, and these, where a node is made of whole ones, in as many
    # nodes. Even routing sends it to each of N nodes with the same chance.
    nodes_of_token = min(k, mesh.node)
    if model.n_group % mesh.node == 0 and model.topk_method != "greedy":
        nodes_of_token = min(nodes_of_token, model.topk_group)
    to_node = settings.node_slack * tokens * nodes_of_token / mesh.node
    node_capacity = min(tokens, _rounded_up(to_node))
    to_device = settings.device_slack * tokens * k / mesh.local
    most = (tokens if mesh.node == 1 else mesh.node * node_capacity) * k
    return Route(
        nodes=mesh.node,
        devices=mesh.local,
        num_experts=num_experts,
        node_capacity=node_capacity,
        device_capacity=min(most, _rounded_up(to_device)),
        transport=settings.transport,
    )


def _rounded_up(rows: float) -> int:
    """Return a whole number of rows of at least `rows`, a multiple of 8 where it matters little."""
    step = 8 if rows >= 64 else 1
    return math.ceil(rows / step) * step


def bytes_of_round(route: Route, model: ModelConfig, itemsize: int, recipe: Recipe | None = None) -> tuple[int, int]:
    """Return how many bytes a device sends to other nodes, and to other devices of its node, in a round of padded hops.

    Forward and backward pass of a layer together: rows four times, weights of choices twice, numbers of experts once.

    Args:
        itemsize: bytes of a number of the payload.
        recipe: of FP8, in which half of the rows travel.
    """
    sums = model.hidden_size * itemsize
    sent = sums if recipe is None else model.hidden_size + 4 * math.ceil(model.hidden_size / recipe.tile)
    row, choice = 2 * (sent + sums), 2 * 4 + (2 if route.num_experts < 2**15 else 4)
    to_nodes = (route.nodes - 1) * route.node_capacity * (row + model.num_experts_per_tok * choice)
    to_devices = (route.devices - 1) * route.device_capacity * (row + choice)
    return to_nodes, to_devices


def exchange_in_rounds(
    route: Route,
    experts: ExpertFunction,
    x: Float[Array, "T D"],
    indices: Int32[Array, "T K"],
    weights: Float[Array, "T K"],
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """Return, for each token, the sum over its experts of their outputs times its weights, and the rounds it took.

    Args:
        experts: the experts of this device.
    """
    with jax.named_scope("dispatch"):
        queues = hops.queues_to_nodes(route, indices)

    def one_round(round1: Int[Array, ""] | int, round2: Int[Array, ""] | int, named: bool) -> tuple[Array, Plan]:
        courier = Courier(queues, indices, round1, round2, route, experts.alignment)
        return experts(courier, x, weights, named=named)

    y, plan = one_round(0, 0, named=True)
    one = jnp.ones((), jnp.int32)
    if route.rounds(*indices.shape) == (1, 1):
        return y, one

    def further_rounds(y: Float[Array, "T D"]) -> tuple[Float[Array, "T D"], Int32[Array, ""]]:
        active = hops.active_rounds(route, queues, indices)

        def step(total: Float[Array, "T D"], number: Int[Array, ""]) -> tuple[Float[Array, "T D"], None]:
            round1, round2 = number // active.shape[1], number % active.shape[1]

            @jax.checkpoint  # without the total, which would be kept for every round
            def part(round1: Int[Array, ""], round2: Int[Array, ""]) -> Float[Array, "T D"]:
                return lax.cond(
                    active[round1, round2],
                    # What bears a name would be kept: of every round that there could be.
                    lambda: one_round(round1, round2, named=False)[0].astype(jnp.float32),
                    lambda: jnp.zeros(x.shape, jnp.float32),
                )

            return total + part(round1, round2), None

        total, _ = lax.scan(step, y.astype(jnp.float32), jnp.arange(1, active.size))
        return total.astype(y.dtype), active.sum(dtype=jnp.int32)

    with jax.named_scope("overflow"):
        overflows = checkpoint_name(lax.pmax(lax.stop_gradient(plan.waiting), route.all_axes), "plan")
        return lax.cond(overflows, jax.checkpoint(further_rounds), lambda y: (y, one), y)
