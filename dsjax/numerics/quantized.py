"""Quantized tensors, made and multiplied as a recipe says.

Activations have tiles of 1 x 128 where a product sums over channels, and of 128 x 1, transposed, where it sums over
tokens; weights have blocks of 128 x 128, which serve both ways (report section 3.3.2). A recipe with narrow tiles
(MXFP8: 1 x 32) has no square blocks, and quantizes weights once for each way.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Int32

from dsjax.numerics.instruments import Role, is_observed, observe
from dsjax.pallas.matmul import reference as matmul_reference
from dsjax.pallas.quantize import api as quantizers
from dsjax.runtime import Recipe


class Quantized(NamedTuple):
    """Codes and their scales; what they stand for is codes * scales."""

    codes: Float8e4m3fn[Array, "*batch M K"]
    scales: Float[Array, "*batch M/rows K/tile"]


def named(tree: Any, name: str) -> Any:
    """Return quantized tensors or other arrays under a name by which a rematerialization keeps them."""

    def one(leaf: Array) -> Array:
        if leaf.dtype != jnp.float8_e4m3fn:
            return checkpoint_name(leaf, name)
        # As bits: JAX rounds what it keeps by `reduce_precision`, to which E4M3's values above 240 are infinite.
        bits = checkpoint_name(lax.bitcast_convert_type(leaf, jnp.uint8), name)
        return lax.bitcast_convert_type(bits, leaf.dtype)

    return jax.tree.map(one, tree)


def activations(
    x: Float[Array, "M K"], recipe: Recipe, *, power_of_two: bool = False, of: str | None = None, role: Role = "input"
) -> Quantized:
    """Quantize along channels.

    Args:
        power_of_two: whether scales are, whatever the recipe; so that another grouping adds little error.
        of, role: name of the weight that it is multiplied with, and what it is to it, for `instruments`.
    """
    quantized = Quantized(*_tiles(x, recipe, power_of_two))
    _observe(of, role, x, quantized, recipe)
    return quantized


def activations_transposed(x: Float[Array, "M K"], recipe: Recipe) -> Quantized:
    """Quantize along tokens, and transpose."""
    if recipe.tile != 128:
        return Quantized(*_tiles(x.T, recipe, False))
    return Quantized(*quantizers.tiles_transposed(x, power_of_two=recipe.power_of_two, **recipe.kernels))


def gradients(
    dy: Float[Array, "M K"], recipe: Recipe, *, power_of_two: bool = False, of: str | None = None
) -> Quantized:
    """Quantize gradients of activations along channels: like activations, but in the report's ablation in blocks."""
    if recipe.gradient_blocks:
        codes, scales = quantizers.blocks(dy, power_of_two=power_of_two or recipe.power_of_two, **recipe.kernels)
        quantized = Quantized(codes, jnp.repeat(scales, 128, axis=0)[: dy.shape[0]])
    else:
        quantized = activations(dy, recipe, power_of_two=power_of_two)
    _observe(of, "gradient", dy, quantized, recipe)
    return quantized


def gradients_transposed(dy: Float[Array, "M K"], recipe: Recipe) -> Quantized:
    """Quantize gradients of activations along tokens, and transpose."""
    if not recipe.gradient_blocks:
        return activations_transposed(dy, recipe)
    codes, scales = quantizers.blocks(dy, power_of_two=recipe.power_of_two, **recipe.kernels)
    return Quantized(codes.T, jnp.repeat(scales.T, 128, axis=0)[: dy.shape[1]])


def regrouped(x: Quantized, recipe: Recipe, rows: Int32[Array, "R"] | None = None) -> Quantized:
    """Quantize along tokens, and transpose, what has been quantized along channels.

    Args:
        rows: which rows to take; as many or more than there are for zeros.
    """
    if recipe.tile == 128 and not recipe.gradient_blocks:
        power_of_two = recipe.power_of_two
        return Quantized(*quantizers.requantize_transposed(*x, rows, power_of_two=power_of_two, **recipe.kernels))
    if rows is not None:
        x = jax.tree.map(lambda leaf: leaf.at[rows].get(mode="fill", fill_value=0), x)
    return activations_transposed(dequantized(x, recipe), recipe)


def dequantized(x: Quantized, recipe: Recipe, rows: int = 1) -> Float[Array, "*batch M K"]:
    """Return codes * scales in float32.

    Args:
        rows: that share a scale.
    """
    return quantizers.dequantize(*x, rows=rows, tile=recipe.tile)


def product(a: Quantized, b: Quantized, recipe: Recipe, out_dtype: DTypeLike, *, b_rows: int) -> Float[Array, "M N"]:
    """Return a b^T.

    Args:
        b_rows: rows of `b` that share a scale.
    """
    if recipe.tile != 128:
        return matmul_reference.scaled_matmul(*a, *b, rows=b_rows, tile=recipe.tile, out_dtype=out_dtype)
    return _products().scaled_matmul(*a, *b, rows=b_rows, out_dtype=out_dtype, **recipe.kernels)


def grouped_product(
    x: Quantized, w: Quantized, groups: Any, recipe: Recipe, out_dtype: DTypeLike
) -> Float[Array, "R N"]:
    """Return x w[g]^T for the rows of each group g, and zero elsewhere."""
    if recipe.tile != 128:
        rows, tile = recipe.weight_rows, recipe.tile
        function = functools.partial(matmul_reference.grouped_scaled_matmul, rows=rows, tile=tile)
    else:
        function = functools.partial(_products().grouped_scaled_matmul, **recipe.kernels)
    return function(*x, *w, groups.group_of_tile, out_dtype=out_dtype)


def grouped_sum(dy_t: Quantized, x_t: Quantized, groups: Any, recipe: Recipe) -> Float[Array, "G N K"]:
    """Return dy^T x of each group's rows, float32: the gradients of experts."""
    if recipe.tile != 128:
        function = functools.partial(matmul_reference.grouped_scaled_wgrad, tile=recipe.tile)
    else:
        function = functools.partial(_products().grouped_scaled_wgrad, **recipe.kernels)
    return function(*dy_t, *x_t, groups.padded_sizes)


def swiglu(
    gate_up: Float[Array, "M F2"], weights: Float[Array, " M"], recipe: Recipe, *, of: str | None = None
) -> Quantized:
    """Quantize what a SwiGLU makes of [gate | up], times a weight per row, along channels and from float32."""
    wide = activated(gate_up.astype(jnp.float32), weights)
    if recipe.tile != 128:
        quantized = Quantized(*_tiles(wide, recipe, False))
    else:
        quantized = Quantized(
            *quantizers.swiglu_tiles(gate_up, weights, power_of_two=recipe.power_of_two, **recipe.kernels)
        )
    _observe(of, "input", wide, quantized, recipe)
    return quantized


def activated(gate_up: Float[Array, "M F2"], weights: Float[Array, " M"]) -> Float[Array, "M F"]:
    """Return what a SwiGLU makes of [gate | up], times a weight per row: float32, in the type of the former."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up * weights[:, None]).astype(gate_up.dtype)


def _observe(name: str | None, role: Role, x: Array, quantized: Quantized, recipe: Recipe) -> None:
    if name is not None and is_observed():
        observe(name, role, x, quantized.codes, dequantized(quantized, recipe))


def _products() -> ModuleType:
    from dsjax.pallas.matmul import scaled  # see `pallas.choice`

    return scaled


def _tiles(x: Float[Array, "M K"], recipe: Recipe, power_of_two: bool) -> tuple[Array, Array]:
    power_of_two = power_of_two or recipe.power_of_two
    if recipe.tile != 128:
        return quantizers.tiles(x, power_of_two=power_of_two, tile=recipe.tile, impl="xla")
    return quantizers.tiles(x, power_of_two=power_of_two, **recipe.kernels)
