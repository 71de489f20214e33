"""What a conversion has done, so that the next process can go on where one was killed."""

import fcntl
import json
import os
import shutil
from pathlib import Path

_JOURNAL, _LOCK, _KEY = "journal.jsonl", "lock", "fingerprint"


class Journal:
    """The files of a conversion that are complete, with the checksums of their tensors, one line each.

    Its folder is removed and begun anew if it is another conversion's. Raises BlockingIOError if one is at work there.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.done: dict[str, dict[str, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        self._path = folder / _JOURNAL
        entries = self._entries()
        self.replaced = any(file != _LOCK for file in os.listdir(folder)) and entries[:1] != [{_KEY: fingerprint}]
        if self.replaced:
            shutil.rmtree(folder)
            folder.mkdir()
            os.close(self._lock)
            self._lock, entries = _lock(folder), []
        self.done = {entry["file"]: entry["tensors"] for entry in entries[1:]}
        # Written anew, so that a line that a killed process left torn does not swallow the next.
        self._path.write_text("")
        for entry in entries or [{_KEY: fingerprint}]:
            self._append(entry)

    def _entries(self) -> list[dict]:
        """Return the whole lines, up to the first torn one."""
        entries = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        return entries

    def add(self, file: str, sums: dict[str, int]) -> None:
        """Note that a file is complete."""
        self.done[file] = sums
        self._append({"file": file, "tensors": sums})

    def _append(self, entry: dict) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Take its own files out of a folder that is complete."""
        self._path.unlink()
        (self._path.parent / _LOCK).unlink()

    def close(self) -> None:
        """Let another process write in the folder."""
        os.close(self._lock)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BlockingIOError(f"{folder}: another process is converting into it") from error
    return descriptor
