"""What a training step reads and leaves behind, and its form in a checkpoint."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from dsjax.config import Config
from dsjax.model.layout import stack, unstack
from dsjax.model.transformer import initial_parameters
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import shardings
from dsjax.pipeline.stages import rows_of
from dsjax.training.optimizer import Moments, initial_moments


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; parameters, biases and moments in the stacked layout."""

    step: Int[Array, ""]
    """Steps taken, skipped ones included."""
    params: PyTree
    """Master weights, float32."""
    biases: PyTree
    """Router biases, float32."""
    moments: Moments
    """Of AdamW."""
    skipped: Int[Array, ""]
    """Steps whose loss or gradient was not finite, and which changed nothing else."""
    skipped_in_a_row: Int[Array, ""]
    """How many of them came last."""


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Return where each array of a state (or its shape) lives between steps: see `parallel.sharding`."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def whole(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: everywhere, tree)

    return replace(
        whole(state),
        params=shardings(state.params, mesh),
        moments=Moments(everywhere, shardings(state.moments.first, mesh), shardings(state.moments.second, mesh)),
    )


def initial_state(config: Config, mesh: Mesh | None = None) -> TrainState:
    """Return the state before the first step, its weights drawn; one compiled program makes all of it.

    Every device draws its own part: no host ever holds all weights. The values are the same on every mesh.
    """
    # It runs once: to optimize it took ten seconds for `tiny` on a CPU, and saved a third of one.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    mesh = mesh or make_mesh(config.mesh)
    where = state_shardings(jax.eval_shape(lambda: drawn_state(config)), mesh)
    return jax.jit(lambda: drawn_state(config), compiler_options=options, out_shardings=where)()


def state_of_weights(params: PyTree, biases: PyTree, config: Config) -> TrainState:
    """Return the state before the first step from given weights, float32 and stacked."""
    # One array each: a buffer that two fields share could not be donated.
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(zeros[0], params, biases, initial_moments(params, config.optimizer), zeros[1], zeros[2])


def drawn_state(config: Config) -> TrainState:
    return state_of_weights(*initial_parameters(config.model, config.train.seed, rows_of(config)), config)


def to_canonical(state: TrainState, config: Config) -> PyTree:
    """Return the state as a checkpoint holds it: nested dicts, one array per layer and tensor."""

    def unstacked(tree: PyTree) -> PyTree:
        return unstack(tree, config.model, rows_of(config))

    return {
        "step": state.step,
        "params": unstacked(state.params),
        "biases": unstacked(state.biases),
        "moments": {
            "count": state.moments.count,
            "first": unstacked(state.moments.first),
            "second": unstacked(state.moments.second),
        },
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }


def from_canonical(tree: PyTree, config: Config, mesh: Mesh | None = None) -> TrainState:
    """Return the state that a checkpoint holds; the inverse of `to_canonical`."""
    state = _stacked(tree, config)
    where = state_shardings(state, mesh or make_mesh(config.mesh))
    return jax.jit(lambda state: state, out_shardings=where)(state)


def _stacked(tree: PyTree, config: Config) -> TrainState:
    def stacked(tree: PyTree) -> PyTree:
        return stack(tree, config.model, rows_of(config))

    moments = tree["moments"]
    return TrainState(
        step=tree["step"],
        params=stacked(tree["params"]),
        biases=stacked(tree["biases"]),
        moments=Moments(moments["count"], stacked(moments["first"]), stacked(moments["second"])),
        skipped=tree["skipped"],
        skipped_in_a_row=tree["skipped_in_a_row"],
    )


def abstract_state(config: Config, mesh: Mesh | None = None) -> PyTree:
    """Return shapes, dtypes and shardings of what `to_canonical` gives, without making any array."""
    mesh = mesh or make_mesh(config.mesh)
    tree = to_canonical(jax.eval_shape(lambda: drawn_state(config)), config)
    everywhere = NamedSharding(mesh, PartitionSpec())
    where = jax.tree.map(lambda leaf: everywhere, tree)
    where["params"] = shardings(tree["params"], mesh)
    where["moments"] |= {name: shardings(tree["moments"][name], mesh) for name in ("first", "second")}
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, where)
