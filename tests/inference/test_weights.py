"""Weights from disk to the devices of a unit: the right ones, in their format, and nothing else."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import GREEDY, SETTINGS, answered, prompt
from jax.sharding import SingleDeviceSharding
from safetensors import deserialize

from dsjax.checkpoint import files
from dsjax.checkpoint.arrays import Arrays
from dsjax.checkpoint.huggingface import open_huggingface, save_huggingface
from dsjax.inference import reading
from dsjax.inference.engine import Engine
from dsjax.inference.layout import Layout
from dsjax.inference.load import load_model
from dsjax.inference.reading import fp8_weights_kept, read_weights
from dsjax.inference.weights import first_placement
from dsjax.model.dispatch import exchange_locally
from dsjax.model.layout import unstack
from dsjax.model.moe import RoutedExperts
from dsjax.numerics.quantized import dequantized
from dsjax.numerics.weights import Fp8Weight
from dsjax.runtime import Runtime

GOLDEN = Path(__file__).parents[1] / "golden" / "v3"
LAYOUTS = {
    "plain": Layout(node=2, data=2, tensor=2),
    "redundant": Layout(node=2, data=2, tensor=2, slots=2),
    "shared as routed": Layout(node=3, data=1, tensor=2, slots=2, shared_as_routed=True),
}
FORMS = ["run", "bf16", "fp32", "fp8"]


def bits(array):
    return np.asarray(array).tobytes()


def assert_same(found, expected):
    """The same arrays in the same places, bit by bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), where
        assert bits(a) == bits(b), where


@pytest.fixture(scope="module")
def wide(small):
    """A model whose heads and experts are whole blocks, also of two devices; other weights end with partial ones."""
    sizes = {"qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64, "kv_lora_rank": 40, "hidden_size": 160}
    return replace(small, moe_intermediate_size=128, intermediate_size=256, num_nextn_predict_layers=1, **sizes)


@pytest.fixture(scope="module")
def folders(wide, run, random_parameters, tokenizer, tmp_path_factory):
    """The model in all forms, and a run of another."""
    found, (params, biases) = {"run": run}, random_parameters(wide)
    for form in FORMS[1:]:
        found[form] = tmp_path_factory.mktemp("released") / form
        save_huggingface(found[form], wide, unstack(params, wide), unstack(biases, wide), form)
        tokenizer.save(found[form] / "tokenizer.json")
    return found


@pytest.mark.parametrize(
    ("form", "layout"),
    [("run", "plain"), ("run", "redundant"), ("bf16", "shared as routed"), ("fp32", "redundant"), ("fp8", "plain")],
)
def test_what_is_loaded_on_a_unit_is_what_is_arranged_there(folders, form, layout):
    alone, layout = load_model(folders[form], mtp=True, precision="bf16"), LAYOUTS[layout]
    expected, found = alone.on_unit(layout), load_model(folders[form], mtp=True, layout=layout, precision="bf16")
    assert_same((found.params, found.biases), (expected.params, expected.biases))
    assert (found.mesh, found.layout, found.config) == (expected.mesh, expected.layout, expected.config)
    assert found.params["moe"]["attention"]["q_b"].dtype == jnp.bfloat16
    assert found.params["moe"]["moe"]["router"].dtype == jnp.float32
    if found.placement:
        np.testing.assert_array_equal(found.placement.expert_of_slot, expected.placement.expert_of_slot)


@pytest.mark.parametrize("layout", [None, "shared as routed"])
def test_weights_in_fp8_are_quantized_alike_before_and_after_reading(folders, layout):
    layout, path = LAYOUTS.get(layout), folders["fp32"]
    alone = load_model(path, mtp=True, precision="fp32")
    expected = alone.on_unit(layout or Layout(), fp8=True).params
    found = load_model(path, mtp=True, layout=layout, precision="fp8")
    assert "quantized to FP8" in found.origin
    pairs = zip(quantized(found.params), quantized(expected), strict=True)
    for (name, a), (other, b) in pairs:
        assert (name, bits(a.codes), bits(a.scales)) == (other, bits(b.codes), bits(b.scales)), name
    assert found.params["moe"]["attention"]["kv_b"].dtype == jnp.bfloat16


def quantized(params):
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Fp8Weight)]


def bytes_of(folder):
    """What is stored of every tensor."""
    return {name: bytes(found["data"]) for name, found in deserialize((folder / "model.safetensors").read_bytes())}


def in_file(tensors, layer, name):
    """Codes and scales of a tensor."""
    name = f"model.layers.{layer}.{name}"
    return tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_codes_and_scales_are_the_files(folders, layout):
    layout = LAYOUTS.get(layout, Layout())
    model = load_model(folders["fp8"], mtp=True, layout=layout, precision="fp8")
    assert model.origin.endswith(", in FP8 as stored")
    tensors, held = bytes_of(folders["fp8"]), first_placement(model.config, layout)
    params = jax.tree.map(np.asarray, model.params)  # JAX would add zeros to what it cuts out of a divided array.
    names = {"q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "o": "o_proj"}
    groups = [("dense", 0, 0), ("moe", 0, 1), ("moe", 2, 3), ("mtp", 0, 4)]
    for group, row, layer in groups:
        stacked = params[group]["block"] if group == "mtp" else params[group]
        for ours, theirs in names.items():
            weight = stacked["attention"][ours]
            found = bits(weight.codes[row]), bits(weight.scales[row])
            assert found == in_file(tensors, layer, f"self_attn.{theirs}"), (group, ours)
        assert not isinstance(stacked["attention"]["kv_b"], Fp8Weight)
        if group == "dense":
            assert pair(stacked["ffn"]["gate_up"], (row,)) == of_pair(tensors, layer, "mlp")
            continue
        experts = stacked["moe"]["experts"]
        for slot, expert in enumerate(held.expert_of_slot[layer - 1]):
            theirs = f"mlp.experts.{expert}" if expert < 8 else "mlp.shared_experts"
            assert pair(experts["gate_up"], (row, slot)) == of_pair(tensors, layer, theirs)
            down = bits(experts["down"].codes[row, slot]), bits(experts["down"].scales[row, slot])
            assert down == in_file(tensors, layer, f"{theirs}.down_proj")
        assert ("shared" in stacked["moe"]) != layout.shared_as_routed


def pair(weight, at):
    return bits(weight.codes[at]), bits(weight.scales[at])


def of_pair(tensors, layer, name):
    gate, up = (in_file(tensors, layer, f"{name}.{which}_proj") for which in ("gate", "up"))
    return gate[0] + up[0], gate[1] + up[1]


def read_alone(folder, dtype=jnp.float32, *, fp8):
    source = open_huggingface(folder)
    device = SingleDeviceSharding(jax.devices()[0])
    held = first_placement(source.config, Layout()).expert_of_slot
    return read_weights(Arrays(source), source.config, Layout(), held, lambda _: device, dtype, fp8=fp8)[0]


def test_blocks_that_gate_and_up_would_share_are_made_anew():
    """The golden model's 32 and 96 rows of a gate are no whole blocks; its other weights are partial blocks at most."""
    tensors, params = bytes_of(GOLDEN / "hf_fp8"), read_alone(GOLDEN / "hf_fp8", fp8=True)
    experts = params["moe"]["moe"]["experts"]
    for expert in range(8):
        down = bits(experts["down"].codes[0, expert]), bits(experts["down"].scales[0, expert])
        assert down == in_file(tensors, 1, f"mlp.experts.{expert}.down_proj")
    assert experts["gate_up"].scales.shape == (1, 8, 1, 1)
    exact = read_alone(GOLDEN / "hf_fp8", fp8=False)["moe"]["moe"]["experts"]["gate_up"]
    made = dequantized(experts["gate_up"].forward, experts["gate_up"].recipe, 128).reshape(exact.shape)
    assert np.abs(made - exact).max() <= np.abs(exact).max() / 16
    # In 3 layers 4 arrays of attention, and 2, 4 and 4 of networks, of which 1, 2 and 2 are pairs.
    assert fp8_weights_kept(Arrays(open_huggingface(GOLDEN / "hf_fp8"))) == (17, 22)
    assert fp8_weights_kept(Arrays(open_huggingface(GOLDEN / "hf"))) == (0, 22)


def test_a_layout_must_not_cut_through_blocks(folders):
    with pytest.raises(ValueError, match=r"layout\.tensor = 4: must divide the 256 rows .*attention\.o in FP8"):
        load_model(folders["fp8"], layout=Layout(data=2, tensor=4), precision="fp8")
    alone = load_model(folders["fp8"], precision="bf16")
    with pytest.raises(ValueError, match="into whole blocks of 128"):
        alone.on_unit(Layout(data=2, tensor=4), fp8=True)
    load_model(folders["fp8"], layout=Layout(data=2, tensor=4), precision="bf16")


def test_what_cannot_be_loaded(folders, tmp_path):
    path = folders["fp32"]
    for how, said in [
        ({"precision": "fp4"}, "precision = 'fp4': must be one of auto, bf16, fp32, fp8"),
        ({"layout": Layout(tensor=3)}, r"layout\.tensor = 3: must divide model\.num_attention_heads = 4"),
        ({"layout": Layout(data=16)}, "= 16 devices: there are 8"),
        ({"layout": Layout(data=2), "devices": jax.devices()[:1]}, "= 2 devices: there are 1"),
        ({"layout": Layout(slots=9)}, r"layout\.slots = 9 on a single device: must be 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            load_model(path, **how)
    other = shutil.copytree(path, tmp_path / "other")
    document = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(document | {"moe_intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"wrong shape: model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight"):
        load_model(other, layout=LAYOUTS["plain"])
    shutil.copy(path / "config.json", other)
    with open(other / "model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(other / "model.safetensors") - 100)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        load_model(other, layout=LAYOUTS["plain"])


def test_a_run_of_another_model_than_its_checkpoint(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("routed_scaling_factor = 2.5", "routed_scaling_factor = 2.0"))
    with pytest.raises(ValueError, match=r"model\.routed_scaling_factor: 2\.5 in the checkpoint, 2\.0 now"):
        load_model(copy)


@pytest.mark.parametrize("form", ["fp32", "fp8"])
def test_a_byte_is_read_for_whom_it_is(folders, form, monkeypatch):
    """All devices of a process read what each of them holds, and what several hold, once."""
    monkeypatch.setattr(files, "_SKIPPED", 1)  # Rows are as short as a test's.
    read, original = [], files.os.preadv

    def preadv(descriptor, buffers, offset):
        read.append(original(descriptor, buffers, offset))
        return read[-1]

    def bytes_for(layout):
        read.clear()
        load_model(folders[form], layout=layout, precision=form)
        return sum(read)

    source = open_huggingface(folders[form])
    sizes = {name: np.prod(t.shape) * files.DTYPES[t.dtype].itemsize for name, t in source.stored.items()}
    monkeypatch.setattr(files.os, "preadv", preadv)
    main = {name: size for name, size in sizes.items() if not name.startswith("model.layers.4.")}
    # Each half of kv_b takes all of the scales to be multiplied out: they are few.
    again = sum(size for name, size in main.items() if name.endswith("kv_b_proj.weight_scale_inv"))
    once = sum(main.values())
    assert bytes_for(Layout()) == once
    assert bytes_for(LAYOUTS["plain"]) == once + again
    # Each of the 8 experts has 2 slots, on different devices: as in processes of their own, both read it.
    experts = sum(size for name, size in main.items() if ".experts." in name)
    assert bytes_for(LAYOUTS["redundant"]) == once + again + experts


def test_arrays_on_their_way_elsewhere_are_written_in_rows(folders, monkeypatch):
    """As for devices with memory of their own."""
    path = folders["fp8"]
    layout = LAYOUTS["redundant"]
    expected = [load_model(path, layout=layout, precision=precision) for precision in ("bf16", "fp8")]
    monkeypatch.setattr(reading, "AT_ONCE", 1 << 19)
    monkeypatch.setattr(reading, "_takes_memory_over", lambda device: False)
    parts, put = [], reading._put

    def watched(wanted, sharding, read, start, stop):
        made = put(wanted, sharding, read, start, stop)
        parts.append((stop - start, wanted[0].shape[0], sum(s.data.nbytes for a in made for s in a.addressable_shards)))
        return made

    monkeypatch.setattr(reading, "_put", watched)
    for precision, before in zip(("bf16", "fp8"), expected, strict=True):
        parts.clear()
        after = load_model(path, layout=layout, precision=precision)
        assert_same((after.params, after.biases), (before.params, before.biases))
        assert any(1 < count < rows for count, rows, _ in parts)
        assert all(count == 1 or size <= 1 << 19 for count, _, size in parts)


def test_weights_as_stored_answer_nearly_like_those_multiplied_out(wide, random_parameters, tokenizer, tmp_path):
    """Where every token has all experts: in others, rounding changes the choice of some."""
    config = replace(wide, num_experts_per_tok=8, n_group=1, topk_group=1, num_hidden_layers=2)
    params, biases = random_parameters(config)
    save_huggingface(tmp_path / "fp8", config, unstack(params, config), unstack(biases, config), "fp8")
    tokenizer.save(tmp_path / "fp8" / "tokenizer.json")
    found = []
    for precision in ("fp8", "fp32"):
        engine = Engine(load_model(tmp_path / "fp8", precision=precision), replace(SETTINGS, context=32))
        request = engine.submit(prompt(9), replace(GREEDY, logprobs=20), max_tokens=1, stop_ids=[])
        answered(engine, request)
        found.append(dict(request.tokens[0].likeliest))
    common = sorted(set(found[0]) & set(found[1]))
    assert len(common) >= 15
    fp8, exact = (np.array([scores[id] for id in common]) for scores in found)
    assert 0 < np.sqrt(np.mean((fp8 - exact) ** 2)) < 0.25 * np.std(exact)


def feed_forward_of_a_routed_expert(params, x):
    """A feed-forward network as the only one of a layer's routed experts, which every token chooses with weight 1."""
    experts = RoutedExperts(jax.tree.map(lambda w: w[None], params), Runtime())
    everyone = jnp.zeros((len(x), 1), jnp.int32)
    return exchange_locally(experts, x, everyone, jnp.ones((len(x), 1)), 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["redundant", "shared as routed"])
def test_units_answer_in_fp8_like_a_device(folders, name, monkeypatch):
    """In float32 but for the products, with speculation, and one of them in two micro-batches. Tokens that go to routed
    experts have scales of powers of two, and so has what a shared expert is given if it is one of them: the device that
    is compared with does the same."""
    alone, layout = load_model(folders["fp32"], mtp=True, precision="fp32"), LAYOUTS[name]
    layout, found = replace(layout, micro_batches=1 + (name == "redundant")), []
    for unit in (Layout(), layout):
        model = alone.on_unit(unit, fp8=True)
        if layout.shared_as_routed and not model.layout.shared_as_routed:
            monkeypatch.setattr("dsjax.model.moe.feed_forward", feed_forward_of_a_routed_expert)
            model = replace(model, config=replace(model.config, name=name))  # Not the programs of another test.
        engine = Engine(model, replace(SETTINGS, slots=12, context=48, shortest_table=48, speculate=1))
        how = replace(GREEDY, logprobs=1)
        requests = [engine.submit(prompt(n), how, max_tokens=8, stop_ids=[]) for n in (1, 9, 20, 30)]
        found.append((answered(engine, *requests), [[token.logprob for token in r.tokens] for r in requests]))
        monkeypatch.undo()
    (expected, scores), (answers, own) = found
    assert answers == expected
    # Sums in another order differ in the last bits, which now and then makes another code.
    difference = np.abs(np.subtract(own, scores))
    assert np.median(difference) < 1e-5 and difference.max() < 0.02
