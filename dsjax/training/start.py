"""Where a run begins: with drawn weights, or with given ones."""

from pathlib import Path

import numpy as np

from dsjax.checkpoint.forms import open_checkpoint
from dsjax.checkpoint.huggingface import load
from dsjax.checkpoint.native import differing_fields
from dsjax.config import Config
from dsjax.model.layout import stack
from dsjax.settings import to_dict
from dsjax.training.state import TrainState, initial_state, state_of_weights

MAY_DIFFER = {"name", "initializer_range", "embedding_initializer_range", "rope_scaling", "num_nextn_predict_layers"}
"""Settings of a model that weights need not share with the run: a context extension, for one, turns YaRN on."""


def first_state(config: Config) -> TrainState:
    """Return the state before the first step.

    Raises:
        ValueError: `train.initial_weights` cannot be read, or are another model's.
    """
    path = config.train.initial_weights
    if not path:
        return initial_state(config)
    source = open_checkpoint(Path(path), mtp=bool(config.model.num_nextn_predict_layers))
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
        weights = load(source, dtype=np.float32)
    finally:
        source.close()
    return state_of_weights(stack(weights.params, config.model), stack(weights.biases, config.model), config)
