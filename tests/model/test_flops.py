"""Parameter counts against published figures, FLOPs against the report's, arithmetic against real arrays."""

import dataclasses
from math import prod

import jax
import pytest

from dsjax.model import flops
from dsjax.model.transformer import abstract_parameters
from dsjax.settings import load_model_config

MODELS = ("tiny", "small_gpu", "v2_lite_16b", "v2_236b", "v3_671b")


def test_v3_is_the_published_size():
    count = flops.parameter_count(load_model_config("v3_671b"))
    assert count.main == 671_026_419_200
    assert count.active == 37_552_297_472
    assert count.mtp == 11_610_068_224
    assert count.released == 684_489_845_504


@pytest.mark.parametrize(
    ("model", "main", "active"), [("v2_236b", 235_741_434_880, 21.38e9), ("v2_lite_16b", 15_706_484_224, 2.66e9)]
)
def test_v2_is_the_published_size(model, main, active):
    count = flops.parameter_count(load_model_config(model))
    assert count.main == count.released == main
    assert count.active == pytest.approx(active, abs=0.005e9)


def test_sizes_of_our_own_models():
    tiny, small = (flops.parameter_count(load_model_config(name)) for name in ("tiny", "small_gpu"))
    assert tiny.active >= 1_500_000
    assert 300e6 <= small.main <= 1e9


@pytest.mark.parametrize("model", MODELS)
def test_count_is_that_of_the_parameters_that_are_made(model):
    config = load_model_config(model)
    count = flops.parameter_count(config)
    made = sum(prod(leaf.shape) for leaf in jax.tree.leaves(abstract_parameters(config)))
    assert made == count.main + count.mtp


def test_v3_training_flops_are_the_reports():
    v3 = load_model_config("v3_671b")
    assert flops.training_flops_per_token(v3, 4096, mtp=False) / 1e9 == pytest.approx(250.46, abs=0.02)
    assert flops.training_flops_per_token(v3, 4096) / 1e9 == pytest.approx(260.65, abs=0.02)


def test_training_flops_equal_a_count_by_hand():
    """A layer small enough to count every product: 2 FLOPs per multiplication, three products per weight."""
    config = dataclasses.replace(
        load_model_config("v2_lite_16b"),
        vocab_size=10,
        hidden_size=4,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        intermediate_size=5,
        num_attention_heads=2,
        kv_lora_rank=3,
        qk_nope_head_dim=2,
        qk_rope_head_dim=2,
        v_head_dim=3,
    )
    q, kv_a, kv_b, o = 4 * 2 * 4, 4 * (3 + 2), 3 * 2 * (2 + 3), 2 * 3 * 4
    ffn, head = 3 * 4 * 5, 10 * 4
    keys = [1, 2, 3]  # that the queries of a sequence of three see
    scores_and_values = sum(2 * seen * (4 + 3) for seen in keys) / len(keys)
    expected = 3 * 2 * (q + kv_a + kv_b + o + ffn + head + scores_and_values)
    assert flops.training_flops_per_token(config, 3) == expected


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H800", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("TPU v4", 275),
        ("TPU v5", 459),
        ("TPU v5 lite", 197),
        ("TPU v6 lite", 918),
    ],
)
def test_peak_of_known_devices(kind, tflops):
    assert flops.peak_flops(kind) == tflops * 1e12


def test_peak_of_unknown_devices_is_not_made_up():
    assert flops.peak_flops("NVIDIA GeForce RTX 4090") is None
    assert flops.peak_flops("NVIDIA H2000") is None
    assert flops.peak_flops("cpu") is None


def test_peak_of_a_cpu_is_measured():
    peak, basis = flops.peak(jax.local_devices(backend="cpu")[0])
    assert 1e8 < peak < 1e15
    assert "measured" in basis
