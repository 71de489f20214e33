"""Rotary position embedding in the released checkpoints' interleaved convention, and YaRN."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig, YarnConfig


def frequencies(config: ModelConfig) -> np.ndarray:
    """Return the angle per position of each pair of RoPE dimensions: float32[qk_rope_head_dim / 2], in radians."""
    width, theta = config.qk_rope_head_dim, config.rope_theta
    plain = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if config.rope_scaling is None:
        return plain.astype(np.float32)
    yarn = config.rope_scaling
    low, high = _correction_range(yarn, width, theta)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
    return (plain / yarn.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def _correction_range(yarn: YarnConfig, width: int, theta: float) -> tuple[int, int]:
    """Return the first pair that YaRN slows down and the first that it slows down fully."""

    def pair_with(rotations: float) -> float:
        context = yarn.original_max_position_embeddings
        return width * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = math.floor(pair_with(yarn.beta_fast)), math.ceil(pair_with(yarn.beta_slow))
    return max(low, 0), min(high, width - 1)


def mscale(factor: float, weight: float) -> float:
    """Return YaRN's length correction 0.1 * weight * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Return the factor on attention scores: (query width)^-0.5, times mscale^2 under YaRN."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    yarn = config.rope_scaling
    if yarn is None or not yarn.mscale_all_dim:
        return scale
    return scale * mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def rotation(
    config: ModelConfig, positions: Int[Array, "*batch S"]
) -> tuple[Float[Array, "*batch S half"], Float[Array, "*batch S half"]]:
    """Return cos and sin of every position's angles, float32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(config)
    length = 1.0
    if (yarn := config.rope_scaling) is not None:
        length = mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    return jnp.cos(angles) * length, jnp.sin(angles) * length


def rotate(
    x: Float[Array, "*batch S H rope"], cos: Float[Array, "*#batch S half"], sin: Float[Array, "*#batch S half"]
) -> Float[Array, "*batch S H rope"]:
    """Turn each pair (x[2i], x[2i+1]) by its angle; computed in float32, returned in x's format."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = cos[..., None, :], sin[..., None, :]
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
