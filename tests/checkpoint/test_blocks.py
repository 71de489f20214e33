"""FP8 blocks: every E4M3 code, every rounding case, and partial blocks, against ml_dtypes and torch's golden."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsjax.checkpoint.arrays import read_values
from dsjax.checkpoint.blocks import dequantize, e4m3_to_float32, float32_to_e4m3, quantize
from dsjax.checkpoint.huggingface import open_huggingface

GOLDEN = Path(__file__).parents[1] / "golden" / "v3"
E4M3 = ml_dtypes.float8_e4m3fn


def _bits(array):
    return array.view(f"u{array.itemsize}")


def test_all_256_codes():
    codes = np.arange(256, dtype=np.uint8).view(E4M3)
    ours, right = e4m3_to_float32(codes), codes.astype(np.float32)
    numbers = ~np.isnan(right)
    assert (_bits(ours)[numbers] == _bits(right)[numbers]).all()
    assert np.isnan(ours[~numbers]).all()
    assert (~numbers).sum() == 2


def test_rounding_is_to_nearest_even_everywhere():
    codes = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    numbers = np.unique(codes[~np.isnan(codes)])
    ties = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    up, down = (np.nextafter(ties, np.float32(end)) for end in (np.inf, -np.inf))
    edges = np.float32([0.0, -0.0, 1e-45, -1e-45, 448, 463.99, 464, 465, 1e38, -1e38, np.inf, -np.inf])
    random = np.random.default_rng(0)
    scattered = (random.standard_normal(1 << 18) * np.exp2(random.uniform(-16, 9, 1 << 18))).astype(np.float32)
    for values in (numbers, ties, up, down, edges, scattered):
        right = np.clip(values, -448, 448).astype(E4M3)
        assert (_bits(float32_to_e4m3(values)) == _bits(right)).all()


def test_nan_has_no_code():
    with pytest.raises(ValueError, match="NaN"):
        float32_to_e4m3(np.float32([1, np.nan]))


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (576, 200), (130, 384), (127, 129)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_weight_comes_back_within_half_a_step(shape, power_of_two):
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 0.006
    codes, scales = quantize(weight, power_of_two=power_of_two)
    assert codes.shape == shape
    assert scales.shape == tuple(-(-n // 128) for n in shape)
    each = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
    assert (_bits(codes) == _bits((weight / each).astype(E4M3))).all()
    assert (np.abs(dequantize(codes, scales) - weight) <= each * 16).all()
    if power_of_two:
        assert (np.exp2(np.round(np.log2(scales))) == scales).all()
        assert (scales >= quantize(weight)[1]).all()
        assert (scales < 2 * quantize(weight)[1]).all()


def test_scales_of_zeros_and_of_exact_powers_of_two():
    assert quantize(np.zeros((128, 128), np.float32))[1] == np.float32(1e-4) / np.float32(448)
    exact = np.full((2, 2), 448 * 2.0**-9, np.float32)
    assert quantize(exact, power_of_two=True)[1] == 2.0**-9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    weight = np.zeros((130, 3), np.float32)
    weight[129, 2] = bad
    with pytest.raises(ValueError, match=r"\(130, 3\) has values that are not finite"):
        quantize(weight)


def test_any_window_of_a_weight_is_multiplied_by_its_own_scales():
    codes, scales = quantize(np.random.default_rng(2).standard_normal((576, 300)).astype(np.float32))
    whole = dequantize(codes, scales)
    for rows, columns in (((0, 576), (0, 300)), ((100, 300), (5, 290)), ((512, 576), (128, 256)), ((129, 130), (0, 1))):
        part = dequantize(codes[slice(*rows), slice(*columns)], scales, rows[0], columns[0])
        assert (part == whole[slice(*rows), slice(*columns)]).all()


def test_large_and_tiny_scales_do_not_overflow():
    codes = np.full((1, 4), 0x7E, np.uint8).view(E4M3)
    for scale in (2.0**100, 2.0**-140, 1e30):
        assert (dequantize(codes, np.float32([[scale]])) == np.float32(448) * np.float32(scale)).all()


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_every_tensor_of_the_golden_bit_for_bit(kind):
    expected = json.loads((GOLDEN / "dequantized.json").read_text())
    source = open_huggingface(GOLDEN / "hf_fp8")
    dtype = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16}[kind]
    for name, digests in expected.items():
        values = read_values(source, name, 0, source.stored[name].shape[0]).astype(dtype)
        assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == digests[kind], name
    assert source.stored["model.layers.1.self_attn.q_b_proj.weight_scale_inv"].shape == (2, 1), "has a partial block"
    source.close()
