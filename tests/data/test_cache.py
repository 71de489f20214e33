"""A sealed folder is whole or is built again; the ledger never vouches for bytes that have changed."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsjax.data import cache
from dsjax.data.cache import digest_of_files, sealed
from dsjax.data.sources import SourceFile


class Builder:
    """Writes two files and counts how often it had to."""

    def __init__(self) -> None:
        self.builds = 0

    def __call__(self, folder):
        self.builds += 1
        (folder / "data.bin").write_bytes(bytes(range(256)) * 20)
        (folder / "empty.bin").touch()
        return {"tokens": 5120}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "data.bin has 5119 bytes, not 5120": lambda folder: os.truncate(folder / "data.bin", 5119),
    "the bytes of data.bin have changed": lambda folder: flip(folder / "data.bin"),
    "data.bin is missing": lambda folder: (folder / "data.bin").unlink(),
    "seal.json is missing": lambda folder: (folder / "seal.json").unlink(),
    "seal.json is not readable": lambda folder: os.truncate(folder / "seal.json", 40),
    "seal.json has changed": lambda folder: (folder / "seal.json").write_text(
        (folder / "seal.json").read_text().replace('"tokens": 5120', '"tokens": 5121')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_built_again(tmp_path, caplog, damage):
    build, folder = Builder(), tmp_path / "cache" / "tokens-1"
    facts = sealed(folder, build)
    assert facts["tokens"] == 5120 and sealed(folder, build) == facts and build.builds == 1
    DAMAGES[damage](folder)
    assert sealed(folder, build) == facts and build.builds == 2
    assert caplog.messages == [f"{folder} is damaged ({damage}) and is built again"]
    assert (folder / "data.bin").read_bytes() == bytes(range(256)) * 20


def test_a_large_file_is_sampled_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK", 16)
    monkeypatch.setattr(cache, "_BLOCKS", 10)
    build, folder = Builder(), tmp_path / "tokens-1"
    sealed(folder, build)
    data = (folder / "data.bin").read_bytes()
    for at in (0, len(data) - 1):
        (folder / "data.bin").write_bytes(data[:at] + b"\x99" + data[at + 1 :])
        sealed(folder, build)
    assert build.builds == 3


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "data.bin").write_bytes(b"half")
        raise ValueError("bad input")

    folder = tmp_path / "tokens-1"
    with pytest.raises(ValueError, match="bad input"):
        sealed(folder, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-1.lock"]
    (tmp_path / "tokens-1.tmp").mkdir()
    (tmp_path / "tokens-1.tmp" / "left by a killed process").touch()
    sealed(folder, Builder())
    assert sorted(path.name for path in folder.iterdir()) == ["data.bin", "empty.bin", "seal.json"]
    assert not (tmp_path / "tokens-1.tmp").exists()


def test_many_ask_and_one_builds(tmp_path):
    build = Builder()

    def slow(folder):
        time.sleep(0.05)
        return build(folder)

    with ThreadPoolExecutor(8) as pool:
        facts = list(pool.map(lambda _: sealed(tmp_path / "tokens-1", slow), range(8)))
    assert build.builds == 1 and all(fact == facts[0] for fact in facts)


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b"):
        path = tmp_path / name
        path.write_bytes(name.encode() * 10)
        os.utime(path, (1e9, 1e9))
    return [SourceFile(name, tmp_path / name) for name in ("a", "b")]


@pytest.fixture
def reads(monkeypatch):
    """Counts the files that are really read."""
    found = []
    whole = cache.hashlib.file_digest

    def counted(file, kind):
        found.append(file.name)
        return whole(file, kind)

    monkeypatch.setattr(cache.hashlib, "file_digest", counted)
    return found


def test_only_changed_files_are_read_again(tmp_path, files, reads, monkeypatch):
    ledger = tmp_path / "cache" / "ledger.json"
    first = digest_of_files(files, ledger)
    assert len(reads) == 2 and not ledger.exists(), "their change is too fresh to be trusted"
    monkeypatch.setattr(cache, "_SETTLED_NS", 0)
    assert digest_of_files(files, ledger) == first and len(reads) == 4
    assert digest_of_files(files, ledger) == first and len(reads) == 4
    # The same size and the same modification time: only the change time tells.
    files[1].path.write_bytes(b"B" * 10)
    os.utime(files[1].path, (1e9, 1e9))
    second = digest_of_files(files, ledger)
    assert second != first and len(reads) == 5
    ledger.write_text('{"half": ')
    assert digest_of_files(files, ledger) == second and len(reads) == 7


def test_names_count_and_places_do_not(tmp_path, files):
    ledger = tmp_path / "ledger.json"
    first = digest_of_files(files, ledger)
    (tmp_path / "elsewhere").mkdir()
    moved = [SourceFile(file.name, file.path.rename(tmp_path / "elsewhere" / file.name)) for file in files]
    assert digest_of_files(moved, ledger) == first
    renamed = [SourceFile("c", moved[0].path), moved[1]]
    assert digest_of_files(renamed, ledger) != first
    assert digest_of_files(moved[::-1], ledger) != first
