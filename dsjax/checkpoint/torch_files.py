"""PyTorch's own files (`.pt`, `.bin`), where torch is installed; only tensors are read, never arbitrary pickles."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_NESTED = ("model", "state_dict", "module")
"""Keys under which training scripts keep the state dict."""
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
"""The function or class that a pickle asks for, in torch's refusal."""


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a PyTorch file."""

    tensor: Any
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.tensor.shape)

    def read(self, start: int, stop: int, columns: tuple[int, int] | None = None) -> np.ndarray:
        """Return rows start to stop."""
        from dsjax.checkpoint.torch_interop import tensor_to_numpy

        rows = tensor_to_numpy(self.tensor[start:stop].contiguous())  # Also of a tensor saved as a transposed view.
        return rows[:, slice(*columns)] if columns else rows


class TorchFile:
    """A file of `torch.save`: `tensors` by name. Raises ValueError that says what is wrong with it.

    The file is mapped into memory, not read, if it has the format that torch writes since 1.6.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            import torch
        except ImportError as error:
            raise ValueError(f"{path}: PyTorch files need torch, which is not installed") from error
        dtypes = {
            torch.float32: "F32",
            torch.float16: "F16",
            torch.bfloat16: "BF16",
            torch.float8_e4m3fn: "F8_E4M3",
            torch.int64: "I64",
        }
        contents = _load(path)
        for key in _NESTED:
            if isinstance(contents, dict) and isinstance(contents.get(key), dict):
                contents = contents[key]
        if not isinstance(contents, dict):
            raise ValueError(f"{path}: not a state dict, but a {type(contents).__name__}")
        strangers = [str(name) for name, value in contents.items() if not _is_plain(name, value)]
        if strangers:
            raise ValueError(f"{path}: not a state dict: {', '.join(strangers[:5])} are no plain tensors")
        self.tensors = {
            name: TorchTensor(tensor, dtypes.get(tensor.dtype, str(tensor.dtype))) for name, tensor in contents.items()
        }

    def close(self) -> None:
        """Let go of the tensors."""
        self.tensors = {}


def _load(path: Path) -> Any:
    """Return what a file holds. torch's own messages are left out: they tell how to run a stranger's code."""
    import torch

    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # Over other files, torch raises what its reader happens to stumble on.
        if found := _GLOBAL.search(str(error)):
            raise ValueError(f"{path}: holds more than tensors ({found[1]}), and is not loaded") from error
        raise ValueError(f"{path}: not a whole PyTorch file") from error


def _is_plain(name: Any, value: Any) -> bool:
    """Return whether an entry of a state dict is a name and a tensor with numbers in memory."""
    import torch

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
