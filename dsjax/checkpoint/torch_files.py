"""PyTorch's own files (`.pt`, `.bin`), where torch is installed; only tensors are read, never arbitrary pickles."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_NESTED = ("model", "state_dict", "module")
"""Keys under which training scripts keep the state dict."""


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a PyTorch file."""

    tensor: Any
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.tensor.shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows start to stop."""
        from dsjax.checkpoint.torch_interop import tensor_to_numpy

        return tensor_to_numpy(self.tensor[start:stop])


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
        try:
            try:
                contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                contents = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path}: holds more than tensors, and is not loaded: {str(error).splitlines()[0]}"
            ) from error
        except (RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: not a whole PyTorch file: {str(error).splitlines()[0]}") from error
        for key in _NESTED:
            if isinstance(contents, dict) and isinstance(contents.get(key), dict):
                contents = contents[key]
        strangers = [str(key) for key, value in contents.items() if not isinstance(value, torch.Tensor)]
        if strangers:
            raise ValueError(f"{path}: not a state dict: {', '.join(strangers[:5])} are no tensors")
        self.tensors = {
            name: TorchTensor(tensor, dtypes.get(tensor.dtype, str(tensor.dtype))) for name, tensor in contents.items()
        }

    def close(self) -> None:
        """Let go of the tensors."""
        self.tensors = {}
