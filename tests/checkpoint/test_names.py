"""The name table against the complete tensor list of a real release, and as a bijection."""

import json
import math
from pathlib import Path

import pytest

from dsjax.checkpoint.audit import compare_listings, read_listing, released_listing
from dsjax.checkpoint.families import config_from_huggingface
from dsjax.checkpoint.names import locate, scale_shape, tensors
from dsjax.checkpoint.sources import model_arrays
from dsjax.settings import load_model_config

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def r1():
    return config_from_huggingface(json.loads((GOLDEN / "r1_config.json").read_text()))


def test_all_91991_names_dtypes_and_shapes_are_those_of_the_release(r1):
    ours, reference = released_listing(r1), read_listing(GOLDEN / "r1_tensors.json.gz")
    assert compare_listings(ours, reference) == []
    assert len(ours) == len(reference) == 91_991
    assert ours == reference


def test_the_release_has_the_elements_that_the_report_counts(r1):
    listing = released_listing(r1)
    size = {dtype: sum(math.prod(s) for d, s in listing.values() if d == dtype) for dtype in ("F8_E4M3", "BF16", "F32")}
    assert size == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_540_496 + 15_104}
    weights = sum(math.prod(shape) for name, (_, shape) in listing.items() if not name.endswith("_scale_inv"))
    assert weights == 684_489_845_504


def test_every_difference_of_two_lists_is_told():
    reference = {"a": ("BF16", (2,)), "b": ("BF16", (2,)), "c": ("F32", (3,))}
    ours = {"a": ("BF16", (2,)), "b": ("F32", (4,)), "d": ("F32", (3,))}
    assert compare_listings(ours, reference) == [
        "not in the reference: d",
        "only in the reference: c",
        "b: F32[4], the reference has BF16[2]",
    ]


@pytest.mark.parametrize(
    ("model", "weights"), [("v2_236b", 235_741_434_880), ("v2_lite_16b", 15_706_484_224), ("tiny", None)]
)
def test_other_families_have_the_parameters_of_their_reports(model, weights):
    config = load_model_config(model)
    listing = released_listing(config, fp8=False)
    assert ("model.layers.1.self_attn.q_proj.weight" in listing) == (not config.q_lora_rank)
    assert any("bias" in name for name in listing) == (config.topk_method == "noaux_tc")
    assert {dtype for dtype, _ in listing.values()} <= {"BF16", "F32"}
    if weights:
        assert sum(math.prod(shape) for _, shape in listing.values()) == weights


@pytest.mark.parametrize("model", ["v3_671b", "v2_lite_16b", "tiny"])
def test_names_lead_back_to_where_they_came_from(model):
    config = load_model_config(model)
    pieces = tensors(model_arrays(config))
    for piece in pieces:
        if not piece.copy:
            assert locate(piece.huggingface, config.num_hidden_layers) == (piece.path, piece.index)
    places = [(piece.path, piece.index) for piece in pieces if not piece.copy]
    assert len(set(places)) == len(places)
    demo = [piece.deepseek for piece in pieces if piece.deepseek]
    assert len(set(demo)) == len(demo)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate_proj.weight_scale_inv",
        "model.layers.x.mlp.gate_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "lm_head.bias",
        "model.layers.1.enorm.weight",
        "model.layers.61.embed_tokens.weight",
        "",
    ],
)
def test_names_outside_the_table_lead_nowhere(name):
    assert locate(name, 61) is None


def test_the_pieces_of_an_array_cover_it_once(r1):
    shapes = model_arrays(r1)
    elements = dict.fromkeys(shapes, 0)
    for piece in tensors(shapes):
        elements[piece.path] += 0 if piece.copy else math.prod(piece.shape)
    assert elements == {path: math.prod(shape) for path, shape in shapes.items()}


def test_the_demo_names_of_the_first_layers_and_no_mtp(r1):
    names = {piece.huggingface: piece.deepseek for piece in tensors(model_arrays(r1))}
    assert names["model.embed_tokens.weight"] == "embed.weight"
    assert names["lm_head.weight"] == "head.weight"
    assert names["model.layers.0.mlp.up_proj.weight"] == "layers.0.ffn.w3.weight"
    assert names["model.layers.3.mlp.experts.255.down_proj.weight"] == "layers.3.ffn.experts.255.w2.weight"
    assert names["model.layers.3.mlp.gate.e_score_correction_bias"] == "layers.3.ffn.gate.bias"
    assert names["model.layers.60.self_attn.kv_a_proj_with_mqa.weight"] == "layers.60.attn.wkv_a.weight"
    assert all(demo is None for name, demo in names.items() if name.startswith("model.layers.61."))


def test_an_array_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="no row of the name table is for params/layers/0/attention/bias"):
        tensors({"params/layers/0/attention/bias": (3,)})


def test_scales_count_partial_blocks():
    assert scale_shape((576, 7168)) == (5, 56)
    assert scale_shape((8, 2, 1, 129)) == (8, 2, 1, 2)
