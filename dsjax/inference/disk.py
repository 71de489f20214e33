"""Pages on disk, for prompts that come again after their pages had to go, after a restart, or to another engine.

One file per page, in a folder that is named after the model (`fingerprint.py`). Engines that have the same model may
use the folder at the same time: files appear whole, whoever needs room deletes those that were unused for longest, and
a file that is gone is as good as one that never was. A file holds the page's tokens too, and is only believed if they
are those asked for; its parts have checksums.
"""

import logging
import os
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from dsjax.inference.pages import Known

log = logging.getLogger("dsjax.inference")

MOST_WAITING = 16
"""Pages that wait to be written, each of which takes its bytes of the device's memory too; others are not written."""
ABANDONED = 3600.0
"""Seconds after which a file that is not whole belongs to a process that was killed."""
SHARE = 16
"""The folder is listed again when an engine has written one part in so many of the budget."""


class PageFiles:
    """A folder of pages, within a budget. Threads and processes may share it."""

    def __init__(self, folder: Path, budget: int):
        """Takes over what is in the folder.

        Args:
            folder: of one model's pages; made if it is not there.
            budget: bytes at most, whoever has written them. Several engines may exceed it by a part in `SHARE` each.
        """
        self._folder, self._budget, self._unlisted = folder, budget, 0
        self._is_usable, self._lock = True, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        with self._giving_up():
            self._make_room()

    def has(self, known: Known) -> bool:
        """Whether there is a file."""
        return os.path.exists(self._file(known))

    def wants(self, known: Known) -> bool:
        """Whether a page is worth writing: it is not there, and could be."""
        return self._is_usable and not self.has(known)

    def write(self, known: Known, arrays: Mapping[str, Array]) -> None:
        """Write a page, unless it is there; a file is whole or not there. Where that fails, it is said once, and no
        more pages are written.

        Args:
            arrays: what is on the page; this waits for the device.
        """
        if not self.wants(known):
            return
        # As bytes: the NumPy format knows neither bfloat16 nor FP8.
        spelled = {name: np.ascontiguousarray(array).view(np.uint8) for name, array in jax.device_get(arrays).items()}
        file = self._file(known)
        part = file.with_suffix(f".{uuid.uuid4().hex}.part")
        with self._giving_up():
            try:
                with part.open("xb") as stream:
                    np.savez(stream, parent=_bytes(known.parent), tokens=_bytes(known.tokens), **spelled)
                with self._lock:
                    self._unlisted += part.stat().st_size
                    has_room = self._unlisted <= self._budget // SHARE or self._make_room()
                if has_room:
                    os.replace(part, file)
            finally:
                part.unlink(missing_ok=True)

    def read(self, known: Known) -> dict[str, np.ndarray] | None:
        """Return what is on a page, as bytes; None without a file. A damaged one is reported and deleted."""
        file = self._file(known)
        try:
            with np.load(file) as found:
                arrays = dict(found)
            same = arrays.pop("tokens").tobytes() == known.tokens and arrays.pop("parent").tobytes() == known.parent
        except FileNotFoundError:
            return None  # another engine needed the room
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("prefix cache: %s cannot be read (%s); it is deleted", file, error)
            with self._giving_up():
                file.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # gone, or somebody else's: it may be deleted sooner than it should be
            os.utime(file)
        return arrays if same else None

    def _make_room(self) -> bool:
        """Delete what killed processes have left and, oldest first, pages until a part in `SHARE` of it all is free.
        Return whether the rest is within the budget."""
        found, now = [], time.time()
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):  # another engine does the same
                about, is_part = entry.stat(), entry.name.endswith(".part")
                if is_part and now - about.st_mtime > ABANDONED:
                    os.unlink(entry.path)
                elif is_part or entry.name.endswith(".npz"):
                    found.append((about.st_mtime, entry.path, about.st_size, is_part))
        total = sum(size for _, _, size, _ in found)
        for _, path, size, is_part in sorted(found):
            if total <= self._budget - self._budget // SHARE:
                break
            if not is_part:
                Path(path).unlink(missing_ok=True)
                total -= size
        self._unlisted = 0
        return total <= self._budget

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Go on without writing when the disk fails."""
        try:
            yield
        except OSError as error:
            if self._is_usable:
                log.warning("prefix cache: no more pages are written to %s: %s", self._folder, error.strerror)
            self._is_usable = False

    def _file(self, known: Known) -> Path:
        return self._folder / f"{known.digest.hex()}.npz"


class DiskTier:
    """What a group's pool of pages sees of the files. A thread writes them, so that no step waits for the disk."""

    def __init__(
        self,
        files: PageFiles,
        read: Callable[[int], Mapping[str, Array]],
        write: Callable[[int, Mapping[str, np.ndarray]], None],
    ):
        """Begins with nothing to write.

        Args:
            files: of all groups.
            read: returns a page of the cache, without waiting for the device.
            write: sets one.
        """
        self._files, self._read, self._write = files, read, write
        self._writer, self._room = ThreadPoolExecutor(1, "pages"), threading.BoundedSemaphore(MOST_WAITING)

    def has(self, known: Known) -> bool:
        """Whether there is a file."""
        return self._files.has(known)

    def save(self, known: Known, page: int, *, wait: bool) -> None:
        """Let a page be written, unless it is there.

        Args:
            wait: whether to wait when too many others are to be written; otherwise it is left out.
        """
        if not self._files.wants(known) or not self._room.acquire(blocking=wait):
            return
        arrays = self._read(page)
        for array in arrays.values():
            array.copy_to_host_async()
        self._writer.submit(self._files.write, known, arrays).add_done_callback(self._written)

    def load(self, known: Known, page: int) -> bool:
        """Set a page from its file; return whether there was one."""
        arrays = self._files.read(known)
        if arrays is not None:
            self._write(page, arrays)
        return arrays is not None

    def flush(self) -> None:
        """Wait until all pages are written."""
        self._writer.submit(lambda: None).result()

    def _written(self, future: Future) -> None:
        self._room.release()
        future.result()


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)
