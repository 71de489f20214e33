"""Training in FP8: the step learns as in full precision, and a run says what quantization does."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import KernelConfig, MeshConfig, ModelConfig
from dsjax.numerics.weights import PRODUCTS
from dsjax.runtime import DEEPSEEK, MXFP8, Runtime, runtime_of
from dsjax.training.quantization import make_observe, shares, summary
from dsjax.training.state import initial_state
from dsjax.training.step import Knobs, make_evaluate, make_train_step

KNOBS = Knobs(1e-2, 0.3, 1e-3)
STEPS = 16


def losses(config, runtime, tokens):
    """Of steps on the same sequences, which it learns by heart, and what evaluation says at the end."""
    state, step = initial_state(config), make_train_step(config, runtime)
    found = []
    for _ in range(STEPS):
        state, metrics = step(state, tokens[None], KNOBS)
        found.append(float(metrics["loss"]))
    return np.asarray(found), float(make_evaluate(config, runtime)(state.params, state.biases, tokens)["loss"])


@pytest.fixture(scope="module")
def in_full_precision(small_run, tokens):
    return losses(small_run, Runtime(), tokens)


@pytest.mark.parametrize("recipe", [DEEPSEEK, MXFP8], ids=["fp8", "mxfp8"])
def test_it_learns_as_fast_as_in_full_precision(small_run, tokens, in_full_precision, recipe):
    expected, expected_end = in_full_precision
    found, end = losses(small_run, Runtime(recipe=recipe), tokens)
    assert expected[-1] < 0.2 * expected[0]
    # Of more than four nats at the start; later ones are near 0.
    np.testing.assert_allclose(found, expected, atol=0.06)
    np.testing.assert_allclose(end, expected_end, atol=0.06)
    assert not np.allclose(found[1:], expected[1:], rtol=1e-5), "nothing was quantized"


def test_settings_choose_the_recipe(small_run):
    assert runtime_of(small_run).recipe is None
    runtime = runtime_of(replace(small_run, precision="fp8"))
    assert (runtime.recipe, runtime.compute_dtype) == (DEEPSEEK, jnp.bfloat16)
    kernels = KernelConfig(fp8="xla", fp8_gradient_blocks=True)
    recipe = runtime_of(replace(small_run, precision="fp8", kernels=kernels)).recipe
    assert recipe == replace(DEEPSEEK, impl="xla", gradient_blocks=True)
    assert runtime_of(replace(small_run, precision="mxfp8")).recipe == MXFP8


def test_settings_that_cannot_be(small_run):
    with pytest.raises(ValueError, match="fp8_statistics with precision = 'fp32' on 1 devices: needs precision 'fp8'"):
        replace(small_run, train=replace(small_run.train, fp8_statistics=True))
    odd = ModelConfig(**vars(small_run.model) | {"num_attention_heads": 1, "v_head_dim": 12})
    with pytest.raises(ValueError, match="v_head_dim = 12 must be divisible by 8"):
        replace(small_run, model=odd, precision="fp8")
    for precision, kernels, message in (
        ("mxfp8", KernelConfig(fp8_gradient_blocks=True), "an ablation of 'fp8'"),
        ("bf16", KernelConfig(fp8_gradient_blocks=True), "an ablation of 'fp8'"),
        ("mxfp8", KernelConfig(fp8="mosaic"), "no kernels for groups of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(small_run, precision=precision, kernels=kernels)
    with pytest.raises(ValueError, match="precision should be 'fp8' or 'mxfp8'"):
        make_observe(small_run, Runtime())
    state = initial_state(small_run)
    runtime = Runtime(recipe=replace(DEEPSEEK, impl="mosaic"))
    with pytest.raises(ValueError, match="need a Hopper GPU"):
        make_evaluate(small_run, runtime)(state.params, state.biases, jnp.zeros((4, 17), jnp.int32))


def test_observations_are_of_every_layer(small_run, tokens):
    """Names, roles, and numbers that must be: 3 bits of mantissa cost 2 to 3 % wherever a tile is not tiny."""
    config = replace(small_run, precision="fp8")
    state = initial_state(config)
    found = jax.device_get(make_observe(config, runtime_of(config))(state.params, state.biases, tokens))
    layers = {"dense.0": "ffn", "moe.0": "moe", "moe.1": "moe", "mtp.block": "moe"}
    for layer, network in layers.items():
        networks = ["ffn"] if network == "ffn" else ["moe.experts", "moe.shared"]
        names = {f"{layer}.attention.{name}" for name in PRODUCTS if name in ("q_a", "q_b", "kv_a", "kv_b", "o")}
        names |= {f"{layer}.{network}.{name}" for network in networks for name in ("gate_up", "down")}
        for name in names:
            roles = {role for at, role in found if at == name}
            assert roles >= {"weight", "input", "gradient"}, name
    assert {name.rsplit(".", 2)[0] for name, _ in found} >= {"dense.0", "moe.1", "mtp.block"}
    for key, statistics in found.items():
        assert 0.01 < statistics.error < 0.04 and statistics.underflow < 0.05, key
    totals = summary(found)
    assert set(totals) == {
        f"fp8_{role}_{what}"
        for role in ("weight", "input", "gradient")
        for what in ("error", "amax", "underflow", "saturation")
    }
    weights = max(np.abs(leaf).max() for leaf in jax.tree.leaves(state.params["moe"]["attention"]) if leaf.ndim > 2)
    assert totals["fp8_weight_amax"] >= 0.99 * weights


def counting(config, tokens):
    """Return what the metrics of a step say of given weights."""
    step, micro_batch = make_train_step(config, runtime_of(config)), config.train.micro_batch_size or len(tokens)
    micro_batches = tokens.reshape(-1, micro_batch, tokens.shape[-1])

    def counted(params=None):
        state = initial_state(config)
        _, metrics = step(replace(state, params=params) if params else state, micro_batches, KNOBS)
        return shares(jax.device_get(metrics["fp8"])), set(metrics["fp8"])

    return counted


def test_every_step_says_what_became_of_its_weights(small_run, tokens):
    """A matrix with one number far above the others loses these; the step says so, and which kinds it looked at."""
    model = replace(small_run.model, num_hidden_layers=2, num_nextn_predict_layers=0)
    config = replace(small_run, model=model, precision="fp8")
    counted, params = counting(config, tokens), jax.device_get(initial_state(config).params)
    usual, kinds = counted()
    assert kinds == {
        *(f"attention.{name}" for name in ("q_a", "q_b", "kv_a", "kv_b", "o")),
        *(f"{where}.{name}" for where in ("ffn", "experts", "shared") for name in ("gate_up", "down")),
    }
    assert usual["fp8_weights_to_zero"] < 0.01 and usual["fp8_weights_not_finite"] == 0
    matrices = params["moe"]["attention"]["q_a"]
    one_of_each = 1 / matrices[0].size  # matrices are smaller than a block
    assert one_of_each <= usual["fp8_weights_largest"] < 0.05

    def with_first(value):
        changed = matrices.copy()
        changed[:, 0, 0] = value
        moe = params["moe"] | {"attention": params["moe"]["attention"] | {"q_a": changed}}
        return counted(jax.device_put(params | {"moe": moe}))[0]

    zeros = matrices.size - len(matrices)
    dense = params["dense"]["attention"]["q_a"].size
    assert with_first(1e6)["fp8_weights_to_zero"] == pytest.approx(zeros / (matrices.size + dense), 0.01)
    assert with_first(np.nan)["fp8_weights_not_finite"] > 0


def test_in_other_formats_there_is_nothing_to_count(small_run, tokens, train_step, start):
    _, metrics = train_step(start(), tokens[None], KNOBS)
    assert "fp8" not in metrics and shares({}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2), MeshConfig(pipe=2, local=2)], ids=["data", "pipeline, experts divided"]
)
def test_a_mesh_counts_the_same(small_run, tokens, mesh):
    """Up to how often a weight is there; the ends of a pipeline are not counted. Its pairs leave multiprocessors."""
    model = replace(small_run.model, num_nextn_predict_layers=0, first_k_dense_replace=0, num_hidden_layers=2)
    kernels = KernelConfig(communication_sms=20)
    config = replace(small_run, model=model, precision="fp8", kernels=kernels)
    config = replace(config, train=replace(config.train, batch_size=8, micro_batch_size=2))
    rows = jnp.concatenate([tokens, tokens[::-1]])
    alone, kinds = counting(config, rows)()
    found, kinds_there = counting(replace(config, mesh=mesh), rows)()
    assert found == pytest.approx(alone, rel=1e-6) and kinds == kinds_there
