"""The mixture of experts: routed and shared experts, aux-loss-free balancing (DeepSeekMoE, report section 2.1.2)."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from dsjax.config import ModelConfig
from dsjax.model.context import Context
from dsjax.model.dispatch import combine, dispatch, exchange_locally
from dsjax.model.ffn import FeedForward, feed_forward
from dsjax.model.grouped_matmul import default_alignment, grouped_matmul
from dsjax.model.layers import RouterBias, gate_up_matrix, swiglu, weight
from dsjax.model.router import add_loss, expert_loads, route, sequence_balance_loss
from dsjax.numerics import experts as fp8
from dsjax.numerics.weights import Fp8Weight
from dsjax.runtime import Courier, Plan, Runtime, target_platform


class MoEAux(NamedTuple):
    """What an MoE layer reports beside its output; no gradient flows through it."""

    loads: Int[Array, "*L E"]
    """Tokens that chose each expert, int32."""
    balance_loss: Float[Array, "*L"]
    """Sequence-wise balance loss, before its weight."""
    rounds: Int[Array, "*L"]
    """Rounds of the expert exchange, int32; 1 where nothing overflowed."""


class Experts(nnx.Module):
    """Parameters of all routed experts of a layer, stacked."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up = weight(config, rngs, experts, 2, width, hidden)
        self.down = weight(config, rngs, experts, hidden, width)


class MoE(nnx.Module):
    """Parameters of a mixture of experts."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.router = weight(config, rngs, config.n_routed_experts, config.hidden_size)
        if config.topk_method == "noaux_tc":
            self.bias = RouterBias(jnp.zeros(config.n_routed_experts, jnp.float32))
        self.experts = Experts(config, rngs)
        self.shared = FeedForward(config, config.n_shared_experts * config.moe_intermediate_size, rngs)


def moe(
    params: PyTree, x: Float[Array, "B S D"], ctx: Context, *, config: ModelConfig, runtime: Runtime
) -> tuple[Float[Array, "B S D"], MoEAux]:
    """Return the weighted sum of each token's routed experts plus its shared experts, and the router's loads."""
    tokens = x.reshape(-1, config.hidden_size)
    routing = route(params["router"], ctx.router_bias, tokens, config)
    if ctx.real is not None:
        indices = jnp.where(ctx.real.reshape(-1, 1), routing.indices, config.n_routed_experts)
        routing = routing._replace(indices=indices)

    experts, exchange = RoutedExperts(params["experts"], runtime), runtime.exchange or exchange_locally
    routed, rounds = exchange(experts, tokens, routing.indices, routing.weights, config.n_routed_experts)
    # Without parameters of its own, the shared expert is one of the routed: see `inference.replicas`.
    y = (routed + feed_forward(params["shared"], tokens) if "shared" in params else routed).reshape(x.shape)

    balance_loss = sequence_balance_loss(routing.scores.reshape(*x.shape[:2], -1), config)
    y = add_loss(y, balance_loss, ctx.balance_weight)
    loads = expert_loads(routing.indices, config.n_routed_experts)
    return y, MoEAux(loads, jax.lax.stop_gradient(balance_loss), rounds)


@dataclass(frozen=True)
class RoutedExperts:
    """The `ExpertFunction` of a layer."""

    params: PyTree
    runtime: Runtime

    @property
    def alignment(self) -> int:
        return fp8.ALIGNMENT if self._in_fp8 else default_alignment(target_platform())

    @property
    def _in_fp8(self) -> bool:
        return isinstance(self.params["down"], Fp8Weight)

    def __call__(
        self, courier: Courier, x: Float[Array, "T D"], weights: Float[Array, "T K"], *, named: bool = True
    ) -> tuple[Float[Array, "T D"], Plan]:
        """Return each token's sum; its weight multiplies an expert's SwiGLU output, before the down projection.

        So combining is a plain sum.
        """
        if self._in_fp8:
            return fp8.routed_experts(courier, x, weights, self.params["gate_up"], self.params["down"], named=named)

        def name(array: Array, what: str) -> Array:
            return checkpoint_name(array, what) if named else array

        plan, rows, row_weights = dispatch(courier, x, weights, named=named)
        rows = name(rows, "dispatched")
        multiply = partial(
            grouped_matmul, groups=plan.groups, impl=self.runtime.grouped_matmul, num_sms=self.runtime.num_sms
        )
        matrices = gate_up_matrix(self.params["gate_up"]), self.params["down"]
        gate_up, down = (matrix.astype(rows.dtype) for matrix in matrices)
        activated = swiglu(name(multiply(rows, gate_up), "gate_up"))
        activated *= row_weights[:, None].astype(rows.dtype)
        return combine(plan, multiply(activated, down)), plan
