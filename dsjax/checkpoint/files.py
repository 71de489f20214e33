"""Safetensors files, read and written in pieces.

The format is 8 bytes of header length, a JSON header that gives each tensor's dtype, shape and place, and the bytes.
We read and write it ourselves, with positioned reads and writes of a few MB, because a conversion must never hold a
whole tensor, let alone a file, and because a truncated or inconsistent file must be told in words.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The format's names of dtypes."""
_HEADER_LIMIT = 1 << 30
_WRITE = 1 << 15
"""Bytes of a write. Linux 6 gives a large write large pages of cache, which cost up to 5 times the time to get
(measured on ext4, 6 GB: 2.2 s of system time at 32 KiB, 5 to 12 s at 1 MiB)."""


_SKIPPED = 1 << 13
"""Bytes of a row that must not be wanted before each row gets a read call of its own: a call takes as long as copying
about so many. Measured on ext4, for an eighth of rows of 16 KiB: half the time of whole rows where the file is in the
cache, as for all but the first of a host's devices, and a quarter more where it is not."""
_AHEAD = 1 << 22
"""Bytes that are asked for ahead of such calls; without it the kernel takes them for random reads, which are slow."""

type Columns = tuple[int, int] | None
"""Part of the second axis; None is all of it."""


@runtime_checkable
class Stored(Protocol):
    """A tensor somewhere on disk, readable by rows, and by columns if it has two axes."""

    dtype: str
    shape: tuple[int, ...]

    def read(self, start: int, stop: int, columns: Columns = None) -> np.ndarray:
        """Return rows start to stop of the first axis."""
        ...


@dataclass(frozen=True)
class Spec:
    """Name, dtype (as in `DTYPES`) and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return DTYPES[self.dtype].itemsize * prod(self.shape)


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a safetensors file."""

    file: "SafetensorsFile"
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, start: int, stop: int, columns: Columns = None) -> np.ndarray:
        """Return rows start to stop, from the file into new memory; of few wanted columns, only these are read."""
        dtype = DTYPES[self.dtype]
        row = prod(self.shape[1:]) * dtype.itemsize
        first, last = columns or (0, prod(self.shape[1:]))
        if row - (last - first) * dtype.itemsize >= _SKIPPED:
            out = np.empty((stop - start, last - first), dtype)
            self.file.read_rows_into(out, self.offset + start * row + first * dtype.itemsize, row)
            return out
        out = np.empty((stop - start, *self.shape[1:]), dtype)
        self.file.read_into(out, self.offset + start * row)
        return out[:, first:last] if columns else out

    def raw(self, start: int, stop: int, buffer: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the bytes of rows start to stop, piece by piece, in `buffer`, which the next piece overwrites."""
        row = prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        for offset in range(start * row, stop * row, buffer.size):
            piece = buffer[: min(buffer.size, stop * row - offset)]
            self.file.read_into(piece, self.offset + offset)
            yield piece


class SafetensorsFile:
    """A safetensors file open for reading: `tensors` by name. Raises ValueError that says what is wrong with it."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self.tensors, self.metadata = self._read_header()
        except ValueError:
            self.close()
            raise

    def _read_header(self) -> tuple[dict[str, FileTensor], dict[str, str]]:
        size = os.fstat(self._descriptor).st_size
        if size < 8:
            raise ValueError(f"{self.path}: truncated, {size} bytes are not even a header")
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        if length > _HEADER_LIMIT:
            raise ValueError(f"{self.path}: not a safetensors file (a header of {length} bytes)")
        if 8 + length > size:
            raise ValueError(f"{self.path}: truncated, {size} bytes of a header of {8 + length}")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8))
            metadata = header.pop("__metadata__", {})
            entries = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.path}: not a safetensors file ({error!r} in its header)") from error
        tensors, end = {}, 0
        for name, (dtype, shape, start, stop) in entries.items():
            if dtype not in DTYPES:
                raise ValueError(f"{self.path}: {name} has dtype {dtype}; known are {', '.join(DTYPES)}")
            if stop - start != prod(shape) * DTYPES[dtype].itemsize or start < 0:
                raise ValueError(f"{self.path}: {name} is {dtype}{list(shape)} but has {stop - start} bytes")
            tensors[name] = FileTensor(self, dtype, shape, 8 + length + start)
            end = max(end, 8 + length + stop)
        if end > size:
            raise ValueError(f"{self.path}: truncated, {size} bytes of {end}")
        return tensors, metadata

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """Fill a contiguous array with the bytes from `offset` on."""
        self._read(memoryview(out.reshape(-1).view(np.uint8)), offset)

    def read_rows_into(self, out: np.ndarray, offset: int, stride: int) -> None:
        """Fill the rows of a contiguous array, which lie in the file from `offset` on, `stride` bytes apart."""
        view, row = memoryview(out.reshape(-1).view(np.uint8)), out[0].nbytes if len(out) else 0
        ahead = max(1, _AHEAD // stride)
        for i in range(len(out)):
            if i % ahead == 0 and hasattr(os, "posix_fadvise"):
                span = min(ahead, len(out) - i) * stride
                os.posix_fadvise(self._descriptor, offset + i * stride, span, os.POSIX_FADV_WILLNEED)
            self._read(view[i * row : (i + 1) * row], offset + i * stride)

    def _read(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise OSError(f"{self.path}: ended at byte {offset}; it was cut while being read")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class SafetensorsWriter:
    """A safetensors file to be filled in any order: the header first, then `write` at a tensor's own offsets."""

    def __init__(self, path: Path, specs: Sequence[Spec], metadata: Mapping[str, str] | None = None):
        header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
        self._start, offset = {}, 0
        # Large elements first, as the safetensors library does: torch needs tensors aligned to their elements.
        for spec in sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize):
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            self._start[spec.name], offset = offset, offset + spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # The format asks for data at a multiple of 8.
        self._data = 8 + len(text)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.ftruncate(self._descriptor, self._data + offset)
        self._write(struct.pack("<Q", len(text)) + text, 0)

    def write(self, name: str, offset: int, data: np.ndarray) -> None:
        """Write contiguous data at `offset` bytes into the tensor `name`."""
        self._write(memoryview(data.reshape(-1).view(np.uint8)), self._data + self._start[name] + offset)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._descriptor, view[:_WRITE], offset)
            view, offset = view[count:], offset + count

    def sync(self) -> None:
        """Bring everything to disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (new names, renames) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
