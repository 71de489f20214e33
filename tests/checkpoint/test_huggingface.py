"""Released checkpoints as jax arrays and back, and what is said of broken ones."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from dsjax.checkpoint import files
from dsjax.checkpoint.arrays import Arrays
from dsjax.checkpoint.huggingface import load, load_huggingface, open_huggingface, save_huggingface
from dsjax.checkpoint.sources import CheckpointProblems
from dsjax.model.layout import stack
from dsjax.model.transformer import abstract_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = ["v3", "v3_no_yarn", "v2", "v2_lite"]


def _leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _same(left, right):
    pairs = zip(_leaves(left), _leaves(right), strict=True)
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_loaded_has_the_models_tree_and_the_files_numbers(variant):
    config, params, biases = load_huggingface(GOLDEN / variant / "hf")
    abstract = abstract_parameters(config)
    assert jax.tree.structure((params, biases)) == jax.tree.structure(abstract)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), (params, biases)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract
    )
    raw = load_file(GOLDEN / variant / "hf" / "model.safetensors")
    assert sum(leaf.size for leaf in _leaves((params, biases))) == sum(array.size for array in raw.values())
    experts = params["layers"]["1"]["moe"]["experts"]
    assert (experts["gate_up"][3, 1] == raw["model.layers.1.mlp.experts.3.up_proj.weight"]).all()
    assert (experts["down"][5] == raw["model.layers.1.mlp.experts.5.down_proj.weight"]).all()
    assert (params["layers"]["0"]["ffn"]["gate_up"][0] == raw["model.layers.0.mlp.gate_proj.weight"]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_weights_are_the_files_that_they_came_from(variant, tmp_path):
    original = GOLDEN / variant / "hf"
    weights = load_huggingface(original)
    base = json.loads((original / "config.json").read_text())
    report = save_huggingface(tmp_path / "out", *weights, dtype="fp32", base=base)
    before, after = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "out"))
    copies = {name for name in after if name not in before}
    main = weights.config.num_hidden_layers
    assert copies == {
        f"model.layers.{main + k}.{name}.weight"
        for k in range(weights.config.num_nextn_predict_layers)
        for name in ("embed_tokens", "shared_head.head")
    }
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)
    assert report.tensors == len(after)
    assert _same(load_huggingface(tmp_path / "out")[1:], weights[1:])


def test_fp8_weights_are_multiplied_out_and_other_dtypes_are_a_choice():
    weights = load_huggingface(GOLDEN / "v3" / "hf_fp8")
    exact = load_huggingface(GOLDEN / "v3" / "hf")
    for ours, theirs in zip(_leaves(weights.params), _leaves(exact.params), strict=True):
        assert np.abs(ours - theirs).max() <= np.abs(theirs).max() / 16
    assert not _same(weights.params, exact.params)
    half = load_huggingface(GOLDEN / "v3" / "hf_fp8", dtype=jnp.bfloat16)
    assert _same(half.params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights.params))
    assert all(leaf.dtype == np.float32 for leaf in _leaves(half.biases))


def test_only_the_bytes_of_this_process_are_read(monkeypatch):
    mesh = jax.make_mesh((8,), ("e",), axis_types=(AxisType.Auto,))
    _, params, biases = load_huggingface(GOLDEN / "v3" / "hf")

    def place(leaf):
        return NamedSharding(mesh, P("e") if leaf.shape[0] % 8 == 0 else P())

    shardings = {"params": jax.tree.map(place, params), "biases": jax.tree.map(place, biases)}
    reads, original = [], files.FileTensor.read

    def read(self, start, stop, columns=None):
        out = original(self, start, stop, columns)
        reads.append(out.nbytes)
        return out

    monkeypatch.setattr(files.FileTensor, "read", read)
    sharded = load_huggingface(GOLDEN / "v3" / "hf", shardings=shardings)
    assert _same(sharded[1:], (params, biases))
    assert jax.tree.map(lambda a: a.sharding, sharded.params) == shardings["params"]
    assert sum(reads) == sum(leaf.nbytes for leaf in jax.tree.leaves((params, biases))), "every byte is read once"
    reads.clear()
    experts = sharded.params["layers"]["1"]["moe"]["experts"]["gate_up"]
    source = open_huggingface(GOLDEN / "v3" / "hf")
    part = (slice(3, 4), slice(0, 2), slice(8, 16), slice(None))
    found = Arrays(source).read("params/layers/1/moe/experts/gate_up", part, np.float32)
    assert (found == np.asarray(experts[part])).all()
    assert sum(reads) == found.nbytes, "and of a part, the part's"


@pytest.mark.parametrize("form", ["hf", "hf_fp8"])
def test_of_a_sharding_along_columns_only_the_columns_are_read(form, monkeypatch):
    """With rows so short as a test's, if they are taken for long ones."""
    monkeypatch.setattr(files, "_SKIPPED", 1)
    mesh = jax.make_mesh((8,), ("e",), axis_types=(AxisType.Auto,))
    _, params, biases = load_huggingface(GOLDEN / "v3" / form)

    def place(leaf):
        divided = leaf.ndim > 1 and leaf.shape[-1] % 8 == 0
        return NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "e") if divided else P())

    shardings = {"params": jax.tree.map(place, params), "biases": jax.tree.map(place, biases)}
    read, original = [], files.os.preadv

    def preadv(descriptor, buffers, offset):
        read.append(original(descriptor, buffers, offset))
        return read[-1]

    source = open_huggingface(GOLDEN / "v3" / form)
    monkeypatch.setattr(files.os, "preadv", preadv)
    sharded = load(source, shardings)
    assert _same(sharded[1:], (params, biases))
    codes = sum(np.prod(t.shape) for t in source.stored.values() if t.dtype == "F8_E4M3")
    scales = [t for name, t in source.stored.items() if name.endswith("_scale_inv")]
    plain = sum(leaf.nbytes for leaf in jax.tree.leaves((params, biases))) - 4 * codes
    # Scales are few: each of the 8 devices' columns takes them all.
    assert sum(read) == codes + plain + 8 * sum(4 * np.prod(t.shape) for t in scales)


def test_quantized_weights_are_the_goldens_bit_for_bit(tmp_path):
    config, params, biases = load_huggingface(GOLDEN / "v3" / "hf")
    save_huggingface(tmp_path / "out", config, params, biases, dtype="fp8")
    written = files.SafetensorsFile(tmp_path / "out" / "model.safetensors")
    golden = files.SafetensorsFile(GOLDEN / "v3" / "hf_fp8" / "model.safetensors")
    compared = 0
    for name, tensor in golden.tensors.items():
        if tensor.dtype == "F8_E4M3" or name.endswith("_scale_inv"):
            compared += 1
            ours = written.tensors[name]
            assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
            assert ours.read(0, ours.shape[0]).tobytes() == tensor.read(0, tensor.shape[0]).tobytes(), name
    assert compared == 144
    assert written.tensors["model.norm.weight"].dtype == "BF16"
    assert written.tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


def test_numpy_and_bfloat16_arrays_can_be_saved(tmp_path):
    config, params, biases = load_huggingface(GOLDEN / "v2" / "hf", dtype=jnp.bfloat16)
    save_huggingface(tmp_path / "a", config, jax.tree.map(np.asarray, params), biases)
    assert _same(load_huggingface(tmp_path / "a", dtype=ml_dtypes.bfloat16).params, params)


def test_arrays_that_do_not_fit_the_config_are_listed(tmp_path):
    config, params, biases = load_huggingface(GOLDEN / "v3" / "hf")
    params = params | {"norm": params["norm"][:-1], "head": params["head"].astype(jnp.float16)}
    del params["layers"]["1"]["moe"]["shared"]
    with pytest.raises(CheckpointProblems) as error:
        save_huggingface(tmp_path / "out", config, params, biases)
    assert {
        "wrong shape: model.norm.weight is [63], the config says [64]",
        "wrong dtype: lm_head.weight is F16, it may be F32, BF16",
        "missing: model.layers.1.mlp.shared_experts.down_proj.weight [64, 32]",
    } <= set(error.value.problems)
    assert not (tmp_path / "out").exists()


# Broken checkpoints: each is a copy of the FP8 golden with something done to it, and its exact report.


def _tensors(folder: Path) -> dict:
    source = files.SafetensorsFile(folder / "model.safetensors")
    arrays = {name: (tensor.dtype, tensor.read(0, tensor.shape[0])) for name, tensor in source.tensors.items()}
    source.close()
    return arrays


def _write(path: Path, arrays: dict) -> None:
    writer = files.SafetensorsWriter(path, [files.Spec(n, dtype, a.shape) for n, (dtype, a) in arrays.items()])
    for name, (_, array) in arrays.items():
        writer.write(name, 0, array)
    writer.close()


def _changed(change):
    def damage(folder: Path) -> None:
        arrays = _tensors(folder)
        change(arrays)
        _write(folder / "model.safetensors", arrays)

    return damage


def _config(**values):
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def _indexed(folder: Path) -> dict:
    """Turn the single file into two shards with an index; return the index."""
    arrays = _tensors(folder)
    names = sorted(arrays)
    halves = {"a.safetensors": names[:80], "b.safetensors": names[80:]}
    for file, part in halves.items():
        _write(folder / file, {name: arrays[name] for name in part})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index["weight_map"]


def _absent_shard(folder: Path) -> None:
    _indexed(folder)
    (folder / "b.safetensors").unlink()


def _truncated_shard(folder: Path) -> None:
    _indexed(folder)
    data = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(data[:-1])


def _lying_index(folder: Path) -> None:
    places = _indexed(folder)
    places["lm_head.weight"] = "b.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
BROKEN = {
    "missing": (_changed(lambda t: t.pop("model.norm.weight")), ["missing: model.norm.weight [64]"]),
    "unexpected": (
        _changed(lambda t: t.update({"model.extra.weight": ("F32", np.zeros((2, 3), np.float32))})),
        ["unexpected: model.extra.weight [2, 3]"],
    ),
    "misshapen": (
        _changed(lambda t: t.update({"model.norm.weight": ("F32", np.zeros(63, np.float32))})),
        ["wrong shape: model.norm.weight is [63], the config says [64]"],
    ),
    "wrong dtype": (
        _changed(lambda t: t.update({"lm_head.weight": ("I32", np.zeros((128, 64), np.int32))})),
        ["wrong dtype: lm_head.weight is I32, it may be F32, BF16"],
    ),
    "FP8 without scales": (
        _changed(lambda t: t.pop(f"{GATE}_scale_inv")),
        [f"missing: {GATE}_scale_inv [1, 1], the scales of an FP8 weight"],
    ),
    "scales of a wrong shape": (
        _changed(lambda t: t.update({f"{GATE}_scale_inv": ("F32", np.ones((2, 1), np.float32))})),
        [f"wrong shape: {GATE}_scale_inv is [2, 1], should be [1, 1]"],
    ),
    "scales of a wrong dtype": (
        _changed(lambda t: t.update({f"{GATE}_scale_inv": ("F64", np.ones((1, 1)))})),
        [f"wrong dtype: {GATE}_scale_inv is F64, should be F32"],
    ),
    "scales without FP8": (
        _changed(lambda t: t.update({GATE: ("BF16", np.zeros((32, 64), ml_dtypes.bfloat16))})),
        [f"unexpected: {GATE}_scale_inv [1, 1]"],
    ),
    "no MTP layer": (
        _changed(lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.2.")]),
        ["layer 2 (MTP) is absent, although num_nextn_predict_layers is 1"],
    ),
    "several": (
        _changed(lambda t: [t.pop("model.norm.weight"), t.pop("lm_head.weight")]),
        ["missing: model.norm.weight [64]", "missing: lm_head.weight [128, 64]"],
    ),
    "unknown model": (
        _config(model_type="llama"),
        ["config.json: unknown model_type 'llama'; known are deepseek_v3, deepseek_v2"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json: no such file"]),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        [
            "no weights: none of model.safetensors.index.json, pytorch_model.bin.index.json, model.safetensors, "
            "pytorch_model.bin, model.pt is there"
        ],
    ),
}


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(GOLDEN / "v3" / "hf_fp8", tmp_path / "copy")


@pytest.mark.parametrize("kind", BROKEN)
def test_every_problem_is_reported_in_one_go(copy, kind):
    damage, expected = BROKEN[kind]
    damage(copy)
    with pytest.raises(CheckpointProblems) as error:
        load_huggingface(copy)
    assert error.value.problems == expected
    count = "1 problem" if len(expected) == 1 else f"{len(expected)} problems"
    assert str(error.value).splitlines()[0] == f"{copy}: {count}"


def test_an_index_that_names_an_absent_file(copy):
    _absent_shard(copy)
    with pytest.raises(CheckpointProblems) as error:
        load_huggingface(copy)
    assert error.value.problems == ["b.safetensors: no such file"]


def test_a_truncated_shard(copy):
    _truncated_shard(copy)
    size = (copy / "b.safetensors").stat().st_size
    with pytest.raises(CheckpointProblems) as error:
        load_huggingface(copy)
    assert error.value.problems == [f"b.safetensors: truncated, {size} bytes of {size + 1}"]


def test_a_truncated_single_file(copy):
    file = copy / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointProblems) as error:
        load_huggingface(copy)
    assert error.value.problems == [f"model.safetensors: truncated, {size - 9} bytes of {size}"]


def test_an_index_that_does_not_fit_its_files(copy):
    _lying_index(copy)
    with pytest.raises(CheckpointProblems) as error:
        load_huggingface(copy)
    assert error.value.problems == [
        "model.safetensors.index.json names lm_head.weight in b.safetensors, which does not hold it"
    ]


def test_broken_files_do_not_hide_what_is_missing_elsewhere(copy):
    _absent_shard(copy)
    arrays = files.SafetensorsFile(copy / "a.safetensors")
    keep = {n: (t.dtype, t.read(0, t.shape[0])) for n, t in arrays.tensors.items() if n != "lm_head.weight"}
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    _write(copy / "a.safetensors", keep)
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointProblems) as error:
        load_huggingface(copy)
    assert error.value.problems == ["b.safetensors: no such file", "missing: lm_head.weight [128, 64]"]


def test_shards_are_one_checkpoint(copy):
    _indexed(copy)
    whole = GOLDEN / "v3" / "hf_fp8"
    assert _same(load_huggingface(copy)[1:], load_huggingface(whole)[1:])
    assert _same(load_huggingface(whole / "model.safetensors")[1:], load_huggingface(whole)[1:])


def test_a_config_can_be_given(copy):
    config = load_huggingface(copy).config
    (copy / "config.json").unlink()
    assert load_huggingface(copy, config).config == config
    save_file({"x": np.zeros(1)}, copy / "model.safetensors")
    with pytest.raises(CheckpointProblems, match="unexpected: x"):
        load_huggingface(copy, config)


def test_loaded_weights_stack(copy):
    config, params, biases = load_huggingface(copy)
    assert stack(params, config)["moe"]["moe"]["experts"]["gate_up"].shape == (1, 8, 2, 32, 64)
    assert stack(biases, config)["mtp"]["block"]["moe"]["bias"].shape == (1, 8)
