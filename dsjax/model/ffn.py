"""The dense feed-forward network: that of the first layers, and the shared expert of the others."""

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PyTree

from dsjax.config import ModelConfig
from dsjax.model.layers import gate_up_matrix, linear, swiglu, weight
from dsjax.numerics import linear as fp8
from dsjax.numerics.weights import Fp8Weight


class FeedForward(nnx.Module):
    """Parameters of a SwiGLU network of inner width `width`."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs):
        self.gate_up = weight(config, rngs, 2, width, config.hidden_size)
        self.down = weight(config, rngs, config.hidden_size, width)


def feed_forward(params: PyTree, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Return W_down (silu(W_gate x) * W_up x)."""
    if isinstance(params["down"], Fp8Weight):
        return fp8.feed_forward(x, params["gate_up"], params["down"])
    gate_up = checkpoint_name(linear(x, gate_up_matrix(params["gate_up"])), "gate_up")
    return linear(swiglu(gate_up), params["down"])
