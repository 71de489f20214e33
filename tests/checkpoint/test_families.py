"""config.json both ways: the real one of R1, the new form of transformers 5, V2-Lite's, and the demo's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsjax.checkpoint.families import config_from_demo, config_from_huggingface, config_to_demo, config_to_huggingface
from dsjax.config import YarnConfig
from dsjax.settings import load_model_config

GOLDEN = Path(__file__).parents[1] / "golden"
R1 = json.loads((GOLDEN / "r1_config.json").read_text())


def test_the_released_config_is_our_v3():
    ours = load_model_config("v3_671b")
    released = config_from_huggingface(R1, ours.name)
    # Released configs keep the library's default; the weights were drawn with the report's 0.006.
    assert replace(released, initializer_range=ours.initializer_range, rope_scaling=ours.rope_scaling) == ours
    assert released.rope_scaling == YarnConfig(factor=40.0, original_max_position_embeddings=4096)


def test_a_released_config_comes_back_unchanged():
    assert config_to_huggingface(config_from_huggingface(R1), R1, fp8=True) == R1


def test_pow2_scales_and_bf16_change_the_quantization_only():
    config = config_from_huggingface(R1)
    v31 = config_to_huggingface(config, R1, fp8=True, power_of_two_scales=True)
    assert v31["quantization_config"] == R1["quantization_config"] | {"scale_fmt": "ue8m0"}
    bf16 = config_to_huggingface(config, R1)
    assert bf16 == {key: value for key, value in R1.items() if key != "quantization_config"}


@pytest.mark.parametrize("model", ["v3_671b", "v2_236b", "v2_lite_16b", "tiny"])
def test_our_models_go_out_and_come_back(model):
    config = load_model_config(model)
    data = config_to_huggingface(config)
    assert config_from_huggingface(data, config.name) == config
    family = "v3" if config.topk_method == "noaux_tc" else "v2"
    assert data["model_type"] == f"deepseek_{family}"
    assert data["architectures"] == [f"Deepseek{family.upper()}ForCausalLM"]
    assert data["q_lora_rank"] == (config.q_lora_rank or None)
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize("variant", ["v3", "v3_no_yarn", "v2", "v2_lite"])
def test_the_form_of_transformers_5_is_read_and_kept(variant):
    data = json.loads((GOLDEN / variant / "hf" / "config.json").read_text())
    config = config_from_huggingface(data)
    assert (config.rope_scaling is None) == (data["rope_parameters"]["rope_type"] == "default")
    again = config_to_huggingface(config, data, dtype="float32")
    assert {key: value for key, value in again.items() if data.get(key) != value} in (
        {},
        {"scoring_func": config.scoring_func, "topk_method": config.topk_method},
        {"scoring_func": config.scoring_func},
    )
    assert set(data) <= set(again)


def test_a_longer_context_can_be_stated():
    config = replace(config_from_huggingface(R1), rope_scaling=None)
    assert config_to_huggingface(config)["max_position_embeddings"] == 4096
    assert config_to_huggingface(config, max_position_embeddings=512)["max_position_embeddings"] == 512
    assert config_to_huggingface(config)["rope_scaling"] is None


def test_yarn_without_mscale_means_what_deepseeks_code_takes_it_for():
    data = R1 | {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}}
    assert config_from_huggingface(data).rope_scaling == YarnConfig(
        factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.0
    )


PROBLEMS = {
    "model_type": ("llama", "config.json: unknown model_type 'llama'; known are deepseek_v3, deepseek_v2"),
    "hidden_size": (None, "config.json: hidden_size is missing"),
    "hidden_act": (
        "gelu",
        "config.json: hidden_act is 'gelu', only 'silu' is supported: SwiGLU is the only activation",
    ),
    "num_key_value_heads": (8, "config.json: num_key_value_heads is 8, not num_attention_heads"),
    "rope_scaling": ({"type": "linear"}, "config.json: RoPE scaling 'linear' is unknown; yarn and default are known"),
}


@pytest.mark.parametrize("key", PROBLEMS)
def test_what_cannot_be_done_is_refused(key):
    value, message = PROBLEMS[key]
    with pytest.raises(ValueError) as error:
        config_from_huggingface(R1 | {key: value})
    assert str(error.value) == message


def test_all_problems_are_told_at_once():
    data = {key: value for key, value in R1.items() if key not in ("vocab_size", "kv_lora_rank")}
    data |= {"attention_bias": True, "rope_scaling": {"type": "yarn", "factor": 2}}
    with pytest.raises(ValueError) as error:
        config_from_huggingface(data)
    assert str(error.value).splitlines() == [
        "config.json: vocab_size is missing",
        "config.json: kv_lora_rank is missing",
        "config.json: attention_bias is True, only False is supported: attention has no biases",
        "config.json: YaRN without original_max_position_embeddings",
    ]


def test_the_demos_config_of_v3():
    demo = config_to_demo(config_from_huggingface(R1), fp8=True)
    # The published configs/config_671B.json.
    published = {
        "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61,
        "n_dense_layers": 3, "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8,
        "n_expert_groups": 8, "n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8",
    }  # fmt: skip
    assert published.items() <= demo.items()
    expected = replace(config_from_huggingface(R1), num_nextn_predict_layers=0)
    for data in (published, demo):
        assert replace(config_from_demo(data), initializer_range=expected.initializer_range) == expected


def test_the_demos_config_of_v2_lite_and_one_that_lacks_fields():
    config = load_model_config("v2_lite_16b")
    again = config_from_demo(config_to_demo(config, fp8=False))
    assert (again.topk_method, again.norm_topk_prob, again.q_lora_rank) == ("greedy", False, 0)
    with pytest.raises(ValueError, match="the demo's config lacks vocab_size, dim"):
        config_from_demo({"n_layers": 3})
