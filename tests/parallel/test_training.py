"""A training step on many devices against the same step on one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import EXPERTS, MESHES, MTP_WEIGHT, ROUTINGS, TIGHT, check_equal, found_on

from dsjax.config import MeshConfig
from dsjax.model.block import block_function
from dsjax.model.context import context
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import batch_spec, partitions
from dsjax.runtime import Runtime
from dsjax.training.state import initial_state
from dsjax.training.step import Knobs, accumulated_loss_and_grads, make_evaluate, make_train_step, on_mesh

FEW = ("2x4", "1x8", "data 2 x EP 2x2")
KNOBS = Knobs(1e-2, 0.3, 1e-3)


@pytest.fixture(scope="module")
def alone(run, micro_batches):
    return found_on(run, micro_batches, ROUTINGS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in MESHES])
def test_losses_loads_and_every_gradient_are_those_of_one_device(run, micro_batches, alone, name):
    mesh, dispatch = MESHES[name]
    found = found_on(replace(run, mesh=mesh, dispatch=dispatch), micro_batches, ROUTINGS)
    for routing in ROUTINGS:
        check_equal(found[routing], alone[routing])
        rounds = found[routing][0].aux.rounds
        assert (rounds > 2).any() == (dispatch is TIGHT and mesh.expert_shards > 1), routing
    loads = alone["one device"][0].aux.loads
    assert (loads[:, :3] == 2 * 8 * 16).all() and loads[:, 3:].sum() == 0, "the biases did not steer"


def test_steps_on_a_mesh_are_those_of_one_device(run, micro_batches):
    """Two optimizer steps with clipping, and evaluation; biases have the same bits on every device."""
    grouped = replace(run.model, n_group=8, topk_group=3)
    results = []
    for mesh in (MeshConfig(), MeshConfig(data=2, node=2, local=2)):
        config = replace(run, model=grouped, mesh=mesh)
        state, step = initial_state(config), make_train_step(config, Runtime())
        for _ in range(2):
            state, metrics = step(state, micro_batches, KNOBS)
        evaluation = make_evaluate(config, Runtime())(state.params, state.biases, micro_batches[0])
        results.append((state, metrics, evaluation))
    (state, metrics, evaluation), (expected, expected_metrics, expected_evaluation) = results[::-1]
    for key in ("loss", "loss_mtp", "loss_balance", "grad_norm"):
        np.testing.assert_allclose(metrics[key], expected_metrics[key], rtol=1e-5)
    np.testing.assert_allclose(evaluation["loss"], expected_evaluation["loss"], rtol=1e-5)
    for bias, of_one in zip(jax.tree.leaves(state.biases), jax.tree.leaves(expected.biases), strict=True):
        assert len(bias.addressable_shards) == 8
        for shard in bias.addressable_shards:
            np.testing.assert_array_equal(shard.data, of_one)
    # Adam divides by the root of squares, which makes much of the last bits of small gradients.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, expected.params)


def test_a_state_is_divided_as_zero_has_it(run):
    """Each device holds its eighth of weights and moments, and of no expert more; values do not depend on the mesh."""
    config = replace(run, mesh=MeshConfig(data=2, node=2, local=2))
    state, whole = initial_state(config), initial_state(run)
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    for tree in (state.params, state.moments.first, state.moments.second):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            assert leaf.size == 8 * leaf.addressable_shards[0].data.size, jax.tree_util.keystr(path)
    down = state.params["moe"]["moe"]["experts"]["down"]
    assert down.addressable_shards[0].data.shape == (2, 8, 32 // 2, 16)


def test_the_compiled_step_reduces_gradients_once(run, micro_batches):
    """One reduction per array, whatever the number of micro-batches, and only exchanges in the loop over them."""
    config = replace(run, mesh=MeshConfig(data=2, node=2, local=2), dispatch=TIGHT)
    state = initial_state(config)
    jaxpr = jax.make_jaxpr(accumulated_loss_and_grads(config, Runtime()))(
        state.params, state.biases, micro_batches, MTP_WEIGHT
    )
    outside, inside = collectives_of(jaxpr.jaxpr)
    divided = jax.tree.leaves(partitions(state.params, make_mesh(config.mesh)))
    assert outside.count("reduce_scatter") == outside.count("all_gather") == len(divided)
    assert set(inside) == {"all_to_all", "pmax"}


def collectives_of(jaxpr, in_loop=False):
    """Names of the collectives outside and inside of loops."""
    outside, inside = [], []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("all_to_all", "all_gather", "reduce_scatter", "psum", "psum_invariant", "pmax", "ppermute"):
            (inside if in_loop else outside).append(name)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found = collectives_of(inner, in_loop or name in ("scan", "while"))
                    outside += found[0]
                    inside += found[1]
    return outside, inside


def test_further_rounds_keep_nothing_for_the_backward_pass(run, capsys):
    """Only the first round's results bear names; those of every round that there could be would be many times more."""
    config = replace(run, mesh=MeshConfig(node=2, local=4), dispatch=TIGHT)
    mesh, state = make_mesh(config.mesh), initial_state(run)
    layer = jax.tree.map(lambda leaf: np.asarray(leaf[0]), state.params["moe"])
    layer["moe"]["experts"] = jax.tree.map(lambda leaf: leaf[:4], layer["moe"]["experts"])
    block = block_function(config.model, on_mesh(Runtime(remat="report"), config))

    def on_device(x):
        ctx = context(config.model, 16).for_layer(jnp.zeros(EXPERTS))
        jax.ad_checkpoint.print_saved_residuals(
            lambda p, x: block(p, x, ctx)[0].sum(), jax.tree.map(jnp.asarray, layer), x
        )
        return x

    jax.shard_map(on_device, mesh=mesh, in_specs=batch_spec(3, 0), out_specs=batch_spec(3, 0), check_vma=False)(
        jnp.ones((8, 16, 32))
    )
    lines = capsys.readouterr().out.splitlines()
    kept = [line for line in lines if "from the argument" not in line and "from a constant" not in line]
    assert sum("named 'dispatched'" in line for line in kept) == 1 and all("named" in line for line in kept)
