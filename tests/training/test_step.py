"""Laws of the train step: accumulation, router biases, steps that are skipped, the weight of the MTP loss."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import DataConfig
from dsjax.model.moe import MoEAux
from dsjax.model.router import updated_bias
from dsjax.model.transformer import losses
from dsjax.runtime import Runtime
from dsjax.training.optimizer import initial_moments
from dsjax.training.state import TrainState
from dsjax.training.step import (
    Knobs,
    StepLosses,
    accumulated_loss_and_grads,
    make_evaluate,
    make_train_step,
    segment_ids,
)

KNOBS = Knobs(learning_rate=1e-3, mtp_weight=0.3, bias_speed=1e-3)


def gradients(state):
    """The gradients of the first step: without clipping, the first moment is a tenth of them."""
    return jax.tree.map(lambda m: np.asarray(m) / 0.1, state.moments.first)


def relative_errors(got, want):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        yield jax.tree_util.keystr(path), np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


def same_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_accumulation_equals_one_batch(start, train_step, tokens):
    """Four micro-batches of one sequence are one of four: losses, gradients, loads, and the biases to the bit."""
    whole, whole_metrics = train_step(start(), tokens[None], KNOBS)
    parts, parts_metrics = train_step(start(), tokens[:, None], KNOBS)
    for key in ("loss", "loss_mtp", "loss_balance", "grad_norm"):
        np.testing.assert_allclose(parts_metrics[key], whole_metrics[key], rtol=1e-6, err_msg=key)
    np.testing.assert_array_equal(parts_metrics["loads"], whole_metrics["loads"])
    for name, error in relative_errors(gradients(parts), gradients(whole)):
        assert error < 1e-6, f"{name}: {error:.1e}"
    assert all(jax.tree.leaves(jax.tree.map(same_bits, parts.biases, whole.biases)))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_biases_move_once_by_the_loads_of_the_whole_step(start, train_step, tokens, small_run, micro_batches):
    before = start()
    state, metrics = train_step(start(), tokens.reshape(micro_batches, 4 // micro_batches, -1), KNOBS)
    loads = metrics["loads"]
    assert loads.shape == (2 + 1, 8) and loads.dtype == jnp.int32
    np.testing.assert_array_equal(loads.sum(axis=1), tokens[:, 1:].size * small_run.model.num_experts_per_tok)
    moe, mtp = state.biases["moe"]["moe"]["bias"], state.biases["mtp"]["block"]["moe"]["bias"]
    np.testing.assert_array_equal(moe, updated_bias(before.biases["moe"]["moe"]["bias"], loads[:2], 1e-3))
    np.testing.assert_array_equal(mtp, updated_bias(before.biases["mtp"]["block"]["moe"]["bias"], loads[2:], 1e-3))
    assert set(np.unique(np.abs(np.concatenate([moe, mtp])))) <= {np.float32(0), np.float32(1e-3)}
    still, _ = train_step(
        start(), tokens.reshape(micro_batches, 4 // micro_batches, -1), KNOBS._replace(bias_speed=0.0)
    )
    assert all(jax.tree.leaves(jax.tree.map(same_bits, still.biases, before.biases)))


def test_mtp_weight_weighs_the_mtp_loss_alone(start, train_step, tokens):
    """Gradients are affine in the weight; at 0 no gradient of the MTP loss is left, only of its balance loss."""
    (none, metrics), (half, _), (full, with_mtp) = (
        train_step(start(), tokens[None], KNOBS._replace(mtp_weight=weight)) for weight in (0.0, 0.5, 1.0)
    )
    none, half, full = (gradients(state) for state in (none, half, full))
    assert same_bits(metrics["loss"], with_mtp["loss"]) and same_bits(metrics["loss_mtp"], with_mtp["loss_mtp"])
    for name, error in relative_errors(half, jax.tree.map(lambda a, b: (a + b) / 2, none, full)):
        assert error < 1e-5, f"{name}: {error:.1e}"
    assert not np.any(none["mtp"]["norm"]) and not np.any(none["mtp"]["block"]["moe"]["experts"]["down"])
    assert np.any(none["mtp"]["block"]["moe"]["router"]), "the balance loss has no weight here"
    for name in ("embed", "head", "moe", "dense", "mtp"):
        assert all(
            np.any(a != b) for a, b in zip(jax.tree.leaves(none[name]), jax.tree.leaves(full[name]), strict=True)
        )


def test_a_step_that_is_not_finite_changes_nothing_else(start, train_step, tokens):
    """Every bit of weights, biases and moments stays; the next good step ends the row and keeps the count."""
    state, _ = train_step(start(), tokens[None], KNOBS)
    broken = replace(state, params=state.params | {"norm": state.params["norm"].at[3].set(jnp.inf)})
    kept = jax.tree.map(np.array, broken)
    for count in (1, 2):
        broken, metrics = train_step(broken, tokens[None], KNOBS)
        assert not metrics["finite"]
        for name in ("params", "biases", "moments"):
            assert all(jax.tree.leaves(jax.tree.map(same_bits, getattr(broken, name), getattr(kept, name))))
        assert (broken.step, broken.skipped, broken.skipped_in_a_row) == (1 + count, count, count)
    mended = replace(broken, params=broken.params | {"norm": jnp.ones(32)})
    mended, metrics = train_step(mended, tokens[None], KNOBS)
    assert metrics["finite"] and (mended.step, mended.skipped, mended.skipped_in_a_row) == (4, 2, 0)
    assert mended.moments.count == 2
    assert not same_bits(mended.params["embed"], kept.params["embed"])


@pytest.mark.parametrize("fault", ["none", "loss", "mtp loss", "gradient", "gradient too large to sum"])
def test_what_makes_a_step_not_finite(small_run, fault):
    """The gradients come from a function of the caller's; any of its results can spoil a step."""
    nan = jnp.float32(jnp.nan)

    def given(params, biases, micro_batches, mtp_weight):
        grads = {
            "w": {"none": 1.0, "gradient": jnp.inf, "gradient too large to sum": 1e30}.get(fault, 1.0) * jnp.ones(2)
        }
        main, mtp = nan if fault == "loss" else 1.0, nan if fault == "mtp loss" else mtp_weight
        aux = MoEAux(micro_batches, jnp.zeros(2), jnp.ones(2, jnp.int32))
        return StepLosses(jnp.float32(main), jnp.float32(mtp), aux), grads

    params, biases = {"w": jnp.ones(2)}, {"moe": {"moe": {"bias": jnp.zeros((2, 2))}}}
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    state = TrainState(zeros[0], params, biases, initial_moments(params, small_run.optimizer), zeros[1], zeros[2])
    step = make_train_step(small_run, Runtime(), loss_and_grads=given)
    state, metrics = step(state, jnp.asarray([[3, 1], [2, 2]], jnp.int32), KNOBS)
    good = fault == "none"
    assert bool(metrics["finite"]) == good and state.skipped == state.skipped_in_a_row == 1 - good and state.step == 1
    assert np.isfinite(state.params["w"]).all() and bool(jnp.all(state.params["w"] < 1)) == good
    step_of_bias = np.float32(1e-3) if good else 0
    np.testing.assert_array_equal(state.biases["moe"]["moe"]["bias"], [[-step_of_bias, step_of_bias], [0, 0]])


def test_a_step_takes_its_states_memory_and_compiles_once(start, train_step, tokens):
    state = start()
    after, _ = train_step(state, tokens[None], KNOBS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    programs = train_step._cache_size()
    train_step(after, tokens[None], Knobs(2e-3, 0.1, 0.0))
    assert train_step._cache_size() == programs


def test_steps_learn_and_evaluation_agrees(start, train_step, tokens, small_run):
    evaluate = make_evaluate(small_run, Runtime())
    state = start()
    before = evaluate(state.params, state.biases, tokens)
    history = []
    for _ in range(20):
        state, metrics = train_step(state, tokens[None], KNOBS._replace(learning_rate=1e-2))
        history.append(metrics)
    np.testing.assert_allclose(before["loss"], history[0]["loss"], rtol=1e-6)
    np.testing.assert_allclose(before["loss_mtp"], history[0]["loss_mtp"], rtol=1e-6)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"] and history[-1]["loss_mtp"] < 0.7 * history[0]["loss_mtp"]
    assert all(metrics["finite"] for metrics in history) and state.step == 20


def test_segments_number_documents():
    tokens = jnp.asarray([[5, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 0]])
    np.testing.assert_array_equal(segment_ids(tokens, 0), [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]])


def test_document_mask_reaches_the_model(small_run, tokens, start):
    """Losses of a step and of an evaluation are those of the model that tells documents apart, where asked for."""
    state, end = start(), int(tokens[0, 5])
    found = {}
    for masked in (False, True):
        config = replace(small_run, data=DataConfig(sequence_length=16, document_mask=masked))
        segments = segment_ids(tokens[:, :-1], end) if masked else None
        direct = losses(state.params, state.biases, tokens, config=config.model, runtime=Runtime(), segments=segments)
        in_parts = jax.jit(accumulated_loss_and_grads(config, Runtime(), end_of_document=end))
        parts, _ = in_parts(state.params, state.biases, tokens[None], jnp.float32(0))
        evaluated = make_evaluate(config, Runtime(), end_of_document=end)(state.params, state.biases, tokens)
        np.testing.assert_allclose([parts.main, evaluated["loss"]], 2 * [direct.main], rtol=1e-6)
        found[masked] = float(direct.main)
    assert abs(found[True] - found[False]) > 1e-4


def test_products_of_float32_are_not_rounded(small_run, tokens, start, train_step):
    """As chips do by default; on a CPU only the program can show it."""
    program = train_step.lower(start(), tokens[None], Knobs(1e-3, 0.3, 1e-3)).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 50
    assert not [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line]
