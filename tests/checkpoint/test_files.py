"""Our safetensors files against the safetensors library, and what is said of broken ones."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dsjax.checkpoint import files
from dsjax.checkpoint.files import DTYPES, SafetensorsFile, SafetensorsWriter, Spec


def test_the_library_reads_what_we_write(tmp_path):
    arrays = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.arange(5).astype(ml_dtypes.bfloat16),
        "c": np.arange(6, dtype=np.uint8).reshape(2, 3).view(ml_dtypes.float8_e4m3fn),
    }
    names = {"a": "F32", "b": "BF16", "c": "F8_E4M3"}
    writer = SafetensorsWriter(tmp_path / "x", [Spec(n, names[n], a.shape) for n, a in arrays.items()])
    for name, array in arrays.items():
        writer.write(name, array[:1].nbytes, array[1:])  # The end first.
        writer.write(name, 0, array[:1])
    writer.close()
    with safe_open(tmp_path / "x", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert (file.get_tensor("a") == arrays["a"]).all()
        assert {name: file.get_slice(name).get_dtype() for name in file.keys()} == names  # noqa: SIM118
    ours = SafetensorsFile(tmp_path / "x")
    for name, array in arrays.items():
        assert ours.tensors[name].read(0, len(array)).tobytes() == array.tobytes()
    ours.close()


def test_tensors_are_aligned_to_their_elements(tmp_path):
    shapes = {
        "a": ("F8_E4M3", (3, 5)),
        "b": ("F32", (1, 1)),
        "c": ("BF16", (7,)),
        "d": ("F32", (3,)),
        "e": ("U8", (1,)),
    }
    SafetensorsWriter(tmp_path / "x", [Spec(name, *rest) for name, rest in shapes.items()]).close()
    file = SafetensorsFile(tmp_path / "x")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in file.tensors.items()} == shapes
    assert all(tensor.offset % DTYPES[tensor.dtype].itemsize == 0 for tensor in file.tensors.values())


def test_we_read_what_the_library_writes(tmp_path):
    arrays = {"a": np.random.default_rng(0).standard_normal((7, 5)), "b": np.arange(9, dtype=np.int64)}
    save_file(arrays, tmp_path / "x", {"k": "v"})
    file = SafetensorsFile(tmp_path / "x")
    assert file.metadata == {"k": "v"}
    assert (file.tensors["a"].read(2, 5) == arrays["a"][2:5]).all()
    assert (file.tensors["b"].read(0, 9) == arrays["b"]).all()
    file.close()


@pytest.mark.parametrize(
    ("width", "columns", "expected"),
    [
        (4096, (2048, 4096), 4 * 5 * 2048),  # Of 16 KiB a row, 8 KiB are skipped: just worth a call for each row.
        (4096, (2047, 4096), 4 * 5 * 4096),
        (8192, (1024, 1025), 4 * 5),
        (2048, (0, 256), 4 * 5 * 2048),
        (8192, None, 4 * 5 * 8192),
    ],
)
def test_only_wanted_columns_of_wide_rows_are_read(tmp_path, monkeypatch, width, columns, expected):
    array = np.random.default_rng(0).standard_normal((9, width)).astype(np.float32)
    save_file({"before": array[:1], "a": array}, tmp_path / "x")
    read, original = [], files.os.preadv

    def preadv(descriptor, buffers, offset):
        read.append(original(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(files.os, "preadv", preadv)
    file = SafetensorsFile(tmp_path / "x")
    found = file.tensors["a"].read(2, 7, columns)
    assert (found == array[2:7, slice(*columns) if columns else slice(None)]).all()
    assert sum(read) == expected
    assert file.tensors["a"].read(3, 3, columns).shape == (0, found.shape[1])


def _file(tmp_path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return tmp_path / "x"


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


BROKEN = {
    "a header cut short": (lambda p: (p / "x").write_bytes(b"abc"), "truncated, 3 bytes are not even a header"),
    "data cut short": (lambda p: _file(p, _entry(), b"1234"), "truncated, 7"),
    "half a header": (lambda p: (p / "x").write_bytes(struct.pack("<Q", 900) + b"{"), "truncated, 9 bytes of a header"),
    "something else": (
        lambda p: (p / "x").write_bytes(b"PK\x03\x04 not a model"),
        "not a safetensors file (a header of",
    ),
    "not JSON": (lambda p: _file(p, b"{nonsense}"), "not a safetensors file (JSONDecodeError"),
    "no offsets": (lambda p: _file(p, {"a": {"dtype": "F32"}}), "not a safetensors file (KeyError('shape')"),
    "unknown dtype": (lambda p: _file(p, _entry("F4"), b"8" * 8), "a has dtype F4; known are F64, F32"),
    "wrong size": (lambda p: _file(p, _entry(shape=(3,)), b"8" * 8), "a is F32[3] but has 8 bytes"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_told_in_words(tmp_path, kind):
    make, message = BROKEN[kind]
    make(tmp_path)
    with pytest.raises(ValueError) as error:
        SafetensorsFile(tmp_path / "x")
    assert str(error.value).startswith(f"{tmp_path / 'x'}: {message}")


def test_every_dtype_has_its_size():
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
        "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    }  # fmt: skip
