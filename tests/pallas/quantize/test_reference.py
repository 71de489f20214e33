"""The definitions, to the bit, against the rule written in NumPy and ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsjax.pallas.quantize import api
from dsjax.pallas.quantize.reference import E5M6_LARGEST, dequantize, scales_of

E4M3 = ml_dtypes.float8_e4m3fn
SMALL = [(128, 128), (256, 256), (256, 272), (303, 300), (305, 256), (1, 16), (65, 96), (1024, 1)]
LARGE = [(256, 1024), (1024, 256), (993, 512), (2000, 2000), (2048, 2000)]
SHAPES = [*SMALL, *(pytest.param(shape, marks=pytest.mark.slow) for shape in LARGE)]
DTYPES = [jnp.float32, jnp.bfloat16]


def every_tile_its_own(shape, rows, columns, dtype, seed=0):
    """Values that rise within every tile, up to an extremum of its own: wrong scales show."""
    rng = np.random.default_rng(seed)
    grid = [-(-shape[0] // rows), -(-shape[1] // columns)]
    extrema = rng.uniform(-8192, 8192, grid)
    rising = np.arange(1, rows * columns + 1).reshape(rows, columns) / (rows * columns)
    x = (extrema[:, None, :, None] * rising[None, :, None, :]).reshape(grid[0] * rows, grid[1] * columns)
    return x[: shape[0], : shape[1]].astype(dtype)


def by_the_rule(x, rows, columns, power_of_two, largest=448.0):
    """Return x / s in float32, and the scales s of tiles."""
    x = np.asarray(x, np.float32)
    grid = [-(-x.shape[0] // rows), -(-x.shape[1] // columns)]
    scales = np.empty(grid, np.float32)
    divided = np.empty_like(x)
    for i in range(grid[0]):
        for j in range(grid[1]):
            tile = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale = np.maximum(np.abs(x[tile]).max(), np.float32(1e-4)) / np.float32(largest)
            if power_of_two:
                mantissa, exponent = np.frexp(scale)
                scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
            scales[i, j] = scale
            divided[tile] = x[tile] / scale
    return divided, scales


def bits(codes):
    return np.asarray(codes).view(np.uint8)


def check(got, divided, scales):
    np.testing.assert_array_equal(np.asarray(got[1]), scales)
    np.testing.assert_array_equal(bits(got[0]), bits(divided.astype(E4M3)))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_and_blocks_follow_the_rule(shape, dtype, power_of_two):
    for f, rows, columns in ((api.tiles, 1, 128), (api.tiles_transposed, 128, 1), (api.blocks, 128, 128)):
        x = every_tile_its_own(shape, rows, columns, dtype)
        got = jax.jit(f, static_argnames="power_of_two")(x, power_of_two=power_of_two)
        divided, scales = by_the_rule(x, rows, columns, power_of_two)
        if f is api.tiles_transposed:
            divided, scales = divided.T, scales.T
        check(got, divided, scales)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_rule_holds_outside_of_jit(power_of_two):
    """Where XLA sees other programs, and makes products of divisions if it can."""
    x = every_tile_its_own((200, 272), 1, 128, jnp.bfloat16)
    check(api.tiles(x, power_of_two=power_of_two), *by_the_rule(x, 1, 128, power_of_two))
    check(api.blocks(x, power_of_two=power_of_two), *by_the_rule(x, 128, 128, power_of_two))


def test_batches_of_tiles_and_blocks():
    x = jnp.stack([every_tile_its_own((130, 144), 1, 128, jnp.float32, seed) for seed in range(3)])
    for f in (api.tiles, api.blocks):
        got = f(x)
        for i in range(3):
            alone = f(x[i])
            np.testing.assert_array_equal(bits(got[0][i]), bits(alone[0]))
            np.testing.assert_array_equal(got[1][i], alone[1])


def test_smaller_tiles():
    x = every_tile_its_own((3, 80), 1, 32, jnp.float32)
    check(api.tiles(x, tile=32, power_of_two=True), *by_the_rule(x, 1, 32, True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extrema(dtype):
    for f in (api.tiles, api.tiles_transposed, api.blocks):
        codes, scales = jax.jit(f)(jnp.zeros((128, 128), dtype))
        assert not bits(codes).any()
        np.testing.assert_array_equal(scales, np.float32(1e-4) / np.float32(448))
        for power_of_two in (False, True):
            x = jnp.full((128, 128), jnp.finfo(dtype).max)
            got = jax.jit(f, static_argnames="power_of_two")(x, power_of_two=power_of_two)
            divided, scales = by_the_rule(x, 128, 128, power_of_two)
            check(got, divided, np.broadcast_to(scales, got[1].shape))
            assert not power_of_two or float(scales[0, 0]) == 2.0**120


def _tile(f):
    return {api.tiles: (1, 128), api.tiles_transposed: (1, 128), api.blocks: (128, 128)}[f]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_its_tile_only(bad, power_of_two):
    x = every_tile_its_own((2, 256), 1, 128, jnp.float32)
    spoiled = x.copy()
    spoiled[1, 130] = bad
    codes, scales = api.tiles(spoiled, power_of_two=power_of_two)
    good_codes, good_scales = api.tiles(x, power_of_two=power_of_two)
    assert not np.isfinite(dequantize(codes, scales)[1, 128:]).any()
    np.testing.assert_array_equal(np.isfinite(scales), [[True, True], [True, False]])
    np.testing.assert_array_equal(scales[:, 0], good_scales[:, 0])
    np.testing.assert_array_equal(bits(codes)[:, :128], bits(good_codes)[:, :128])
    np.testing.assert_array_equal(bits(codes)[0], bits(good_codes)[0])


def test_scales_that_are_powers_of_two_are_the_next_above():
    amax = np.concatenate([np.float32(448 * 2.0**e) * np.float32([1 - 2**-20, 1, 1 + 2**-20]) for e in range(-10, 100)])
    got = np.asarray(scales_of(jnp.asarray(amax), power_of_two=True))
    np.testing.assert_array_equal(got.view(np.uint32) & 0x7FFFFF, 0)
    want = np.array([[2.0**e, 2.0**e, 2.0 ** (e + 1)] for e in range(-10, 100)]).ravel()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_dequantization_returns_the_tensor(power_of_two):
    x = every_tile_its_own((300, 272), 1, 128, jnp.float32)
    for f in (api.tiles, api.blocks):
        codes, scales = f(x, power_of_two=power_of_two)
        spread = scales if f is api.tiles else np.repeat(scales, 128, 0)[:300]
        spread = np.repeat(spread, 128, 1)[:, :272]
        error = np.abs(dequantize(codes, scales, *_tile(f)) - x)
        # Half a unit of 3 bits of mantissa; of subnormal codes, half of the smallest.
        assert (error <= np.maximum(np.abs(x) * 2**-4, spread * 2**-10) * (1 + 1e-6)).all()


def test_requantizing_is_that_of_the_dequantized():
    x = every_tile_its_own((300, 272), 1, 128, jnp.float32)
    codes, scales = api.tiles(x)
    rows = jnp.array([7, 300, 0, 299, 7, 300])
    got = api.requantize_transposed(codes, scales, rows)
    taken = np.concatenate([dequantize(codes, scales), np.zeros((1, 272), np.float32)])[rows]
    check(got, *(a.T for a in by_the_rule(taken, 128, 1, False)))


def test_requantizing_is_exact_where_powers_of_two_permit():
    """Values of equal magnitude along a column and two bits of mantissa: every code of both tensors is exact."""
    rng = np.random.default_rng(0)
    x = rng.choice([-1.75, -1.5, -1, 1, 1.25, 1.5], (256, 256)) * 2.0 ** rng.integers(-3, 3, (1, 256))
    codes, scales = api.tiles(jnp.asarray(x, jnp.float32), power_of_two=True)
    np.testing.assert_array_equal(dequantize(codes, scales), x)
    np.testing.assert_array_equal(dequantize(*api.requantize_transposed(codes, scales, power_of_two=True)), x.T)


def test_transposed_blocks_keep_their_scales():
    w = every_tile_its_own((256, 384), 128, 128, jnp.float32)
    codes, scales = api.blocks(w)
    got = dequantize(api.transpose(codes), scales.T, 128, 128)
    np.testing.assert_array_equal(got, dequantize(codes, scales, 128, 128).T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_rounded_before_it_is_quantized(dtype):
    x = every_tile_its_own((33, 256), 1, 128, dtype)
    gain = np.linspace(0.5, 2, 256, dtype=np.float32)
    codes, scales = api.rms_norm_tiles(jnp.asarray(x), jnp.asarray(gain), 1e-6)
    x64 = np.asarray(x, np.float64)
    normed = x64 / np.sqrt((x64**2).mean(1, keepdims=True) + 1e-6) * gain
    want = dequantize(*api.tiles(jnp.asarray(normed.astype(np.float32)).astype(dtype)))
    np.testing.assert_allclose(dequantize(codes, scales), want, rtol=0.13, atol=1e-3)
    off = np.abs(np.asarray(dequantize(codes, scales)) - want) > 1e-5 * np.abs(want)
    assert off.mean() < 0.01  # only where float32's rounding and float64's fall on two sides


def test_swiglu_is_weighted_before_it_is_quantized():
    gate_up = every_tile_its_own((40, 512), 1, 128, jnp.float32) / 2048
    weights = np.random.default_rng(0).uniform(0, 1, 40).astype(np.float32)
    codes, scales = api.swiglu_tiles(jnp.asarray(gate_up), jnp.asarray(weights))
    product = _swiglu(np.asarray(gate_up, np.float64), weights)
    divided, want = by_the_rule(product.astype(np.float32), 1, 128, False)
    np.testing.assert_allclose(scales, want, rtol=1e-6)
    assert (bits(codes) != bits(divided.astype(E4M3))).mean() < 1e-3


def _swiglu(gate_up, weights):
    gate, up = np.split(gate_up, 2, -1)
    return gate / (1 + np.exp(-gate)) * up * weights[:, None]


def test_gradients_of_swiglu():
    """In float32 against JAX's own, and against finite differences in float64."""
    rng = np.random.default_rng(0)
    gate_up, weights, dy = rng.normal(size=(5, 24)) * 2, rng.uniform(size=5), rng.normal(size=(5, 12))

    def product(gate_up, weights):
        gate, up = jnp.split(gate_up, 2, -1)
        return jax.nn.silu(gate) * up * weights[:, None]

    arrays = [jnp.asarray(a, jnp.float32) for a in (gate_up, weights, dy)]
    got = api.swiglu_backward(*arrays)
    want = jax.vjp(product, *arrays[:2])[1](arrays[2])
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert got[0].dtype == got[1].dtype == jnp.float32
    assert api.swiglu_backward(*arrays[:2], arrays[2].astype(jnp.bfloat16))[0].dtype == jnp.bfloat16

    step = 1e-6
    for gradient, which in ((got[0], 0), (got[1], 1)):
        for index in [(0, 0), (3, 5), (2, 12), (4, 23)] if which == 0 else [(0,), (4,)]:
            ends = []
            for sign in (1, -1):
                moved = [gate_up.copy(), weights.copy()]
                moved[which][index] += sign * step
                ends.append((_swiglu(*moved) * dy).sum())
            np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-5)


def test_gradients_of_swiglu_of_large_gates_are_finite():
    gate_up = jnp.array([[-200.0, -90.0, 90.0, 200.0, 1.0, 1.0, 1.0, 1.0]])
    gradient, of_weights = api.swiglu_backward(gate_up, jnp.ones(1), jnp.ones((1, 4)))
    np.testing.assert_allclose(gradient, [[0, 0, 1, 1, 0, 0, 90, 200]], atol=1e-30)
    np.testing.assert_allclose(of_weights, [290.0])


def e5m6_by_the_rule(divided):
    """Float16 towards zero, then to 6 bits of mantissa by the last 17 of float32: DeepSeek's kernel."""
    half = divided.astype(np.float16)
    further = np.abs(half.astype(np.float32)) > np.abs(divided)
    half = np.where(further, np.nextafter(half, np.float16(0)), half)
    kept = half.view(np.uint16).astype(np.uint32) >> 4
    return kept + ((kept & 1) + (divided.view(np.uint32) & 0x1FFFF) > 0x10000)


def unpacked(words):
    """The 12-bit codes of 3 words, in order from the highest bits of the first."""
    words = np.asarray(words).reshape(-1, 3).astype(object)
    whole = words[:, 0] << 64 | words[:, 1] << 32 | words[:, 2]
    return np.array([[int(w >> (84 - 12 * i)) & 0xFFF for i in range(8)] for w in whole], np.uint32)


def check_e5m6(x):
    words, scales = api.pack_e5m6(jnp.asarray(x))
    divided, want = by_the_rule(x, 1, 128, True, E5M6_LARGEST)
    np.testing.assert_array_equal(scales, want)
    codes = e5m6_by_the_rule(divided)
    np.testing.assert_array_equal(unpacked(words).reshape(x.shape), codes)
    values = (codes << 4).astype(np.uint16).view(np.float16).astype(np.float32)  # one code is four bits of float16
    np.testing.assert_array_equal(api.unpack_e5m6(words, scales), values * np.repeat(scales, 128, 1)[:, : x.shape[1]])
    return np.asarray(api.unpack_e5m6(words, scales))


def test_e5m6_of_every_float16():
    """All in range, 127 in a tile, beside one that makes its scale 1."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every) & (np.abs(every) <= E5M6_LARGEST)].astype(np.float32)
    every = np.pad(every, (0, -every.size % 127)).reshape(-1, 127)
    x = np.concatenate([every, np.full((every.shape[0], 1), E5M6_LARGEST, np.float32)], 1)
    got = check_e5m6(x)
    normal = np.abs(x) >= 2.0**-14
    # A code keeps 6 bits of mantissa, so half a unit is 2**-7 of the value.
    assert (np.abs(got - x)[normal] <= 2.0**-7 * np.abs(x)[normal]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_e5m6_of_other_numbers(dtype):
    """Those that float16 does not hold, ties among them broken by the bits it lost; partial tiles."""
    x = np.random.default_rng(0).normal(size=(20, 200)).astype(np.float32)
    x = (x * np.exp2(np.random.default_rng(1).integers(-20, 4, x.shape))).astype(np.float32)
    ties = np.float32(1 + 2**-7) + np.float32([0, 2**-23, -(2**-23), 2**-10])
    x[0, :4], x[0, 4:8] = ties, -ties
    x = np.asarray(jnp.asarray(x).astype(dtype), np.float32)
    got = check_e5m6(x)
    near = np.abs(x) > 2.0**-10 * np.abs(x).max(1, keepdims=True)
    assert (np.abs(got - x)[near] <= 0.008 * np.abs(x)[near]).all()


def test_errors():
    for impl in ("xla", "interpret"):
        with pytest.raises(ValueError, match="multiple of 8"):
            api.pack_e5m6(jnp.ones((2, 12)), impl=impl)
    with pytest.raises(ValueError, match="no kernel for tiles of 32"):
        api.tiles(jnp.ones((2, 64)), tile=32, impl="interpret")
    with pytest.raises(ValueError, match="no kernel for inputs in float16"):
        api.blocks(jnp.ones((2, 64), jnp.float16), impl="interpret")
    with pytest.raises(ValueError, match="no kernel for an RMSNorm of 100 columns"):
        api.rms_norm_tiles(jnp.ones((2, 100)), jnp.ones(100), 1e-6, impl="interpret")
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        api.tiles(jnp.ones((2, 64)), impl="triton")
    with pytest.raises(ValueError, match="Hopper"):
        api.tiles(jnp.ones((2, 64)), impl="mosaic")
    with pytest.raises(ValueError, match="even number"):
        api.swiglu_tiles(jnp.ones((2, 33)), jnp.ones(2), impl="interpret")
