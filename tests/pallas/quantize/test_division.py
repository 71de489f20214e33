"""The kernels' division, with an exact fused multiply-add in place of the GPU's."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.pallas.quantize import division, reference
from dsjax.pallas.quantize.kernels import LAYOUT


def fma(a, b, c):
    """Return a * b + c rounded once: in float64 to odd, from where rounding to float32 is that of the exact sum."""
    with np.errstate(all="ignore"):
        product = np.float64(a) * np.float64(b)  # exact
        c = np.float64(c)
        total = product + c
        back = total - product
        error = (product - (total - back)) + (c - back)
        even = total.view(np.int64) & 1 == 0
        towards = np.where(error > 0, np.inf, -np.inf)
        odd = np.where((error != 0) & even & np.isfinite(total), np.nextafter(total, towards), total)
        return jnp.asarray(odd.astype(np.float32))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(division, "_fma", lambda shape, layout: fma)
    monkeypatch.setattr(division.plgpu, "layout_cast", lambda x, layout: x)


def over(x, scales, power_of_two=False):
    with np.errstate(all="ignore"):
        return np.asarray(
            division.over(jnp.asarray(x), jnp.asarray(scales), LAYOUT, "mosaic", power_of_two=power_of_two)
        )


def same(got, want):
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_the_multiply_add_is_exact():
    assert float(fma(np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(-1 - 2**-11))) == 2**-24
    # Without rounding to odd, float64 would round to a tie of float32, and that to even.
    assert float(fma(np.float32(2**-30), np.float32(2**-30), np.float32(1))) == 1
    a, b = np.float32(1 + 2**-23), np.float32(2**-24)
    assert float(fma(a, b, np.float32(1))) == 1 + 2**-23


def test_scales():
    amax = np.random.default_rng(0).integers(0, 0x7F800000, 2**18).astype(np.uint32).view(np.float32)
    edges = [0, 1e-4, np.nextafter(np.float32(1e-4), np.float32(1)), 448, np.finfo(np.float32).max]
    amax = np.concatenate([np.float32(edges), amax])
    for largest in (reference.LARGEST, reference.E5M6_LARGEST):
        for power_of_two in (False, True):
            kwargs = dict(power_of_two=power_of_two, largest=largest)
            got = division.scales_of(jnp.asarray(amax), LAYOUT.reduce(1), "mosaic", **kwargs)
            same(np.asarray(got), np.asarray(reference.scales_of(jnp.asarray(amax), **kwargs)))
            if not power_of_two:
                same(np.asarray(got), np.maximum(amax, np.float32(1e-4)) / np.float32(largest))


def test_quotients_of_all_bfloat16():
    """Divisions are the same in every binade: all mantissas of amax times all values below it, down to code zero."""
    amax = (np.arange(128, dtype=np.uint32) + (130 << 7) << 16).view(np.float32)
    scales = np.asarray(reference.scales_of(jnp.asarray(amax), power_of_two=False))
    x = (np.arange(108 << 7, 132 << 7, dtype=np.uint32) << 16).view(np.float32)
    x = np.broadcast_to(np.concatenate([x, -x, np.float32([0, -0.0])]), (128, 2 * x.size + 2))
    same(over(x, scales), x / scales[:, None])


def test_quotients_of_float32():
    rng = np.random.default_rng(0)
    scales = np.concatenate([
        rng.integers(0x34000000, 0x7B000000, 2000).astype(np.uint32),
        np.arange(104, 246, dtype=np.uint32) << 23 | 0x7FFFFF,  # the mantissa whose inverse needs care
        np.arange(104, 246, dtype=np.uint32) << 23,
        np.arange(104, 246, dtype=np.uint32) << 23 | 1,
    ]).view(np.float32)  # fmt: skip
    # Around what E4M3 rounds at, codes' midpoints, where the last bit decides; and anywhere.
    codes = np.arange(0x7E, dtype=np.uint8).view(reference.E4M3).astype(np.float32)
    midpoints = (codes[1:] + codes[:-1]) / 2
    with np.errstate(over="ignore"):
        near = (scales[:, None] * midpoints).astype(np.float32)
    near = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))], 1)
    anywhere = scales[:, None] * rng.uniform(2**-11, 448, (scales.size, 256)).astype(np.float32)
    x = np.concatenate([near, -anywhere], 1)
    x = np.where(np.isfinite(x), x, 0)
    same(over(x, scales), x / scales[:, None])


def test_inverses_from_estimates_that_are_off():
    """`div.full.f32` may be off by two units."""
    scales = np.random.default_rng(0).integers(0x34000000, 0x7B000000, 2**16).astype(np.uint32).view(np.float32)
    exact = np.float32(1) / scales
    for off in range(-2, 3):
        estimate = (exact.view(np.int32) + off).view(np.float32)
        got = division._inverse(jnp.asarray(scales), jnp.asarray(estimate), LAYOUT.reduce(1))
        same(np.asarray(got), exact)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite(power_of_two):
    x = np.float32([[0, 1, -3e38, np.inf, -np.inf, np.nan]] * 2)
    scales = np.float32([np.inf, np.nan])
    with np.errstate(invalid="ignore"):
        want = x / scales[:, None]
    got = over(x, scales, power_of_two)
    np.testing.assert_array_equal(got, want)
    for amax in (np.inf, np.nan):
        scale = division.scales_of(jnp.float32([amax]), LAYOUT, "mosaic", power_of_two=power_of_two)
        np.testing.assert_array_equal(scale, np.float32([amax]))


def test_powers_of_two():
    scales = np.exp2(np.arange(-22, 121)).astype(np.float32)
    x = scales[:, None] * np.random.default_rng(0).uniform(-255, 255, (scales.size, 512)).astype(np.float32)
    same(over(x, scales, power_of_two=True), x / scales[:, None])
