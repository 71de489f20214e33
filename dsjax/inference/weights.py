"""Weights as the programs of inference read them: in their format, experts in their slots, each where its device is."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int32, PyTree

from dsjax.checkpoint.blocks import BLOCK
from dsjax.config import ModelConfig
from dsjax.inference.layout import TENSOR, Layout, weight_spec
from dsjax.inference.replicas import Tables, in_slots, loads_with_shared, shared_as_routed, tables_of
from dsjax.model.layers import cast_weights
from dsjax.numerics.weights import Fp8Weight, quantize_weights
from dsjax.parallel.placement import Placement, plan_placement
from dsjax.runtime import DEEPSEEK


def first_placement(config: ModelConfig, layout: Layout) -> Placement:
    """Return where experts are before loads are known, in MoE layers and MTP modules: what is best if all are chosen
    alike."""
    layers = moe_layers(config) + config.num_nextn_predict_layers
    slots = layout.total_slots(config)
    if layout.is_plain(config):
        held = np.broadcast_to(np.arange(slots), (layers, slots))
        return Placement(held, slots, layout.devices, layout.node)
    loads = np.ones((layers, config.n_routed_experts))
    if layout.shared_as_routed:
        loads = loads_with_shared(loads, config.num_experts_per_tok)
    # Groups of experts mean nothing to an exchange in one hop, and the shared expert is in none.
    groups = 1 if layout.shared_as_routed else config.n_group
    return plan_placement(loads, slots, layout.devices, layout.node, groups)


def moe_layers(config: ModelConfig) -> int:
    """Return how many layers have experts, of the main model."""
    return config.num_hidden_layers - config.first_k_dense_replace


def arranged(
    params: PyTree, config: ModelConfig, layout: Layout, held: Int32[np.ndarray, "L R"], dtype: DTypeLike, *, fp8: bool
) -> PyTree:
    """Return the weights that programs read; with tables of who is where, in layers whose experts have several slots.

    Args:
        params: stacked.
        held: the expert of each slot, in MoE layers and then in MTP modules.
        dtype: of what is not in FP8.
        fp8: whether products are; attention's up-projection of latents is not, which the absorbed form takes apart.
    """
    params = cast_weights(params, dtype)
    if fp8:
        params = _quantized(params)
    if layout.is_plain(config):
        return params
    layers = moe_layers(config)
    if "moe" in params:
        params = params | {"moe": _in_slots(params["moe"], config, layout, held[:layers])}
    if "mtp" in params:
        block = _in_slots(params["mtp"]["block"], config, layout, held[layers:])
        params = params | {"mtp": params["mtp"] | {"block": block}}
    return params


def _in_slots(layers: PyTree, config: ModelConfig, layout: Layout, held: Int32[np.ndarray, "L R"]) -> PyTree:
    network = shared_as_routed(layers["moe"], config) if layout.shared_as_routed else layers["moe"]
    network = network | {"experts": in_slots(network["experts"], held)}
    return layers | {"moe": network, "tables": Tables(*map(jnp.asarray, tables_of_slots(held, config, layout)))}


def tables_of_slots(held: Int32[np.ndarray, "L R"], config: ModelConfig, layout: Layout) -> Tables:
    """Return who is where, on the host."""
    return tables_of(Placement(held, layout.experts(config), layout.devices, layout.node))


def check_blocks(params: PyTree, layout: Layout) -> None:
    """Raises ValueError where a layout cuts weights in FP8, or their shapes, through blocks that share a scale."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_quantized):
        if not _is_quantized(leaf):
            continue
        for size, over in zip(leaf.codes.shape, weight_spec(path), strict=False):
            if over == TENSOR and layout.tensor > 1 and size // layout.tensor % BLOCK:
                raise ValueError(
                    f"layout.tensor = {layout.tensor}: must divide the {size} rows or columns of {leaf.name} in FP8 "
                    f"into whole blocks of {BLOCK}; take precision = 'bf16', or fewer devices to a group"
                )


def _quantized(params: PyTree) -> PyTree:
    """Return weights in FP8, and nothing that only training needs."""
    quantized = quantize_weights(params, DEEPSEEK)

    def keep(path: tuple, leaf: object) -> object:
        if not isinstance(leaf, Fp8Weight):
            return leaf
        return leaf.master if path[-1].key == "kv_b" else leaf.kept()

    return jax.tree_util.tree_map_with_path(keep, quantized, is_leaf=_is_quantized)


def _is_quantized(leaf: object) -> bool:
    return isinstance(leaf, Fp8Weight)
