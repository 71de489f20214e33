"""`config.json` in and out: Hugging Face's, and the configuration file of DeepSeek's demo."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from dsjax.config import ModelConfig, YarnConfig


@dataclass(frozen=True)
class Family:
    """What a `model_type` implies where its config.json says nothing."""

    architecture: str
    defaults: Mapping[str, Any]


FAMILIES = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    ),
}
"""Known model types: V3, R1, V3.1 and V2, V2-Lite."""

_FIXED = {
    "hidden_act": ("silu", "SwiGLU is the only activation"),
    "tie_word_embeddings": (False, "the head has weights of its own"),
    "attention_bias": (False, "attention has no biases"),
    "mlp_bias": (False, "FFNs have no biases"),
    "moe_layer_freq": (1, "every layer after the dense ones is an MoE layer"),
    "rope_interleave": (True, "RoPE turns neighbouring pairs, as in all releases"),
}
_OPTIONAL_SIZES = {
    "q_lora_rank": 0,
    "num_nextn_predict_layers": 0,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
"""Fields that a config.json may leave out or set to null."""
_OWN = ("name", "rope_theta", "rope_scaling")
"""Fields of `ModelConfig` that are not copied by name."""
_WRITTEN_IF_SET = ("num_nextn_predict_layers", "embedding_initializer_range")
"""Fields that a config.json leaves out where they are 0; the second is dsjax's own."""
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
"""What DeepSeek's model code takes for what `rope_scaling` leaves out."""


def config_from_huggingface(data: Mapping[str, Any], name: str = "") -> ModelConfig:
    """Return the model that a `config.json` describes.

    Args:
        data: contents of the file.
        name: name of the model in our configs; empty for the model type.

    Raises:
        ValueError: lists everything that is missing or that dsjax does not do.
    """
    problems = []
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json: unknown model_type {model_type!r}; known are {', '.join(FAMILIES)}")
    values: dict[str, Any] = {}
    for entry in fields(ModelConfig):
        if entry.name in _OWN:
            continue
        value = data.get(entry.name)
        if value is None:
            value = FAMILIES[model_type].defaults.get(entry.name, _OPTIONAL_SIZES.get(entry.name, entry.default))
        if value is MISSING:
            problems.append(f"config.json: {entry.name} is missing")
        values[entry.name] = float(value) if entry.type is float and isinstance(value, int) else value
    for key, (supported, reason) in _FIXED.items():
        if data.get(key, supported) != supported:
            problems.append(f"config.json: {key} is {data[key]!r}, only {supported!r} is supported: {reason}")
    tables = {key: data.get(key) or {} for key in ("rope_parameters", "rope_scaling", "quantization_config")}
    wrong = {key: table for key, table in tables.items() if not isinstance(table, Mapping)}
    problems += [f"config.json: {key} is {table!r}, not a table" for key, table in wrong.items()]
    heads = data.get("num_attention_heads")
    if data.get("num_key_value_heads", heads) != heads:
        problems.append(f"config.json: num_key_value_heads is {data['num_key_value_heads']}, not num_attention_heads")
    try:
        theta, scaling = _rope({key: value for key, value in data.items() if key not in wrong})
    except ValueError as error:
        problems.append(f"config.json: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return ModelConfig(name=name or model_type, rope_theta=theta, rope_scaling=scaling, **values)


def _rope(data: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    """Read RoPE's settings, in the form of the releases or in the one of transformers 5."""
    settings = data.get("rope_parameters") or data.get("rope_scaling") or {}
    theta = float(settings.get("rope_theta") or data.get("rope_theta") or 10000.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"RoPE scaling {kind!r} is unknown; yarn and default are known")
    missing = [key for key in ("factor", "original_max_position_embeddings") if key not in settings]
    if missing:
        raise ValueError(f"YaRN without {' and '.join(missing)}")
    numbers = {key: float(settings.get(key, default)) for key, default in _YARN_DEFAULTS.items()}
    length = int(settings["original_max_position_embeddings"])
    return theta, YarnConfig(factor=float(settings["factor"]), original_max_position_embeddings=length, **numbers)


def config_to_huggingface(
    config: ModelConfig,
    base: Mapping[str, Any] | None = None,
    *,
    fp8: bool = False,
    power_of_two_scales: bool = False,
    dtype: str = "bfloat16",
    max_position_embeddings: int | None = None,
) -> dict[str, Any]:
    """Return the contents of a `config.json`.

    Args:
        config: the model.
        base: an earlier config.json of it, whose other entries (token ids, remote code ...) are kept.
        fp8: whether the weights are FP8 in 128x128 blocks.
        power_of_two_scales: whether their scales are powers of two (`scale_fmt: ue8m0`, V3.1).
        dtype: format of the tensors that are not FP8: "bfloat16" or "float32".
        max_position_embeddings: longest context; by default the base's, or what YaRN was set for, or 4096.
    """
    model_type = "deepseek_v3" if config.topk_method == "noaux_tc" else "deepseek_v2"
    data = dict(base) if base else _invariants(config, model_type)
    yarn = config.rope_scaling
    values = {key: value for key, value in asdict(config).items() if key not in _OWN}
    values["q_lora_rank"] = config.q_lora_rank or None
    for key in _WRITTEN_IF_SET:
        if not values[key] and key not in data:
            del values[key]
    data |= {key: _as_before(value, data.get(key)) for key, value in values.items()}
    data["num_key_value_heads"] = config.num_attention_heads
    length = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else 4096
    data["max_position_embeddings"] = max_position_embeddings or data.get("max_position_embeddings", length)
    _write_rope(data, config)
    data["torch_dtype"] = dtype
    if "dtype" in data:
        data["dtype"] = dtype
    if not fp8:
        data.pop("quantization_config", None)
    else:
        scale_format = {"scale_fmt": "ue8m0"} if power_of_two_scales else {}
        data["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            **scale_format,
            "weight_block_size": [128, 128],
        }
    return data


def _invariants(config: ModelConfig, model_type: str) -> dict[str, Any]:
    return {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        **{key: value for key, (value, _) in _FIXED.items() if key != "mlp_bias"},
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def _write_rope(data: dict[str, Any], config: ModelConfig) -> None:
    """Write RoPE's settings in the form that the base has, else in the one of the releases, which all engines read."""
    new_form, yarn = "rope_parameters" in data, config.rope_scaling
    before = data.get("rope_parameters" if new_form else "rope_scaling") or {}
    settings = {key: _as_before(value, before.get(key)) for key, value in asdict(yarn).items()} if yarn else {}
    if new_form:
        kind = {"rope_type": "yarn" if yarn else "default"}
        data["rope_parameters"] = settings | kind | {"rope_theta": config.rope_theta}
    else:
        data["rope_theta"] = _as_before(config.rope_theta, data.get("rope_theta"))
        data["rope_scaling"] = settings | {"type": "yarn"} if yarn else None


def _as_before(value: Any, before: Any) -> Any:
    """Keep the way in which an equal number was written (40, 40.0), so that an unchanged config stays the same file."""
    return before if value == before and not isinstance(before, bool) else value


_DEMO = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "score_func": "scoring_func",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
"""The demo's names of our fields."""


def config_to_demo(config: ModelConfig, *, fp8: bool, power_of_two_scales: bool = False) -> dict[str, Any]:
    """Return what the demo's `--config` file holds for a model."""
    data = {theirs: getattr(config, ours) for theirs, ours in _DEMO.items()} | {"rope_theta": config.rope_theta}
    if yarn := config.rope_scaling:
        data |= {
            "original_seq_len": yarn.original_max_position_embeddings,
            "rope_factor": yarn.factor,
            "beta_fast": int(yarn.beta_fast),
            "beta_slow": int(yarn.beta_slow),
            "mscale": yarn.mscale,
        }
    data["dtype"] = "fp8" if fp8 else "bf16"
    return data | ({"scale_fmt": "ue8m0"} if power_of_two_scales else {})


def config_from_demo(data: Mapping[str, Any]) -> ModelConfig:
    """Return the model that a file of the demo's `configs/` describes.

    Raises ValueError that lists what is missing. The demo's own defaults hold for YaRN; it always sets it up, and
    uses it beyond the original length only, as we do for a config with `rope_scaling`.
    """
    optional = {
        "n_expert_groups": 1,
        "n_limited_groups": 1,
        "q_lora_rank": 0,
        "n_shared_experts": 1,
        "route_scale": 1.0,
    }
    missing = [theirs for theirs in _DEMO if theirs not in data and theirs not in (*optional, "score_func")]
    if missing:
        raise ValueError(f"the demo's config lacks {', '.join(missing)}")
    values = {ours: data.get(theirs, optional.get(theirs, "softmax")) for theirs, ours in _DEMO.items()}
    sigmoid, groups = values["scoring_func"] == "sigmoid", values["n_group"] > 1
    yarn = YarnConfig(
        factor=float(data.get("rope_factor", 40.0)),
        original_max_position_embeddings=data.get("original_seq_len", 4096),
        beta_fast=float(data.get("beta_fast", 32)),
        beta_slow=float(data.get("beta_slow", 1)),
        mscale=float(data.get("mscale", 1.0)),
        mscale_all_dim=float(data.get("mscale", 1.0)),
    )
    return ModelConfig(
        name="deepseek_v3" if sigmoid else "deepseek_v2",
        topk_method="noaux_tc" if sigmoid else "group_limited_greedy" if groups else "greedy",
        norm_topk_prob=sigmoid,
        rope_theta=float(data.get("rope_theta", 10000.0)),
        rope_scaling=yarn,
        **values,
    )
