"""Weights in FP8: quantized once per optimizer step, beside what their gradients belong to.

A quantized weight goes where the weight went: layers hand it to their products, which read its codes and give the
gradient to its master. FP8 arrays never pass through JAX's differentiation, which would make their gradients FP8 too.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, PyTree

from dsjax.numerics.instruments import Counts, counts, is_observed, observe
from dsjax.numerics.quantized import Quantized, dequantized
from dsjax.pallas.quantize import api as quantizers
from dsjax.runtime import Recipe

PRODUCTS = ("q", "q_a", "q_b", "kv_a", "kv_b", "o", "gate_up", "down")
"""Names of the weights that are multiplied in FP8; embedding, head, router, norms and MTP's projection are not."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["master", "codes", "scales", "transposed_codes", "transposed_scales"],
    meta_fields=["recipe", "name", "dtype", "pair"],
)
@dataclass(frozen=True)
class Fp8Weight:
    """A weight that is multiplied in FP8; stacked and experts' ones have axes in front."""

    master: Float[Array, "..."] | None
    """What the gradient is of, and never read. None where a backward pass keeps a weight."""
    codes: Float8e4m3fn[Array, "*batch O I"]
    scales: Float[Array, "*batch O/rows I/tile"]
    transposed_codes: Float8e4m3fn[Array, "*batch I O"] | None
    """For gradients of inputs; None where those of the weight serve, transposed."""
    transposed_scales: Float[Array, "*batch I O/tile"] | None
    recipe: Recipe
    name: str
    """Where it is in the tree of parameters."""
    dtype: str
    """Of the gradient."""
    pair: bool
    """Whether it is the two matrices of a SwiGLU, [*batch 2 O/2 I], in one product."""

    @property
    def forward(self) -> Quantized:
        """The operand of y = x w^T."""
        return Quantized(self.codes, self.scales)

    def backward(self) -> Quantized:
        """Return the operand of dx = dy w."""
        if self.transposed_codes is not None:
            return Quantized(self.transposed_codes, self.transposed_scales)
        codes = quantizers.transpose(self.codes, **self.recipe.kernels)
        return Quantized(codes, self.scales.swapaxes(-1, -2))

    def kept(self) -> "Fp8Weight":
        """Return what a backward pass reads."""
        return replace(self, master=None)

    def gradient(self, dw: Float[Array, "*batch O I"]) -> "Fp8Weight":
        """Return the result of a backward pass: a gradient for the master, and nothing for the rest."""
        if self.pair:
            dw = dw.reshape(*dw.shape[:-2], 2, -1, dw.shape[-1])
        nothing = dict.fromkeys(("codes", "scales", "transposed_codes", "transposed_scales"))
        return replace(self, master=dw.astype(self.dtype), **nothing)


def quantize_weights(params: PyTree, recipe: Recipe | None) -> PyTree:
    """Return parameters with those of `PRODUCTS` quantized; all as they are without a recipe."""
    if recipe is None:
        return params

    def quantize(path: tuple, leaf: Array) -> Array | Fp8Weight:
        if getattr(path[-1], "key", None) not in PRODUCTS:
            return leaf
        weight = _quantize(jax.tree_util.keystr(path, simple=True, separator="."), leaf, recipe)
        if is_observed():
            w = leaf.reshape(weight.codes.shape)
            observe(weight.name, "weight", w, weight.codes, dequantized(weight.forward, recipe, recipe.weight_rows))
        return weight

    return jax.tree_util.tree_map_with_path(quantize, params)


def _quantize(name: str, master: Array, recipe: Recipe) -> Fp8Weight:
    w, pair, dtype = jax.lax.stop_gradient(master), name.endswith("gate_up"), master.dtype.name
    if pair:
        w = w.reshape(*w.shape[:-3], -1, w.shape[-1])
    if recipe.tile == 128:
        codes, scales = quantizers.blocks(w, power_of_two=recipe.power_of_two, **recipe.kernels)
        return Fp8Weight(master, codes, scales, None, None, recipe, name, dtype, pair)
    both = (quantizers.tiles(m, power_of_two=recipe.power_of_two, tile=recipe.tile) for m in (w, w.swapaxes(-1, -2)))
    (codes, scales), (transposed_codes, transposed_scales) = both
    return Fp8Weight(master, codes, scales, transposed_codes, transposed_scales, recipe, name, dtype, pair)


def counts_of_weights(*trees: PyTree) -> dict[str, Counts]:
    """Return what quantization did to weights, added up by kind (`attention.q_a`, `experts.down`), masters there."""
    found: dict[str, Counts] = {}
    for weight in jax.tree.leaves(trees, is_leaf=_is_quantized):
        if _is_quantized(weight):
            kind = ".".join(weight.name.split(".")[-2:])
            new = counts(weight.master.reshape(weight.codes.shape), weight.codes)
            found[kind] = jax.tree.map(jnp.add, found[kind], new) if kind in found else new
    return found


def with_recipe(quantized: PyTree, recipe: Recipe | None) -> PyTree:
    """Return quantized weights with another recipe for their products; it quantizes as theirs did."""

    def replaced(leaf: Fp8Weight) -> Fp8Weight:
        return replace(leaf, recipe=recipe) if _is_quantized(leaf) else leaf

    return jax.tree.map(replaced, quantized, is_leaf=_is_quantized)


def apart(params: PyTree) -> tuple[PyTree, PyTree]:
    """Return what gradients are taken of, and the quantized weights without it, None for parameters that are none.

    Masters become float32 zeros, which cost nothing, because nothing reads them: gradients come in float32, and the
    weights in another format need not stay.
    """

    def master(leaf: Array | Fp8Weight) -> Array:
        return jnp.zeros(leaf.master.shape, jnp.float32) if isinstance(leaf, Fp8Weight) else leaf

    def rest(leaf: Array | Fp8Weight) -> Fp8Weight | None:
        return replace(leaf, master=None, dtype="float32") if isinstance(leaf, Fp8Weight) else None

    is_leaf = _is_quantized
    return jax.tree.map(master, params, is_leaf=is_leaf), jax.tree.map(rest, params, is_leaf=is_leaf)


def together(masters: PyTree, quantized: PyTree) -> PyTree:
    """Undo `apart`."""

    def join(leaf: Fp8Weight | None, master: Array) -> Array | Fp8Weight:
        return master if leaf is None else replace(leaf, master=master)

    return jax.tree.map(join, quantized, masters, is_leaf=lambda leaf: leaf is None or _is_quantized(leaf))


def _is_quantized(leaf: object) -> bool:
    return isinstance(leaf, Fp8Weight)
