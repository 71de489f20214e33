"""Multi-token prediction: modules that predict one token further each (report section 2.2).

They share the embedding and the output head of the main model, and form a causal chain: module k reads the hidden
states that module k - 1 predicts with. Module 1 reads those of the main model, after its final norm.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from dsjax.config import ModelConfig
from dsjax.model.block import Block, BlockFunction
from dsjax.model.context import Context
from dsjax.model.layers import linear, norm_weight, rms_norm, weight
from dsjax.model.moe import MoEAux


class MTP(nnx.Module):
    """Parameters of one module."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.embed_norm = norm_weight(hidden)
        self.hidden_norm = norm_weight(hidden)
        self.proj = weight(config, rngs, hidden, 2 * hidden)
        self.block = Block(config, rngs, dense=False)
        self.norm = norm_weight(hidden)


def mtp(
    params: PyTree,
    hidden: Float[Array, "B S D"],
    embedded: Float[Array, "B S D"],
    ctx: Context,
    block: BlockFunction,
    *,
    config: ModelConfig,
) -> tuple[Float[Array, "B S D"], MoEAux]:
    """Return the hidden states that the shared head turns into logits of the token after the embedded one.

    Args:
        hidden: states of the main model or the module before, normalized as the head reads them.
        embedded: embeddings of the tokens that those states predict.
    """
    eps = config.rms_norm_eps
    # The released weights read the embedding first, though the report writes it second.
    pair = [rms_norm(embedded, params["embed_norm"], eps), rms_norm(hidden, params["hidden_norm"], eps)]
    x, aux = block(params["block"], linear(jnp.concatenate(pair, -1), params["proj"]), ctx)
    return rms_norm(x, params["norm"], eps), aux
