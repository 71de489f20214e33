"""Every implementation of causal attention that can run here, against the plain one in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model import causal_attention as module
from dsjax.model.causal_attention import causal_attention, chunked, cudnn, plain, resolve, splash

SCALE = 0.3


def inputs(length, batch=2, heads=3, dk=12, dv=8, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    shapes = [(batch, length, heads, d) for d in (dk, dk, dv, dv)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def documents(length, batch=2):
    """Segment ids that change at different places in each row, numbered from anywhere and not in order."""
    borders = np.random.default_rng(0).random((batch, length)) < 4 / length
    return jnp.asarray((7 - borders.cumsum(1)) % 5, jnp.int32)


def value_and_gradients(attend, q, k, v, dout):
    out, transpose = jax.vjp(attend, q, k, v)
    return out, *transpose(dout)


def expected(q, k, v, dout, segments):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in (q, k, v, dout)]
        return [np.asarray(a) for a in value_and_gradients(lambda q, k, v: plain(q, k, v, SCALE, segments), *wide)]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("length", [1, 5, 65, 200, 520])
@pytest.mark.parametrize("impl", ["plain", "chunked"])
def test_equals_the_definition(impl, length, masked):
    arguments = inputs(length, heads=3 if length < 500 else 1)
    segments = documents(length) if masked else None
    got = jax.jit(
        lambda *a: value_and_gradients(
            lambda q, k, v: causal_attention(q, k, v, scale=SCALE, segments=segments, impl=impl), *a
        )
    )(*arguments)
    for a, b in zip(got, expected(*arguments, segments), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_definition_in_numpy():
    """A loop over positions, with the mask in words: same sequence, not later, same document."""
    q, k, v, _ = (np.asarray(a, np.float64) for a in inputs(9))
    segments = np.asarray(documents(9))
    out = np.zeros(v.shape)
    for b, i, h in np.ndindex(2, 9, 3):
        seen = [j for j in range(i + 1) if segments[b, j] == segments[b, i]]
        weights = np.exp([SCALE * q[b, i, h] @ k[b, j, h] for j in seen])
        out[b, i, h] = (weights / weights.sum()) @ v[b, seen, h]
    np.testing.assert_allclose(plain(*inputs(9)[:3], SCALE, documents(9)), out, atol=1e-5)


@pytest.mark.parametrize("impl", ["plain", "chunked"])
def test_bfloat16_has_a_float32_softmax(impl):
    """Sums over 300 keys are right to bfloat16's last place, not to the sum of so many roundings."""
    q, k, v, dout = inputs(300, batch=1, heads=1, dtype=jnp.bfloat16)
    got = value_and_gradients(lambda q, k, v: causal_attention(q, k, v, scale=SCALE, impl=impl), q, k, v, dout)
    assert all(a.dtype == jnp.bfloat16 for a in got)
    for a, b in zip(got, expected(q, k, v, dout, None), strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) < 8e-3 * np.linalg.norm(b)


def test_large_scores_do_not_overflow():
    q, k, v, dout = inputs(130)
    got = value_and_gradients(lambda q, k, v: chunked(q, k, v, None, 1.0), 100 * q, k, v, dout)
    assert all(np.isfinite(a).all() for a in got)


def test_long_sequences_never_hold_all_probabilities():
    """What the compiled program needs stays below the S x S probabilities of one head, let alone their gradients."""
    length = 4096
    shapes = [jax.ShapeDtypeStruct((1, length, 1, d), jnp.float32) for d in (12, 12, 8, 8)]
    program = jax.jit(lambda *a: value_and_gradients(lambda q, k, v: chunked(q, k, v, None, 1.0), *a)).lower(*shapes)
    assert program.compile().memory_analysis().temp_size_in_bytes < 0.5 * 4 * length**2


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "documents"])
def test_splash_in_the_interpreter(masked):
    arguments = inputs(200, heads=2, dk=192, dv=128)
    segments = documents(200) if masked else None
    out = splash(*arguments[:3], 0.05, segments, interpret=True)
    np.testing.assert_allclose(out, plain(*arguments[:3], 0.05, segments), atol=2e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "documents"])
def test_cudnn_takes_the_shapes_of_v3(masked, monkeypatch):
    """Without a GPU the kernel cannot run, but jax checks shapes and types, values narrower than queries included."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    arguments = inputs(128, heads=2, dk=192, dv=128, dtype=jnp.bfloat16)
    segments = documents(128) if masked else None
    shapes = jax.eval_shape(
        lambda *a: value_and_gradients(lambda q, k, v: cudnn(q, k, v, SCALE, segments), *a), *arguments
    )
    assert [s.shape for s in shapes] == [arguments[i].shape for i in (3, 0, 1, 2)]


def test_resolve():
    assert resolve("auto", "cpu") == "chunked"
    assert resolve("auto", "gpu", jnp.bfloat16) == "cudnn"
    assert resolve("auto", "gpu", jnp.float32) == "chunked"
    assert resolve("auto", "tpu") == "splash"
    assert resolve("plain", "gpu") == "plain"
    for impl, platform, words in [
        ("flash", "cpu", "no implementation 'flash'"),
        ("cudnn", "cpu", "NVIDIA GPU"),
        ("splash", "gpu", "needs a TPU"),
    ]:
        with pytest.raises(ValueError, match=words):
            resolve(impl, platform)
    with pytest.raises(ValueError, match="float32; 'chunked' runs everywhere"):
        resolve("cudnn", "gpu", jnp.float32)


def test_missing_tokamax(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        resolve("tokamax", "gpu")
