"""The definitions of the scaled products against sums in float64, and against products that were never quantized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.pallas.matmul import scaled, sixteen_bits
from dsjax.pallas.matmul.config import Config
from dsjax.pallas.quantize.reference import blocks, tiles, tiles_transposed

F64 = np.float64


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _values(codes, scales, rows: int = 1) -> np.ndarray:
    """codes * scales in float64, by their indices."""
    codes, scales = np.asarray(codes, F64), np.asarray(scales, F64)
    row, column = np.arange(codes.shape[-2]) // rows, np.arange(codes.shape[-1]) // 128
    return codes * scales[..., row[:, None], column[None, :]]


def _close(found, wanted: np.ndarray, tolerance: float = 1e-6) -> None:
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found, F64) - wanted).max() <= tolerance * np.abs(wanted).max()


def _difference(x: np.ndarray, y: np.ndarray) -> float:
    """DeepSeek's measure of how much two tensors differ: half the square of the relative error, if that is small."""
    x, y = np.asarray(x, F64), np.asarray(y, F64)
    return 1 - 2 * (x * y).sum() / (x * x + y * y).sum()


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (5, 130, 128), (16, 128, 1280), (33, 64, 300), (130, 257, 640)])
@pytest.mark.parametrize("rows", [1, 128])
def test_scaled_matmul(m, n, k, rows):
    a, b = tiles(_normal(0, m, k)), (tiles if rows == 1 else blocks)(_normal(1, n, k))
    wanted = _values(*a) @ _values(*b, rows).T
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-8)):
        found = scaled.scaled_matmul(*a, *b, rows=rows, out_dtype=dtype, impl="xla")
        assert found.dtype == dtype
        _close(found, wanted, tolerance)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_without_rows_there_is_no_result(impl):
    b = blocks(_normal(0, 64, 128))
    codes, scales = jnp.zeros((0, 128), jnp.float8_e4m3fn), jnp.zeros((0, 1))
    assert scaled.scaled_matmul(codes, scales, *b, impl=impl).shape == (0, 64)
    codes, scales = jnp.zeros((8, 0), jnp.float8_e4m3fn), jnp.zeros((8, 0))
    into = jnp.ones((2, 8, 8))
    sizes = jnp.zeros(2, jnp.int32)
    found = scaled.grouped_scaled_wgrad(codes, scales, codes, scales, sizes, into=into, impl=impl)
    assert (found == into).all()


GROUPS = [130, 0, 7, 256, 0]
"""Rows of groups: ragged, of none, of whole tiles; two tiles remain behind the last."""
R = 1024


def _grouped() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Group of every tile, padded sizes, first row of every group, and which rows are there."""
    padded = np.array([-(-size // 128) * 128 for size in GROUPS], np.int32)
    starts = np.cumsum(padded) - padded
    group_of_tile = np.full(R // 128, len(GROUPS), np.int32)
    there = np.zeros(R, bool)
    for g, (start, size) in enumerate(zip(starts, GROUPS, strict=True)):
        group_of_tile[start // 128 : (start + padded[g]) // 128] = g
        there[start : start + size] = True
    return group_of_tile, padded, starts, there


def test_grouped_scaled_matmul():
    group_of_tile, padded, starts, there = _grouped()
    x, w = tiles(_normal(0, R, 300) * there[:, None]), blocks(_normal(1, len(GROUPS), 130, 300))
    wanted = np.zeros((R, 130))
    for g, matrix in enumerate(_values(*w, 128)):
        rows = slice(starts[g], starts[g] + padded[g])
        wanted[rows] = _values(*x)[rows] @ matrix.T
    _close(scaled.grouped_scaled_matmul(*x, *w, group_of_tile, out_dtype=jnp.float32, impl="xla"), wanted)


def test_rows_behind_the_last_group_become_zero_whatever_they_hold():
    x, w = tiles(_normal(0, 256, 128)), blocks(_normal(1, 1, 64, 128))
    found = scaled.grouped_scaled_matmul(*x, *w, jnp.array([0, 1], jnp.int32), impl="xla")
    assert (found[:128] != 0).mean() > 0.99
    assert (found[128:] == 0).all()


def test_tiles_of_the_definition_have_any_number_of_rows():
    x, w = tiles(_normal(0, 64, 128)), blocks(_normal(1, 2, 64, 128))
    found = scaled.grouped_scaled_matmul(*x, *w, jnp.array([0, 1], jnp.int32), out_dtype=jnp.float32, impl="xla")
    matrices = _values(*w, 128)
    _close(found, np.concatenate([_values(*x)[32 * g : 32 * g + 32] @ matrices[g].T for g in range(2)]))


def test_masked_scaled_matmul():
    counts = [3, 0, 40]
    x, w = tiles(_normal(0, 3, 40, 200)), blocks(_normal(1, 3, 72, 200))
    wanted = np.einsum("gck,gnk->gcn", _values(*x), _values(*w, 128))
    wanted *= np.arange(40)[None, :, None] < np.array(counts)[:, None, None]
    found = scaled.masked_scaled_matmul(*x, *w, jnp.array(counts, jnp.int32), out_dtype=jnp.float32, impl="xla")
    _close(found, wanted)


@pytest.mark.parametrize("adding", [False, True])
def test_grouped_scaled_wgrad(adding):
    _, padded, starts, there = _grouped()
    dy, x = _normal(0, R, 72) * there[:, None], _normal(1, R, 136)
    dy, x = tiles_transposed(dy), tiles_transposed(x)
    into = _normal(2, len(GROUPS), 72, 136) if adding else None
    wanted = np.zeros((len(GROUPS), 72, 136)) if into is None else into.astype(F64)
    for g, start in enumerate(starts):
        rows = slice(start, start + padded[g])
        wanted[g] += _values(*dy)[:, rows] @ _values(*x)[:, rows].T
    found = scaled.grouped_scaled_wgrad(*dy, *x, padded, into=into, impl="xla")
    _close(found, wanted)
    assert (found[1] == (0 if into is None else into[1])).all()


@pytest.mark.parametrize("contract", [1, 2])
def test_grouped_matmul(contract):
    group_of_tile, padded, starts, there = _grouped()
    x = jnp.asarray(_normal(0, R, 72 if contract == 1 else 40) * there[:, None], jnp.bfloat16)
    w = jnp.asarray(_normal(1, len(GROUPS), 72, 40), jnp.bfloat16)
    matrices = np.asarray(w, F64) if contract == 1 else np.asarray(w, F64).swapaxes(1, 2)
    wanted = np.zeros((R, matrices.shape[2]))
    for g, start in enumerate(starts):
        rows = slice(start, start + padded[g])
        wanted[rows] = np.asarray(x, F64)[rows] @ matrices[g]
    found = sixteen_bits.grouped_matmul(x, w, group_of_tile, contract=contract, impl="xla")
    assert found.dtype == jnp.bfloat16
    _close(found, wanted, 2.0**-8)


@pytest.mark.parametrize("adding", [False, True])
def test_grouped_wgrad(adding):
    _, padded, starts, there = _grouped()
    dy, x = (jnp.asarray(_normal(i, R, width) * there[:, None], jnp.bfloat16) for i, width in enumerate((72, 40)))
    into = _normal(2, len(GROUPS), 72, 40) if adding else None
    wanted = np.zeros((len(GROUPS), 72, 40)) if into is None else into.astype(F64)
    for g, start in enumerate(starts):
        rows = slice(start, start + padded[g])
        wanted[g] += np.asarray(dy, F64)[rows].T @ np.asarray(x, F64)[rows]
    _close(sixteen_bits.grouped_wgrad(dy, x, padded, into=into, impl="xla"), wanted)


def test_the_error_does_not_grow_with_k():
    of_sums, of_codes = [], []
    for k in (128, 2048, 16384):
        x, w = _normal(0, 32, k), _normal(1, 64, k)
        a, b = tiles(x), blocks(w)
        found = np.asarray(scaled.scaled_matmul(*a, *b, out_dtype=jnp.float32, impl="xla"), F64)
        exact, unquantized = _values(*a) @ _values(*b, 128).T, x.astype(F64) @ w.astype(F64).T
        of_sums.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        of_codes.append(np.linalg.norm(found - unquantized) / np.linalg.norm(unquantized))
    assert max(of_sums) < 1e-6
    assert max(of_codes) < 1.1 * min(of_codes)


SHAPES = [(576, 7168), (7168, 2048)]
LARGE = [(2112, 7168), (4096, 7168), (24576, 1536), (32768, 512), (7168, 16384)]


@pytest.mark.parametrize("n, k", [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.slow) for shape in LARGE)])
@pytest.mark.parametrize("rows", [1, 128])
def test_close_to_the_product_of_what_was_quantized(n, k, rows):
    x, w = _normal(0, 16, k), _normal(1, n, k)
    quantize = jax.jit(tiles if rows == 1 else blocks)
    found = scaled.scaled_matmul(*tiles(x), *quantize(w), rows=rows, out_dtype=jnp.float32, impl="xla")
    assert _difference(found, x @ w.T) < 1e-3


def _dense_arguments() -> dict:
    a, b = tiles(_normal(0, 16, 256)), blocks(_normal(1, 64, 256))
    return {"a": a[0], "a_scales": a[1], "b": b[0], "b_scales": b[1]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": 64}, "rows = 64"),
        ({"a": jnp.zeros((16, 256), jnp.bfloat16)}, r"a is bfloat16\[16, 256\], should be float8_e4m3fn"),
        ({"b": jnp.zeros((64, 128), jnp.float8_e4m3fn)}, "equal last dimensions"),
        ({"a_scales": jnp.zeros((2, 16))}, r"a_scales is float32\[2, 16\], should be float32\[16, 2\]"),
        ({"b_scales": jnp.zeros((64, 2))}, r"b_scales is float32\[64, 2\], should be float32\[1, 2\]"),
        ({"b_scales": jnp.zeros((1, 2), jnp.bfloat16)}, "b_scales is bfloat16"),
        ({"impl": "triton"}, "no implementation 'triton'"),
        ({"impl": "mosaic"}, "need a Hopper GPU"),
        ({"impl": "interpret", "out_dtype": jnp.float16}, "not float16"),
        ({"impl": "interpret", "num_sms": 0}, "num_sms = 0"),
        ({"impl": "interpret", "config": Config(warpgroups=4)}, "1 to 3 warpgroups"),
        ({"impl": "interpret", "config": Config(stages=9)}, "shared memory"),
        ({"impl": "interpret", "config": Config(tile_n=192, store_n=128)}, "store_n should divide 64"),
        ({"impl": "interpret", "config": Config(cluster="n"), "num_sms": 1}, "needs 2 SMs"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        scaled.scaled_matmul(**_dense_arguments() | change)


def test_grouped_arguments_that_do_not_fit_are_refused():
    x, w = tiles(_normal(0, 256, 128)), blocks(_normal(1, 2, 64, 128))
    with pytest.raises(ValueError, match="one entry per 128 rows"):
        scaled.grouped_scaled_matmul(*x, *w, jnp.zeros(8, jnp.int32), impl="interpret")
    with pytest.raises(ValueError, match="no cluster along m"):
        config = Config(cluster="m")
        scaled.grouped_scaled_matmul(*x, *w, jnp.zeros(2, jnp.int32), impl="interpret", config=config)
    with pytest.raises(ValueError, match="counts"):
        masked = tiles(_normal(0, 2, 8, 128))
        scaled.masked_scaled_matmul(*masked, *w, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"into is float32\[2, 64, 8\], should be float32\[2, 8, 64\]"):
        dy_t, x_t = tiles(_normal(0, 8, 128)), tiles(_normal(0, 64, 128))
        scaled.grouped_scaled_wgrad(*dy_t, *x_t, jnp.zeros(2, jnp.int32), into=jnp.zeros((2, 64, 8)))
    with pytest.raises(ValueError, match="100 rows, should be a multiple of 128"):
        dy_t, x_t = tiles(_normal(0, 8, 100)), tiles(_normal(0, 64, 100))
        scaled.grouped_scaled_wgrad(*dy_t, *x_t, jnp.zeros(2, jnp.int32))
    rows, matrices = jnp.zeros((128, 64)), jnp.zeros((2, 64, 128))
    with pytest.raises(ValueError, match="contract = 0"):
        sixteen_bits.grouped_matmul(rows, matrices, jnp.zeros(1, jnp.int32), contract=0)
    with pytest.raises(ValueError, match="width of axis 2"):
        sixteen_bits.grouped_matmul(rows, matrices, jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="the kernel needs bfloat16"):
        sixteen_bits.grouped_matmul(rows, matrices, jnp.zeros(1, jnp.int32), contract=1, impl="interpret")
    with pytest.raises(ValueError, match="equally many rows"):
        sixteen_bits.grouped_wgrad(rows, jnp.zeros((256, 8)), jnp.zeros(2, jnp.int32))
