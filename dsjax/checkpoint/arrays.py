"""The arrays of a model, read in parts from an open checkpoint of any form: only the bytes of a part are read."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.checkpoint.blocks import BLOCK, dequantize
from dsjax.checkpoint.files import Columns
from dsjax.checkpoint.names import scale_name, scale_shape
from dsjax.checkpoint.sources import Source, model_arrays

type Index = tuple[slice, ...]
"""Part of an array: a slice of each axis, without steps."""
type Reader = Callable[[str, int, int, Columns], np.ndarray]
"""Returns rows, and of these columns, of the tensor of a name."""

_ROWS = 4096
"""Rows that are read at once."""


class Arrays:
    """Canonical arrays by path ("params/layers/3/moe/experts/gate_up"), each one or several tensors of a checkpoint.

    Attributes:
        shapes: of all arrays.
    """

    def __init__(self, source: Source):
        self.shapes = model_arrays(source.config)
        self._source = source
        self._names: dict[str, dict[tuple[int, ...], str]] = {}
        self._fp8: dict[str, bool] = {}
        for tensor in source.tensors():
            if not tensor.copy:
                self._names.setdefault(tensor.path, {})[tensor.index] = tensor.huggingface

    def is_fp8(self, path: str) -> bool:
        """Whether an array is stored as codes and scales; of experts, whether all are."""
        if path not in self._fp8:
            stored = self._source.stored
            self._fp8[path] = all(stored[name].dtype == "F8_E4M3" for name in self._names[path].values())
        return self._fp8[path]

    def read(self, path: str, index: Index, dtype: Any, out: np.ndarray | None = None) -> np.ndarray:
        """Return array[index] in a floating-point format, FP8 weights multiplied out.

        Args:
            out: contiguous memory to be filled, of this format and as many elements in whatever shape.
        """

        def values(name: str, start: int, stop: int, columns: Columns) -> np.ndarray:
            return read_values(self._source, name, start, stop, columns)

        return self._read(path, self.shapes[path], index, np.dtype(dtype), values, out)

    def read_codes(self, path: str, index: Index) -> tuple[np.ndarray, np.ndarray]:
        """Return codes [index] and their scales, as they are stored, of an array in FP8.

        Args:
            index: along the last two axes, parts that begin and end with blocks.
        """

        def codes(name: str, start: int, stop: int, columns: Columns) -> np.ndarray:
            return self._source.stored[name].read(start, stop, columns)

        def scales(name: str, start: int, stop: int, columns: Columns) -> np.ndarray:
            return self._source.stored[scale_name(name)].read(start, stop, columns)

        shape = self.shapes[path]
        return (
            self._read(path, shape, index, np.dtype(ml_dtypes.float8_e4m3fn), codes),
            self._read(path, scale_shape(shape), of_blocks(index, shape), np.dtype(np.float32), scales),
        )

    def _read(
        self,
        path: str,
        shape: tuple[int, ...],
        index: Index,
        dtype: np.dtype[Any],
        read: Reader,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return array[index], of an array of that shape whose pieces are tensors."""
        names = self._names[path]
        ranges = [range(size)[part] for size, part in zip(shape, index, strict=True)]
        lengths = [len(part) for part in ranges]
        out = np.empty(lengths, dtype) if out is None else out.reshape(lengths, copy=False)
        lead = len(next(iter(names)))
        rows, *columns = ranges[lead:]
        kept = (columns[0].start, columns[0].stop) if columns else None
        for at in np.ndindex(*out.shape[:lead]):
            name = names[tuple(part[i] for part, i in zip(ranges, at, strict=False))]
            for start in range(rows.start, rows.stop, _ROWS):  # Little more than the part itself is in memory.
                stop = min(start + _ROWS, rows.stop)
                out[at][start - rows.start : stop - rows.start] = read(name, start, stop, kept)
        return out


def of_blocks(index: Index, shape: tuple[int, ...]) -> Index:
    """Return the part of the scales that belongs to the part [index] of codes of this shape."""
    *lead, rows, columns = (slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
    return (*lead, *(slice(part.start // BLOCK, -(-part.stop // BLOCK)) for part in (rows, columns)))


def read_values(source: Source, name: str, start: int, stop: int, columns: Columns = None) -> np.ndarray:
    """Return rows of a tensor as numbers: FP8 weights multiplied out in float32, others as they are stored."""
    values = source.stored[name].read(start, stop, columns)
    if values.dtype == ml_dtypes.float8_e4m3fn:
        return dequantize(values, source.scales(name), start, columns[0] if columns else 0)
    return values
