"""Folders that are whole or absent: built aside, sealed with digests, renamed into place, and checked at each use.

Looking at the source again at every start is cheap: a ledger remembers each file's digest together with its size,
times and inode, as git's index does, and only files whose `stat` has changed are read again.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsjax.data.sources import SourceFile

_SEAL = "seal.json"
_BLOCK, _BLOCKS = 2**20, 256
# A file changed after it was read, but within the clock's grain, would keep its times.
_SETTLED_NS = 2_000_000_000

_log = logging.getLogger(__name__)


def digest(*values: Any) -> str:
    """Returns 32 hexadecimal digits that stand for the values, which JSON must be able to hold."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def digest_of_files(files: list[SourceFile], ledger: Path) -> str:
    """Returns a digest of the names and the bytes of the files, reading only those that changed since the last call.

    Args:
        files: in the order that counts.
        ledger: JSON file that remembers digests; written atomically, and begun anew if it is damaged.

    Raises:
        ValueError: a file cannot be read.
    """
    try:
        known = json.loads(ledger.read_text())
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    now = time.time_ns()

    def look(file: SourceFile) -> tuple[str, list]:
        stat = file.path.stat()
        key = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = known.get(str(file.path.absolute()))
        if isinstance(entry, list) and entry[:-1] == key:
            return entry[-1], entry
        try:
            with open(file.path, "rb") as stream:
                found = hashlib.file_digest(stream, _blake2b).hexdigest()
        except OSError as error:  # of a disk that fails, say, which names no file
            raise ValueError(f"{file.path}: {error.strerror}") from error
        settled = max(stat.st_mtime_ns, stat.st_ctime_ns) < now - _SETTLED_NS
        return found, [*key, found] if settled else []

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(look, files))
    entries = {str(file.path.absolute()): entry for file, (_, entry) in zip(files, found, strict=True) if entry}
    if entries != known:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        temporary = ledger.with_name(f"{ledger.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(entries))
        temporary.replace(ledger)
    return digest(*[(file.name, content) for file, (content, _) in zip(files, found, strict=True)])


def sealed(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Returns what `build` said of a folder, after building it if it is absent or damaged.

    One process builds at a time; the others wait and use what it made. A process that dies leaves a temporary folder
    that the next one removes. Damage (a changed size or digest) is logged and built anew. Digests cover a file up to
    256 MiB completely, and of a larger one its size and 256 blocks of 1 MiB evenly spread.

    Args:
        folder: where the files are to be.
        build: writes files into the empty folder it is given, and returns facts that JSON can hold.

    Returns:
        The facts, with `fingerprint` added: a digest of the folder's name and of all its files.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            damage = _damage(folder)
            if damage is None:
                return json.loads((folder / _SEAL).read_text())["facts"]
            _log.warning("%s is damaged (%s) and is built again", folder, damage)
            shutil.rmtree(folder)
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            facts = build(temporary)
            files = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
            facts = {**facts, "fingerprint": digest(folder.name, files)}
            (temporary / _SEAL).write_text(
                json.dumps({"files": files, "facts": facts, "check": digest(files, facts)}, indent=1)
            )
            for path in [*temporary.iterdir(), temporary]:
                _sync(path)
            temporary.rename(folder)
            _sync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return facts


def _damage(folder: Path) -> str | None:
    try:
        seal = json.loads((folder / _SEAL).read_text())
        for name, expected in seal["files"].items():
            found = _digest(folder / name)
            if found[0] != expected[0]:
                return f"{name} has {found[0]} bytes, not {expected[0]}"
            if found[1] != expected[1]:
                return f"the bytes of {name} have changed"
        if seal["check"] != digest(seal["files"], seal["facts"]):
            return f"{_SEAL} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_SEAL} is not readable"
    return None


def _digest(path: Path) -> list:
    size = path.stat().st_size
    blocks = -(-size // _BLOCK)
    chosen = range(blocks) if blocks <= _BLOCKS else [i * (blocks - 1) // (_BLOCKS - 1) for i in range(_BLOCKS)]
    total = _blake2b()
    with open(path, "rb") as stream:
        for block in chosen:
            stream.seek(block * _BLOCK)
            total.update(stream.read(_BLOCK))
    return [size, total.hexdigest()]


def _blake2b():
    return hashlib.blake2b(digest_size=16)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
