"""Every kind of source is read whole and in order, and every bad input is an error that names the place."""

import gzip
import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from dsjax.config import DataConfig
from dsjax.data import sources
from dsjax.data.sources import documents, source_files


def read(source: str, path: object, **options) -> list:
    return list(documents(DataConfig(source=source, path=str(path)), **options))


def texts(source: str, path: object) -> list[str]:
    return [document.content for document in read(source, path)]


def complaint(source: str, path: object, **options) -> str:
    with pytest.raises(ValueError) as caught:
        read(source, path, **options)
    return str(caught.value)


def test_standard_library_without_tests_and_packages():
    config = DataConfig()
    files = source_files(config)
    names = [file.name for file in files]
    assert names == sorted(names) and len(names) > 300
    assert {"argparse.py", "json/decoder.py", "idlelib/editor.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    found = {document.origin: document for document in documents(config, files)}
    root = Path(sysconfig.get_path("stdlib"))
    assert found[f"{root / 'argparse.py'}:1"].content == (root / "argparse.py").read_bytes().decode()
    assert list(found.values())[-1].consumed == sum(file.path.stat().st_size for file in files)


def test_a_library_without_source_files_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert complaint("python-stdlib", "") == (
        f"data.source = 'python-stdlib': no .py file under {tmp_path}; set another data.source"
    )


def test_text_files_folders_and_globs(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("zwei\r\n€ 😀\n", newline="")
    (tmp_path / "c.py.gz").write_bytes(gzip.compress(b"three\n"))
    (tmp_path / "d.md.zst").write_bytes(zstandard.compress(b"four\n") + zstandard.compress(b"and more\n"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_bytes(b"\xff")
    assert texts("text", tmp_path) == ["one\n", "zwei\r\n€ 😀\n", "three\n", "four\nand more\n"]
    assert texts("text", tmp_path / "a.txt") == ["one\n"]
    assert texts("text", tmp_path / "**" / "*.txt") == ["one\n", "zwei\r\n€ 😀\n"]
    assert [file.name for file in source_files(DataConfig(source="text", path=str(tmp_path)))][1] == "b/two.txt"


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_long_text_goes_on_as_another_document_at_a_line_end(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(sources, "PIECE", 1000)
    text = "".join(f"line {i} of a long text, ü\n" for i in range(500))
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed]
    path = tmp_path / f"long.txt{packed}"
    path.write_bytes(pack(text.encode()))
    found = read("text", path)
    assert "".join(document.content for document in found) == text
    assert all(document.content.endswith("\n") for document in found) and len(found) > 10
    assert max(len(document.content) for document in found) < 1100
    line = 1 + found[0].content.count("\n")
    assert found[1].origin == f"{path}:{line}"
    consumed = [document.consumed for document in found]
    assert consumed == sorted(consumed) and consumed[-1] == path.stat().st_size


def test_zstandard_streams_highly_compressible_data(tmp_path):
    path = tmp_path / "x.txt.zst"
    data = b"a line that is repeated very often\n" * 300_000
    path.write_bytes(zstandard.compress(data))
    assert "".join(texts("text", path)).encode() == data


def test_json_lines_of_every_packing(tmp_path):
    lines = [json.dumps({"text": f"document {i} é", "id": i}) for i in range(5)]
    data = ("\ufeff" + lines[0] + "\n\n" + "\n".join(lines[1:])).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(data))
    (tmp_path / "notes.md").write_text("not a record")
    assert texts("jsonl", tmp_path) == [f"document {i} é" for i in range(5)] * 3
    assert read("jsonl", tmp_path)[1].origin == f"{tmp_path / 'a.jsonl'}:3"


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")])
def test_parquet(tmp_path, kind):
    values = [f"document {i % 7} 😀" for i in range(3000)]
    table = pyarrow.table({"id": list(range(3000)), "text": pyarrow.array(values).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    found = read("parquet", tmp_path)
    assert [document.content for document in found] == values
    assert found[2500].origin == f"{tmp_path / 'a.parquet'}:2501"
    assert found[-1].consumed == (tmp_path / "a.parquet").stat().st_size


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_arrays_are_cut_behind_end_tokens(tmp_path, monkeypatch, dtype):
    ids = np.array([5, 6, 1, 7, 1, 1, 8, 9], dtype)
    np.save(tmp_path / "a.npy", ids)
    np.save(tmp_path / "b.npy", ids[:2])
    whole = read("tokens", tmp_path)
    assert [document.content.tolist() for document in whole] == [ids.tolist(), [5, 6]]
    for piece in (100, 3, 2):
        monkeypatch.setattr(sources, "PIECE", piece)
        found = read("tokens", tmp_path / "a.npy", end_of_document=1)
        assert np.concatenate([document.content for document in found]).tolist() == ids.tolist()
        if piece >= 3:
            assert [document.content.tolist() for document in found] == [[5, 6, 1], [7, 1], [1], [8, 9]]
            assert found[3].origin == f"{tmp_path / 'a.npy'}[6]"


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    missing = tmp_path / "missing.txt"
    assert complaint("text", missing) == f"data.path = '{missing}': no such file or folder"
    assert complaint("text", tmp_path / "*.txt") == f"data.path = '{tmp_path}/*.txt': the pattern matches no file"
    assert complaint("text", tmp_path / "empty") == f"data.path = '{tmp_path}/empty': the folder holds no file"
    for source, suffix in (("jsonl", ".jsonl"), ("parquet", ".parquet"), ("tokens", ".npy")):
        assert complaint(source, tmp_path) == f"data.path = '{tmp_path}': the folder holds no {suffix} file"


@pytest.mark.parametrize("piece", [2**22, 4])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_bytes_that_are_not_utf8(tmp_path, monkeypatch, piece, packed):
    monkeypatch.setattr(sources, "PIECE", piece)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed]
    path = tmp_path / f"latin.txt{packed}"
    path.write_bytes(pack(b"\xef\xbb\xbfgood\ngood \xc3\xa9\nbad \xe9t\xe9\n"))
    assert complaint("text", path) == f"{path}:3: byte 0xe9 is not UTF-8; every text must be UTF-8"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not JSON: Expecting ',' delimiter (column 13)"),
        (b"plain text", "not JSON: Expecting value (column 1)"),
        (b"[" * 100_000, "not JSON: nested too deep"),
        (b"[1]", "a JSON list, not an object with the field 'text'"),
        (b'{"body": "x", "id": 1}', "no field 'text', only 'body', 'id'; set data.text_field"),
        (b"{}", "no field 'text', only none at all; set data.text_field"),
        (b'{"text": 3}', "field 'text' is of type int, not a string"),
        (b'{"text": null}', "field 'text' is of type NoneType, not a string"),
        (b'{"text": "\\ud800"}', r"field 'text' holds half of a surrogate pair, '\ud800'"),
        (b'{"text": "\xff"}', "byte 0xff is not UTF-8; every text must be UTF-8"),
    ],
)
def test_bad_json_lines(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    assert complaint("jsonl", path) == f"{path}:3: {reason}"


def test_bad_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), path)
    assert complaint("parquet", path) == f"{path}: no column 'text', only 'body', 'id'; set data.text_field"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    assert complaint("parquet", path) == f"{path}: column 'text' is of type int64, not string"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    assert complaint("parquet", path) == f"{path}:2: column 'text' is null, not a string"
    bytes_as_text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(np.array([0, 1], np.int32)), pyarrow.py_buffer(b"\xff")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": bytes_as_text}), path)
    assert complaint("parquet", path) == f"{path}:1: byte 0xff is not UTF-8"
    path.write_bytes(path.read_bytes()[:-9])
    assert complaint("parquet", path).startswith(f"{path}: damaged or not a Parquet file: ")


def test_bad_arrays(tmp_path, monkeypatch):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros(3, np.float32))
    assert complaint("tokens", path) == f"{path}: token ids of type float32, not integers"
    np.save(path, np.zeros((2, 3), np.int32))
    assert complaint("tokens", path) == f"{path}: token ids of shape (2, 3), not one-dimensional"
    np.save(path, np.array([{}], object), allow_pickle=True)
    assert complaint("tokens", path).startswith(f"{path}: damaged or not a .npy array: ")
    path.write_bytes(b"")
    assert complaint("tokens", path).startswith(f"{path}: damaged or not a .npy array: ")
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))
    assert complaint("tokens", path) == f"{path}: an archive of arrays, not one .npy array"
    monkeypatch.setattr(sources, "PIECE", 4)
    for bad in (512, -1):
        np.save(path, np.array([0, 511, 3, 4, 5, bad, 6]))
        assert complaint("tokens", path, vocab_size=512) == (
            f"{path}[5]: token id {bad} is not in the model's vocabulary, 0 to 511"
        )


def test_damaged_packings(tmp_path):
    text = "".join(f"{i * i}\n" for i in range(20_000)).encode()
    for suffix, whole in ((".gz", gzip.compress(text)), (".zst", zstandard.compress(text))):
        path = tmp_path / f"x.txt{suffix}"
        for bad in (whole[: len(whole) // 2], whole[:-1], b"not packed at all"):
            path.write_bytes(bad)
            assert complaint("text", path).startswith(f"{path}: damaged {suffix} data: ")
    assert complaint("text", path) == f"{path}: damaged .zst data: zstd decompressor error: Unknown frame descriptor"
    path.write_bytes(whole[:-1])
    assert complaint("text", path) == f"{path}: damaged .zst data: the file ends within a frame"


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    advice = "install the extra `data`: uv sync --extra data, or pip install dsjax[data]"
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, source, package in (("x.txt.zst", "text", "zstandard"), ("x.parquet", "parquet", "pyarrow")):
        path = tmp_path / name
        path.write_bytes(b"x")
        assert complaint(source, path) == f"{path}: reading it needs {package}; {advice}"
