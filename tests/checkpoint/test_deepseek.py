"""The demo's form against an independent statement of its rules, and what cannot be divided."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from dsjax.checkpoint.conversion import convert
from dsjax.checkpoint.forms import make_plan, open_checkpoint
from dsjax.checkpoint.sources import CheckpointProblems

GOLDEN = Path(__file__).parents[1] / "golden"

# The demo's conversion, said once more in its own way: new name and divided axis by the last but one part of a name.
RENAMED = {
    "embed_tokens": ("embed", 0), "lm_head": ("head", 0), "norm": ("norm", None),
    "input_layernorm": ("attn_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0), "q_a_proj": ("wq_a", None), "q_a_layernorm": ("q_norm", None), "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None), "kv_a_layernorm": ("kv_norm", None), "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1), "gate": ("gate", None), "gate_proj": ("w1", 0), "down_proj": ("w2", 1), "up_proj": ("w3", 0),
}  # fmt: skip


def _demo_files(tensors: dict, ranks: int, experts: int, main_layers: int, divide=True) -> list[dict]:
    files = [{} for _ in range(ranks)]
    for name, array in tensors.items():
        if f"layers.{main_layers}." in name:
            continue
        *parents, key, last = name.removeprefix("model.").split(".")
        new, axis = RENAMED[key]
        renamed = {"self_attn": "attn", "mlp": "ffn"}
        last = {"weight_scale_inv": "scale", "e_score_correction_bias": "bias"}.get(last, last)
        path = ".".join([*(renamed.get(part, part) for part in parents), new, last])
        if "experts" in parents:
            expert = int(parents[-1])
            files[expert // (experts // ranks)][path] = array
            continue
        for rank, file in enumerate(files):
            part = array
            if axis is not None and divide:
                share = array.shape[axis] // ranks
                part = array.take(range(rank * share, (rank + 1) * share), axis)
            file[path] = part
    return files


def _convert(source, destination, ranks):
    opened = open_checkpoint(source)
    convert(opened, make_plan(opened, "deepseek", ranks=ranks), destination)
    opened.close()


@pytest.mark.parametrize("variant", ["v3", "v2", "v2_lite"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_files_are_what_the_demos_own_conversion_makes(variant, ranks, tmp_path):
    original = GOLDEN / variant / "hf"
    _convert(original, tmp_path / "demo", ranks)
    config = open_checkpoint(original).config
    raw = load_file(original / "model.safetensors")
    expected = _demo_files(raw, ranks, config.n_routed_experts, config.num_hidden_layers)
    for rank, file in enumerate(expected):
        ours = load_file(tmp_path / "demo" / f"model{rank}-mp{ranks}.safetensors")
        assert set(ours) == set(file)
        for name, array in file.items():
            assert ours[name].shape == array.shape, name
            assert ours[name].tobytes() == array.tobytes(), name


def test_fp8_scales_are_beside_their_weights(tmp_path):
    _convert(GOLDEN / "v3" / "hf_fp8", tmp_path / "demo", 1)
    raw = safetensors.deserialize((GOLDEN / "v3" / "hf_fp8" / "model.safetensors").read_bytes())
    (expected,) = _demo_files(dict(raw), 1, 8, 2, divide=False)
    assert dict(safetensors.deserialize((tmp_path / "demo" / "model0-mp1.safetensors").read_bytes())) == expected


def test_fp8_is_cut_between_blocks_or_not_at_all(tmp_path):
    with pytest.raises(CheckpointProblems) as error:
        _convert(GOLDEN / "v3" / "hf_fp8", tmp_path / "demo", 2)
    name = "model.layers.0.self_attn.q_b_proj.weight"
    assert error.value.problems[0] == f"{name}: its 192 rows do not make 2 equal shares of whole blocks of 128"
    assert len(error.value.problems) == 10
    assert not list(tmp_path.iterdir())


def test_ranks_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(CheckpointProblems) as error:
        _convert(GOLDEN / "v3" / "hf", tmp_path / "demo", 3)
    assert "model.embed_tokens.weight: its 128 rows do not make 3 equal shares of rows" in error.value.problems
    assert error.value.problems.count("8 experts cannot be divided among 3 ranks") == 1


@pytest.fixture
def demo(tmp_path):
    _convert(GOLDEN / "v3" / "hf", tmp_path / "demo", 2)
    return tmp_path / "demo"


def test_without_the_side_file_the_mtp_layer_is_reported_absent(demo):
    (demo / "mtp.safetensors").unlink()
    source = open_checkpoint(demo)
    assert source.config.num_nextn_predict_layers == 0
    assert source.notes == ["no MTP layer: the demo's form has none, and there is no mtp.safetensors"]


def test_the_demos_own_config_is_enough(demo):
    (demo / "mtp.safetensors").unlink()
    expected = open_checkpoint(demo)
    (demo / "config.json").unlink()
    source = open_checkpoint(demo)
    assert set(source.stored) == set(expected.stored)
    (demo / "deepseek.json").unlink()
    with pytest.raises(
        CheckpointProblems, match=r"neither config.json nor deepseek.json is there; name one with --con"
    ):
        open_checkpoint(demo)
    assert open_checkpoint(demo, expected.config).stored.keys() == expected.stored.keys()


def test_a_missing_rank_and_a_mixture(demo):
    shutil.copy(demo / "model0-mp2.safetensors", demo / "model0-mp1.safetensors")
    with pytest.raises(CheckpointProblems, match="files of 1 and 2 ranks are mixed"):
        open_checkpoint(demo)
    (demo / "model0-mp1.safetensors").unlink()
    (demo / "model1-mp2.safetensors").unlink()
    with pytest.raises(CheckpointProblems) as error:
        open_checkpoint(demo)
    assert error.value.problems == ["model1-mp2.safetensors: no such file"]


def test_ranks_that_disagree_on_what_both_have(demo, tmp_path):
    file = demo / "model1-mp2.safetensors"
    data = bytearray(file.read_bytes())
    at = data.index(load_file(file)["layers.0.attn.kv_norm.weight"].tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    source = open_checkpoint(demo)
    with pytest.raises(CheckpointProblems, match=r"layers\.0\.attn\.kv_norm\.weight is not the same in files 0 and 1"):
        convert(source, make_plan(source, "dsjax"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_strangers_and_absentees_are_named(demo):
    arrays = load_file(demo / "model1-mp2.safetensors")
    arrays["layers.0.attn.extra"] = arrays.pop("layers.0.attn.wo.weight")
    del arrays["layers.1.ffn.experts.7.w1.weight"]
    save_file(arrays, demo / "model1-mp2.safetensors")
    with pytest.raises(CheckpointProblems) as error:
        open_checkpoint(demo)
    assert error.value.problems == [
        "missing: layers.0.attn.wo.weight of ranks 1",
        "unexpected: layers.0.attn.extra in model1-mp2.safetensors",
        "missing: model.layers.0.self_attn.o_proj.weight [64, 128]",
        "missing: model.layers.1.mlp.experts.7.gate_proj.weight [32, 64]",
    ]
    assert json.loads((demo / "config.json").read_text())["num_hidden_layers"] == 2
