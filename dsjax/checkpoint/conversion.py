"""Rewriting a checkpoint in another form, in bounded memory, whatever its size.

A plan says, for every tensor of every file to be written, which rows and columns of which tensors of the source follow
each other in it. Carrying it out moves a few MB at a time, multiplies FP8 weights out or quantizes where the target's
format says so, and works on several files at once. Files are written into a hidden folder beside the destination and
brought to disk; the folder gets its name when all is there. If the process dies, the next one goes on at the next file.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsjax.checkpoint.blocks import BLOCK, dequantize, quantize
from dsjax.checkpoint.families import config_to_huggingface
from dsjax.checkpoint.files import DTYPES, FileTensor, SafetensorsWriter, Spec, sync_folder
from dsjax.checkpoint.journal import Journal
from dsjax.checkpoint.names import Tensor, scale_shape
from dsjax.checkpoint.sources import CheckpointProblems, Source

Format = Literal["keep", "bf16", "fp32", "fp8"]
"""Format of the written weights: each as it is stored, or all in one (FP8 as the releases: matrices only)."""
REPORT = "conversion.json"
"""File in a converted folder that says where it came from, with a CRC-32 of every tensor."""
SHARD_BYTES = 4_300_000_000
"""Size of a written file, about that of the releases."""
CARRIED = ("*token*", "generation_config.json", "chat_template*", "configuration_*.py", "modeling_*.py", "LICENSE*")
"""Files that go along with the weights."""
_CHUNK = 1 << 18
"""Elements that a worker holds at once, but for wide matrices, of which it holds 128 rows."""


@dataclass(frozen=True)
class Part:
    """Rows and columns of a tensor of the source."""

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None
    copies: tuple[str, ...] = ()
    """Tensors of the source that must be the same, because the target holds only this one."""


@dataclass(frozen=True)
class Output:
    """A tensor to be written: its parts, in the order of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    scale: str | None = None
    """Name of the scales of an FP8 weight; they have one value per block of the last two axes."""

    def specs(self) -> list[Spec]:
        """Return what the file holds for it."""
        scales = [Spec(self.scale, "F32", scale_shape(self.shape, BLOCK))] if self.scale else []
        return [Spec(self.name, self.dtype, self.shape), *scales]


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be written."""

    name: str
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for output in self.outputs for spec in output.specs())


@dataclass(frozen=True)
class Plan:
    """All that a destination is to hold."""

    files: tuple[OutputFile, ...]
    documents: Mapping[str, Any]
    """JSON files."""
    notes: tuple[str, ...] = ()


@dataclass
class Report:
    """What a conversion did."""

    destination: Path
    tensors: int
    nbytes: int
    seconds: float
    resumed_files: int
    notes: list[str] = field(default_factory=list)


def target_dtype(tensor: Tensor, stored: str, wanted: Format) -> str:
    """Return the dtype in which a tensor is written that is stored in another, or the same."""
    if wanted == "keep":
        return stored
    if wanted == "fp32" or tensor.storage == "fp32":
        return "F32"
    return "F8_E4M3" if wanted == "fp8" and tensor.storage == "fp8" else "BF16"


def is_fp8(files: Iterable[OutputFile]) -> bool:
    """Return whether any tensor is to be FP8."""
    return any(output.scale for file in files for output in file.outputs)


def config_document(source: Source, files: Sequence[OutputFile]) -> dict[str, Any]:
    """Return the config.json that goes with planned files."""
    fp8 = is_fp8(files)
    embedding = source.tensors()[0]
    names = [output.dtype for file in files for output in file.outputs if output.parts[0].name == embedding.huggingface]
    return config_to_huggingface(
        source.config,
        source.huggingface,
        fp8=fp8,
        power_of_two_scales=fp8 and source.power_of_two_scales,
        dtype="float32" if names[0] == "F32" else "bfloat16",
    )


def shards(outputs: Sequence[Output], limit: int, name: Callable[[int, int], str]) -> tuple[OutputFile, ...]:
    """Fill files with tensors, in order, to at most `limit` bytes each where a tensor is not larger by itself.

    Args:
        name: gives the name of file i of n.
    """
    groups: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        size = sum(spec.nbytes for spec in output.specs())
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += size
    return tuple(OutputFile(name(i, len(groups)), tuple(group)) for i, group in enumerate(groups))


def convert(
    source: Source,
    plan: Plan,
    destination: Path,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Carry out a plan.

    Args:
        source: checkpoint, already checked.
        plan: what to write.
        destination: folder to be made; it must not exist.
        workers: files in work at once; by default the number of CPUs, at most the source's limit.
        progress: called with the bytes written so far and in all.

    Raises:
        FileExistsError: the destination exists.
        CheckpointProblems: the source turned out to be broken; nothing is left behind.
        BlockingIOError: another process is converting into the same folder.
        OSError, KeyboardInterrupt: the disk is full, or the user stopped it; calling it again goes on from there.
    """
    require_absent(destination)
    started, total = time.monotonic(), sum(file.nbytes for file in plan.files)
    partial = destination.parent / f".{destination.name}.partial"
    journal = Journal(partial, _fingerprint(source, plan))
    try:
        remaining = [file for file in plan.files if file.name not in journal.done]
        resumed = len(plan.files) - len(remaining)
        _require_space(partial, sum(file.nbytes for file in remaining))
        workers = min(source.workers, workers or os.cpu_count() or 1)
        _write_files(source, remaining, partial, journal, workers, total, progress)
        sums = {file.name: journal.done[file.name] for file in plan.files}
        _write_documents(source, plan, partial, sums)
        _publish(partial, journal, destination)
    except ValueError:
        shutil.rmtree(partial)
        raise
    finally:
        journal.close()
    notes = [*source.notes, *plan.notes]
    notes += [f"{resumed} of {len(plan.files)} files were there from before"] if resumed else []
    notes += ["an unfinished conversion of something else was replaced"] if journal.replaced else []
    return Report(destination, sum(map(len, sums.values())), total, time.monotonic() - started, resumed, notes)


def require_absent(destination: Path) -> None:
    """Raise FileExistsError if there is anything, even a link to nothing, where a folder is to be made."""
    if os.path.lexists(destination):
        raise FileExistsError(f"{destination} exists; name another folder, or remove it")


def _write_files(
    source: Source,
    files: Sequence[OutputFile],
    folder: Path,
    journal: Journal,
    workers: int,
    total: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write files, several tensors at once; on the first failure the others stop at their next piece."""
    lock, stop = threading.Lock(), threading.Event()
    written = total - sum(file.nbytes for file in files)

    def advance(count: int) -> None:
        nonlocal written
        if stop.is_set():
            raise _Stopped
        with lock:
            written += count
            progress(written, total)

    def work(file: _FileInWork, output: Output) -> None:
        sums = _write_output(source, output, file.writer(), advance)
        if file.is_last(sums):
            file.finish()
            with lock:
                journal.add(file.name, file.sums)

    pool = ThreadPoolExecutor(workers)
    in_work = [_FileInWork(folder, file) for file in files]
    tasks = [(file, output) for file, planned in zip(in_work, files, strict=True) for output in planned.outputs]
    try:
        done, _ = wait([pool.submit(work, *task) for task in tasks], return_when=FIRST_EXCEPTION)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        for file in in_work:
            file.abandon()
    for failure in filter(None, (future.exception() for future in done)):
        raise failure


class _FileInWork:
    """A file that workers fill tensor by tensor; whoever writes the last one brings it to disk."""

    def __init__(self, folder: Path, planned: OutputFile):
        self.name, self.sums = planned.name, {}
        self._planned, self._left, self._lock = planned, len(planned.outputs), threading.Lock()
        self._path = (folder / planned.name).with_suffix(".writing")
        self._writer: SafetensorsWriter | None = None

    def writer(self) -> SafetensorsWriter:
        """Return the open file."""
        with self._lock:
            if self._writer is None:
                specs = [spec for output in self._planned.outputs for spec in output.specs()]
                self._writer = SafetensorsWriter(self._path, specs)
            return self._writer

    def is_last(self, sums: Mapping[str, int]) -> bool:
        """Note the checksums of a tensor that is written; return whether it was the last."""
        with self._lock:
            self.sums |= sums
            self._left -= 1
            return self._left == 0

    def finish(self) -> None:
        """Bring the file to disk and give it its name."""
        self._writer.sync()
        self.abandon()
        self._path.rename(self._path.parent / self.name)
        sync_folder(self._path.parent)

    def abandon(self) -> None:
        """Close the file, if it is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are to be written and {free:,} are free", str(folder.parent))


class _Stopped(Exception):
    """Another worker failed, or the user stopped the conversion."""


def _fingerprint(source: Source, plan: Plan) -> str:
    """Return a digest of what the written bytes depend on: a conversion only goes on where it left the same one."""
    files = sorted(source.path.iterdir()) if source.path.is_dir() else [source.path]
    # Hidden entries are left out: an unfinished conversion may be one of them.
    files = [file for file in files if file.exists() and not file.name.startswith(".")]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    once = time.time_ns() if source.form == "memory" else 0  # Nothing tells one array in memory from the next.
    facts = (version("dsjax"), str(source.path.resolve()), stats, source.notes, once, plan.files)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _write_output(
    source: Source, output: Output, writer: SafetensorsWriter, advance: Callable[[int], None]
) -> dict[str, int]:
    """Write a tensor and its scales; return the CRC-32 of each."""
    sums, offsets = {}, {}

    def write(name: str, data: np.ndarray) -> None:
        data = np.ascontiguousarray(data)
        writer.write(name, offsets.get(name, 0), data)
        offsets[name] = offsets.get(name, 0) + data.nbytes
        sums[name] = zlib.crc32(data.reshape(-1).view(np.uint8), sums.get(name, 0))
        advance(data.nbytes)

    for part in output.parts:
        for values, scales in _values(source, part, output.dtype):
            write(output.name, values)
            if output.scale and scales is not None:
                write(output.scale, scales)
    return sums


def _values(source: Source, part: Part, dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield a part in pieces of whole blocks of rows, in the wanted dtype, with the pieces' scales if it is FP8."""
    stored = source.stored[part.name]
    is_fp8, width = stored.dtype == "F8_E4M3", int(np.prod(stored.shape[1:]))
    scales = source.scales(part.name) if is_fp8 else None
    if isinstance(stored, FileTensor) and stored.dtype == dtype and not part.columns and not part.copies:
        yield from ((data, None) for data in stored.raw(*part.rows, _scratch()))
        if is_fp8:
            yield np.empty(0, np.uint8), scales[part.rows[0] // BLOCK : -(-part.rows[1] // BLOCK)]
        return
    columns = slice(*part.columns) if part.columns else slice(None)
    first, last = part.rows
    step = max(BLOCK, _CHUNK // width // BLOCK * BLOCK)
    for start in range(first, last, step):
        stop = min(start + step, last)
        values = stored.read(start, stop, part.columns)
        for copy in part.copies:
            if source.stored[copy].read(start, stop, part.columns).tobytes() != values.tobytes():
                raise CheckpointProblems(source.path, [f"{copy} differs from {part.name}, of which it is to be a copy"])
        if is_fp8 and dtype == "F8_E4M3":
            blocks = slice(start // BLOCK, -(-stop // BLOCK))
            block_columns = slice(columns.start // BLOCK, -(-columns.stop // BLOCK)) if part.columns else slice(None)
            yield values, scales[blocks, block_columns]
        elif dtype == "F8_E4M3":
            try:
                yield quantize(values.astype(np.float32), power_of_two=source.power_of_two_scales)
            except ValueError as error:
                raise CheckpointProblems(source.path, [f"{part.name}: {error}"]) from error
        else:
            if is_fp8:
                values = dequantize(values, scales, start, columns.start or 0, DTYPES[dtype])
            yield values.astype(DTYPES[dtype], copy=False), None


_local = threading.local()


def _scratch() -> np.ndarray:
    """Return a buffer of this thread's: new memory for every piece would cost as much as copying it."""
    if not hasattr(_local, "buffer"):
        _local.buffer = np.empty(1 << 18, np.uint8)
    return _local.buffer


def _write_documents(source: Source, plan: Plan, folder: Path, sums: Mapping[str, Mapping[str, int]]) -> None:
    """Write JSON files and the report, and bring along the tokenizer."""
    report = {
        "dsjax": version("dsjax"),
        "source": str(source.path.resolve()),
        "source_form": source.form,
        "notes": [*source.notes, *plan.notes],
        "crc32": {file: {name: f"{crc:08x}" for name, crc in tensors.items()} for file, tensors in sums.items()},
    }
    for name, contents in {**plan.documents, REPORT: report}.items():
        with (folder / name).open("w", encoding="utf-8") as file:
            json.dump(contents, file, indent=2, ensure_ascii=False)
            file.write("\n")
            os.fsync(file.fileno())
    origin = source.path if source.path.is_dir() else source.path.parent
    for path in sorted({path for pattern in CARRIED for path in origin.glob(pattern)}):
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt") and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
            with (folder / path.name).open("rb+") as file:
                os.fsync(file.fileno())


def _publish(partial: Path, journal: Journal, destination: Path) -> None:
    """Give the finished folder its name."""
    journal.remove()
    sync_folder(partial)
    partial.rename(destination)
    sync_folder(destination.parent)
