"""Which tiles each kind of product has, and which of them run side by side on the chip."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from dsjax.pallas.matmul.config import Config
from dsjax.pallas.matmul.kernel import Ref, Scalar, Tile

ALIGNMENT = 128
"""Rows that groups begin at a multiple of."""


@dataclass(frozen=True)
class Dense:
    """One product. Tiles go through the output in bands, so that what SMs read at a time stays in L2."""

    m_tiles: int
    n_tiles: int
    k_blocks: int
    snake: int

    def count(self, tables: Sequence[Ref]) -> Scalar:
        return self.m_tiles * self.n_tiles

    def tile(self, index: Scalar, tables: Sequence[Ref]) -> Tile:
        m, n = plgpu.planar_snake(index, (self.m_tiles, self.n_tiles), 0, self.snake)
        return Tile(m, n, 0, self.k_blocks)


@dataclass(frozen=True)
class Grouped:
    """A product for every group of rows of one buffer; table: the group of every 128 rows, G where it is none."""

    all_rows: Dense
    groups: int
    tile_m: int

    def count(self, tables: Sequence[Ref]) -> Scalar:
        return self.all_rows.count(tables)

    def tile(self, index: Scalar, tables: Sequence[Ref]) -> Tile:
        tile = self.all_rows.tile(index, tables)
        group = tables[0][lax.div(tile.m * self.tile_m, ALIGNMENT)]
        end = lax.select(group < self.groups, jnp.int32(self.all_rows.k_blocks), jnp.int32(0))
        return Tile(tile.m, tile.n, 0, end, lax.min(group, self.groups - 1))


@dataclass(frozen=True)
class Masked:
    """A product for the first rows of every group; tables: see `masked_tables`."""

    n_tiles: int
    k_blocks: int

    def count(self, tables: Sequence[Ref]) -> Scalar:
        return tables[2][0] * self.n_tiles

    def tile(self, index: Scalar, tables: Sequence[Ref]) -> Tile:
        # A group has few rows and a large matrix: the tiles along N share the rows.
        i, n = lax.div(index, self.n_tiles), lax.rem(index, self.n_tiles)
        return Tile(tables[1][i], n, 0, self.k_blocks, tables[0][i])


def masked_tables(
    counts: Int32[Array, "G"], rows: int, tile_m: int
) -> tuple[Int32[Array, "T"], Int32[Array, "T"], Int32[Array, "1"]]:
    """Return group and place of every tile with rows before `counts`, and how many entries are in use.

    Args:
        rows: of a group, of which `counts` are there.
    """
    tiles = pl.cdiv(jnp.clip(counts, 0, rows), tile_m)
    ends = jnp.cumsum(tiles)
    index = jnp.arange(counts.shape[0] * pl.cdiv(rows, tile_m), dtype=jnp.int32)
    group = jnp.minimum((ends[None, :] <= index[:, None]).sum(1, dtype=jnp.int32), counts.shape[0] - 1)
    return group, (index - (ends - tiles)[group]).astype(jnp.int32), ends[-1:].astype(jnp.int32)


@dataclass(frozen=True)
class SumOverGroups:
    """A product for every group that sums over its rows of one buffer; table: blocks of K before every group, and
    all of them."""

    one: Dense
    groups: int

    def count(self, tables: Sequence[Ref]) -> Scalar:
        return self.groups * self.one.count(tables)

    def tile(self, index: Scalar, tables: Sequence[Ref]) -> Tile:
        tiles = self.one.count(tables)
        group = lax.div(index, tiles)
        tile = self.one.tile(lax.rem(index, tiles), tables)
        return Tile(tile.m, tile.n, tables[0][group], tables[0][group + 1], group)


def block_bounds(padded_sizes: Int32[Array, "G"], block_k: int) -> Int32[Array, "G+1"]:
    """Return the table of `SumOverGroups`."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(padded_sizes // block_k, dtype=jnp.int32)])


def dense(config: Config, m: int, n: int, k_blocks: int) -> Dense:
    """Cut an output [m, n]; with a cluster, into pairs of tiles."""
    m_tile = config.tile_m * (config.cluster_size if config.cluster == "m" else 1)
    return Dense(pl.cdiv(m, m_tile), n_tiles(config, n), k_blocks, config.snake)


def n_tiles(config: Config, n: int) -> int:
    """Count tiles, or pairs of tiles, along n columns."""
    return pl.cdiv(n, config.tile_n * (config.cluster_size if config.cluster == "n" else 1))
