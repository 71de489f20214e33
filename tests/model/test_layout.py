"""The canonical and the stacked layout are each other's inverse, for arrays of any library and for bare shapes."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dsjax.model.layout import stack, unstack
from dsjax.model.transformer import abstract_parameters


def numbered(tree):
    """A tree of arrays of the same shapes, no two values alike."""
    start = iter(range(0, 10**9, 10**4))
    return jax.tree.map(lambda leaf: np.arange(leaf.size, dtype=np.float64).reshape(leaf.shape) + next(start), tree)


def variants(small):
    """All kinds of layers; none but dense ones; none but MoE ones, without MTP and without biases; eleven layers."""
    yield small
    yield replace(small, num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0)
    yield replace(
        small, first_k_dense_replace=0, num_nextn_predict_layers=0, topk_method="group_limited_greedy", q_lora_rank=0
    )
    yield replace(small, num_hidden_layers=12, first_k_dense_replace=1, num_nextn_predict_layers=11)


@pytest.mark.parametrize("which", range(4))
def test_round_trip(small, which):
    config = list(variants(small))[which]
    for tree in abstract_parameters(config):
        canonical = numbered(tree)
        again = unstack(stack(canonical, config), config)
        assert jax.tree.structure(again) == jax.tree.structure(canonical)
        jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.float32, canonical))


def test_layers_keep_their_order(small):
    config = replace(small, num_hidden_layers=12, num_nextn_predict_layers=11)
    canonical = numbered(abstract_parameters(config)[0])
    stacked = stack(canonical, config)
    assert stacked["dense"]["ffn_norm"].shape == (1, 32) and stacked["moe"]["ffn_norm"].shape == (11, 32)
    for i in range(1, 12):
        np.testing.assert_array_equal(
            stacked["moe"]["moe"]["router"][i - 1], canonical["layers"][str(i)]["moe"]["router"]
        )
    for k in range(11):
        np.testing.assert_array_equal(stacked["mtp"]["proj"][k], canonical["mtp"][str(k)]["proj"])


def test_shapes_alone(small):
    for tree in abstract_parameters(small):
        stacked = stack(tree, small)
        assert stacked == jax.eval_shape(lambda t: stack(t, small), tree)
        assert unstack(stacked, small) == tree
