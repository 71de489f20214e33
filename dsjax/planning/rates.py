"""How fast the parts of a layer are computed and sent: DeepSeek's published training profile, scaled to other chips.

The profile (github.com/deepseek-ai/profile-data, read kernel by kernel) is of rank 0 of DeepSeek-V3 on H800s with
EP 64, one sequence of 4096 tokens, FP8 and balanced routing, in which a forward pass runs beside a backward pass: 112
of 132 multiprocessors compute and 20 communicate. Dividing the work of each part by its time gives a rate that has
everything in it that goes with the part: casts, norms, the router, notification of peers.
"""

from dataclasses import dataclass

from dsjax.config import ModelConfig
from dsjax.model.flops import work_of_parts
from dsjax.planning.chips import CHIPS, Chip

TOKENS = SEQUENCE = 4096
_SMS = 132
_COMPUTING = 112

MILLISECONDS = {
    "attention_forward": 4.37,
    "attention_input": 9.34,
    "attention_weight": 2.39,
    "mlp_forward": 4.60,
    "mlp_input": 5.31,
    "mlp_weight": 3.54,
}
"""Computing, per layer; `input` and `weight` are the parts of the backward pass."""
CORE_MILLISECONDS = {"attention_forward": 1.20, "attention_input": 3.86}
"""Of them, softmax(q k^T) v."""
EXCHANGE_MILLISECONDS = {"dispatch": 6.69, "combine": 8.68, "combine_backward": 5.77, "dispatch_backward": 7.49}
"""Communicating, per layer; the combine of the backward pass sends in FP8, as dispatch does, the others in BF16."""
PAIR_MILLISECONDS = 32.25
"""Wall time of a layer's forward pass beside one's backward pass: more than 29.6 of computing alone."""
ALONE = {"nodes": (51e9, 50e9), "node": (153e9, 158e9)}
"""Bytes per second that a device gets from a dispatch and a combine with nothing beside them, over nodes (EP 64) and
inside of one (EP 8): DeepEP's published figures on H800."""
HEAD_SHARE = 0.6
"""Share of the BF16 peak that the products of the head are taken to reach: an assumption."""
BF16_SHARE = 0.75
"""Rate of the other parts in BF16, of that in FP8: an assumption. Products take longer; there are no casts."""


@dataclass(frozen=True)
class Rates:
    """Of one device; FLOP/s and bytes/s."""

    linear: dict[str, float]
    """Products of weights, by part of the layer."""
    core: dict[str, float]
    """Attention's own products."""
    head: float
    exchange: dict[str, float]
    """Bytes that arrive from other nodes, or in a run of one node from its devices, per second in a pair."""
    alone: tuple[float, float]
    """The same of a dispatch and a combine with nothing beside them."""
    in_node: tuple[float, float]
    pair_slowdown: float
    """Of computing, by communication beside it."""
    memory: float
    network: float
    node: float
    computing_share: float = _COMPUTING / _SMS
    """Of the multiprocessors, that compute in a pair."""


def published(chip: Chip, fp8: bool) -> Rates:
    """Return the profile's rates on a chip, scaled by its peaks and its links to those of an H800."""
    model, h800 = _profiled(), CHIPS["h800"]
    _, layer, _, _ = work_of_parts(model)
    attention, mlp = attention_weights(model), layer - attention_weights(model)
    in_fp8 = fp8 and chip.fp8_flops is not None
    faster = chip.fp8_flops / h800.fp8_flops if in_fp8 else BF16_SHARE * chip.bf16_flops / h800.bf16_flops
    linear, core = {}, {}
    for part, time in MILLISECONDS.items():
        weights = attention if part.startswith("attention") else mlp
        own = time - CORE_MILLISECONDS.get(part, 0.0)
        linear[part] = 2 * weights * TOKENS / (own / 1e3) * faster
    for part, time in CORE_MILLISECONDS.items():
        passes = 1.0 if part == "attention_forward" else 2.5
        core[part] = passes * core_flops(model, SEQUENCE) * TOKENS / (time / 1e3) * chip.bf16_flops / h800.bf16_flops
    network = chip.network_bandwidth / h800.network_bandwidth
    exchange = {
        part: TOKENS * nodes_of_token(model, 8) * row_bytes(model, part, fp8=True) / (time / 1e3) * network
        for part, time in EXCHANGE_MILLISECONDS.items()
    }
    in_node = chip.node_bandwidth / h800.node_bandwidth
    return Rates(
        linear=linear,
        core=core,
        head=HEAD_SHARE * chip.bf16_flops,
        exchange=exchange,
        alone=tuple(rate * network for rate in ALONE["nodes"]),
        in_node=tuple(rate * in_node for rate in ALONE["node"]),
        pair_slowdown=PAIR_MILLISECONDS / sum(MILLISECONDS.values()),
        memory=chip.memory_bandwidth,
        network=chip.network_bandwidth,
        node=chip.node_bandwidth,
    )


def _profiled() -> ModelConfig:
    from dsjax.settings import load_model_config

    return load_model_config("v3_671b")


def attention_weights(model: ModelConfig) -> int:
    """Return the weights that a token multiplies in attention."""
    return work_of_parts(model)[0] - 3 * model.hidden_size * model.intermediate_size


def core_flops(model: ModelConfig, length: int) -> float:
    """Return the FLOPs of a token's causal attention, forward, without the products of weights."""
    head = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    return model.num_attention_heads * head * (length + 1)


def nodes_of_token(model: ModelConfig, nodes: int) -> int:
    """Return the most nodes that a token is sent to."""
    limit = model.topk_group if model.topk_method != "greedy" and model.n_group % nodes == 0 else nodes
    return min(model.num_experts_per_tok, nodes, limit)


def row_bytes(model: ModelConfig, part: str, *, fp8: bool) -> int:
    """Return the bytes of a token's row in a part of the exchange."""
    if fp8 and part in ("dispatch", "combine_backward"):
        return model.hidden_size + 4 * -(-model.hidden_size // 128)
    return 2 * model.hidden_size
