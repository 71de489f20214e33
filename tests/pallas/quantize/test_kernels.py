"""The kernels, interpreted with a look for races, against the definitions."""

import functools
import math

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.pallas.quantize import api, e5m6, kernels, reference
from dsjax.runtime import made_for

E4M3 = reference.E4M3
BF16, F32 = jnp.bfloat16, jnp.float32
FORMATS = pytest.mark.parametrize(
    "dtype, power_of_two",
    [
        pytest.param(BF16, False, id="bf16"),
        pytest.param(BF16, True, id="bf16-power"),
        pytest.param(F32, False, id="f32"),
        pytest.param(F32, True, id="f32-power", marks=pytest.mark.slow),
    ],
)


def tensor(shape, dtype, seed=0):
    """Normal values, every tile of 128 of a magnitude of its own; a zero tile and extreme ones among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp2(rng.integers(-12, 12, (*shape[:-1], 1)))
    x *= np.repeat(np.exp2(rng.integers(-12, 12, -(-shape[-1] // 128))), 128)[: shape[-1]]
    if shape[-2] > 3:
        x[..., 1, :] = 0
        x[..., 2, 0] = 3e38
        x[..., 3, -1] = -1e-30
    return jnp.asarray(x, dtype)


def bits(x):
    return np.asarray(x).view(np.uint8) if x.dtype == E4M3 else np.asarray(x)


def defined(f, *args, **kwargs):
    # Inside `jit`, as models call it.
    return jax.jit(functools.partial(f, **kwargs))(*args)


def equal(got, want):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(bits(ours), bits(theirs))


@FORMATS
@pytest.mark.parametrize(
    "shape", [(64, 128), (256, 384), pytest.param((200, 272), id="partial"), pytest.param((3, 30, 133), id="padded")]
)
def test_tiles(interpreted, shape, dtype, power_of_two):
    x = tensor(shape, dtype)
    got = interpreted(api.tiles, x, power_of_two=power_of_two)
    equal(got, defined(reference.tiles, x, power_of_two=power_of_two))


@FORMATS
@pytest.mark.parametrize(
    "shape", [(256, 192), pytest.param((208, 80), id="partial"), pytest.param((130, 41), id="padded")]
)
def test_tiles_transposed(interpreted, shape, dtype, power_of_two):
    x = tensor(shape, dtype)
    got = interpreted(api.tiles_transposed, x, power_of_two=power_of_two)
    equal(got, defined(reference.tiles_transposed, x, power_of_two=power_of_two))


@FORMATS
@pytest.mark.parametrize(
    "shape",
    [(128, 128), (256, 384), pytest.param((2, 72, 144), id="partial"), pytest.param((2, 1, 130, 130), id="padded")],
)
def test_blocks(interpreted, shape, dtype, power_of_two):
    w = tensor(shape, dtype)
    got = interpreted(api.blocks, w, power_of_two=power_of_two)
    equal(got, defined(reference.blocks, w, power_of_two=power_of_two))


@pytest.mark.parametrize("f", [api.tiles, api.blocks, api.tiles_transposed])
def test_what_is_not_finite(interpreted, f):
    x = tensor((128, 256), F32).at[5, 6].set(jnp.nan).at[70, 130].set(jnp.inf)
    got = [np.asarray(a, np.float32) for a in interpreted(f, x)]
    want = [np.asarray(a, np.float32) for a in f(x, impl="xla")]
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.isnan(got[1]).any() and np.isinf(got[1]).any()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    "shape", [(256, 192), pytest.param((208, 272), id="partial"), pytest.param((130, 41), id="padded")]
)
def test_requantize_transposed(interpreted, shape, power_of_two):
    codes, scales = defined(reference.tiles, tensor(shape, F32))
    got = interpreted(api.requantize_transposed, codes, scales, power_of_two=power_of_two)
    equal(got, defined(reference.requantize_transposed, codes, scales, power_of_two=power_of_two))


def test_requantize_chosen_rows(interpreted):
    codes, scales = defined(reference.tiles, tensor((50, 128), F32))
    rows = jnp.concatenate([jax.random.permutation(jax.random.key(0), 51), jnp.full(77, 50), jnp.arange(16)])
    got = interpreted(api.requantize_transposed, codes, scales, rows)
    equal(got, defined(reference.requantize_transposed, codes, scales, rows))


@pytest.mark.parametrize(
    "shape", [(128, 128), pytest.param((3, 144, 208), id="partial"), pytest.param((2, 9, 70), id="padded")]
)
def test_transpose(interpreted, shape):
    # All codes; of the two that are no number only the positive: the way is by float16, whose sign of them may differ.
    every = np.arange(256, dtype=np.uint8)
    codes = jnp.asarray(np.resize(every[every != 0xFF], shape).view(E4M3))
    equal(interpreted(api.transpose, codes), codes.swapaxes(-1, -2))


def near(got, candidates):
    """Check codes and scales to be of any of `candidates`: the input of the definition and numbers so close to it that
    they have the same code, or, at a boundary of rounding, the next. Return how many codes are the next."""
    codes, scales = got
    allowed_codes, allowed_scales = [], []
    spread = np.repeat(np.asarray(scales), 128, 1)[:, : codes.shape[1]]
    for x in candidates:
        allowed_codes.append(bits((np.asarray(x, np.float32) / spread).astype(E4M3)))
        allowed_scales.append(np.asarray(reference.tiles(jnp.asarray(x, F32))[1]))
    ok = np.any([bits(codes) == allowed for allowed in allowed_codes], 0)
    assert ok.all()
    close = np.any([np.isclose(scales, allowed, rtol=1e-6, atol=0) for allowed in allowed_scales], 0)
    assert close.all()
    return (bits(codes) != allowed_codes[0]).mean()


def around(x):
    return [x * (1 + off) for off in (0, 1e-6, -1e-6)]


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("m, f", [(128, 256), pytest.param(72, 208, id="partial"), pytest.param(33, 100, id="padded")])
def test_swiglu_tiles(interpreted, m, f, dtype):
    rng = np.random.default_rng(0)
    gate_up = jnp.asarray(rng.normal(size=(m, 2 * f)) * np.exp2(rng.integers(-8, 5, (m, 1))), dtype)
    weights = jnp.asarray(rng.uniform(size=m), F32)
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, -1)
    product = gate / (1 + np.exp(-gate)) * up * np.asarray(weights)[:, None]
    assert near(interpreted(api.swiglu_tiles, gate_up, weights), around(product)) < 1e-3
    ours = interpreted(api.swiglu_tiles, gate_up, weights, power_of_two=True)
    want = defined(reference.swiglu_tiles, gate_up, weights, power_of_two=True)
    np.testing.assert_array_equal(ours[1], want[1])
    assert (bits(ours[0]) != bits(want[0])).mean() < 1e-3


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("m, f", [(128, 128), pytest.param(72, 208, id="partial"), pytest.param(33, 100, id="padded")])
def test_swiglu_backward(interpreted, m, f, dtype):
    rng = np.random.default_rng(0)
    gate_up, dy = (jnp.asarray(rng.normal(size=(m, n)) * 3, dtype) for n in (2 * f, f))
    weights = jnp.asarray(rng.uniform(size=m), F32)
    got = interpreted(api.swiglu_backward, gate_up, weights, dy)
    want = defined(reference.swiglu_backward, gate_up, weights, dy)
    assert got[0].dtype == dtype and got[1].dtype == F32
    step = {BF16: 2**-8, F32: 1e-5}[dtype]
    np.testing.assert_allclose(np.asarray(got[0], np.float32), np.asarray(want[0], np.float32), rtol=step, atol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("m, k", [(3, 7168), (13, 1536), (33, 512), (70, 128)])
def test_rms_norm_tiles(interpreted, m, k, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(m, k)) * np.exp2(rng.integers(-8, 8, (m, 1))), dtype)
    gain = jnp.asarray(rng.uniform(0.5, 2, k), F32)
    x64 = np.asarray(x, np.float64)
    normed = x64 / np.sqrt((x64**2).mean(1, keepdims=True) + 1e-6) * np.asarray(gain)
    # Where the norm falls between two numbers of `dtype`, both are right.
    candidates = [y for n in around(normed) for y in around(np.asarray(jnp.asarray(n, F32).astype(dtype), np.float64))]
    assert near(interpreted(api.rms_norm_tiles, x, gain, 1e-6), candidates) < 1e-3
    ours = interpreted(api.rms_norm_tiles, x, gain, 1e-6, power_of_two=True)
    want = defined(reference.rms_norm_tiles, x, gain, 1e-6, power_of_two=True)
    np.testing.assert_array_equal(ours[1], want[1])
    assert (bits(ours[0]) != bits(want[0])).mean() < 1e-3


@pytest.mark.parametrize(
    "k, rows",
    [(7168, 1), (1536, 4), (512, 16), (2048, 4), (128, 64), (8192, 1), (1152, None), (100, None), (8320, None)],
)
def test_rows_of_an_rms_norm(k, rows):
    assert kernels.rms_norm_rows(k) == rows


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    "shape",
    [
        (16, 512),
        pytest.param((5, 640), id="partial"),
        pytest.param((70, 1280), id="many"),
        pytest.param((3, 7, 136), id="padded"),
    ],
)
def test_e5m6(interpreted, shape, dtype):
    x = tensor(shape, dtype)
    words, scales = interpreted(api.pack_e5m6, x)
    equal((words, scales), defined(reference.pack_e5m6, x))
    got = interpreted(api.unpack_e5m6, words, scales, dtype=dtype)
    equal(got, defined(reference.unpack_e5m6, words, scales, dtype=dtype))
    assert got.dtype == dtype


def test_e5m6_of_every_float16(interpreted):
    """Beside one that makes every tile's scale 1; zeros, subnormal numbers and ties are among them."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = every[np.isfinite(every) & (np.abs(every) <= reference.E5M6_LARGEST)]
    every = np.pad(every, (0, -every.size % 127)).reshape(-1, 127)
    x = np.concatenate([every, np.full((every.shape[0], 1), reference.E5M6_LARGEST, np.float32)], 1)
    words, scales = interpreted(api.pack_e5m6, jnp.asarray(x))
    assert (np.asarray(scales) == 1).all()
    equal((words, scales), defined(reference.pack_e5m6, x))
    equal(interpreted(api.unpack_e5m6, words, scales), defined(reference.unpack_e5m6, words, scales))


def test_e5m6_of_all_codes(interpreted):
    """Also those that packing does not make: of the largest exponent."""
    codes = np.arange(2**12, dtype=np.uint32).reshape(-1, 8)
    words = jnp.stack(reference.e5m6_words(list(jnp.asarray(codes.T))), -1).reshape(-1, 48)
    scales = jnp.asarray(np.exp2(np.arange(-20, 12))[:, None], F32)
    got = interpreted(api.unpack_e5m6, words, scales)
    sign, exponent, mantissa = codes >> 11, codes >> 6 & 31, codes & 63
    values = np.where(exponent > 0, (64 + mantissa) * 2.0 ** (exponent - 21.0), mantissa * 2.0**-20)
    np.testing.assert_array_equal(got, (np.where(sign, -values, values)).reshape(-1, 128) * np.asarray(scales))


def test_e5m6_of_what_is_not_finite(interpreted):
    x = tensor((16, 512), F32).at[5, 6].set(jnp.nan).at[7, 130].set(jnp.inf)
    words, scales = interpreted(api.pack_e5m6, x)
    want, want_scales = api.pack_e5m6(x, impl="xla")
    np.testing.assert_array_equal(scales, want_scales)
    finite = np.isfinite(want_scales)
    assert finite.sum() == finite.size - 2
    got, want = (np.asarray(y).reshape(16, 4, 48) for y in (words, want))
    np.testing.assert_array_equal(got[finite], want[finite])
    values = np.asarray(interpreted(api.unpack_e5m6, words, scales)).reshape(16, 4, 128)
    np.testing.assert_array_equal(np.isfinite(values).all(-1), finite)
    assert not np.isfinite(values[~finite]).any()


def test_threads_of_e5m6_hold_whole_octets():
    """In the register arrays that the kernels take apart and put together, which the interpreter does not see."""

    def owner(layout, index):
        place = layout.tiling.tile_indices(index)
        *register, vector = (0 if i - len(place) in of_threads(layout) else at for i, at in enumerate(place))
        return [place[d] for d in of_threads(layout)], register, vector

    def of_threads(layout):
        return (*layout.warp_dims, *layout.lane_dims)

    values, parts = e5m6.LAYOUT.to_mgpu(), e5m6.OF_PART.to_mgpu()
    for row, octet, i in np.ndindex(64, 16, 8):
        threads, register, vector = owner(values, (row, 8 * octet + i))
        assert owner(parts, (row, octet)) == (threads, register, 0) and vector == i
        assert threads == [row % 8 // 2, row % 2, octet]


def test_more_steps_than_buffers(interpreted):
    """Two blocks of threads take turns of a grid that uses every buffer several times."""
    x = tensor((64, 128 * 20), BF16)
    equal(interpreted(api.tiles, x), defined(reference.tiles, x))


def test_nothing():
    """A device may have no rows."""
    codes, scales = api.tiles(jnp.ones((0, 256)), impl="interpret")
    assert codes.shape == (0, 256) and scales.shape == (0, 2)


@pytest.mark.parametrize("num_sms", [1, 3])
def test_as_many_multiprocessors_as_it_may_take(interpreted, num_sms):
    x = tensor((192, 256), BF16)
    equal(interpreted(api.tiles, x, num_sms=num_sms), defined(reference.tiles, x))
    assert blocks_of_threads(functools.partial(api.tiles, impl="interpret", num_sms=num_sms), x) == num_sms


@pytest.mark.parametrize("f", [api.tiles, api.tiles_transposed, api.blocks, api.pack_e5m6])
def test_every_multiprocessor_gets_blocks(f):
    x = jax.ShapeDtypeStruct((4096, 7168), BF16)
    with made_for("gpu"):
        all_of_them, fewer = (blocks_of_threads(functools.partial(f, num_sms=n), x) for n in (132, 112))
    assert all_of_them % 132 == 0 and fewer == all_of_them // 132 * 112


def blocks_of_threads(f, *args):
    (kernel,) = kernels_of(jax.make_jaxpr(f)(*args).jaxpr)
    (mesh,) = kernel.params["meshes"]
    return math.prod(mesh.grid)


def kernels_of(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "mpmd_map":  # a kernel of Mosaic GPU
            yield eqn
        else:
            for inner in jex.jaxprs_in_params(eqn.params):
                yield from kernels_of(getattr(inner, "jaxpr", inner))


def test_no_multiprocessors(interpreted):
    with pytest.raises(ValueError, match="num_sms = 0, should be at least 1"):
        interpreted(api.tiles, tensor((64, 128), BF16), num_sms=0)
