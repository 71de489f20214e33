"""RoPE and YaRN against the numbers of DeepSeek-V3 and against rotation by complex numbers."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import ModelConfig, YarnConfig
from dsjax.model.rope import _correction_range, frequencies, mscale, rotate, rotation, softmax_scale

YARN = YarnConfig(factor=40.0, original_max_position_embeddings=4096)
V3 = ModelConfig(
    name="attention of V3",
    vocab_size=8,
    hidden_size=8,
    num_hidden_layers=1,
    first_k_dense_replace=1,
    intermediate_size=8,
    moe_intermediate_size=8,
    num_attention_heads=1,
    kv_lora_rank=8,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=2,
    num_experts_per_tok=1,
    rope_scaling=YARN,
)
PLAIN = replace(V3, rope_scaling=None)
LITE = replace(V3, rope_scaling=replace(YARN, mscale=0.707, mscale_all_dim=0.707))


def test_softmax_scales_of_the_releases():
    assert mscale(40, 1.0) == pytest.approx(1.3688879454, abs=1e-10)
    assert mscale(1, 1.0) == mscale(0.5, 1.0) == 1.0
    assert softmax_scale(V3) == pytest.approx(0.1352337789, abs=1e-10)
    assert softmax_scale(PLAIN) == pytest.approx(0.0721687836, abs=1e-10)
    assert softmax_scale(LITE) == pytest.approx(0.1147213867, abs=1e-10)


def test_yarn_without_mscale_all_dim_scales_the_rotation_instead():
    config = replace(V3, rope_scaling=replace(YARN, mscale_all_dim=0.0))
    assert softmax_scale(config) == softmax_scale(PLAIN)
    cos, sin = rotation(config, jnp.arange(5))
    np.testing.assert_allclose(np.hypot(cos, sin), 1.3688879454, rtol=1e-6)


def test_frequencies_of_the_releases():
    assert _correction_range(YARN, 64, 10000.0) == (10, 23)
    plain, slowed = frequencies(PLAIN), frequencies(V3)
    assert plain.dtype == slowed.dtype == np.float32 and plain.shape == slowed.shape == (32,)
    np.testing.assert_allclose(plain, [10000 ** (-i / 32) for i in range(32)], rtol=1e-6)
    np.testing.assert_array_equal(slowed[:11], plain[:11])
    np.testing.assert_allclose(slowed[23:], plain[23:] / 40, rtol=1e-6)
    middle = [f / 40 * (i - 10) / 13 + f * (23 - i) / 13 for i, f in enumerate(plain)][11:23]
    np.testing.assert_allclose(slowed[11:23], middle, rtol=1e-6)


def test_correction_range_stays_within_the_pairs():
    assert _correction_range(replace(YARN, original_max_position_embeddings=64), 16, 10000.0) == (0, 3)
    low, high = _correction_range(replace(YARN, beta_fast=1e9, beta_slow=1e-9), 64, 10000.0)
    assert (low, high) == (0, 63)


@pytest.mark.parametrize("config", [PLAIN, V3])
def test_rotate_multiplies_neighbouring_pairs_by_complex_numbers(config):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 3, 64)).astype(np.float32)
    positions = jnp.asarray([0, 1, 2, 5, 63, 4095, 163839])
    got = np.asarray(rotate(jnp.asarray(x), *rotation(config, positions)), np.float64)

    angles = np.float32(positions)[:, None] * frequencies(config)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles.astype(np.float64))[None, :, None]
    np.testing.assert_allclose(got[..., 0::2], turned.real, atol=2e-6)
    np.testing.assert_allclose(got[..., 1::2], turned.imag, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(got[:, 0], x[:, 0])


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(np.tile(rng.normal(size=64), (1, 40, 1, 1)), jnp.float32) for _ in range(2))
    rotations = rotation(V3, jnp.arange(40))
    scores = np.einsum("qd,kd->qk", rotate(q, *rotations)[0, :, 0], rotate(k, *rotations)[0, :, 0])
    for distance in range(-39, 40):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert math.isclose(scores[0, 0], np.vdot(q[0, 0], k[0, 0]), rel_tol=1e-5)
    assert np.std(scores) > 1, "all scores are equal"


def test_rotation_of_each_sequence_and_of_low_precision():
    positions = jnp.asarray([[0, 1, 2], [7, 8, 9]])
    x = jnp.ones((2, 3, 1, 64), jnp.bfloat16)
    turned = rotate(x, *rotation(PLAIN, positions))
    assert turned.dtype == jnp.bfloat16
    alone = rotate(x[1:], *rotation(PLAIN, positions[1]))
    np.testing.assert_array_equal(np.asarray(turned[1:], np.float32), np.asarray(alone, np.float32))
