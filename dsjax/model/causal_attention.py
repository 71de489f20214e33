"""Causal attention of every head over its sequence: softmax(scale * q k^T) v, each position seeing those up to its own.

`causal_attention` picks an implementation; `plain` is the definition that all others must equal. Heads of multi-head
latent attention have wider queries and keys (192 in V3) than values (128), which not every kernel can do.

Dimensions: B batch, S positions, H heads, dk width of queries and keys, dv width of values.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PyTree

from dsjax.config import AttentionKernel
from dsjax.runtime import target_platform

SMALLEST_BLOCK = 64
"""Queries of a block in short sequences; fewer make products too small for a CPU."""
HIDDEN = -1e30
"""Added to the score of a key that a query must not see; finite, so that no difference of two of them is NaN."""


def resolve(impl: AttentionKernel, platform: str, dtype: DTypeLike = jnp.bfloat16) -> AttentionKernel:
    """The implementation that `impl` means on `platform` ("cpu", "gpu", "tpu", as `runtime.target_platform` says).

    `auto` is cuDNN on NVIDIA for 16-bit inputs, splash attention on TPU, and blocks of plain XLA elsewhere.

    Raises:
        ValueError: no such implementation, or one that cannot run there.
    """
    if impl not in get_args(AttentionKernel):
        raise ValueError(f"attention: no implementation {impl!r}; there are {', '.join(get_args(AttentionKernel))}")
    sixteen_bits = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if impl == "auto":
        return {"gpu": "cudnn" if sixteen_bits else "chunked", "tpu": "splash"}.get(platform, "chunked")
    if impl == "cudnn" and not (platform == "gpu" and sixteen_bits):
        raise ValueError(
            f"kernels.attention = 'cudnn' needs an NVIDIA GPU and bfloat16 or float16 inputs, not {platform} with "
            f"{jnp.dtype(dtype).name}; 'chunked' runs everywhere"
        )
    if impl == "splash" and platform != "tpu":
        raise ValueError(f"kernels.attention = 'splash' needs a TPU, not {platform}; 'chunked' runs everywhere")
    if impl == "tokamax" and importlib.util.find_spec("tokamax") is None:
        raise ValueError(
            "kernels.attention = 'tokamax' needs the package tokamax, which is not installed; 'auto' runs everywhere"
        )
    return impl


def causal_attention(
    q: Float[Array, "B S H dk"],
    k: Float[Array, "B S H dk"],
    v: Float[Array, "B S H dv"],
    *,
    scale: float,
    segments: Int32[Array, "B S"] | None = None,
    impl: AttentionKernel = "auto",
) -> Float[Array, "B S H dv"]:
    """Attend to all positions up to one's own; with `segments`, only to those of the same segment (document).

    Softmax is in float32 whatever the type of the inputs, which the result has too.

    Raises:
        ValueError: no such implementation, or one that cannot run on this process' default backend.
    """
    match resolve(impl, target_platform(), q.dtype):
        case "chunked":
            return chunked(q, k, v, segments, scale)  # names what it keeps itself
        case "plain":
            out = plain(q, k, v, scale, segments)
        case "cudnn":
            out = cudnn(q, k, v, scale, segments)
        case "splash":
            out = splash(q, k, v, scale, segments)
        case "tokamax":
            out = tokamax(q, k, v, scale, segments)
    return checkpoint_name(out, "attention_out")


def plain(q: Array, k: Array, v: Array, scale: float, segments: Array | None = None) -> Array:
    """The definition, all S x S probabilities at once."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    probabilities = jax.nn.softmax(scores + _bias(0, q.shape[1], segments), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(v.dtype), v)


def block_size(length: int) -> int:
    """Queries per block of `chunked`: at most 16 blocks, because each is compiled."""
    return max(1, -(-length // (16 * SMALLEST_BLOCK))) * SMALLEST_BLOCK


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked(q: Array, k: Array, v: Array, segments: Array | None, scale: float) -> Array:
    """Blocks of queries, each against the keys up to its end, so that the masked half is mostly not computed.

    Keeps the output and the logarithm of the softmax's denominator; the backward pass makes the probabilities again,
    block by block (FlashAttention, arXiv 2205.14135, algorithm 4). They exist for one sixteenth of the queries at once.
    """
    return chunked_forward(q, k, v, segments, scale)[0]


def chunked_forward(
    q: Array, k: Array, v: Array, segments: Array | None, scale: float
) -> tuple[Float[Array, "B S H dv"], Float[Array, "B H S 1"]]:
    """Return the output and the logarithm of the softmax's denominator."""
    queries, keys, values = _head_rows(q * scale), _head_columns(k), _head_rows(v)
    parts = []
    for begin, end in _blocks(q.shape[1]):
        queries = _after(parts, queries)
        scores = _dot("bhqd,bhdk->bhqk", queries[:, :, begin:end], keys[..., :end]) + _bias(begin, end, segments)
        largest = scores.max(-1, keepdims=True)
        exponentials = jnp.exp(scores - largest)
        denominator = exponentials.sum(-1, keepdims=True)
        out = _dot("bhqk,bhkd->bhqd", exponentials.astype(v.dtype), values[:, :, :end]) / denominator
        parts.append((out.astype(v.dtype), largest + jnp.log(denominator)))
    out, lse = (jnp.concatenate(blocks, 2) for blocks in zip(*parts, strict=True))
    return _from_head_rows(out), checkpoint_name(lse, "attention_lse")


def chunked_backward(
    q: Array, k: Array, v: Array, segments: Array | None, out: Array, lse: Array, dout: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Return the gradients of `q`, `k` and `v`."""
    # A product that contracts over rows would copy its S x S operand transposed; so the narrow one comes as columns.
    queries, query_columns = _head_rows(q * scale), _head_columns(q * scale)
    key_rows, key_columns, value_columns = _head_rows(k), _head_columns(k), _head_columns(v)
    dout_rows, dout_columns = _head_rows(dout), _head_columns(dout)
    dot_of_outs = (dout.astype(jnp.float32) * out).sum(-1).swapaxes(1, 2)[..., None]
    parts = []
    for begin, end in _blocks(q.shape[1]):
        queries, dout_rows = _after(parts, (queries, dout_rows))
        scores = _dot("bhqd,bhdk->bhqk", queries[:, :, begin:end], key_columns[..., :end]) + _bias(begin, end, segments)
        p = jnp.exp(scores - lse[:, :, begin:end])
        dp = _dot("bhqd,bhdk->bhqk", dout_rows[:, :, begin:end], value_columns[..., :end])
        dscores = (p * (dp - dot_of_outs[:, :, begin:end])).astype(q.dtype)
        dq = _dot("bhqk,bhkd->bhqd", dscores, key_rows[:, :, :end]) * scale
        dk = _dot("bhdq,bhqk->bhdk", query_columns[..., begin:end], dscores)
        dv = _dot("bhdq,bhqk->bhdk", dout_columns[..., begin:end], p.astype(v.dtype))
        parts.append((dq, dk, dv))
    dq, dk, dv = zip(*parts, strict=True)
    dq, dk, dv = _from_head_rows(jnp.concatenate(dq, 2)), *(_from_head_columns(_sum_prefixes(d)) for d in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _chunked_forward(q, k, v, segments, scale):
    out, lse = chunked_forward(q, k, v, segments, scale)
    out = checkpoint_name(out, "attention_out")
    return out, (q, k, v, segments, out, lse)


chunked.defvjp(_chunked_forward, lambda scale, kept, dout: (*chunked_backward(*kept, dout, scale), None))


def cudnn(q: Array, k: Array, v: Array, scale: float, segments: Array | None = None) -> Array:
    """cuDNN's flash attention: NVIDIA Ampere and later, 16-bit; for narrow values Hopper and cuDNN 9.10."""
    # jax.nn.dot_product_attention(implementation="cudnn") calls this function too, but only if values are as wide as
    # queries; padding them to 192 would cost a fifth more operations.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    return dot_product_attention(q, k, v, mask=mask, scale=scale, mask_type=MaskType.CAUSAL)


def tokamax(q: Array, k: Array, v: Array, scale: float, segments: Array | None = None) -> Array:
    """The kernel that the package tokamax chooses for this device."""
    from tokamax import dot_product_attention

    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    return dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True)


def splash(
    q: Array, k: Array, v: Array, scale: float, segments: Array | None = None, *, interpret: bool = False
) -> Array:
    """JAX's flash attention kernel for TPU; sequences are padded to its blocks, which no earlier position sees."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernel

    length, heads = q.shape[1], q.shape[2]
    padded = -(-length // 128) * 128
    block = max(b for b in (128, 256, 512) if padded % b == 0)
    attend = kernel.make_splash_mha_single_device(
        kernel.MultiHeadMask([kernel.CausalMask((padded, padded))] * heads),
        block_sizes=kernel.BlockSizes(*[block] * 8),
        interpret=interpret,
    )
    q, k, v = (jnp.pad(a, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2) for a in (q * scale, k, v))
    if segments is None:
        segments = jnp.zeros((q.shape[0], length), jnp.int32)
    segments = jnp.pad(segments, ((0, 0), (0, padded - length)), constant_values=-1)
    out = jax.vmap(attend)(q, k, v, kernel.SegmentIds(segments, segments))
    return out.swapaxes(1, 2)[:, :length]


def _blocks(length: int) -> list[tuple[int, int]]:
    size = block_size(length)
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _after(parts: list, x: PyTree) -> PyTree:
    """`x`, but not before the last part is there: XLA would run long blocks side by side and hold all probabilities."""
    if parts and parts[0][0].shape[2] > SMALLEST_BLOCK:
        x, parts[-1] = lax.optimization_barrier((x, parts[-1]))
    return x


def _bias(begin: int, end: int, segments: Array | None) -> Float[Array, "#B 1 q k"]:
    """0 where the queries begin..end see the keys 0..end, `HIDDEN` where they do not."""
    # A constant and not two iotas: adding one is as fast as reading it, comparing is not (on a CPU, half of the exp).
    causal = np.where(np.arange(begin, end)[:, None] >= np.arange(end), 0, HIDDEN).astype(np.float32)[None, None]
    if segments is None:
        return jnp.asarray(causal)
    return jnp.where(segments[:, None, begin:end, None] == segments[:, None, None, :end], causal, HIDDEN)


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _head_rows(x: Array) -> Array:
    """[B, S, H, d] -> [B, H, S, d]"""
    return x.transpose(0, 2, 1, 3)


def _head_columns(x: Array) -> Array:
    """[B, S, H, d] -> [B, H, d, S]"""
    return x.transpose(0, 2, 3, 1)


def _from_head_rows(x: Array) -> Array:
    return x.transpose(0, 2, 1, 3)


def _from_head_columns(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2)


def _sum_prefixes(parts: Sequence[Array]) -> Array:
    """Sum arrays [..., n] of growing n, each missing zeros at its end."""
    length = parts[-1].shape[-1]
    padded = [lax.pad(p, jnp.zeros((), p.dtype), [(0, 0, 0)] * 3 + [(0, length - p.shape[-1], 0)]) for p in parts]
    return sum(padded[1:], padded[0])
