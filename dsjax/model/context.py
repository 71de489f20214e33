"""What a block reads and no gradient flows into."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import ModelConfig
from dsjax.model.rope import rotation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """Positions, document borders and router state of one pass; the same for all layers but for `router_bias`."""

    cos: Float[Array, "*b S half"]
    """Cosine of every position's RoPE angles, without a batch axis where all sequences have the same positions."""
    sin: Float[Array, "*b S half"]
    """Sine of the same."""
    segments: Int[Array, "B S"] | None = None
    """Number of the document of each token; attention stops where it changes. None: no borders."""
    router_bias: Float[Array, " E"] | None = None
    """Bias of this layer's router, for the choice only."""
    balance_weight: Float[Array, ""] | float = 0.0
    """Weight of the sequence-wise balance loss."""
    real: Bool[Array, "B S"] | None = None
    """Which tokens count; the others only fill up a batch, and go to no routed expert. None: all."""

    def for_layer(self, router_bias: Float[Array, " E"] | None) -> "Context":
        """Return this context with the bias of one layer's router."""
        return replace(self, router_bias=router_bias)


def context(
    config: ModelConfig,
    length: int,
    *,
    segments: Int[Array, "B S"] | None = None,
    balance_weight: Float[Array, ""] | float = 0.0,
) -> Context:
    """Return the context of sequences that start at position 0."""
    cos, sin = rotation(config, jnp.arange(length))
    return Context(cos, sin, segments, balance_weight=balance_weight)
