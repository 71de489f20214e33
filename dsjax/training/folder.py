"""The folder of a run: who may use it, what is resumed from it, and what is saved into it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from dsjax.checkpoint.native import Checkpoints, differing_fields
from dsjax.config import Config
from dsjax.data.tokens import TokenCache
from dsjax.model.layout import stack, unstack
from dsjax.settings import to_dict, to_toml
from dsjax.training.state import TrainState, abstract_state, from_canonical, to_canonical

MAY_CHANGE = {
    *("run", "data.path", "data.tokenizer", "data.cache"),
    *("train.log_every", "train.validate_every", "train.validation_sequences", "train.max_bad_steps"),
    *("checkpoint.every", "checkpoint.keep"),
}
"""Settings that a resumed run may have otherwise: its numbers do not depend on them. Paths are covered by the
fingerprint of the tokens behind them."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    state: TrainState
    average: PyTree | None
    """The moving average of the weights, stacked NumPy arrays; None where the run keeps none."""
    seconds: float
    """Time spent in the run so far."""


class RunFolder:
    """A run's folder: `config.toml`, `tokenizer.json`, `checkpoints/`, and what the run writes about itself.

    A context, inside of which `checkpoints` is open; nothing is made before.
    """

    checkpoints: Checkpoints

    def __init__(self, config: Config, *, fresh: bool = False, overwrite: bool = False):
        """Check that a run may use the folder `config.run`.

        Args:
            fresh: begin at step 0; a folder that a run has used is refused.
            overwrite: together with `fresh`, delete what that run left.

        Raises:
            ValueError: the folder is used, or holds something that is not a run.
        """
        self.path = Path(config.run)
        self._config = config
        if overwrite and not fresh:
            raise ValueError("--overwrite goes with --fresh: without it, the same command resumes the run")
        used = self.path.is_dir() and any(self.path.iterdir())
        if used and not (self.path / "config.toml").is_file():
            raise ValueError(f"run = {config.run!r}: the folder holds something else than a run; name another")
        if used and fresh and not overwrite:
            raise ValueError(
                f"run = {config.run!r}: a run is there, which --fresh would lose; "
                "add --overwrite, or name another folder"
            )
        if used and fresh:
            shutil.rmtree(self.path)

    def __enter__(self) -> "RunFolder":
        self.path.mkdir(parents=True, exist_ok=True)
        config = self.path / "config.toml"
        if not config.exists():  # from here on the folder is a run's, even if the run dies before its first checkpoint
            config.write_text(to_toml(self._config), "utf-8")
        self.checkpoints = Checkpoints(self.path / "checkpoints", self._config.checkpoint.keep)
        return self

    def __exit__(self, *exception: object) -> None:
        self.checkpoints.close()

    def resume(self, fingerprint: str) -> Resumed | None:
        """Return the newest undamaged checkpoint's contents, or None in a run that has saved nothing yet.

        Args:
            fingerprint: of the tokens that the run would read now.

        Raises:
            ValueError: the checkpoint is of other settings or other data; the message lists what differs.
        """
        if not self.checkpoints.steps():
            return None
        abstract = abstract_state(self._config)
        if self._config.train.ema_decay:
            abstract["ema"] = abstract["params"]
        # Settings first: arrays that do not fit are best explained by what was set otherwise.
        self._check(self.checkpoints.read_metadata(self.checkpoints.steps()[-1]), fingerprint)
        _, tree, metadata = self.checkpoints.restore(abstract)
        average = tree.pop("ema", None)
        if average is not None:
            average = jax.tree.map(np.asarray, stack(average, self._config.model))
        return Resumed(from_canonical(tree, self._config.model), average, metadata["seconds"])

    def _check(self, metadata: dict[str, Any], fingerprint: str) -> None:
        lines = differing_fields(metadata["config"], to_dict(self._config))
        lines = [line for line in lines if line.partition(":")[0] not in MAY_CHANGE]
        if lines:
            raise ValueError(
                f"run = {self._config.run!r}: its checkpoint was made with other settings ({'; '.join(lines)}); "
                "set them back, name another folder, or begin anew with --fresh --overwrite"
            )
        if metadata["fingerprint"] != fingerprint:
            raise ValueError(
                f"run = {self._config.run!r}: its checkpoint was made from other data than the source gives now; "
                "put the data back, name another folder, or begin anew with --fresh --overwrite"
            )

    def describe(self, data: TokenCache) -> None:
        """Write the resolved settings and the tokenizer, which other commands read."""
        (self.path / "config.toml").write_text(to_toml(self._config), "utf-8")
        if data.tokenizer is not None:
            data.tokenizer.save(self.path / "tokenizer.json")

    def save(self, state: TrainState, average: PyTree | None, fingerprint: str, seconds: float) -> None:
        """Start to write a checkpoint; returns when the arrays are copied."""
        model = self._config.model
        tree = to_canonical(state, model)
        if average is not None:
            tree["ema"] = unstack(average, model)
        metadata = {"config": to_dict(self._config), "fingerprint": fingerprint, "seconds": seconds}
        self.checkpoints.save(int(state.step), tree, metadata)
