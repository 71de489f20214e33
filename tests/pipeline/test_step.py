"""The real model through every schedule, against the step without a pipeline."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import MTP_WEIGHT, ROOMY, TIGHT

from dsjax.config import Config, MeshConfig, PipelineConfig
from dsjax.model.layout import unstack
from dsjax.parallel.mesh import BATCH_AXES, make_mesh
from dsjax.parallel.sharding import partitions, reduce_scatter, specs
from dsjax.pipeline import executor, step
from dsjax.pipeline.program import Field
from dsjax.pipeline.stages import rows_of, stage_layout
from dsjax.runtime import DEEPSEEK, Runtime
from dsjax.settings import load_model_config
from dsjax.training.state import from_canonical, initial_state, to_canonical
from dsjax.training.step import Knobs, accumulated_loss_and_grads, make_evaluate, make_train_step

FAST = [
    ("dualpipe", MeshConfig(pipe=4, node=2), {"mtp": 1, "remat": "report", "dense": 1}),
    ("zb1p", MeshConfig(pipe=4), {"mtp": 1, "remat": "report", "dense": 0}),
    ("1f1b", MeshConfig(pipe=2, data=2, local=2), {"mtp": 0, "remat": "full", "dense": 1}),
    ("gpipe", MeshConfig(pipe=4), {"mtp": 0, "remat": "full", "dense": 1}),
]
SLOW = [
    ("dualpipe", MeshConfig(pipe=2, data=2, local=2), {"mtp": 0, "remat": "none", "dense": 1}),
    ("dualpipe", MeshConfig(pipe=2), {"mtp": 1, "remat": "full", "dense": 1}),
    ("dualpipev", MeshConfig(pipe=2, local=2), {"mtp": 1, "remat": "none", "dense": 1}),
    ("dualpipev", MeshConfig(pipe=2, node=2), {"mtp": 0, "remat": "report", "dense": 1}),
    ("zb1p", MeshConfig(pipe=2, data=2, node=2), {"mtp": 0, "remat": "none", "dense": 1}),
    ("1f1b", MeshConfig(pipe=4, node=2), {"mtp": 1, "remat": "none", "dense": 1}),
    ("gpipe", MeshConfig(pipe=2, local=2), {"mtp": 1, "remat": "report", "dense": 1}),
]
KNOBS = Knobs(1e-2, 0.3, 1e-3)


def named(cases, dispatch, *marks):
    return [
        pytest.param(*case, dispatch, marks=marks, id=f"{case[0]}-{'x'.join(str(n) for n in vars(case[1]).values())}")
        for case in cases
    ]


@pytest.fixture(scope="module")
def micro_batches():
    """Eight micro-batches of four sequences."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 4, 17)), jnp.int32)


def config_of(run: Config, *, mtp: int, remat: str, dense: int) -> Config:
    model = replace(run.model, num_hidden_layers=5 + dense, first_k_dense_replace=dense, num_nextn_predict_layers=mtp)
    return replace(run, model=model, train=replace(run.train, batch_size=32, micro_batch_size=4, remat=remat))


def found(config, micro_batches, options=None, **runtime):
    """Losses, and gradients in the canonical layout."""
    state = initial_state(config)
    function = accumulated_loss_and_grads(config, Runtime(remat=config.train.remat, **runtime))
    function = jax.jit(function, compiler_options=options)
    losses, grads = function(state.params, state.biases, micro_batches, MTP_WEIGHT)
    return jax.device_get((losses, unstack(grads, config.model, rows_of(config))))


@pytest.fixture(scope="module")
def alone(run, micro_batches):
    known = {}

    def find(settings):
        key = tuple(settings.values())
        if key not in known:
            known[key] = found(config_of(run, **settings), micro_batches)
        return known[key]

    return find


@pytest.mark.parametrize(
    ("schedule", "mesh", "settings", "dispatch"), [*named(FAST, ROOMY), *named(SLOW, TIGHT, pytest.mark.slow)]
)
def test_losses_and_every_gradient_are_those_without_a_pipeline(
    run, micro_batches, alone, schedule, mesh, settings, dispatch
):
    pipelined = replace(
        config_of(run, **settings), mesh=mesh, dispatch=dispatch, pipeline=PipelineConfig(schedule=schedule)
    )
    losses, grads = found(pipelined, micro_batches)
    expected, expected_grads = alone(settings)
    np.testing.assert_allclose(losses.main, expected.main, rtol=1e-6)
    np.testing.assert_allclose(losses.mtp, expected.mtp, rtol=1e-6)
    rows = rows_of(pipelined)
    order = [rows.index(layer) for layer in range(5)] + [len(rows)] * settings["mtp"]
    np.testing.assert_array_equal(losses.aux.loads[order], expected.aux.loads)
    np.testing.assert_allclose(losses.aux.balance_loss[order], expected.aux.balance_loss, rtol=1e-5)
    for (path, grad), want in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        error = np.linalg.norm(grad - want) / np.linalg.norm(want)
        assert error < 1e-5, (jax.tree_util.keystr(path), error)


def test_overlapped_pairs_give_the_bits_of_pairs_run_one_after_the_other(run, micro_batches, monkeypatch):
    config = replace(
        config_of(run, mtp=1, remat="report", dense=1),
        mesh=MeshConfig(pipe=4, node=2),
        dispatch=ROOMY,
        pipeline=PipelineConfig(schedule="dualpipe"),
    )
    apart = replace(config, pipeline=replace(config.pipeline, overlap=False))
    overlapped, serial = (step.program_of(c, len(micro_batches)) for c in (config, apart))
    schedule = overlapped.schedule

    def pairs(program):
        return sum(len(program.opcodes[code]) > 1 for code in program.table[:, :, Field.OPCODE].flat)

    assert (pairs(overlapped), pairs(serial)) == (sum(len(a) > 1 for ops in schedule.lists for a in ops), 0)
    in_turns = []
    interleaved = executor.interleaved
    monkeypatch.setattr(executor, "interleaved", lambda branch: in_turns.append(branch) or interleaved(branch))
    # XLA makes a product and the transpose in front of it one, which sums in another order, if no barrier is between.
    options = {"xla_disable_hlo_passes": "transpose-folding"}
    results = [found(config, micro_batches, options)]
    assert in_turns
    in_turns.clear()
    results.append(found(apart, micro_batches, options))
    assert not in_turns
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_small_step_of_a_ramp_under_another_schedule(run, micro_batches):
    """Two micro-batches are too few for DualPipe on two ranks; ZB1P computes the same."""
    plain = config_of(run, mtp=0, remat="full", dense=0)
    train = replace(plain.train, batch_ramp_start=8, batch_ramp_fraction=0.5)
    piped = replace(plain, train=train, mesh=MeshConfig(pipe=2), pipeline=PipelineConfig(schedule="dualpipe"))
    assert [step.program_of(piped, count).schedule.name for count in (2, 3, 8)] == ["ZB1P", "ZB1P", "DualPipe"]
    (losses, grads), (expected, expected_grads) = (found(config, micro_batches[:2]) for config in (piped, plain))
    np.testing.assert_allclose(losses.main, expected.main, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), grads, expected_grads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "mesh"), [("dualpipe", MeshConfig(pipe=4)), ("zb1p", MeshConfig(pipe=2)), (None, MeshConfig(local=2))]
)
def test_fp8_in_a_pipeline_is_fp8_without(run, micro_batches, schedule, mesh):
    """Equal where the same rows share scales. On two devices other tokens of an expert do: rounding, and no more."""
    plain = config_of(run, mtp=1, remat="report", dense=1)
    other = replace(plain, mesh=mesh, dispatch=ROOMY)
    if schedule:
        other = replace(other, pipeline=PipelineConfig(schedule=schedule))
    (losses, grads), (expected, expected_grads) = (found(c, micro_batches, recipe=DEEPSEEK) for c in (other, plain))
    np.testing.assert_allclose(losses.main, expected.main, rtol=1e-6)
    np.testing.assert_allclose(losses.mtp, expected.mtp, rtol=1e-6)
    for (path, grad), want in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        error = np.linalg.norm(grad - want) / np.linalg.norm(want)
        assert error < (1e-5 if schedule else 0.1), (jax.tree_util.keystr(path), error)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_more_micro_batches_take_no_more_memory_and_no_longer_program(run, schedule):
    config = replace(
        config_of(run, mtp=0, remat="report", dense=1),
        mesh=MeshConfig(pipe=4, local=2),
        pipeline=PipelineConfig(schedule=schedule),
    )
    state = initial_state(config)
    sizes = set()
    for count in (12, 40):
        tokens = jax.ShapeDtypeStruct((count, 4, 17), jnp.int32)
        function = accumulated_loss_and_grads(config, Runtime(remat="report"))
        compiled = jax.jit(function).lower(state.params, state.biases, tokens, MTP_WEIGHT).compile()
        instructions = sum(" = " in line for line in compiled.as_text().splitlines())
        sizes.add((compiled.memory_analysis().temp_size_in_bytes, instructions))
    assert len(sizes) == 1, sizes


def test_steps_evaluation_and_the_state_on_another_mesh(run, micro_batches):
    """Two optimizer steps; then the state goes to the other mesh, and evaluates the same there."""
    plain = config_of(run, mtp=1, remat="full", dense=1)
    # Adam would make much of the last bits of small gradients.
    plain = replace(plain, optimizer=replace(plain.optimizer, eps=1e-4))
    piped = replace(
        plain, dispatch=ROOMY, mesh=MeshConfig(pipe=4, local=2), pipeline=PipelineConfig(schedule="dualpipe")
    )
    ends = []
    for config in (plain, piped):
        state, evaluate = initial_state(config), make_evaluate(config, Runtime())
        train_step = make_train_step(config, Runtime())
        for _ in range(2):
            state, metrics = train_step(state, micro_batches, KNOBS)
        losses = evaluate(state.params, state.biases, micro_batches[0])
        ends.append((metrics, losses, jax.device_get(to_canonical(state, config)), evaluate))
    (metrics, losses, tree, evaluate), (piped_metrics, piped_losses, piped_tree, piped_evaluate) = ends
    for key in ("loss", "loss_mtp", "loss_balance", "grad_norm"):
        np.testing.assert_allclose(piped_metrics[key], metrics[key], rtol=1e-5)
    np.testing.assert_array_equal(piped_metrics["loads"].sum(1), metrics["loads"].sum(1))
    np.testing.assert_allclose(piped_losses["loss_mtp"], losses["loss_mtp"], rtol=1e-5)
    assert jax.tree.structure(tree) == jax.tree.structure(piped_tree)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), piped_tree["params"], tree["params"])
    jax.tree.map(np.testing.assert_array_equal, piped_tree["biases"], tree["biases"])
    moved = from_canonical(jax.tree.map(jnp.asarray, tree), piped)
    np.testing.assert_allclose(
        piped_evaluate(moved.params, moved.biases, micro_batches[0])["loss"], losses["loss"], rtol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(to_canonical(moved, piped)), tree)


@pytest.mark.parametrize(
    ("model", "layers", "stages", "counts"),
    [
        ("v3_671b", 58, 16, (1, *[4] * 14, 1)),
        ("v3_671b", 58, 32, (1, 1, 1, *[2] * 26, 1, 1, 1)),
        ("tiny", 7, 4, (2, 2, 2, 1)),
        ("tiny", 8, 4, (2, 2, 2, 2)),
        ("tiny", 5, 1, (5,)),
    ],
)
def test_stages_have_even_work(model, layers, stages, counts):
    """The ends of DeepSeek-V3 have 3 dense layers, and an MTP module and twice the head: as much as 3 layers each."""
    model = load_model_config(model)
    model = replace(model, num_hidden_layers=layers + model.first_k_dense_replace)
    layout = stage_layout(model, stages)
    assert layout.counts == counts
    assert [layer for stage in range(stages) for layer in layout.layers(stage)] == list(range(layers))


def test_too_few_layers_are_refused(run):
    with pytest.raises(ValueError, match=r"8 stages of a model with 2 MoE layers: .* at most 2 stages"):
        initial_state(replace(run, mesh=MeshConfig(pipe=8)))


def test_a_large_gradient_is_reduced_in_pieces(monkeypatch):
    """Those of a head are, one after the other; the sums are the same bits."""
    monkeypatch.setattr(step, "PIECE", 4 * 64 * 12 // 4)
    mesh = make_mesh(MeshConfig(data=2, local=4))
    parts = {"head": jnp.zeros((64, 12)), "norm": jnp.zeros(3)}
    divided = partitions(parts, mesh)
    grads = {name: jax.random.normal(jax.random.key(0), (8, 8, *part.shape)) for name, part in parts.items()}

    def reduced(function):
        def on_device(grads):
            return function(jax.tree.map(lambda leaf: leaf[0, 0], grads))

        return jax.shard_map(
            on_device, mesh=mesh, in_specs=P(BATCH_AXES), out_specs=specs(parts, mesh), check_vma=False
        )

    whole = reduced(lambda grads: reduce_scatter(grads, divided))
    pieces = reduced(lambda grads: jax.tree.map(step._reduced_in_pieces, grads, divided))
    assert str(jax.make_jaxpr(pieces)(grads)).count("reduce_scatter[") == 4
    for a, b in zip(jax.tree.leaves(whole(grads)), jax.tree.leaves(pieces(grads)), strict=True):
        np.testing.assert_array_equal(a, b)
