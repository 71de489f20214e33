"""Checkpoints of a training run: asynchronous, atomic, the newest few, with a checksum of every array.

One thin layer over Orbax's stable manager, for what Orbax leaves open: it does not notice flipped bytes (they come back
as numbers), lists a step whose files are gone, names no damaged step, casts to another dtype without a word, and
returns False, silently, for a step that it will not save.
"""

import json
import logging
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from dsjax.checkpoint.checksum import checksum_of_rows, checksums

log = logging.getLogger("dsjax.checkpoint")
_SHARED_WRITING = 1 << 24
"""Bytes of a device's part from which several devices write what each of them has."""


_AT_ONCE = 1 << 26
"""Bytes of an array that are verified at once."""
_BESIDE_CHUNK = 1 << 20
"""Bytes that are kept beside a chunk of an array: what TensorStore knows of where it is."""


class DamagedCheckpoint(Exception):
    """A checkpoint's files are not what was written."""


class NoUsableCheckpoint(RuntimeError):
    """Every checkpoint that was tried is damaged; the message lists them with the reasons."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message says where, why, and which step was saved last."""


class _FailuresOfSaves(logging.Filter):
    """Takes errors of Orbax's threads out of its log, where they come first: of several processes, the one whose save
    has failed would otherwise learn it when it has waited ten minutes for the others."""

    failure: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR or not record.exc_info or "orbax" not in record.pathname:
            return True
        self.failure = self.failure or record.exc_info[1]
        return False


class Checkpoints:
    """The checkpoints of one run, in `folder`, of which the newest `keep` stay.

    A state is any pytree of jax or numpy arrays. `save` returns as soon as the arrays are copied and writes in the
    background; a step's folder appears under its own name when it is complete, so a killed process leaves the one
    before. Arrays come back in whatever sharding `restore` is asked for.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must stay")
        self.folder = Path(folder).absolute()
        self._damaged: dict[int, str] = {}
        self._saved = False
        self._failures = _FailuresOfSaves()
        logging.getLogger("absl").addFilter(self._failures)
        _silence_abandoned_work()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=_type_handlers()),
            "metadata": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first; those found damaged are left out."""
        return [step for step in sorted(self._manager.all_steps()) if step not in self._damaged]

    @property
    def damaged(self) -> dict[int, str]:
        """What is wrong with each step that was found damaged, newest first."""
        return dict(sorted(self._damaged.items(), reverse=True))

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Start to save a state and what a reader must know of it (JSON: config, data fingerprint ...).

        Blocks until the arrays are computed and copied; they may be donated or changed afterwards. Waits for the
        save before. Raises ValueError for a step that is not newer than the newest, and SaveFailed for this save or
        the one before.
        """
        self.wait()
        with self._failing():
            self._prepare_folder()
        newest = max(self._manager.all_steps(), default=-1)
        if step <= newest:
            raise ValueError(f"cannot save step {step} in {self.folder}: step {newest} is there; steps must grow")
        arrays = _flat(state)
        empty = [name for name, array in arrays.items() if not array.size]
        if empty:
            raise ValueError(f"cannot save arrays without elements: {', '.join(empty)}")
        versions = {name: version(name) for name in ("dsjax", "jax", "orbax-checkpoint")}
        facts = {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items()}
        sums = checksums(arrays)
        contents = {
            "metadata": dict(metadata),
            "versions": versions,
            "arrays": {name: [*facts[name], f"{sums[name]:08x}"] for name in arrays},
        }
        text = json.dumps(contents, sort_keys=True)
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            metadata=ocp.args.JsonSave({"checksum": zlib.crc32(text.encode()), "contents": text}),
        )
        with self._failing():
            saved = self._manager.save(step, args=arguments)
        if not saved:
            raise SaveFailed(f"Orbax did not save step {step} in {self.folder}, and gave no reason")

    def check(self) -> None:
        """Raise SaveFailed if the save in the background has failed; does not wait for it."""
        with self._failing():
            if self._failures.failure:
                raise self._failures.failure

    def restore(self, abstract: PyTree, step: int | None = None, *, partial: bool = False) -> tuple[int, PyTree, dict]:
        """Return (step, state, metadata) of the newest checkpoint that is whole, or of `step`.

        `abstract` has the state's structure. A leaf that is a numpy array comes back as one; any other leaf (an array
        or ShapeDtypeStruct) comes back as a jax array in the leaf's sharding, or on the default device if it has none.
        With `partial` it may lack arrays of the checkpoint, which are then neither read nor verified.

        A damaged checkpoint is reported by a warning and the one before is used. Raises FileNotFoundError if there is
        none, NoUsableCheckpoint if all are damaged, ValueError if the checkpoint's arrays are not those of `abstract`.
        """
        found, (state, metadata) = self.newest_whole(lambda at: self.read(at, abstract, partial=partial), step)
        return found, state, metadata

    def newest_whole[T](self, read: Callable[[int], T], step: int | None = None) -> tuple[int, T]:
        """Return (step, read(step)) of the newest checkpoint, or of `step`, in which `read` finds no damage.

        Warns and raises like `restore`; `read` says with DamagedCheckpoint what it found.
        """
        candidates = self.steps()[::-1] if step is None else [step]
        if not candidates or (step is not None and step not in self._manager.all_steps()):
            wanted = "" if step is None else f" of step {step}"
            raise FileNotFoundError(f"no checkpoint{wanted} in {self.folder}; there are: {self.steps() or 'none'}")
        for candidate in candidates:
            try:
                return candidate, read(candidate)
            except DamagedCheckpoint as damage:
                self._damaged[candidate] = str(damage)
                log.warning("checkpoint %s is damaged and not used: %s", self._path(candidate), damage)
        tried = "\n".join(f"  {self._path(at)}: {why}" for at, why in self.damaged.items())
        raise NoUsableCheckpoint(f"no usable checkpoint in {self.folder}; tried:\n{tried}")

    def read(self, step: int, abstract: PyTree, *, partial: bool = False) -> tuple[PyTree, dict]:
        """Return (state, metadata) of a step, as `restore` does. Raises DamagedCheckpoint if it is not whole."""
        contents = _agreed(lambda: self._contents(step))
        wanted = _flat(abstract)
        saved = contents["arrays"]
        _compare(f"checkpoint {self._path(step)}", saved, wanted, partial)
        read = ocp.args.PyTreeRestore(
            item=wanted, restore_args={k: _restore_as(v) for k, v in wanted.items()}, partial_restore=partial
        )

        def arrays() -> dict[str, Any]:
            with _damage("state"):
                return self._manager.restore(step, args=ocp.args.Composite(state=read))["state"]

        state = _agreed(arrays)
        wrong = [name for name, value in checksums(state).items() if f"{value:08x}" != saved[name][2]]
        if wrong:
            raise DamagedCheckpoint(f"checksum does not match: {_some(wrong)}")
        leaves = [state[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), contents["metadata"]

    def read_metadata(self, step: int) -> dict:
        """Return the metadata saved with a step. Raises DamagedCheckpoint if it cannot be trusted."""
        return self._contents(step)["metadata"]

    def arrays(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shape and dtype of every array of a step, by path ("params/embed"), without reading any."""
        saved = self._contents(step)["arrays"]
        return {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, (shape, dtype, _) in saved.items()}

    def on_disk(self, step: int, name: str) -> "SavedArray":
        """Return an array of a step, by path, of which parts can be read. Raises DamagedCheckpoint if it cannot be
        opened."""
        return SavedArray(self._path(step) / "state", name)

    def verify(self, step: int, names: Iterable[str]) -> None:
        """Raise DamagedCheckpoint unless these arrays of a step are what was saved. Little of an array is in memory at
        once; of several processes each reads some of the arrays, and all are told what any has found."""
        saved = _agreed(lambda: self._contents(step))["arrays"]
        own = list(names)[jax.process_index() :: jax.process_count()]

        def look() -> None:
            wrong = [name for name in own if f"{_checksum_on_disk(self.on_disk(step, name)):08x}" != saved[name][2]]
            if wrong:
                raise DamagedCheckpoint(f"checksum does not match: {_some(wrong)}")

        _agreed(look)

    def wait(self) -> None:
        """Return when the last save is complete on disk. Raises SaveFailed if it is not."""
        while self._manager.is_saving_in_progress():
            self.check()
            time.sleep(0.005)
        self.check()
        with self._failing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go of the manager's threads."""
        self._manager.close()
        logging.getLogger("absl").removeFilter(self._failures)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn what goes wrong with a save into SaveFailed: Orbax's errors have no common type."""
        try:
            yield
        except (DamagedCheckpoint, SaveFailed):
            raise
        except Exception as error:
            last = last_saved(self.folder)
            raise SaveFailed(f"cannot save in {self.folder}: {reason_of(error)}; saved last: {last}") from error

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _contents(self, step: int) -> dict:
        """Return what `save` wrote beside the arrays, verified."""
        with _damage("metadata"):
            saved = self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
            if zlib.crc32(saved["contents"].encode()) != saved["checksum"]:
                raise DamagedCheckpoint("metadata: checksum does not match")
            return json.loads(saved["contents"])

    def _prepare_folder(self) -> None:
        """Remove what killed saves left, and rename damaged steps, whose numbers Orbax would refuse; their files stay.

        Not done when a folder is opened, because a reader must not touch the save of a run that goes on.
        """
        if jax.process_index() == 0:
            for unfinished in [] if self._saved else found_in(self.folder)[1]:
                shutil.rmtree(unfinished)
            for step in sorted(self._damaged):
                aside = self.folder / f"damaged-{step}-{time.time_ns()}"
                self._path(step).rename(aside)
                log.warning("damaged checkpoint %s moved to %s; delete it when you like", self._path(step), aside.name)
        if jax.process_count() > 1 and (self._damaged or not self._saved):
            multihost_utils.sync_global_devices("dsjax: checkpoints prepared")
        if self._damaged:
            self._damaged.clear()
            self._manager.reload()
        self._saved = True


class SavedArray:
    """An array of a checkpoint on disk; what is indexed is read, and not verified.

    Orbax divides arrays into chunks, one for each device that has written a part, and a chunk is read whole. The last
    one that was read is kept, so that reading one small part after another costs no more than reading all.
    """

    def __init__(self, folder: Path, name: str):
        self._name, context = name, ocp.type_handlers.get_ts_context()
        info = ocp.type_handlers.ParamInfo(
            name=name, parent_dir=epath.Path(folder), use_zarr3=False, ts_context=context
        )
        with _damage(name):
            spec = tensorstore.Spec(ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True))
            found = tensorstore.open(spec, read=True, context=context).result()
            chunk = prod(found.chunk_layout.read_chunk.shape) * found.dtype.numpy_dtype.itemsize
            keeping = tensorstore.Context({"cache_pool": {"total_bytes_limit": chunk + _BESIDE_CHUNK}}, context)
            self._store = tensorstore.open(spec, read=True, context=keeping).result()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._store.shape

    @property
    def row_bytes(self) -> int:
        """Bytes of what is behind an index of the first axis."""
        return prod(self.shape[1:]) * self._store.dtype.numpy_dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        with _damage(self._name):
            return np.asarray(self._store[index])


def _checksum_on_disk(array: SavedArray) -> int:
    if not array.shape:
        return checksum_of_rows(array[()], 0)
    rows, size = array.shape[0], max(1, _AT_ONCE // array.row_bytes)
    return sum(checksum_of_rows(array[at : min(at + size, rows)], at) for at in range(0, rows, size)) % 2**32


def found_in(folder: Path) -> tuple[list[int], list[Path]]:
    """Return the steps that have a checkpoint in a folder, oldest first, and what killed saves left there."""
    found = list(folder.iterdir()) if folder.exists() else []
    steps = sorted(int(path.name) for path in found if path.name.isdecimal())
    return steps, [path for path in found if ".orbax-checkpoint-tmp" in path.name]


def last_saved(folder: Path) -> str:
    """Return `step 20`, the newest complete checkpoint of a folder, for a message."""
    try:
        steps, _ = found_in(folder)
    except OSError as error:
        return f"unknown ({error.strerror})"
    return f"step {steps[-1]}" if steps else "none"


def reason_of(error: BaseException) -> str:
    """Return what the system had against a write, in its own words if an error or one of its causes holds them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if found := re.search(r"os_error_code='(\d+)'", str(cause)):  # TensorStore
            return os.strerror(int(found[1]))
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def differing_fields(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one line for each field of two nested configs that differs.

    >>> differing_fields({"train": {"batch_size": 8}}, {"train": {"batch_size": 16}})
    ['train.batch_size: 8 in the checkpoint, 16 now']
    """
    lines = []
    for key in [*saved, *(key for key in current if key not in saved)]:
        name = f"{prefix}{key}"
        before, now = (tree.get(key, _ABSENT) for tree in (saved, current))
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += differing_fields(before, now, f"{name}.")
        elif _plain(before) != _plain(now):
            lines.append(f"{name}: {_plain(before)!r} in the checkpoint, {_plain(now)!r} now")
    return lines


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _plain(value: Any) -> Any:
    """JSON has no tuples; a list that came back from it is the tuple that went in."""
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """Turn whatever a reader raises over broken files into DamagedCheckpoint: Orbax's errors have no common type."""
    try:
        yield
    except DamagedCheckpoint:
        raise
    except Exception as error:
        cause: BaseException = error  # of Orbax's, which are long, the first one says it best
        while cause.__cause__:
            cause = cause.__cause__
        reason = " ".join(str(cause.args[0] if isinstance(cause, KeyError) else cause).split())[:300]
        raise DamagedCheckpoint(f"{what}: {reason}") from error


@cache
def _silence_abandoned_work() -> None:
    """Do not let Python print what becomes of the reads and writes that Orbax abandons once one of them has failed: it
    would be a stack for each, with pages of TensorStore's, beside the error that tells what has failed."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        read = code is not None and "orbax" in code.co_filename
        write = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        if not read and not write:
            previous(unraisable)

    sys.unraisablehook = hook


def _agreed[T](read: Callable[[], T]) -> T:
    """Read on every process; if one finds damage, all raise it, so that none is left waiting in a collective."""
    result, damage = None, None
    try:
        result = read()
    except DamagedCheckpoint as error:
        damage = error
    if jax.process_count() > 1:
        flags = multihost_utils.process_allgather(np.int32(damage is not None))
        if flags.any() and damage is None:
            damage = DamagedCheckpoint(f"process {int(np.argmax(flags))} cannot read it")
    if damage is not None:
        raise damage
    return result


def _flat(tree: PyTree) -> dict[str, Any]:
    """Name every leaf by its path: one array on disk is one leaf, whatever classes hold the tree together."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves share a path"
    return {
        name: leaf if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(leaf)
        for name, leaf in flat.items()
    }


def _compare(where: str, saved: dict[str, list], wanted: dict[str, Any], partial: bool) -> None:
    lines = [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
    if not partial:
        lines += [f"{name} is in the checkpoint but not wanted" for name in saved if name not in wanted]
    for name, leaf in wanted.items():
        here = [list(leaf.shape), str(leaf.dtype)]
        if name in saved and saved[name][:2] != here:
            (shape, dtype), (shape_now, dtype_now) = saved[name][:2], here
            lines.append(f"{name} is {dtype}{shape} in the checkpoint, {dtype_now}{shape_now} is wanted")
    if lines:
        more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise ValueError(f"{where} does not fit:\n  " + "\n  ".join(lines[:8]) + more)


def _type_handlers() -> ocp.type_handlers.TypeHandlerRegistry:
    """Return how Orbax writes arrays: devices that hold the same share the writing of what is large. For this it
    compiles a program for every part of every shape, which for small arrays costs seconds of the first save."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_WRITING)
    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )


def _restore_as(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
