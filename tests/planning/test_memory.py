"""The memory of a plan against live arrays, against arithmetic of the model's sizes, and against the report."""

import math
from dataclasses import replace

import jax
import pytest

from dsjax.config import MeshConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.xla_flags import MEMORY_SHARE
from dsjax.planning.aot import traced_for
from dsjax.planning.chips import CHIPS
from dsjax.planning.memory import CATEGORIES, memory_of, nbytes, state_bytes
from dsjax.runtime import runtime_of
from dsjax.settings import load_config
from dsjax.training.state import initial_state


def planned(config):
    with traced_for(CHIPS["h800"]):
        return memory_of(config, runtime_of(config))


def on_first_device(tree):
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize("mesh", [MeshConfig(pipe=2, data=2, local=2), MeshConfig(data=4), MeshConfig()])
def test_the_state_is_that_of_the_live_arrays(mesh):
    config = load_config(["tiny_v3"])
    config = replace(config, mesh=mesh)
    state = initial_state(config, make_mesh(config.mesh))
    found = state_bytes(config)
    assert found["master_weights"] == on_first_device(state.params)
    assert found["moments"] == on_first_device((state.moments.first, state.moments.second))
    assert sum(found.values()) == on_first_device(state)


@pytest.fixture(scope="module")
def tiny_v3():
    config = load_config(["tiny_v3"])
    return config, planned(config)


def test_every_category_of_the_small_recipe(tiny_v3):
    """7 MoE layers on two stages of 4 places; a device computes half of the experts of a place."""
    config, memory = tiny_v3
    model, places, copies = config.model, 4, 2
    assert tuple(memory.device) == tuple(CATEGORIES)
    d, f, experts = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts // 2
    heads, query = model.num_attention_heads, model.qk_nope_head_dim + model.qk_rope_head_dim
    quantized = {
        "q_a": (model.q_lora_rank, d),
        "q_b": (heads * query, model.q_lora_rank),
        "kv_a": (model.kv_lora_rank + model.qk_rope_head_dim, d),
        "kv_b": (heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank),
        "o": (d, heads * model.v_head_dim),
        **{f"expert {e}": (3 * f, d) for e in range(experts + model.n_shared_experts)},
    }
    weights = sum(math.prod(shape) for shape in quantized.values())
    norms = 2 * d + model.q_lora_rank + model.kv_lora_rank
    router = model.n_routed_experts * d
    per_place = 4 * (weights + norms + router)
    assert memory.device["gradients"] == places * per_place
    # Codes of one byte; scales of blocks of 128 x 128 are little beside them, even of small matrices.
    assert places * weights <= memory.device["weights_fp8"] < 1.02 * places * weights
    assert memory.device["weights_16bit"] == places * 4 * (norms + router)
    one_copy = sum(memory.device[name] for name in ("weights_fp8", "weights_16bit", "gradients"))
    assert memory.device["second_copy"] == (copies - 1) * one_copy
    tokens = config.train.micro_batch_size * config.data.sequence_length // 4
    assert memory.activation_bytes == 2 * tokens * d
    # P + 1 micro-batches are in flight.
    assert memory.device["activations"] == pytest.approx(3 * places * memory.residuals_per_token * tokens)
    assert memory.device["messages"] == 4 * memory.activation_bytes
    assert memory.device["tokens"] == 4 * config.train.batch_size * 129 // 4
    assert memory.host == {
        "moving_average": memory.device["master_weights"],
        "copy_to_host": memory.device["master_weights"],
    }


def test_other_schedules_hold_less(tiny_v3):
    """ZB1P has one copy; DualPipeV the same weights in two slots of half the size, and no copy."""
    config, dualpipe = tiny_v3
    single = replace(config, train=replace(config.train, batch_ramp_start=0, batch_ramp_fraction=0.0))
    zb1p = planned(replace(single, pipeline=replace(config.pipeline, schedule="zb1p")))
    vee = planned(replace(single, pipeline=replace(config.pipeline, schedule="dualpipev")))
    assert zb1p.device["second_copy"] == vee.device["second_copy"] == 0
    assert zb1p.device["gradients"] == dualpipe.device["gradients"] == vee.device["gradients"]
    assert zb1p.device["activations"] < dualpipe.device["activations"]
    assert planned(replace(single, mesh=MeshConfig())).device["messages"] > 0


@pytest.fixture(scope="module")
def v3():
    return planned(load_config(["v3_671b"]))


def test_the_released_model_on_2048_gpus(v3):
    """Beside spec 2.5's derivation; docs/scale.md explains every difference."""
    gb = {name: size / 1e9 for name, size in v3.device.items()}
    both_copies = gb["second_copy"] + gb["weights_fp8"] + gb["weights_16bit"] + gb["gradients"]
    # 8 layers of 409M parameters: FP8 and float32.
    assert both_copies == pytest.approx(3.3 + 13.1, rel=0.02)
    assert gb["second_copy"] == pytest.approx(both_copies / 2)
    # Kept per token and layer: 153 KB, and 10 % slack in buffers of rows.
    assert v3.residuals_per_token == pytest.approx(153e3, rel=0.1)
    assert gb["activations"] == pytest.approx(17 * 4 * 4096 * v3.residuals_per_token / 1e9, rel=1e-3)
    assert v3.total < MEMORY_SHARE * CHIPS["h800"].memory_bytes
    first, middle = v3.used_by_rank[0], v3.used_by_rank[7]
    assert first["activations"] * 4 == pytest.approx(middle["activations"])
    assert middle["activations"] == v3.device["activations"]


def test_bytes_of_trees():
    assert nbytes({"a": jax.ShapeDtypeStruct((3, 5), "float32"), "b": jax.ShapeDtypeStruct((7,), "bfloat16")}) == 74
