"""The folder of a run: who may use it, what is resumed from it, and what is saved into it."""

import contextlib
import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from dsjax.checkpoint.native import (
    Checkpoints,
    DamagedCheckpoint,
    NoUsableCheckpoint,
    SaveFailed,
    differing_fields,
    found_in,
    last_saved,
)
from dsjax.config import Config
from dsjax.data.tokens import TokenCache
from dsjax.model.layout import stack, unstack
from dsjax.parallel.agreement import on_first
from dsjax.parallel.preflight import Space
from dsjax.pipeline.stages import rows_of
from dsjax.settings import from_dict, to_dict, to_toml
from dsjax.training.state import TrainState, abstract_state, drawn_state, from_canonical, to_canonical

MAY_CHANGE = {
    *("run", "data.path", "data.tokenizer", "data.cache", "xla_flags"),
    *("train.log_every", "train.validate_every", "train.validation_sequences", "train.max_bad_steps"),
    *("train.fp8_statistics", "kernels.fp8", "kernels.communication_sms", "pipeline.overlap", "train.wandb"),
    *("train.stall_factor", "train.stall_seconds", "train.stall_patience"),
    *("checkpoint.every", "checkpoint.keep"),
    *("mesh.pipe", "mesh.data", "mesh.node", "mesh.local", "pipeline.schedule", "pipeline.max_deferred"),
    *("dispatch.transport", "dispatch.node_slack", "dispatch.device_slack"),
}
"""Settings that a resumed run may have otherwise: its numbers do not depend on them, or only, in the last bits, by the
order of sums. Paths are covered by the fingerprint of the tokens behind them."""

CONTENTS = (
    *("checkpoints", "tensorboard", "pictures", "metrics.jsonl", "metrics.draft"),
    *("baselines.json", "tokenizer.json", "profile", "stalls", "wandb", "wandb.id", "config.toml"),
)
"""What a run leaves in its folder; `config.toml` is last to go, for it makes the folder a run's."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    state: TrainState
    average: PyTree | None
    """The moving average of the weights, stacked; None where the run keeps none."""
    seconds: float
    """Time spent in the run so far."""


def space_for(config: Config, *, overwrite: bool = False) -> Space:
    """Return the bytes that a run's checkpoints will need, beside those that its folder holds already.

    Args:
        overwrite: whether what is there is deleted first.
    """
    state = to_canonical(jax.eval_shape(lambda: drawn_state(config)), config)
    arrays = jax.tree.leaves(state) + (jax.tree.leaves(state["params"]) if config.train.ema_decay else [])
    one = sum(array.size * array.dtype.itemsize for array in arrays)
    saved, unfinished = found_in(Path(config.run) / "checkpoints")
    kept = min(len(saved), config.checkpoint.keep)
    deleted = sum(map(_size, unfinished)) + (kept * one if overwrite else 0)
    return Space(max(0, one - deleted), max(0, (config.checkpoint.keep + 1 - kept) * one - sum(map(_size, unfinished))))


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder, of which some may go meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


class RunFolder:
    """A run's folder: `config.toml`, `tokenizer.json`, `checkpoints/`, and what the run writes about itself.

    A context, inside of which `checkpoints` is open and no other run may use the folder; nothing is made or deleted
    before. Of several processes of a run the first makes and writes what is not an array of the state.
    """

    checkpoints: Checkpoints

    def __init__(self, config: Config, *, fresh: bool = False, overwrite: bool = False):
        """Check that a run may use the folder `config.run`.

        Args:
            fresh: begin at step 0; a folder that a run has used is refused.
            overwrite: together with `fresh`, delete what that run left, once the context is entered.

        Raises:
            ValueError: the folder is used, or holds something that is not a run.
        """
        self.path = Path(config.run)
        self._config, self._fresh, self._overwrite = config, fresh, overwrite
        self._lock: int | None = None
        on_first(self._check_use)

    def _check_use(self) -> None:
        if self._overwrite and not self._fresh:
            raise ValueError("--overwrite goes with --fresh: without it, the same command resumes the run")
        used = self.path.is_dir() and any(self.path.iterdir())
        if used and not (self.path / "config.toml").is_file():
            raise ValueError(f"run = {self._config.run!r}: the folder holds something else than a run; name another")
        if used and self._fresh and not self._overwrite:
            raise ValueError(
                f"run = {self._config.run!r}: a run is there, which --fresh would lose; "
                "add --overwrite, or name another folder"
            )

    def __enter__(self) -> "RunFolder":
        """Raise ValueError if another run uses the folder."""
        on_first(self._prepare)
        self.checkpoints = Checkpoints(self.path / "checkpoints", self._config.checkpoint.keep)
        return self

    def _prepare(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)  # given back by the system too, however the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(
                f"run = {self._config.run!r}: another process is running it; stop that one, or name another folder"
            ) from None
        if self._overwrite:
            self._delete()
        config = self.path / "config.toml"
        if not config.exists():  # from here on the folder is a run's, even if the run dies before its first checkpoint
            config.write_text(to_toml(self._config), "utf-8")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Raise SaveFailed for a file of the run that cannot be written."""
        try:
            # With other processes gone, or about to go, a save that goes on would wait for them.
            if error is None:
                self.checkpoints.close()
            elif jax.process_count() == 1 and not isinstance(error, SaveFailed):
                with contextlib.suppress(Exception):  # what ends the run is to be told
                    self.checkpoints.close()
        finally:
            if self._lock is not None:
                os.close(self._lock)
        if isinstance(error, OSError):
            what, why = error.filename or "a file of the run", error.strerror or error
            last = last_saved(self.path / "checkpoints")
            raise SaveFailed(f"run = {self._config.run!r}: {what}: {why}; saved last: {last}") from error

    def _delete(self) -> None:
        for name in CONTENTS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def resume(self, fingerprint: str, mesh: Mesh) -> Resumed | None:
        """Return the newest undamaged checkpoint's contents, or None in a run that has saved nothing yet.

        Every process reads the parts that its devices hold, whatever mesh the checkpoint was written from.

        Args:
            fingerprint: of the tokens that the run would read now.

        Raises:
            ValueError: the checkpoint is of other settings or other data; the message lists what differs. Or every
                checkpoint is damaged.
        """
        if not self.checkpoints.steps():
            return None
        abstract = abstract_state(self._config, mesh)
        if self._config.train.ema_decay:
            abstract["ema"] = abstract["params"]
        self._check(fingerprint)
        try:
            _, tree, metadata = self.checkpoints.restore(abstract)
        except NoUsableCheckpoint as error:
            raise ValueError(f"run = {self._config.run!r}: {error}; begin anew with --fresh --overwrite") from None
        average = tree.pop("ema", None)
        state = from_canonical(tree, self._config, mesh)
        if average is not None:
            average = stack(average, self._config.model, rows_of(self._config))
            where = jax.tree.map(lambda leaf: leaf.sharding, state.params)
            average = jax.jit(lambda average: average, out_shardings=where)(average)
        return Resumed(state, average, metadata["seconds"])

    def _check(self, fingerprint: str) -> None:
        """Compare settings before any array is read: they best explain arrays that do not fit."""
        metadata = self._newest_metadata()
        if metadata is None:
            return
        saved = metadata["config"]
        with contextlib.suppress(ValueError):  # of settings that this version does not know, which are named below
            saved = to_dict(from_dict(Config, saved))  # what is newer than the checkpoint was as it is by default
        lines = differing_fields(saved, to_dict(self._config))
        lines = sorted(line for line in lines if line.partition(":")[0] not in MAY_CHANGE)
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

    def _newest_metadata(self) -> dict[str, Any] | None:
        for step in reversed(self.checkpoints.steps()):
            try:
                return self.checkpoints.read_metadata(step)
            except DamagedCheckpoint:  # which `restore` reports
                continue
        return None

    def describe(self, data: TokenCache) -> None:
        """Write the resolved settings and the tokenizer, which other commands read; for the first process."""
        (self.path / "config.toml").write_text(to_toml(self._config), "utf-8")
        if data.tokenizer is not None:
            data.tokenizer.save(self.path / "tokenizer.json")

    def save(self, state: TrainState, average: PyTree | None, fingerprint: str, seconds: float) -> None:
        """Start to write a checkpoint; returns when the arrays are copied."""
        tree = to_canonical(state, self._config)
        if average is not None:
            tree["ema"] = unstack(average, self._config.model, rows_of(self._config))
        metadata = {"config": to_dict(self._config), "fingerprint": fingerprint, "seconds": seconds}
        self.checkpoints.save(int(state.step), tree, metadata)
