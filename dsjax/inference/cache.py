"""The latent cache: what multi-head latent attention keeps of the tokens it has read (report section 2.1.1).

Of each token and layer only the normalized latent and the turned shared key, side by side: W = `kv_lora_rank +
qk_rope_head_dim` values, 576 in V3, whatever the number of heads.

Letters of shapes beside those of the model:
    C capacity, tokens that a sequence may have   N new tokens of a pass   W values per token and layer
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentCache:
    """The memory of B sequences, of static shape."""

    entries: Float[Array, "L B C W"]
    """Latent and turned key of every token, in the format of the activations; all layers, dense ones first."""
    lengths: Int[Array, " B"]
    """Tokens of each sequence that have been read; entries behind them mean nothing."""

    @property
    def capacity(self) -> int:
        """C."""
        return self.entries.shape[2]


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> LatentCache:
    """Return the cache of `batch` sequences of which nothing has been read."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    entries = jnp.zeros((config.num_hidden_layers, batch, capacity, width), dtype)
    return LatentCache(entries, jnp.zeros(batch, jnp.int32))


def extended(cache: LatentCache, new: Float[Array, "L B N W"], counts: Int[Array, " B"]) -> LatentCache:
    """Return the cache with the first `counts` new tokens of each sequence behind those it has.

    Of the rest, and of what exceeds the capacity, nothing is written. `lengths` counts all of `counts`: keeping within
    the capacity is the caller's part, because a compiled program cannot refuse.
    """
    index = jnp.arange(new.shape[2])
    positions = jnp.where(index < counts[:, None], cache.lengths[:, None] + index, cache.capacity)
    sequences = jnp.arange(new.shape[1])[:, None]
    entries = cache.entries.at[:, sequences, positions].set(new.astype(cache.entries.dtype), mode="drop")
    return replace(cache, entries=entries, lengths=cache.lengths + counts)
