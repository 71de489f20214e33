"""Check `dsjax.checkpoint.torch_interop` and `torch_files` in an environment that has torch and no JAX.

    python3.11 -m venv torchenv && torchenv/bin/pip install torch==2.13.0 numpy ml_dtypes safetensors
    PYTHONPATH=. torchenv/bin/python tests/oracle/check_torch.py > tests/oracle/check_torch.json

torch is no dependency of dsjax, and its CPU build may be for another Python than ours. Prints JSON, and fails if
anything is not as it should be.
"""

import json
import os
import pickle
import platform
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file

from dsjax.checkpoint.torch_files import TorchFile
from dsjax.checkpoint.torch_interop import array_to_torch, from_torch, tensor_to_numpy, to_torch

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = ("v3", "v3_no_yarn", "v2", "v2_lite")


class Evil:
    """What a pickle may do to whoever loads it."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def flat(tree: dict, prefix: str = "") -> dict:
    """Return leaves by path."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}/{key}") if isinstance(value, dict) else {f"{prefix}/{key}": value}
    return leaves


def check_state_dicts(variant: str) -> dict[str, int]:
    """A state dict becomes our arrays and comes back: the same bits, shared memory where an array is one tensor."""
    state = load_file(GOLDEN / variant / "hf" / "model.safetensors")
    params, biases = from_torch(state)
    back = to_torch(params, biases)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in state)
    pointers = {tensor.data_ptr() for tensor in state.values()}
    arrays = flat(params) | flat(biases)
    shared = sum(array.__array_interface__["data"][0] in pointers for array in arrays.values())
    whole = sum(not any(part in path for part in ("gate_up", "experts/down")) for path in arrays)
    assert shared == whole, "an array that is one tensor shares its memory"
    again = {tensor.untyped_storage().data_ptr() for tensor in back.values()}
    assert again == {array.__array_interface__["data"][0] for array in arrays.values()}, "all are views on the way back"
    return {"tensors": len(state), "arrays": len(arrays), "shared": shared}


def check_formats() -> None:
    """BF16 and FP8 cross over bit for bit, both ways, without copies; so do arrays that may not be written to."""
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float32):
        array = np.arange(48, dtype=np.uint8).repeat(np.dtype(dtype).itemsize).view(dtype).reshape(6, 8)
        array.flags.writeable = False
        tensor = array_to_torch(array)
        assert tensor.data_ptr() == array.__array_interface__["data"][0]
        assert tensor.dtype == getattr(torch, np.dtype(dtype).name)
        assert tensor_to_numpy(tensor).tobytes() == array.tobytes()
        assert tensor_to_numpy(tensor).dtype == array.dtype
        assert torch.equal(tensor.float(), torch.from_numpy(array.astype(np.float32)))


def check_errors() -> None:
    """What a state dict must not have is named."""
    state = load_file(GOLDEN / "v3" / "hf" / "model.safetensors")
    cases = {
        "model.layers.0.self_attn.k_proj.weight: no DeepSeek model has such a tensor": {
            **state,
            "model.layers.0.self_attn.k_proj.weight": torch.zeros(1),
        },
        "params/layers/1/moe/experts/gate_up: its piece [3, 1] is missing": {
            name: tensor for name, tensor in state.items() if name != "model.layers.1.mlp.experts.3.up_proj.weight"
        },
        "x.weight_scale_inv: FP8 weights are read by load_huggingface or converted by dsjax.convert": {
            "x.weight_scale_inv": torch.zeros(1)
        },
    }
    for message, broken in cases.items():
        try:
            from_torch(broken)
        except ValueError as error:
            assert str(error) == message, error
        else:
            raise AssertionError(message)


def check_files(folder: Path) -> None:
    """Files of torch.save, in both of its formats, and what is refused."""
    state = load_file(GOLDEN / "v2" / "hf" / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].bfloat16()
    for name, contents, options in (
        ("plain.bin", state, {}),
        ("nested.pt", {"model": state}, {}),
        ("legacy.bin", state, {"_use_new_zipfile_serialization": False}),
    ):
        torch.save(contents, folder / name, **options)
        file = TorchFile(folder / name)
        assert set(file.tensors) == set(state)
        for key, tensor in state.items():
            stored = file.tensors[key]
            assert stored.shape == tuple(tensor.shape)
            assert stored.dtype == ("BF16" if tensor.dtype == torch.bfloat16 else "F32")
            assert stored.read(1, 5).tobytes() == tensor_to_numpy(tensor)[1:5].tobytes()
        file.close()
    torch.save({"weight": Evil()}, folder / "evil.bin")
    (folder / "pickle.bin").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": torch.zeros(2), "step": 3}, folder / "mixed.bin")
    torch.save({"a": torch.zeros(2).to_sparse(), 7: torch.zeros(2)}, folder / "odd.bin")
    torch.save([torch.zeros(2)], folder / "list.bin")
    torch.save(torch.nn.Linear(2, 2), folder / "module.bin")
    (folder / "text.bin").write_text("hello")
    (folder / "empty.bin").write_bytes(b"")
    data = (folder / "plain.bin").read_bytes()
    (folder / "short.bin").write_bytes(data[: len(data) // 2])
    for name, message in {
        "evil.bin": "holds more than tensors (posix.mkdir), and is not loaded",
        "module.bin": "holds more than tensors (torch.nn.modules.linear.Linear), and is not loaded",
        "mixed.bin": "not a state dict: step are no plain tensors",
        "odd.bin": "not a state dict: a, 7 are no plain tensors",
        "list.bin": "not a state dict, but a list",
        "pickle.bin": "not a whole PyTorch file",
        "short.bin": "not a whole PyTorch file",
        "text.bin": "not a whole PyTorch file",
        "empty.bin": "not a whole PyTorch file",
    }.items():
        try:
            TorchFile(folder / name)
        except ValueError as error:
            assert str(error) == f"{folder / name}: {message}", error
        else:
            raise AssertionError(name)
    assert not Path("evil").exists()


def main() -> None:
    """Run all checks and print what was checked."""
    assert "jax" not in sys.modules
    result = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    result |= {variant: check_state_dicts(variant) for variant in VARIANTS}
    check_formats()
    check_errors()
    with tempfile.TemporaryDirectory() as folder:
        check_files(Path(folder))
    assert "jax" not in sys.modules, "the modules need no JAX"
    print(json.dumps(result | {"ok": True}, indent=2))


if __name__ == "__main__":
    main()
