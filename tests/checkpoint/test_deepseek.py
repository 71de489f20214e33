"""The demo's form against an independent statement of its rules, and what cannot be divided."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from dsjax.checkpoint.audit import compare_values, released_listing
from dsjax.checkpoint.conversion import convert
from dsjax.checkpoint.families import config_to_huggingface
from dsjax.checkpoint.files import DTYPES, SafetensorsWriter, Spec
from dsjax.checkpoint.forms import make_plan, open_checkpoint
from dsjax.checkpoint.sources import CheckpointProblems
from dsjax.convert import main

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


@pytest.fixture(scope="module")
def divisible(tmp_path_factory):
    """An FP8 release, random codes and scales, whose matrices can be cut between blocks in 2 and in 4, not in 8.

    The axes that are not cut have partial blocks.
    """
    folder = tmp_path_factory.mktemp("divisible")
    config = replace(
        open_checkpoint(GOLDEN / "v3" / "hf").config,
        hidden_size=200,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_attention_heads=8,
        q_lora_rank=72,
        kv_lora_rank=136,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=64,
    )
    specs = [Spec(name, *rest) for name, rest in released_listing(config).items() if "layers.2.embed" not in name]
    specs = [spec for spec in specs if not spec.name.endswith("shared_head.head.weight")]
    random = np.random.default_rng(0)
    writer = SafetensorsWriter(folder / "model.safetensors", specs)
    for spec in specs:
        data = random.integers(0, 0x7E, spec.nbytes, dtype=np.uint8)
        if spec.dtype == "F32":
            data = random.uniform(1e-4, 1e-2, spec.shape).astype(np.float32)
        writer.write(spec.name, 0, data.view(DTYPES[spec.dtype]))
    writer.close()
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(config, fp8=True)))
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_fp8_of_several_ranks_comes_back_byte_for_byte(divisible, ranks, tmp_path):
    demo, ours, back = (tmp_path / name for name in ("demo", "ours", "back"))
    assert main(["to-deepseek", str(divisible), str(demo), "--ranks", str(ranks)]) == 0
    assert main(["from-deepseek", str(demo), str(ours)]) == 0
    for source in (ours, demo):
        assert main(["to-hf", str(source), str(back)]) == 0
        assert compare_values(open_checkpoint(back), open_checkpoint(divisible)) == []
        raw = [safetensors.deserialize((path / "model.safetensors").read_bytes()) for path in (back, divisible)]
        assert dict(raw[0]) == dict(raw[1])
        shutil.rmtree(back)
    # What is in a rank's file, said without our reader.
    whole = dict(raw[1])
    o, scales = (whole[f"model.layers.0.self_attn.o_proj.weight{end}"] for end in ("", "_scale_inv"))
    codes = np.frombuffer(o["data"], np.uint8).reshape(o["shape"])
    blocks = np.frombuffer(scales["data"], np.float32).reshape(scales["shape"])
    assert (codes.shape, blocks.shape) == ((200, 512), (2, 4))
    for rank in range(ranks):
        file = dict(safetensors.deserialize((demo / f"model{rank}-mp{ranks}.safetensors").read_bytes()))
        for name, array in (("weight", codes), ("scale", blocks)):
            share = np.split(array, ranks, axis=1)[rank]
            assert file[f"layers.0.attn.wo.{name}"]["shape"] == list(share.shape)
            assert bytes(file[f"layers.0.attn.wo.{name}"]["data"]) == share.tobytes()


def test_fp8_of_more_ranks_than_blocks_is_refused_by_name(divisible, tmp_path, capsys):
    assert main(["to-deepseek", str(divisible), str(tmp_path / "demo"), "--ranks", "8"]) == 1
    said = capsys.readouterr().err.splitlines()
    main_layer = {
        "self_attn.q_b_proj": "1536 rows", "self_attn.kv_b_proj": "1536 rows", "self_attn.o_proj": "512 columns",
        "mlp.gate_proj": "512 rows", "mlp.up_proj": "512 rows", "mlp.down_proj": "512 columns",
    }  # fmt: skip
    lines = [
        f"  model.layers.{layer}.{name.replace('mlp', 'mlp.shared_experts') if layer else name}.weight: "
        f"its {axis} do not make 8 equal shares of whole blocks of 128"
        for layer in range(2)
        for name, axis in main_layer.items()
    ]
    assert sorted(said[1:]) == sorted(lines)
    assert said[0] == f"dsjax: {divisible}: 12 problems"
    assert not list(tmp_path.iterdir())
    # Multiplied out, there are no blocks to cut.
    assert main(["to-deepseek", str(divisible), str(tmp_path / "demo"), "--ranks", "8", "--dtype", "bf16"]) == 0


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
