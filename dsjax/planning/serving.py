"""What a deployment will cost: memory of each device, and how fast it reads prompts or writes answers.

Memory of weights and of the cache is exact: it is that of the shapes that the engine makes, divided as it divides them.
Times are estimates from published rates of an H800: DeepSeek's training profile (`planning.rates`) for long passes;
for decoding, FlashMLA's and DeepEP's own figures and the memory's bandwidth. Two micro-batches hide communication
behind computing; with one, they follow each other. A device does as much as the fullest one, so experts are taken to be
in balance.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.inference.cache import bytes_per_page
from dsjax.inference.deployment import Deployment
from dsjax.inference.layout import weight_spec
from dsjax.inference.weights import arranged, first_placement, moe_layers
from dsjax.model.layout import stack
from dsjax.model.transformer import abstract_parameters
from dsjax.parallel.xla_flags import MEMORY_SHARE
from dsjax.planning.chips import CHIPS, Chip, ChipName
from dsjax.planning.rates import attention_weights, core_flops, nodes_of_token, published, row_bytes

LATENT_FLOPS, LATENT_BANDWIDTH = 660e12, 3000e9
"""Of attention over latents in decoding: FlashMLA's published rates on an H800, bound by products and by memory."""
DIRECT = {8: (98e9, 127e9), 16: (63e9, 74e9), 32: (48e9, 53e9), 64: (43e9, 46e9), 128: (39e9, 39e9), 256: (39e9, 40e9)}
"""Bytes per second that a device sends by a direct dispatch and combine of 128 tokens, by devices: DeepEP's published
low-latency figures on H800."""
SMALL_PRODUCTS = 0.5
"""Share of the peak that products of a hundred rows per expert are taken to reach where memory does not bound them: an
assumption."""
SIZES_OF_V3 = {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
}
"""Of the models that DeepSeek's published figures are of."""


@dataclass(frozen=True)
class ServingReport:
    """A deployment on a chip; bytes and seconds of one device."""

    deployment: Deployment
    chip: Chip
    memory: dict[str, int]
    """By what it is for."""
    parts: dict[str, float]
    """Seconds of a layer's parts, of all tokens of a pass."""
    pass_seconds: float
    """Of a pass over all layers."""
    tokens: int
    """That a device's share of a pass has."""
    published: str
    """What is known of the real thing; empty for models of another size."""

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.chip.memory_bytes * MEMORY_SHARE

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens / self.pass_seconds


def report_of_serving(deployment: Deployment, chip: ChipName) -> ServingReport:
    """Return what a deployment costs on a chip."""
    on, decodes = CHIPS[chip], deployment.work == "decode"
    parts = (_decode_parts if decodes else _prefill_parts)(deployment, on)
    seconds = parts["computing"], parts["dispatch"] + parts["combine"]
    together = max(seconds) if deployment.layout.micro_batches == 2 else sum(seconds)
    total = moe_layers(deployment.model) * together + parts.pop("dense layers and head")
    return ServingReport(deployment, on, _memory(deployment), parts, total, _tokens(deployment), _known(deployment))


def _tokens(deployment: Deployment) -> int:
    engine, layout = deployment.engine, deployment.layout
    if deployment.work == "decode":
        return engine.slots // layout.devices
    return engine.prefill_tokens // layout.tensor


def weight_bytes(deployment: Deployment) -> dict[str, int]:
    """Return what weights take on each device, by what they are for: exactly what the engine's arrays do."""
    model, layout = deployment.served, deployment.layout
    params, _ = abstract_parameters(model)
    held = first_placement(model, layout).expert_of_slot
    arrange = partial(
        arranged, config=model, layout=layout, held=held, dtype=jnp.bfloat16, fp8=deployment.precision == "fp8"
    )
    found = dict.fromkeys(("experts", "attention", "other weights"), 0)
    shapes = jax.eval_shape(arrange, stack(params, model))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = [getattr(key, "key", "") for key in path]
        kind = "experts" if "experts" in names else "attention" if "attention" in names else "other weights"
        parts = _parts(weight_spec(path), layout)
        found[kind] += leaf.size * leaf.dtype.itemsize // parts
    return found


def _parts(spec: Any, layout: Any) -> int:
    axes = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    parts = 1
    for axis in axes:
        parts *= getattr(layout, axis)
    return parts


def _memory(deployment: Deployment) -> dict[str, int]:
    model, layout, engine = deployment.served, deployment.layout, deployment.engine
    needed = -(-(engine.context or 4096) // engine.page_size) * engine.slots // layout.groups + 1
    page = bytes_per_page(model, engine.page_size, jnp.bfloat16, engine.cache_format)
    pages = engine.cache_bytes // page if engine.cache_bytes else needed
    tokens = _tokens(deployment) // layout.micro_batches
    sent = row_bytes(model, "dispatch", fp8=deployment.precision == "fp8") + row_bytes(model, "combine", fp8=False)
    if deployment.work == "decode":
        buffers = layout.devices * tokens * sent
    else:
        buffers = tokens * (nodes_of_token(model, layout.node) + model.num_experts_per_tok) * sent
    return weight_bytes(deployment) | {
        "latent cache": pages * page,
        "communication buffers (estimate)": layout.micro_batches * buffers,
    }


def _decode_parts(deployment: Deployment, chip: Chip) -> dict[str, float]:
    model, layout, engine = deployment.model, deployment.layout, deployment.engine
    tokens, weights = _tokens(deployment), weight_bytes(deployment)
    layers, faster = model.num_hidden_layers, _relative_to_h800(chip)
    peak = chip.fp8_flops if deployment.precision == "fp8" and chip.fp8_flops else chip.bf16_flops
    of_group, context = tokens * layout.tensor, engine.context or 4096
    heads = model.num_attention_heads // layout.tensor
    width = model.kv_lora_rank + model.qk_rope_head_dim
    latent_flops = 2 * of_group * context * heads * (width + model.kv_lora_rank)
    page = bytes_per_page(model, engine.page_size, jnp.bfloat16, engine.cache_format)
    read = of_group * context * page / engine.page_size / layers

    def products(flops: float, nbytes: float) -> float:
        return max(flops / (SMALL_PRODUCTS * peak), nbytes / chip.memory_bandwidth)

    core = max(latent_flops / (LATENT_FLOPS * faster["flops"]), read / (LATENT_BANDWIDTH * faster["memory"]))
    projections = products(2 * attention_weights(model) * tokens, weights["attention"] / layers)
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    chosen = model.num_experts_per_tok + model.n_shared_experts
    experts = products(2 * expert * chosen * tokens, weights["experts"] / moe_layers(model))
    size = min(DIRECT, key=lambda devices: abs(devices - layout.devices))
    rows = tokens * (model.num_experts_per_tok + layout.shared_as_routed)
    dispatch, combine = (rate * faster["network"] for rate in DIRECT[size])
    fp8 = deployment.precision == "fp8"
    head = products(2 * model.vocab_size * model.hidden_size * tokens, 2 * model.vocab_size * model.hidden_size)
    dense = 3 * model.hidden_size * model.intermediate_size
    first = products(2 * dense * tokens, dense * (1 if fp8 else 2)) + core + projections
    return {
        "attention over latents": core,
        "attention projections": projections,
        "experts": experts,
        "computing": core + projections + experts,
        "dispatch": rows * row_bytes(model, "dispatch", fp8=fp8) / dispatch,
        "combine": rows * row_bytes(model, "combine", fp8=fp8) / combine,
        "dense layers and head": model.first_k_dense_replace * first + head,
    }


def _prefill_parts(deployment: Deployment, chip: Chip) -> dict[str, float]:
    model, layout, engine = deployment.model, deployment.layout, deployment.engine
    fp8, tokens = deployment.precision == "fp8", _tokens(deployment)
    rates = published(chip, fp8)
    context = engine.context or 4096
    # The profile's rates are of 112 of 132 multiprocessors; here all compute.
    share = rates.computing_share
    core = core_flops(model, context) * tokens / rates.core["attention_forward"] * share
    projections = 2 * attention_weights(model) * tokens / rates.linear["attention_forward"] * share
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    chosen = model.num_experts_per_tok + model.n_shared_experts
    experts = 2 * expert * chosen * tokens / rates.linear["mlp_forward"] * share
    rows = tokens * (nodes_of_token(model, layout.node) if layout.node > 1 else model.num_experts_per_tok)
    alone = rates.alone if layout.node > 1 else rates.in_node
    dense = 2 * 3 * model.hidden_size * model.intermediate_size * tokens / rates.linear["mlp_forward"] * share
    return {
        "attention": core,
        "attention projections": projections,
        "experts": experts,
        "computing": core + projections + experts,
        "dispatch": rows * row_bytes(model, "dispatch", fp8=fp8) / alone[0],
        "combine": rows * row_bytes(model, "combine", fp8=fp8) / alone[1],
        "dense layers and head": model.first_k_dense_replace * (core + projections + dense),
    }


def _relative_to_h800(chip: Chip) -> dict[str, float]:
    h800 = CHIPS["h800"]
    return {
        "flops": chip.bf16_flops / h800.bf16_flops,
        "memory": chip.memory_bandwidth / h800.memory_bandwidth,
        "network": chip.network_bandwidth / h800.network_bandwidth,
    }


def _known(deployment: Deployment) -> str:
    if any(getattr(deployment.model, name) != size for name, size in SIZES_OF_V3.items()):
        return ""
    if deployment.work == "decode":
        return "DeepSeek's service, mean of a day: 1,850 tokens/s written per H800 (14.8k per node), 20 to 22 per user"
    return "DeepSeek's service, mean of a day: 4,000 tokens/s read per H800 (73.7k per node with 56 % cache hits)"
