"""The paged latent cache: what multi-head latent attention keeps of the tokens it has read (report section 2.1.1).

Of each token and layer only the normalized latent and the turned shared key, side by side: W = `kv_lora_rank +
qk_rope_head_dim` values, 576 in V3, whatever the number of heads. All sequences share one pool of pages; a sequence is
a table of the pages that its tokens are on, in order. So sequences of any lengths fill the memory without gaps, and
several that begin alike have the same pages. Page 0 belongs to nobody: what is padding is written there.

Where there are MTP modules, which draft tokens (`speculation.py`), they have layers here like those of the main model,
and a page also keeps the states behind its last token, from which a module goes on with the token after.

Letters of shapes beside those of the model:
    P pages   G tokens of a page   M pages in a table   N new tokens of a pass   W values per token and layer
"""

import math
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
STATES = "states"
"""Name of the array of states that MTP modules go on from."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """The memory of all sequences, of static shape: per layer (dense ones first, MTP modules last), page and token
    either all values as `entries`, or in FP8 `codes` and `scales` of the latent, and `keys`; with MTP modules also, of
    each page alone, `states`: of the main model and of every module but the last."""

    arrays: dict[str, Shaped[Array, "L P G _"]]

    @property
    def pages(self) -> int:
        """P, with page 0."""
        return next(iter(self.columns.values())).shape[1]

    @property
    def page_size(self) -> int:
        """G."""
        return next(iter(self.columns.values())).shape[2]

    @property
    def columns(self) -> dict[str, Shaped[Array, "L P G _"]]:
        """The arrays that have something of every token."""
        return {name: array for name, array in self.arrays.items() if name != STATES}


def empty_cache(
    config: ModelConfig, pages: int, page_size: int, dtype: DTypeLike, cache_format: CacheFormat = "compute"
) -> PagedCache:
    """Return a cache of zeros."""
    shapes = _shapes(config, pages, page_size, dtype, cache_format)
    return PagedCache({name: jnp.zeros(shape, kind) for name, (shape, kind) in shapes.items()})


def bytes_per_page(config: ModelConfig, page_size: int, dtype: DTypeLike, cache_format: CacheFormat) -> int:
    """Return the bytes of a page, in all layers."""
    shapes = _shapes(config, 1, page_size, dtype, cache_format).values()
    return sum(math.prod(shape) * jnp.dtype(kind).itemsize for shape, kind in shapes)


def _shapes(
    config: ModelConfig, pages: int, page_size: int, dtype: DTypeLike, cache_format: CacheFormat
) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
    """Shape and format of each array."""
    modules = config.num_nextn_predict_layers
    layers = config.num_hidden_layers + modules
    kinds = _kinds(config, dtype, cache_format)
    shapes = {name: ((layers, pages, page_size, width), kind) for name, (width, kind) in kinds.items()}
    return shapes | ({STATES: ((modules, pages, 1, config.hidden_size), dtype)} if modules else {})


def _kinds(config: ModelConfig, dtype: DTypeLike, cache_format: CacheFormat) -> dict[str, tuple[int, DTypeLike]]:
    """Values of a token and layer, and their format, in each array that has some."""
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
    found = {name: _flat(array[layer, tables]) for name, array in cache.columns.items()}
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
    longer = {
        name: cache.arrays[name].at[:, pages, places % cache.page_size].set(column.astype(cache.arrays[name].dtype))
        for name, column in columns.items()
    }
    return PagedCache(cache.arrays | longer)


def read_states(cache: PagedCache, tables: Int[Array, "B M"], lengths: Int[Array, " B"]) -> Float[Array, "modules B D"]:
    """Return the states behind the last token of each sequence, zeros where it has none."""
    last = jnp.maximum(lengths - 1, 0) // cache.page_size
    pages = jnp.take_along_axis(tables, last[:, None], axis=1, mode="clip")[:, 0]
    return jnp.where(lengths[:, None] > 0, cache.arrays[STATES][:, pages, 0], 0)


def write_states(
    cache: PagedCache,
    states: Float[Array, "modules B N D"],
    tables: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
) -> PagedCache:
    """Return the cache with the states of new tokens that are the last of their page, as far as it is read."""
    index = jnp.arange(states.shape[2])
    places = lengths[:, None] + index
    is_last = (index == counts[:, None] - 1) | ((index < counts[:, None]) & ((places + 1) % cache.page_size == 0))
    pages = jnp.take_along_axis(tables, places // cache.page_size, axis=1, mode="clip")
    array = cache.arrays[STATES]
    kept = array.at[:, jnp.where(is_last, pages, 0), 0].set(states.astype(array.dtype))
    return PagedCache(cache.arrays | {STATES: kept})
