"""Where a run begins: with drawn weights, or with given ones."""

import functools
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.checkpoint.forms import open_checkpoint
from dsjax.checkpoint.huggingface import load
from dsjax.checkpoint.native import differing_fields
from dsjax.checkpoint.sources import CheckpointProblems
from dsjax.config import Config
from dsjax.model.layout import stack
from dsjax.model.transformer import abstract_parameters
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import shardings
from dsjax.pipeline.stages import rows_of
from dsjax.settings import to_dict
from dsjax.training.state import TrainState, initial_state, state_of_weights, state_shardings

MAY_DIFFER = {"name", "initializer_range", "embedding_initializer_range", "rope_scaling", "num_nextn_predict_layers"}
"""Settings of a model that weights need not share with the run: a context extension, for one, turns YaRN on."""


def first_state(config: Config, mesh: Mesh | None = None) -> TrainState:
    """Return the state before the first step, divided over a mesh; nothing is ever whole on one device.

    Raises:
        ValueError: `train.initial_weights` cannot be read, or are another model's.
    """
    mesh, path = mesh or make_mesh(config.mesh), config.train.initial_weights
    if not path:
        return initial_state(config, mesh)
    try:
        source = open_checkpoint(Path(path), mtp=bool(config.model.num_nextn_predict_layers))
    except CheckpointProblems as error:
        raise ValueError(f"train.initial_weights = {path!r}: {'; '.join(error.problems)}") from None
    try:
        lines = [
            line.replace(" in the checkpoint, ", " in the weights, ")
            for line in differing_fields(to_dict(source.config), to_dict(config.model), "model.")
            if line.partition(":")[0].split(".")[1] not in MAY_DIFFER
        ]
        modules = config.model.num_nextn_predict_layers, source.config.num_nextn_predict_layers
        if modules[0] != modules[1]:
            lines.append(f"model.num_nextn_predict_layers: {modules[1]} in the weights, {modules[0]} now")
        if lines:
            raise ValueError(f"train.initial_weights = {path!r}: another model's; {'; '.join(lines)}")
        params, biases = abstract_parameters(source.config)
        everywhere = NamedSharding(mesh, PartitionSpec())
        where = {"params": shardings(params, mesh), "biases": jax.tree.map(lambda leaf: everywhere, biases)}
        weights = load(source, where, np.float32)
    finally:
        source.close()
    rows = rows_of(config)
    params, biases = stack(weights.params, config.model, rows), stack(weights.biases, config.model, rows)
    begin = functools.partial(state_of_weights, config=config)
    return jax.jit(begin, out_shardings=state_shardings(jax.eval_shape(begin, params, biases), mesh))(params, biases)
