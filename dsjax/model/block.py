"""A transformer layer: attention, then a dense or a mixture-of-experts network, both before a residual connection."""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PyTree

from dsjax.config import ModelConfig
from dsjax.model.attention import Attention, attention
from dsjax.model.context import Context
from dsjax.model.ffn import FeedForward, feed_forward
from dsjax.model.layers import norm_weight, rms_norm
from dsjax.model.moe import MoE, MoEAux, moe
from dsjax.runtime import Runtime

BlockFunction = Callable[[PyTree, Array, Context], tuple[Array, MoEAux | None]]

SAVED = ("norm_in", "latent", "attention_out", "attention_lse", "router_logits", "plan", "dispatched", "gate_up")
"""What the backward pass reads under `remat = "report"`; norms, MLA up-projections and activations are recomputed."""


class Block(nnx.Module):
    """Parameters of one layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, dense: bool):
        self.attention_norm = norm_weight(config.hidden_size)
        self.attention = Attention(config, rngs)
        self.ffn_norm = norm_weight(config.hidden_size)
        if dense:
            self.ffn = FeedForward(config, config.intermediate_size, rngs)
        else:
            self.moe = MoE(config, rngs)


def block(
    params: PyTree, x: Float[Array, "B S D"], ctx: Context, *, config: ModelConfig, runtime: Runtime
) -> tuple[Float[Array, "B S D"], MoEAux | None]:
    """Return the hidden states after one layer; `aux` is None for a dense layer."""
    x = checkpoint_name(x, "norm_in")
    normalized = rms_norm(x, params["attention_norm"], config.rms_norm_eps)
    with jax.named_scope("attention"):
        x = x + attention(params["attention"], normalized, ctx, config=config, runtime=runtime)
    x = checkpoint_name(x, "norm_in")
    normalized = rms_norm(x, params["ffn_norm"], config.rms_norm_eps)
    with jax.named_scope("ffn"):
        if "ffn" in params:
            return x + feed_forward(params["ffn"], normalized), None
        y, aux = moe(params["moe"], normalized, ctx, config=config, runtime=runtime)
    return x + y, aux


def block_function(config: ModelConfig, runtime: Runtime, *, in_loop: bool = False) -> BlockFunction:
    """Return `(params, x, ctx) -> (y, aux)` for a model and a machine, with the run's rematerialization.

    Args:
        in_loop: whether it is the body of a `lax.scan` over layers, whose backward pass is another loop.
    """
    bound = functools.partial(block, config=config, runtime=runtime)
    if runtime.remat == "none":
        return bound
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED) if runtime.remat == "report" else None
    # Outside of a loop XLA would undo the recomputation by sharing, and by doing it early.
    return jax.checkpoint(bound, policy=policy, prevent_cse=not in_loop)
