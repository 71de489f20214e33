"""Kernels of DeepSeek-V3's shapes, lowered for CUDA: layouts, shared memory and TMA's alignments are checked there."""

import jax
import jax.numpy as jnp
import pytest

from dsjax.pallas.matmul.scaled import (
    grouped_scaled_matmul,
    grouped_scaled_wgrad,
    masked_scaled_matmul,
    scaled_matmul,
)
from dsjax.pallas.matmul.sixteen_bits import grouped_matmul, grouped_wgrad
from dsjax.runtime import made_for

E4M3, F32, BF16, I32 = jnp.float8_e4m3fn, jnp.float32, jnp.bfloat16, jnp.int32
TOKENS = 4096
GROUPS = 8
ROWS = 8 * TOKENS + GROUPS * 128

DENSE = {
    "queries and keys down": (2112, 7168),
    "queries up": (24576, 1536),
    "keys and values up": (32768, 512),
    "attention output": (7168, 16384),
    "dense gate and up": (36864, 7168),
    "dense down": (7168, 18432),
    "shared gate and up": (4096, 7168),
    "shared down": (7168, 2048),
    "keys and values down": (576, 7168),
    "MTP": (7168, 14336),
}
EXPERTS = {"gate and up": (4096, 7168), "down": (7168, 2048)}


def _scales(rows: int, k: int, of: int = 1) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((-(-rows // of), -(-k // 128)), F32)


def _codes(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, E4M3)


def _lowered(function, *arguments, **options) -> str:
    """Lower for a Hopper GPU and check that "auto" took a kernel."""
    with made_for("gpu"):
        traced = jax.jit(lambda *arrays: function(*arrays, **options)).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    return text


def _dense(m: int, n: int, k: int, rows: int = 128):
    return _codes(m, k), _scales(m, k), _codes(n, k), _scales(n, k, rows)


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    _lowered(scaled_matmul, *_dense(TOKENS, *DENSE[name]))


@pytest.mark.parametrize("name", DENSE)
def test_gradients_of_dense_inputs(name):
    """Widths of 576 and 2112 are no multiples of 128: they are summed over, and padded."""
    n, k = DENSE[name]
    text = _lowered(scaled_matmul, *_dense(TOKENS, k, n))
    assert ("stablehlo.pad" in text) == (n % 128 > 0)


@pytest.mark.parametrize("m", [1, 100])
def test_few_rows(m):
    _lowered(scaled_matmul, *_dense(m, 2112, 7168))


@pytest.mark.parametrize("name", DENSE)
def test_gradients_of_dense_weights(name):
    n, k = DENSE[name]
    _lowered(scaled_matmul, *_dense(n, k, TOKENS, rows=1), rows=1, out_dtype=F32)


def test_shapes_that_are_padded():
    _lowered(scaled_matmul, *_dense(101, 100, 300))
    _lowered(scaled_matmul, *_dense(101, 100, 300, rows=1), rows=1, out_dtype=F32)


def _experts(n: int, k: int):
    return _codes(GROUPS, n, k), jax.ShapeDtypeStruct((GROUPS, -(-n // 128), -(-k // 128)), F32)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("num_sms", [132, 1])
def test_experts(name, num_sms):
    n, k = EXPERTS[name]
    group_of_tile = jax.ShapeDtypeStruct((ROWS // 128,), I32)
    rows = (_codes(ROWS, k), _scales(ROWS, k))
    _lowered(grouped_scaled_matmul, *rows, *_experts(n, k), group_of_tile, num_sms=num_sms)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("places", [32, 300])
def test_experts_in_decoding(name, places):
    n, k = EXPERTS[name]
    rows = (_codes(GROUPS, places, k), jax.ShapeDtypeStruct((GROUPS, places, k // 128), F32))
    _lowered(masked_scaled_matmul, *rows, *_experts(n, k), jax.ShapeDtypeStruct((GROUPS,), I32))


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("adding", [False, True])
def test_gradients_of_experts(name, adding):
    n, k = EXPERTS[name]
    sizes, into = jax.ShapeDtypeStruct((GROUPS,), I32), jax.ShapeDtypeStruct((GROUPS, n, k), F32)
    arrays = (_codes(n, ROWS), _scales(n, ROWS), _codes(k, ROWS), _scales(k, ROWS), sizes)
    if adding:
        _lowered(lambda *a: grouped_scaled_wgrad(*a[:-1], into=a[-1]), *arrays, into)
    else:
        _lowered(grouped_scaled_wgrad, *arrays)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("contract", [1, 2])
def test_experts_in_bf16(name, contract):
    n, k = EXPERTS[name]
    x = jax.ShapeDtypeStruct((ROWS, k if contract == 2 else n), BF16)
    arrays = (x, jax.ShapeDtypeStruct((GROUPS, n, k), BF16), jax.ShapeDtypeStruct((ROWS // 128,), I32))
    _lowered(grouped_matmul, *arrays, contract=contract)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("adding", [False, True])
def test_gradients_of_experts_in_bf16(name, adding):
    n, k = EXPERTS[name]
    arrays = [jax.ShapeDtypeStruct((ROWS, width), BF16) for width in (n, k)]
    arrays.append(jax.ShapeDtypeStruct((GROUPS,), I32))
    if adding:
        into = jax.ShapeDtypeStruct((GROUPS, n, k), F32)
        _lowered(lambda *a: grouped_wgrad(*a[:-1], into=a[-1]), *arrays, into)
    else:
        _lowered(grouped_wgrad, *arrays)


def test_elsewhere_the_definition_is_lowered():
    text = jax.jit(scaled_matmul).lower(*_dense(128, 128, 256)).as_text()
    assert "mosaic" not in text
