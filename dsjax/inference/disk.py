"""Pages on disk, for prompts that come again after their pages had to go, or after a restart.

One file per page, in a folder that is named after the model: its settings, a checksum of its weights and the format of
the cache. A file holds the page's tokens too, and is only believed if they are those asked for.
"""

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from dsjax.checkpoint.checksum import checksums
from dsjax.inference.load import Model
from dsjax.inference.pages import Known

log = logging.getLogger("dsjax")

Arrays = Mapping[str, np.ndarray]


def fingerprint(model: Model, page_size: int, cache_format: str) -> str:
    """Return what stands for a model and the form of its pages: the same only if both are."""
    leaves = jax.tree_util.tree_leaves_with_path((model.params, model.biases))
    sums = checksums({jax.tree_util.keystr(path): leaf for path, leaf in leaves})
    described = repr((model.config, np.dtype(model.runtime.compute_dtype).name, page_size, cache_format, sums))
    return hashlib.blake2b(described.encode(), digest_size=12).hexdigest()


class DiskTier:
    """Files of pages, within a budget: those unused for longest are deleted."""

    def __init__(
        self,
        folder: Path,
        budget: int,
        read: Callable[[int], Arrays],
        write: Callable[[int, Arrays], None],
    ):
        """Takes over what is in the folder.

        Args:
            folder: of one model's pages; made if it is not there.
            budget: bytes at most.
            read: returns a page of the cache.
            write: sets one.
        """
        self._folder, self._budget, self._read, self._write = folder, budget, read, write
        folder.mkdir(parents=True, exist_ok=True)
        # Oldest first, as a dict keeps the order in which names came.
        found = sorted(folder.glob("*.npz"), key=lambda file: file.stat().st_mtime)
        self._sizes = {file.stem: file.stat().st_size for file in found}

    def has(self, known: Known) -> bool:
        """Whether there is a file."""
        return known.digest.hex() in self._sizes

    def save(self, known: Known, page: int) -> None:
        """Write a page, unless it is there; a file is whole or not there."""
        name = known.digest.hex()
        if name in self._sizes:
            return
        # As bytes: the NumPy format knows neither bfloat16 nor FP8.
        arrays = {key: np.ascontiguousarray(value).view(np.uint8) for key, value in self._read(page).items()}
        part = self._folder / f"{name}.{os.getpid()}.part"
        with part.open("wb") as file:
            np.savez(file, parent=_bytes(known.parent), tokens=_bytes(known.tokens), **arrays)
        os.replace(part, self._file(name))
        self._sizes[name] = self._file(name).stat().st_size
        while sum(self._sizes.values()) > self._budget:
            self._delete(next(iter(self._sizes)))

    def load(self, known: Known, page: int) -> bool:
        """Set a page from its file; a damaged file is reported and deleted."""
        name = known.digest.hex()
        try:
            with np.load(self._file(name)) as file:
                arrays = dict(file)
            same = arrays.pop("tokens").tobytes() == known.tokens and arrays.pop("parent").tobytes() == known.parent
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("prefix cache: %s cannot be read (%s); it is deleted", self._file(name), error)
            self._delete(name)
            return False
        if same:
            self._write(page, arrays)
            self._sizes[name] = self._sizes.pop(name)
            os.utime(self._file(name))
        return same

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.npz"

    def _delete(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)
        del self._sizes[name]


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)
