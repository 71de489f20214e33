"""Weights out of the checkpoints of a training run, to be exported or sampled from."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np

from dsjax.checkpoint.native import Checkpoints, DamagedCheckpoint, NoUsableCheckpoint
from dsjax.checkpoint.sources import RUN_FOLDER, CheckpointProblems, InMemory, Source, checkpoints_of, show_arrays
from dsjax.config import ModelConfig
from dsjax.settings import from_dict

FOLDER = RUN_FOLDER
"""Folder of a run that holds its checkpoints."""


def open_run(path: Path, step: int | None = None, weights: Literal["live", "ema"] = "live") -> Source:
    """Open the weights in a run's newest checkpoint, or in that of `step`.

    A state has `params` and `biases` in the canonical layout, and `ema` beside them; its metadata has the `config`.
    Arrays are read, and verified, one at a time: the host needs room for the largest.

    Raises:
        CheckpointProblems: the checkpoint is damaged, or has no such weights.
    """
    checkpoints = Checkpoints(checkpoints_of(path))
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise CheckpointProblems(checkpoints_of(path), [f"no checkpoint of step {step}; there are {there}"])
    step = steps[-1] if step is None else step
    where = checkpoints_of(path) / str(step)
    tree = "params" if weights == "live" else "ema"
    try:
        config = from_dict(ModelConfig, checkpoints.read_metadata(step)["config"]["model"])
        shapes = checkpoints.arrays(step)
    except (DamagedCheckpoint, KeyError) as error:
        raise CheckpointProblems(where, [str(error)]) from error
    own = {path: f"{tree}/{path.partition('/')[2]}" if path.startswith("params/") else path for path in shapes}
    own = {path: saved for path, saved in own.items() if path.split("/")[0] in ("params", "biases")}
    absent = [saved for saved in own.values() if saved not in shapes]
    if absent:
        raise CheckpointProblems(where, [f"the checkpoint has no {name}" for name in absent[:3]])

    @lru_cache(maxsize=1)
    def host(path: str) -> np.ndarray:
        name = own[path]
        wanted = {name: np.broadcast_to(np.zeros((), shapes[name].dtype), shapes[name].shape)}
        try:
            return checkpoints.restore(wanted, step, partial=True)[1][name]
        except NoUsableCheckpoint as error:
            raise CheckpointProblems(where, str(error).splitlines()[1:]) from error

    arrays = {path: InMemory(partial(host, path), shapes[name].shape, shapes[name].dtype) for path, name in own.items()}
    source = Source("run", path, config, show_arrays(arrays), close=checkpoints.close)
    source.workers = 1  # More would each drop the array that another is reading from.
    source.notes.append(f"weights: {weights}, of step {step}")
    source.add_copies()
    return source
