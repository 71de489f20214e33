"""Routing: which experts a token uses and with what weight (report sections 2.1.2 and 4.2), in float32 throughout."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig


class Routing(NamedTuple):
    """The router's decision for T tokens, K experts each."""

    indices: Int[Array, "T K"]
    """Chosen experts, best first."""
    weights: Float[Array, "T K"]
    """Their weights, float32."""
    scores: Float[Array, "T E"]
    """Affinity to every expert, without bias, float32."""


def route(
    router: Float[Array, "E D"], bias: Float[Array, " E"] | None, x: Float[Array, "T D"], config: ModelConfig
) -> Routing:
    """Choose experts for each token.

    V3 (`noaux_tc`): sigmoid scores; bias is added for the choice only; a group counts as much as its two best experts.
    V2 (`group_limited_greedy`): softmax scores; a group counts as much as its best. Ties go to the lower index.
    """
    logits = jnp.dot(x.astype(jnp.float32), router.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    logits = checkpoint_name(logits, "router_logits")
    scores = jax.nn.sigmoid(logits) if config.scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if config.topk_method != "greedy":
        choice = _within_best_groups(choice, config)
    _, indices = jax.lax.top_k(choice, config.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, indices, axis=-1)
    if config.norm_topk_prob:
        weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
    return Routing(indices, weights * config.routed_scaling_factor, scores)


def _within_best_groups(choice: Float[Array, "T E"], config: ModelConfig) -> Float[Array, "T E"]:
    """Set to -inf the scores of experts outside each token's `topk_group` best groups."""
    if config.topk_group == config.n_group:
        return choice
    grouped = choice.reshape(-1, config.n_group, config.n_routed_experts // config.n_group)
    best_of_group, _ = jax.lax.top_k(grouped, 2 if config.topk_method == "noaux_tc" else 1)
    _, chosen = jax.lax.top_k(best_of_group.sum(axis=-1), config.topk_group)
    allowed = (chosen[:, :, None] == jnp.arange(config.n_group)).any(axis=1)
    return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


def expert_loads(indices: Int[Array, "T K"], num_experts: int) -> Int[Array, " E"]:
    """Return how many tokens chose each expert, int32: exact, and equal in any order of summation."""
    return (indices.reshape(-1, 1) == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)


def updated_bias(
    bias: Float[Array, "*L E"], loads: Int[Array, "*L E"], speed: Float[Array, ""] | float
) -> Float[Array, "*L E"]:
    """Return the router biases after a step: `speed` lower where a load was above the mean, higher where below.

    Args:
        loads: tokens per expert, over all micro-batches and devices of the optimizer step.
    """
    # In integers, because a rounded mean could flip a sign; a load equals the mean only where nothing remains.
    mean, remainder = jnp.divmod(loads.sum(axis=-1, keepdims=True), loads.shape[-1])
    sign = jnp.where(loads > mean, 1, jnp.where((loads == mean) & (remainder == 0), 0, -1))
    return bias - speed * sign.astype(bias.dtype)


def sequence_balance_loss(scores: Float[Array, "B S E"], config: ModelConfig) -> Float[Array, ""]:
    """Return the sequence-wise balance loss (report equations 17 to 20) before its weight, averaged over sequences.

    The choice that it counts is the top-k of the bare scores: no bias, no groups.
    """
    experts, per_token = config.n_routed_experts, config.num_experts_per_tok
    _, indices = jax.lax.top_k(jax.lax.stop_gradient(scores), per_token)
    length = scores.shape[1]
    counts = jax.vmap(lambda one: expert_loads(one, experts))(indices).astype(jnp.float32)
    fractions = counts * experts / (per_token * length)
    shares = (scores / scores.sum(axis=-1, keepdims=True)).mean(axis=1)
    return (fractions * shares).sum(axis=-1).mean()


@jax.custom_vjp
def add_loss(
    y: Float[Array, "*shape"], loss: Float[Array, ""], weight: Float[Array, ""] | float
) -> Float[Array, "*shape"]:
    """Return y, and let `weight * loss` take part in the gradient of whatever y leads to.

    The loss enters by its cotangent instead of a sum carried through layers, stages and devices.
    """
    return y


def _add_loss_forward(y: Array, loss: Array, weight: Array) -> tuple[Array, Array]:
    return y, jnp.asarray(weight, loss.dtype)


def _add_loss_backward(weight: Array, dy: Array) -> tuple[Array, Array, None]:
    return dy, weight, None


add_loss.defvjp(_add_loss_forward, _add_loss_backward)
