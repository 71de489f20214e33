"""The model against transformers on torch: small random checkpoints and what they computed, in `tests/golden/`.

`tests/oracle/make_golden.py` made them, and says how to make them again.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dsjax.checkpoint.huggingface import load_huggingface
from dsjax.checkpoint.names import locate
from dsjax.model.context import context
from dsjax.model.dispatch import exchange_locally
from dsjax.model.layout import stack, unstack
from dsjax.model.transformer import hidden_states, logits, losses
from dsjax.runtime import Runtime

GOLDEN = Path(__file__).parents[1] / "golden"
MTP_WEIGHT = 0.3
MOE_LAYERS = {"v3": 1, "v3_no_yarn": 2, "v2_lite": 2, "v2": 2}


class Golden:
    """A released checkpoint, loaded through the name table, what transformers computed with it, and what we do."""

    def __init__(self, variant: str):
        self.variant = variant
        self.config, params, biases = load_huggingface(GOLDEN / variant / "hf")
        self.expected = load_file(GOLDEN / variant / "golden.safetensors")
        self.tokens = jnp.asarray(self.expected["input_ids"], jnp.int32)
        # The report divides the MTP loss by all T positions, transformers takes the mean of the T - 1 with a target.
        positions = self.tokens.shape[1] - 1
        self.mtp_ratio = (positions - 1) / positions if self.config.num_nextn_predict_layers else 1.0
        self.choices = []
        run = jax.jit(self._run)(stack(params, self.config), stack(biases, self.config))
        self.logits, self.parts, self.grads = jax.block_until_ready(run)

    def _run(self, params, biases):
        """All that is compared, as one program."""
        runtime = Runtime(loss_chunk=64, remat="none", exchange=self._recorded_exchange)

        def total(params):
            weight = MTP_WEIGHT / self.mtp_ratio
            parts = losses(params, biases, self.tokens, config=self.config, runtime=runtime, mtp_weight=weight)
            return parts.objective, parts

        grads, parts = jax.grad(total, has_aux=True)(params)
        ctx = context(self.config, self.tokens.shape[1])
        x = params["embed"][self.tokens]
        hidden, _ = hidden_states(params, biases, x, ctx, config=self.config, runtime=Runtime())
        return logits(params, hidden), parts, unstack(grads, self.config)

    def _recorded_exchange(self, experts, x, indices, weights, num_experts):
        def record(*choice):
            self.choices.append([np.asarray(a) for a in choice])

        jax.debug.callback(record, indices, weights, ordered=True)
        return exchange_locally(experts, x, indices, weights, num_experts)


@pytest.fixture(scope="module", params=list(MOE_LAYERS))
def golden(request):
    return Golden(request.param)


def test_variants_are_what_they_are_called(golden):
    config = golden.config
    assert (config.rope_scaling is not None) == (golden.variant in ("v3", "v2_lite"))
    assert (config.q_lora_rank == 0) == (golden.variant == "v2_lite")
    methods = {"v2": "group_limited_greedy", "v2_lite": "greedy"}
    assert config.topk_method == methods.get(golden.variant, "noaux_tc")
    assert config.norm_topk_prob == (config.scoring_func == "sigmoid") == (config.num_nextn_predict_layers == 1)
    assert (config.n_shared_experts == 2) == golden.variant.startswith("v2")
    assert config.num_hidden_layers - config.first_k_dense_replace == MOE_LAYERS[golden.variant]
    assert golden.tokens.shape[1] > 64, "YaRN matters beyond the original context"


def test_logits(golden):
    np.testing.assert_allclose(golden.logits, golden.expected["logits"], atol=2e-5, rtol=0)


def test_losses(golden):
    np.testing.assert_allclose(golden.parts.main, golden.expected["loss"], atol=2e-6, rtol=0)
    if golden.config.num_nextn_predict_layers:
        assert golden.mtp_ratio == 94 / 95
        np.testing.assert_allclose(golden.parts.mtp, golden.expected["mtp_loss"] * 94 / 95, atol=2e-6, rtol=0)


def test_every_gradient(golden):
    compared = 0
    for name, expected in golden.expected.items():
        if not name.startswith("grad/"):
            continue
        path, index = locate(name.removeprefix("grad/"), golden.config.num_hidden_layers)
        got = functools.reduce(lambda tree, key: tree[key], path.removeprefix("params/").split("/"), golden.grads)[
            index
        ]
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < 1e-5, f"{name}: {error:.1e}"
        compared += expected.size
    assert compared == sum(leaf.size for leaf in jax.tree.leaves(golden.grads)), "a gradient without a golden"


def test_routing(golden):
    """Every token of every MoE layer uses the same experts with the same weights, MTP's too."""
    layers = sorted(name.removesuffix("/experts") for name in golden.expected if name.endswith("/experts"))
    assert len(layers) == len(golden.choices) == MOE_LAYERS[golden.variant] + golden.config.num_nextn_predict_layers
    batch, length = golden.tokens.shape
    for layer, (indices, weights) in zip(layers, golden.choices, strict=True):
        by_expert = indices.argsort(axis=1)
        for kind, got in ("experts", indices), ("weights", weights):
            expected = golden.expected[f"{layer}/{kind}"].reshape(batch, -1, got.shape[1])[:, : length - 1]
            got = np.take_along_axis(got, by_expert, axis=1).reshape(expected.shape)
            np.testing.assert_allclose(got, expected, rtol=0, atol=0 if kind == "experts" else 1e-5, err_msg=layer)
