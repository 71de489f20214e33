"""The two layouts of parameters: canonical (one array per layer and tensor) and stacked (one array per kind of layer).

Checkpoints, names and mathematics know the canonical layout. A training step holds layers of one shape stacked, so that
it can loop over them and its compile time does not grow with depth.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dsjax.config import ModelConfig

EDGES = ("embed", "norm", "head")
"""Parameters that belong to no layer."""


Rows = Sequence[int | None]
"""The MoE layer, counted from 0, that each row of the stacked arrays holds; None for zeros. By default all in order."""


def stack(canonical: PyTree, config: ModelConfig, rows: Rows | None = None) -> PyTree:
    """Return the stacked layout: `embed`, `norm`, `head`, and `dense`, `moe`, `mtp` with a leading axis of layers."""
    layers = canonical.get("layers", {})

    def present(indices: range) -> list[PyTree]:
        """Return all of these layers, or none: dense layers have no router biases."""
        names = [str(i) for i in indices]
        if missing := [name for name in names if name not in layers]:
            if len(missing) < len(names):
                raise ValueError(f"layers {', '.join(missing)} are missing of a model with {config.num_hidden_layers}")
            return []
        return [layers[name] for name in names]

    groups = {
        "dense": present(_dense(config)),
        "moe": present(_moe(config)),
        "mtp": [module for _, module in sorted(canonical.get("mtp", {}).items(), key=lambda item: int(item[0]))],
    }
    if rows is not None and groups["moe"]:
        zeros = jax.tree.map(_zeros_like, groups["moe"][0])
        groups["moe"] = [zeros if row is None else groups["moe"][row] for row in rows]
    stacked = {name: jax.tree.map(_stack_leaves, *group) for name, group in groups.items() if group}
    return {name: canonical[name] for name in EDGES if name in canonical} | stacked


def _stack_leaves(*leaves: Any) -> Any:
    """Stack arrays, or the shapes of arrays."""
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)


def _zeros_like(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.zeros_like(leaf)


def unstack(stacked: PyTree, config: ModelConfig, rows: Rows | None = None) -> PyTree:
    """Return the canonical layout of a stacked tree; the inverse of `stack`."""
    canonical = {name: stacked[name] for name in EDGES if name in stacked}
    layers = {}
    for group, indices in (("dense", _dense(config)), ("moe", _moe(config))):
        if group in stacked:
            places = range(len(indices)) if rows is None or group == "dense" else map(rows.index, range(len(indices)))
            layers |= {str(i): _slice(stacked[group], at) for at, i in zip(places, indices, strict=True)}
    if layers:
        canonical["layers"] = layers
    if "mtp" in stacked:
        canonical["mtp"] = {str(k): _slice(stacked["mtp"], k) for k in range(config.num_nextn_predict_layers)}
    return canonical


def layers_of(stacked: PyTree, count: int) -> Iterator[PyTree]:
    """Return what each of `count` layers has of stacked arrays, or of their shapes."""
    return (_slice(stacked, at) for at in range(count))


def _slice(group: PyTree, at: int) -> PyTree:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[at]

    return jax.tree.map(one, group)


def _dense(config: ModelConfig) -> range:
    return range(config.first_k_dense_replace)


def _moe(config: ModelConfig) -> range:
    return range(config.first_k_dense_replace, config.num_hidden_layers)
