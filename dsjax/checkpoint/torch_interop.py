"""Weights to and from PyTorch, without copies where memory can be shared.

Imports numpy, ml_dtypes, torch and our name table only, so that it also works in an environment that has torch and no
JAX, and in another Python than ours (3.11 is tested).
"""

import warnings
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch

from dsjax.checkpoint.names import SCALE, locate, tensors

_AS_INTEGER = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.uint8, torch.float8_e4m3fn),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, torch.uint8, torch.float8_e5m2),
}
"""Formats that numpy does not know by itself cross over as integers."""
_BACK = {theirs: (integer, ours) for ours, (_, integer, theirs) in _AS_INTEGER.items()}


def to_torch(params: Mapping[str, Any], biases: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Return a state dict under Hugging Face's names, MTP's copies of embedding and head left out.

    The tensors are views of the arrays' memory (jax arrays of a CPU, numpy arrays); do not write to them.

    Args:
        params: parameters, canonical layout.
        biases: router biases, canonical layout.
    """
    arrays = _flatten(params, "params") | _flatten(biases or {}, "biases")
    shared = {path: array_to_torch(array) for path, array in arrays.items()}
    pieces = tensors({path: tuple(array.shape) for path, array in arrays.items()})
    return {piece.huggingface: shared[piece.path][piece.index] for piece in pieces if not piece.copy}


def from_torch(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (params, biases) in the canonical layout as numpy arrays.

    A tensor that is an array of ours by itself shares its memory; those that are stacked (gate and up, experts) are
    copied. Copies of embedding and head in MTP layers are dropped.

    Args:
        state: state dict under Hugging Face's names, of float32 or bfloat16 tensors.

    Raises:
        ValueError: a name is unknown, a tensor of a stack is missing, or weights are FP8, whose scales a state dict
            keeps apart (`load_huggingface` multiplies them out).
    """
    main = _main_layers(state)
    pieces: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for name, tensor in state.items():
        if name.endswith(SCALE["huggingface"]):
            raise ValueError(f"{name}: FP8 weights are read by load_huggingface or converted by dsjax.convert")
        if name.endswith((".embed_tokens.weight", ".shared_head.head.weight")) and name.startswith("model.layers."):
            continue
        place = locate(name, main)
        if place is None:
            raise ValueError(f"{name}: no DeepSeek model has such a tensor")
        pieces.setdefault(place[0], {})[place[1]] = tensor_to_numpy(tensor)
    return tuple(_unflatten({p: _stack(p, a) for p, a in pieces.items()}, tree) for tree in ("params", "biases"))


def array_to_torch(array: Any) -> torch.Tensor:
    """Return a tensor on an array's memory if that is on the host, else of a copy."""
    array = np.asarray(array)
    integer, _, dtype = _AS_INTEGER.get(array.dtype, (array.dtype, None, None))
    with warnings.catch_warnings():
        # jax arrays may not be written to, which torch cannot express.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensor = torch.from_numpy(array.view(integer))
    return tensor.view(dtype) if dtype else tensor


def tensor_to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return an array on a tensor's memory if that is on the host, else of a copy."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in _BACK:
        integer, dtype = _BACK[tensor.dtype]
        return tensor.contiguous().view(integer).numpy().view(dtype)
    return tensor.numpy()


def _main_layers(names: Mapping[str, Any]) -> int:
    """Count the layers before the MTP modules, which are those with a norm of the embedding."""
    layers = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
    modules = {int(name.split(".")[2]) for name in names if name.endswith(".enorm.weight")}
    return len(layers - modules)


def _stack(path: str, pieces: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    if () in pieces:
        return pieces[()]
    lead = tuple(max(index) + 1 for index in zip(*pieces, strict=True))
    missing = [index for index in np.ndindex(*lead) if index not in pieces]
    if missing:
        raise ValueError(f"{path}: its piece {list(missing[0])} is missing")
    first = pieces[(0,) * len(lead)]
    stacked = np.empty((*lead, *first.shape), first.dtype)
    for index, piece in pieces.items():
        stacked[index] = piece
    return stacked


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}"
        flat |= _flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def _unflatten(flat: Mapping[str, Any], tree: str) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        first, *parents, last = path.split("/")
        if first == tree:
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
    return nested
