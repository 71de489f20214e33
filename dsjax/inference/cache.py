"""The paged latent cache: what multi-head latent attention keeps of the tokens it has read (report section 2.1.1).

Of each token and layer only the normalized latent and the turned shared key, side by side: W = `kv_lora_rank +
qk_rope_head_dim` values, 576 in V3, whatever the number of heads. All sequences share one pool of pages; a sequence is
a table of the pages that its tokens are on, in order. So sequences of any lengths fill the memory without gaps, and
several that begin alike have the same pages. Page 0 belongs to nobody: what is padding is written there.

Letters of shapes beside those of the model:
    P pages   G tokens of a page   M pages in a table   N new tokens of a pass   W values per token and layer
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from dsjax.config import ModelConfig
from dsjax.pallas.quantize.reference import TILE, tiles

CacheFormat = Literal["compute", "fp8"]
"""As the activations are, or FlashMLA's FP8: latents as E4M3 with a float32 scale per 128 values, keys in BF16."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """The memory of all sequences, of static shape: per layer (dense ones first), page and token either all values as
    `entries`, or in FP8 `codes` and `scales` of the latent, and `keys`."""

    arrays: dict[str, Shaped[Array, "L P G _"]]

    @property
    def pages(self) -> int:
        """P, with page 0."""
        return next(iter(self.arrays.values())).shape[1]

    @property
    def page_size(self) -> int:
        """G."""
        return next(iter(self.arrays.values())).shape[2]


def empty_cache(
    config: ModelConfig, pages: int, page_size: int, dtype: DTypeLike, cache_format: CacheFormat = "compute"
) -> PagedCache:
    """Return a cache of zeros."""
    kinds = _kinds(config, dtype, cache_format)
    place = config.num_hidden_layers, pages, page_size
    return PagedCache({name: jnp.zeros((*place, width), kind) for name, (width, kind) in kinds.items()})


def bytes_per_token(config: ModelConfig, dtype: DTypeLike, cache_format: CacheFormat) -> int:
    """Return the bytes that a token takes in the cache, in all layers."""
    kinds = _kinds(config, dtype, cache_format).values()
    return config.num_hidden_layers * sum(width * jnp.dtype(kind).itemsize for width, kind in kinds)


def _kinds(config: ModelConfig, dtype: DTypeLike, cache_format: CacheFormat) -> dict[str, tuple[int, DTypeLike]]:
    """Width and format of each array."""
    latent, key = config.kv_lora_rank, config.qk_rope_head_dim
    if cache_format == "compute":
        return {"entries": (latent + key, dtype)}
    return {
        "codes": (latent, jnp.float8_e4m3fn),
        "scales": (-(-latent // TILE), jnp.float32),
        "keys": (key, jnp.bfloat16),
    }


def read(
    cache: PagedCache,
    layer: Int[Array, ""] | int,
    tables: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    dtype: DTypeLike,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "B S W"]:
    """Return what one layer knows of the M G tokens on the pages of each table, zeros behind `lengths`.

    Only these pages are touched, whatever the pool has.

    Args:
        dtype: of the result.
        first: place in the sequence of the first token in the tables.
    """
    # Zeros, because a page may still hold another's numbers: masked, they have no weight, but 0 times inf is not 0.
    places = first + jnp.arange(tables.shape[1] * cache.page_size)
    known = (places < lengths[:, None])[..., None]
    found = {name: _flat(array[layer, tables]) for name, array in cache.arrays.items()}
    if "entries" in found:
        return jnp.where(known, found["entries"].astype(dtype), 0)
    scales = jnp.repeat(found["scales"], TILE, axis=-1)[..., : found["codes"].shape[-1]]
    latent = (found["codes"].astype(jnp.float32) * scales).astype(dtype)
    return jnp.where(known, jnp.concatenate([latent, found["keys"].astype(dtype)], axis=-1), 0)


def _flat(gathered: Shaped[Array, "B M G W"]) -> Shaped[Array, "B S W"]:
    return gathered.reshape(gathered.shape[0], -1, gathered.shape[-1])


def write(
    cache: PagedCache,
    new: Float[Array, "L B N W"],
    tables: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
) -> PagedCache:
    """Return the cache with the first `counts` new tokens of each sequence behind its first `lengths`.

    The rest goes to page 0. That the tables have pages for them is the caller's part, as is that no other sequence
    reads these places: a compiled program cannot refuse.
    """
    index = jnp.arange(new.shape[2])
    places = lengths[:, None] + index
    pages = jnp.take_along_axis(tables, places // cache.page_size, axis=1, mode="clip")
    pages = jnp.where(index < counts[:, None], pages, 0)
    columns = {"entries": new}
    if "codes" in cache.arrays:
        latent, keys = jnp.split(new, [cache.arrays["codes"].shape[-1]], axis=-1)
        codes, scales = tiles(latent)
        columns = {"codes": codes, "scales": scales, "keys": keys}
    return PagedCache(
        {
            name: cache.arrays[name].at[:, pages, places % cache.page_size].set(column.astype(cache.arrays[name].dtype))
            for name, column in columns.items()
        }
    )
