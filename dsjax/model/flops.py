"""What a model weighs and what its training costs, as arithmetic on its sizes; and what devices can do.

Model FLOPs utilisation (MFU) is `training_flops_per_token * tokens per second / peak FLOP per second`.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; a router's biases are counted where it has them, as the published figures do."""

    main: int
    """Embedding, layers, final norm and head."""
    active: int
    """Those of `main` that one token uses, the whole embedding and head included."""
    mtp: int
    """The MTP modules, without the embedding and the head that they share with the main model."""
    released: int
    """A released file, in which every MTP module comes with a copy of the embedding and of the head."""


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Return the exact numbers of parameters of a model."""
    c, depth = config, config.num_nextn_predict_layers
    norms = 2 * c.hidden_size
    latent_norms = c.q_lora_rank + c.kv_lora_rank
    bias = c.n_routed_experts if c.topk_method == "noaux_tc" else 0
    attention = _attention_weights(c) + latent_norms + norms
    dense = attention + 3 * c.hidden_size * c.intermediate_size
    moe = attention + _moe_weights(c, c.n_routed_experts) + bias
    moe_active = attention + _moe_weights(c, c.num_experts_per_tok) + bias
    vocabulary = c.vocab_size * c.hidden_size
    edges = 2 * vocabulary + c.hidden_size
    n_dense, n_moe = c.first_k_dense_replace, c.num_hidden_layers - c.first_k_dense_replace
    main = edges + n_dense * dense + n_moe * moe
    mtp = depth * (moe + 2 * c.hidden_size**2 + 3 * c.hidden_size)
    return ParameterCount(
        main=main,
        active=edges + n_dense * dense + n_moe * moe_active,
        mtp=mtp,
        released=main + mtp + depth * 2 * vocabulary,
    )


def training_flops_per_token(config: ModelConfig, sequence_length: int, *, mtp: bool = True) -> float:
    """Return the FLOPs that training on one token needs, attention counted as causal.

    These are the matrix products of the mathematics: 2 FLOPs per weight forward, and twice that backward. The
    embedding is a lookup; norms, the choice of experts and anything computed twice to save memory do not count.
    Query i of a sequence sees i keys, (S + 1) / 2 on average. DeepSeek-V3 at 4096: 250.46 GFLOP, with MTP 260.65.

    Args:
        config: the model.
        sequence_length: tokens of a training sequence.
        mtp: whether the MTP modules that the model has are trained too.
    """
    c = config
    depth = c.num_nextn_predict_layers if mtp else 0
    layers = c.num_hidden_layers + depth
    dense, moe, module, head = work_of_parts(c)
    main_layers = c.num_hidden_layers - c.first_k_dense_replace
    weights = c.first_k_dense_replace * dense + main_layers * moe + depth * module + head
    head = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    attention = layers * c.num_attention_heads * head * (sequence_length + 1) / 2
    return 6.0 * (weights + attention)


def work_of_parts(config: ModelConfig) -> tuple[int, int, int, int]:
    """Return the weights that a token multiplies in a dense layer, in an MoE layer, in an MTP module and in the head.

    An MTP module is one with the head, which it uses once more.
    """
    c, attention, head = config, _attention_weights(config), config.vocab_size * config.hidden_size
    dense = attention + 3 * c.hidden_size * c.intermediate_size
    moe = attention + _moe_weights(c, c.num_experts_per_tok)
    return dense, moe, moe + 2 * c.hidden_size**2 + head, head


def _attention_weights(c: ModelConfig) -> int:
    """Entries of the matrices of multi-head latent attention."""
    heads, query = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
    q = c.q_lora_rank * (c.hidden_size + heads * query) if c.q_lora_rank else c.hidden_size * heads * query
    kv_a = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim)
    kv_b = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    return q + kv_a + kv_b + heads * c.v_head_dim * c.hidden_size


def _moe_weights(c: ModelConfig, routed: int) -> int:
    """Entries of the router and of the shared and `routed` routed experts of a layer."""
    return (
        c.n_routed_experts * c.hidden_size + (routed + c.n_shared_experts) * 3 * c.hidden_size * c.moe_intermediate_size
    )


_PEAK_TFLOPS = {
    "a100": 312,
    "h100": 989,
    "h100 pcie": 756,
    "h100 nvl": 835,
    "h200": 989,
    "h800": 989,
    "b200": 2250,
    "tpu v4": 275,
    "tpu v5 lite": 197,
    "tpu v5e": 197,
    "tpu v5": 459,
    "tpu v5p": 459,
    "tpu v6 lite": 918,
    "tpu v6e": 918,
}
"""Dense BF16 TFLOP/s of the makers' data sheets, by words of the device's name in JAX."""


def peak(device: jax.Device) -> tuple[float | None, str]:
    """Return the FLOP/s that MFU is a share of, and words that say which figure that is.

    None, with the reason, for an accelerator whose data sheet is not known: a made-up peak would be a made-up MFU.
    """
    if device.platform == "cpu":
        flops = cpu_peak_flops()
        return flops, f"{flops / 1e9:.0f} GFLOP/s, float32, measured on this CPU at start"
    flops = peak_flops(device.device_kind)
    if flops is None:
        return None, f"no MFU: the peak of {device.device_kind!r} is not known"
    return flops, f"{flops / 1e12:.0f} TFLOP/s, dense BF16, data sheet of {device.device_kind}"


def peak_flops(device_kind: str) -> float | None:
    """Return the dense BF16 FLOP/s of a device by its `jax.Device.device_kind`; None where no data sheet is known."""
    words = f" {device_kind.lower().replace('-', ' ')} "
    known = [name for name in _PEAK_TFLOPS if f" {name} " in words]
    return _PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def cpu_peak_flops(size: int = 512, seconds: float = 0.2) -> float:
    """Return the float32 FLOP/s of this process' CPU device, measured: the best of repeated square matrix products.

    A CPU's clock and vector units are not in its name, so what its own BLAS reaches stands for the peak.

    Args:
        size: rows and columns of the matrices.
        seconds: how long to repeat.
    """
    device = jax.local_devices(backend="cpu")[0]
    x = jax.device_put(np.ones((size, size), np.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
