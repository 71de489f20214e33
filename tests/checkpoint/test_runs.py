"""The checkpoints of a training run as weights to export."""

import jax
import numpy as np
import pytest

from dsjax.checkpoint.conversion import convert
from dsjax.checkpoint.forms import make_plan, open_checkpoint
from dsjax.checkpoint.huggingface import load, load_huggingface
from dsjax.checkpoint.native import Checkpoints
from dsjax.checkpoint.runs import FOLDER
from dsjax.checkpoint.sources import CheckpointProblems
from dsjax.model.layout import unstack
from dsjax.model.transformer import initial_parameters
from dsjax.settings import load_model_config, to_dict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of `tiny` with steps 1 and 2, whose EMA is twice the weights."""
    folder, config = tmp_path_factory.mktemp("run"), load_model_config("tiny")
    with Checkpoints(folder / FOLDER) as checkpoints:
        for step in (1, 2):
            params, biases = (unstack(tree, config) for tree in initial_parameters(config, seed=step))
            state = {
                "params": params,
                "biases": biases,
                "ema": jax.tree.map(lambda a: 2 * np.asarray(a), params),
                "moments": {"mu": params},
            }
            checkpoints.save(step, state, {"config": {"model": to_dict(config)}})
    return folder, config, params, biases


def _same(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), left, right))


def test_the_newest_weights_of_a_run(run, tmp_path):
    folder, config, params, biases = run
    source = open_checkpoint(folder)
    weights = load(source)
    assert weights.config == config
    assert _same(weights.params, params)
    assert _same(weights.biases, biases)
    assert source.notes == ["weights: live, of step 2"]
    convert(source, make_plan(source, "huggingface"), tmp_path / "out")
    again = load_huggingface(tmp_path / "out")
    assert _same(again.params, params)
    source.close()


def test_averaged_weights_and_earlier_steps(run):
    folder, _, params, biases = run
    averaged = load(open_checkpoint(folder, weights="ema"))
    assert _same(averaged.params, jax.tree.map(lambda a: 2 * a, params))
    assert _same(averaged.biases, biases)
    assert not _same(load(open_checkpoint(folder / FOLDER, step=1)).params, params)


def test_a_damaged_or_unknown_step_is_named(run, tmp_path):
    folder, *_ = run
    with pytest.raises(CheckpointProblems, match="no checkpoint of step 7"):
        open_checkpoint(folder, step=7)
    with Checkpoints(tmp_path / FOLDER) as checkpoints:
        checkpoints.save(1, {"params": {"embed": np.zeros(3)}}, {"config": {}})
    with pytest.raises(CheckpointProblems, match="model"):
        open_checkpoint(tmp_path)
