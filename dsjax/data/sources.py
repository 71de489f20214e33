"""Documents out of files: the standard library, text, JSONL, Parquet, and arrays of token ids.

Every reader streams: no more than one document, or one piece of a very long one, is in memory. Bad input is a
ValueError that begins with the file and the line, row or position.
"""

import codecs
import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Integer

from dsjax.config import DataConfig

PIECE = 2**22
"""Bytes (or tokens) of one file after which a text file (or an array) goes on as another document."""

_PACKED = (".gz", ".zst")
_SUFFIXES = {"jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",), "tokens": (".npy",)}
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """A file of the source, with its name inside it, which says nothing of where the source lies."""

    name: str
    path: Path


@dataclass(frozen=True)
class Document:
    """A text, or the token ids of one, and where it begins: `file:line`, `file:row` or `file[position]`."""

    content: str | Integer[np.ndarray, " tokens"]
    origin: str
    consumed: int
    """Bytes of the source's files read up to and with this document."""


def source_files(config: DataConfig) -> list[SourceFile]:
    """Returns the files of the source, sorted by name.

    Hidden files and folders are left out, and of the standard library its tests and installed packages too.

    Raises:
        ValueError: the path is missing or matches no file of the source's kind.
    """
    if config.source == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, _NOT_LIBRARY) if path.suffix == ".py"]
        if not files:
            raise ValueError(f"data.source = 'python-stdlib': no .py file under {root}; set another data.source")
        return _named(files, root)
    where = f"data.path = {config.path!r}"
    path = expanded(config.path, "data.path")
    if path.is_file():
        return [SourceFile(path.name, path)]
    if path.is_dir():
        suffixes = _SUFFIXES.get(config.source, ())
        if config.source == "jsonl":
            suffixes += tuple(suffix + packed for suffix in suffixes for packed in _PACKED)
        files = [file for file in _walk(path, {"__pycache__"}) if not suffixes or file.name.endswith(suffixes)]
        if not files:
            kind = f"{suffixes[0]} file" if suffixes else "file"
            raise ValueError(f"{where}: the folder holds no {kind}")
        return _named(files, path)
    files = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [file for file in files if file.is_file()]
    if files:
        return _named(files, Path(os.path.commonpath([file.parent for file in files])))
    if glob.has_magic(config.path):
        raise ValueError(f"{where}: the pattern matches no file")
    raise ValueError(f"{where}: no such file or folder")


def expanded(path: str | Path, setting: str) -> Path:
    """Returns the path that a setting names, with the home folder in place of `~`.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{setting} = {str(path)!r}: nobody here has that home folder") from None


def documents(
    config: DataConfig,
    files: list[SourceFile] | None = None,
    *,
    vocab_size: int | None = None,
    end_of_document: int | None = None,
) -> Iterator[Document]:
    """Yields the documents of the source in the order of its files, without empty ones.

    Args:
        config: says the kind of the source and its path.
        files: what `source_files(config)` returned, to save a look at the disk.
        vocab_size: ids of the source `tokens` are to be below it; None does not check.
        end_of_document: where the arrays of the source `tokens` are cut into documents; None takes them whole.

    Raises:
        ValueError: undecodable, damaged or ill-formed input, naming the file and the line.
    """
    before = 0
    for file in source_files(config) if files is None else files:
        path = file.path
        size = path.stat().st_size
        match config.source:
            case "jsonl":
                found = _json_lines(path, config.text_field)
            case "parquet":
                found = _parquet(path, config.text_field)
            case "tokens":
                found = _arrays(path, vocab_size, end_of_document)
            case "text" | "python-stdlib":
                found = _texts(path)
        for content, origin, consumed in found:
            if len(content):
                yield Document(content, origin, before + min(consumed, size))
        before += size


_Found = Iterator[tuple[Any, str, int]]


def _texts(path: Path) -> _Found:
    with opened(path) as (stream, raw):
        line = 1
        while data := stream.read(PIECE):
            data += stream.readline()
            yield _decoded(data, path, line), f"{path}:{line}", raw.tell()
            line += data.count(b"\n")


def _json_lines(path: Path, name: str) -> _Found:
    with opened(path) as (stream, raw):
        for line, data in enumerate(stream, 1):
            where = f"{path}:{line}"
            if not data.strip():
                continue
            text = _decoded(data, path, line).rstrip()
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
            except ValueError as error:  # a number of thousands of digits
                raise ValueError(f"{where}: not JSON: {error}") from error
            except RecursionError as error:
                raise ValueError(f"{where}: not JSON: nested too deep") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a JSON {type(record).__name__}, not an object with the field {name!r}")
            if name not in record:
                raise ValueError(f"{where}: no field {name!r}, only {_listed(record)}; set data.text_field")
            text = record[name]
            if not isinstance(text, str):
                raise ValueError(f"{where}: field {name!r} is of type {type(text).__name__}, not a string")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = text[error.start]
                raise ValueError(f"{where}: field {name!r} holds half of a surrogate pair, {half!r}") from error
            yield text, where, raw.tell()


def _parquet(path: Path, name: str) -> _Found:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(_needs(path, "pyarrow")) from error
    size = path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if name not in schema.names:
                raise ValueError(f"{path}: no column {name!r}, only {_listed(schema.names)}; set data.text_field")
            kind = schema.field(name).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ValueError(f"{path}: column {name!r} is of type {kind}, not string")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[name]):
                for value in batch.column(0):
                    row += 1
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        byte = error.object[error.start]
                        raise ValueError(f"{path}:{row}: byte 0x{byte:02x} is not UTF-8") from error
                    if text is None:
                        raise ValueError(f"{path}:{row}: column {name!r} is null, not a string")
                    yield text, f"{path}:{row}", size * row // file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged or not a Parquet file: {error}") from error


def _arrays(path: Path, vocab_size: int | None, end_of_document: int | None) -> _Found:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged or not a .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: an archive of arrays, not one .npy array")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{path}: token ids of type {array.dtype}, not integers")
    if array.ndim != 1:
        raise ValueError(f"{path}: token ids of shape {array.shape}, not one-dimensional")
    start = 0
    while start < len(array):
        piece = np.asarray(array[start : start + PIECE])
        if vocab_size is not None:
            outside = np.flatnonzero((piece < 0) | (piece >= vocab_size))
            if len(outside):
                where, token = start + outside[0], piece[outside[0]]
                raise ValueError(
                    f"{path}[{where}]: token id {token} is not in the model's vocabulary, 0 to {vocab_size - 1}"
                )
        ends = np.zeros(0, np.int64) if end_of_document is None else np.flatnonzero(piece == end_of_document) + 1
        if not len(ends) or start + len(piece) == len(array):
            ends = np.union1d(ends, [len(piece)])
        for first, last in zip([0, *ends[:-1]], ends, strict=True):
            yield piece[first:last], f"{path}[{start + first}]", int(start + last) * array.itemsize
        start += int(ends[-1])


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file, unpacking .gz and .zst: gives the stream to read, and the raw one below it, for its position.

    Raises:
        ValueError: the packed data are damaged or end too early.
    """
    with open(path, "rb") as raw:
        try:
            if path.suffix == ".gz":
                with gzip.open(raw) as stream:
                    yield stream, raw
            elif path.suffix == ".zst":
                with io.BufferedReader(_Zstandard(raw, path), 2**17) as stream:
                    yield stream, raw
            else:
                yield raw, raw
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: damaged {path.suffix} data: {error}") from error


class _Zstandard(io.RawIOBase):
    """Unpacks zstd frames one after the other. The library's own reader takes a truncated file for a shorter one."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(_needs(path, "zstandard")) from error
        self._error = zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor
        self._raw = raw
        self._frame = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            data = b""
            if self._frame is not None and self._frame.eof:
                data, self._frame = self._frame.unused_data, None
            data = data or self._raw.read(2**17)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._unpacker().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise EOFError(error) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _decoded(data: bytes, path: Path, line: int) -> str:
    if line == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        byte = data[error.start]
        raise ValueError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; every text must be UTF-8") from error


def _walk(root: Path, left_out: set[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _named(files: list[Path], root: Path) -> list[SourceFile]:
    found = [SourceFile(path.relative_to(root).as_posix(), path) for path in files]
    return sorted(found, key=lambda file: file.name)


def _listed(names: Any) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none at all"


def _needs(path: Path, package: str) -> str:
    advice = "install the extra `data`: uv sync --extra data, or pip install dsjax[data]"
    return f"{path}: reading it needs {package}; {advice}"
