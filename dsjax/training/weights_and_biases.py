"""Records on Weights & Biases, for who has it: the extra `dsjax[wandb]`.

Where records go, and whether at once, is the package's affair: `WANDB_MODE=offline` keeps them in the run's folder
until `wandb sync`, `WANDB_ENTITY` and the rest mean what its manual says.
"""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

from dsjax.training.metrics import Record


def package() -> ModuleType:
    """Return the package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "train.wandb: needs the package wandb, which is not installed: pip install 'dsjax[wandb]'"
        ) from None
    return wandb


class WeightsAndBiases:
    """A sink of records; a resumed run goes on in the same run there, whose id `wandb.id` in its folder keeps.

    The steps since the last checkpoint, which a resumed run does again, are there twice, with the same numbers.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any]):
        """Open the run.

        Args:
            folder: of the run, whose name it gets.
            config: settings to show.
        """
        wandb, known = package(), folder / "wandb.id"
        known_id = known.read_text().strip() if known.exists() else None
        self._run = wandb.init(
            project=project, id=known_id, resume="allow", name=folder.name, dir=str(folder), config=config
        )
        known.write_text(f"{self._run.id}\n")
        # An axis of our own: its counter refuses to go back to the checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._run.log({key: value for key, value in record.items() if _is_number(value)})

    def sync(self) -> None:
        """Nothing: the package sends in the background, and a checkpoint does not wait for a network."""

    def close(self) -> None:
        self._run.finish()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
