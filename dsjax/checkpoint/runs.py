"""Weights out of the checkpoints of a training run, to be exported or sampled from."""

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from dsjax.checkpoint.native import Checkpoints, NoUsableCheckpoint
from dsjax.checkpoint.sources import RUN_FOLDER, CheckpointProblems, InMemory, Source, checkpoints_of, show_arrays
from dsjax.config import ModelConfig
from dsjax.settings import from_dict

FOLDER = RUN_FOLDER
"""Folder of a run that holds its checkpoints."""
_OPEN = 4
"""Arrays of which the chunk that was read last is kept."""


def open_run(
    path: Path, step: int | None = None, weights: Literal["live", "ema"] = "live", *, headers_only: bool = False
) -> Source:
    """Open the weights in a run's newest undamaged checkpoint, or in that of `step`.

    A state has `params` and `biases` in the canonical layout, and `ema` beside them; its metadata has the `config`.
    All weights are read once to find that they are whole, by several processes together, and those that are used again
    when they are; the host needs room for what one device has written of the largest arrays.

    Args:
        path: folder of a run, or of its checkpoints.
        step: which checkpoint.
        weights: those that were trained, or their moving average.
        headers_only: look for damage in the metadata only.

    Raises:
        CheckpointProblems: every checkpoint is damaged, or `step` is, or it has no such weights.
    """
    folder, tree = checkpoints_of(path), "params" if weights == "live" else "ema"
    path = folder.parent if folder.name == RUN_FOLDER else path  # The tokenizer lies there.
    checkpoints = Checkpoints(folder)

    def look(at: int) -> tuple[ModelConfig, Mapping[str, Any], Mapping[str, str]]:
        metadata, shapes = checkpoints.read_metadata(at), checkpoints.arrays(at)
        config = _model_of(metadata, folder / str(at))
        own = {name: f"{tree}/{name.removeprefix('params/')}" for name in shapes if name.startswith("params/")}
        own |= {name: name for name in shapes if name.startswith("biases/")}
        absent = [saved for saved in own.values() if saved not in shapes]
        if absent:
            raise CheckpointProblems(folder / str(at), [f"the checkpoint has no {name}" for name in absent[:3]])
        if not headers_only:
            checkpoints.verify(at, own.values())
        return config, shapes, own

    try:
        step, (config, shapes, own) = checkpoints.newest_whole(look, step)
    except FileNotFoundError as error:
        there = ", ".join(map(str, checkpoints.steps())) or "none"
        checkpoints.close()
        missing = f"no checkpoint of step {step}; there are {there}" if step is not None else "no checkpoint"
        raise CheckpointProblems(folder, [missing]) from error
    except NoUsableCheckpoint as error:
        checkpoints.close()
        raise CheckpointProblems(folder, [line.strip() for line in str(error).splitlines()[1:]]) from error
    except ValueError:
        checkpoints.close()
        raise

    opened = lru_cache(maxsize=_OPEN)(partial(checkpoints.on_disk, step))
    arrays = {
        path: InMemory(partial(opened, name), shapes[name].shape, shapes[name].dtype) for path, name in own.items()
    }
    source = Source("run", path, config, show_arrays(arrays), step=step, close=checkpoints.close)
    source.workers = 1  # More would each drop the array that another is reading from.
    source.notes.append(f"weights: {weights}, of step {step}")
    source.notes += [f"step {at} is damaged and was not used" for at in checkpoints.damaged]
    source.add_copies()
    return source


def _model_of(metadata: Mapping[str, Any], where: Path) -> ModelConfig:
    try:
        return from_dict(ModelConfig, metadata["config"]["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointProblems(where, ["its metadata has no config of a model"]) from error
    except ValueError as error:
        raise CheckpointProblems(where, [f"its model: {error}"]) from error
