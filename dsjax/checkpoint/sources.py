"""Checkpoints to read from: whatever their form, a `Source` shows them under Hugging Face's names, tensor by tensor.

Opening one reads headers only. Everything that is wrong with files or index is collected, so that one report names it
all.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from dsjax.checkpoint.files import DTYPES, Columns, FileTensor, SafetensorsFile, Stored
from dsjax.checkpoint.names import Tensor, scale_name, scale_shape, tensors
from dsjax.config import ModelConfig

RUN_FOLDER = "checkpoints"
"""Folder of a run that holds its checkpoints."""
_POINTER = b"version https://git-lfs"
"""What a file begins with that stands for one that Git LFS has not brought."""
Form = Literal["huggingface", "deepseek", "dsjax", "run", "memory"]


class CheckpointProblems(ValueError):
    """All that is wrong with a checkpoint, one line each, in `problems`."""

    def __init__(self, path: Path | str, problems: Iterable[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__(f"{path}: {count}\n" + "\n".join(f"  {problem}" for problem in self.problems))


@dataclass
class Source:
    """A checkpoint open for reading."""

    form: Form
    path: Path
    config: ModelConfig
    stored: dict[str, Stored]
    """Every tensor, under its Hugging Face name; scales as `..._scale_inv`."""
    huggingface: dict[str, Any] | None = None
    """The `config.json` that came with it."""
    copies: bool = True
    """Whether a release of it repeats the embedding and the head in each MTP layer."""
    power_of_two_scales: bool = False
    """Whether the scales of FP8 weights are powers of two (`scale_fmt: ue8m0`)."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with its files."""
    unreadable: frozenset[str] | None = frozenset()
    """Names that only a broken file would hold, which are not to be called missing too; None if that is not known."""
    step: int | None = None
    """Which checkpoint of a run this is."""
    notes: list[str] = field(default_factory=list)
    """What a report should say of it, though nothing is wrong."""
    workers: int = 8
    """How many may read from it at once."""
    close: Callable[[], None] = lambda: None

    def tensors(self) -> list[Tensor]:
        """Return what a release of this model holds."""
        return tensors(model_arrays(self.config))

    def check(self) -> None:
        """Raise CheckpointProblems unless files and tensors are those that the config calls for."""
        problems = list(self.problems)
        if self.unreadable is not None:
            problems += differences(self.config, self.stored, self.unreadable)
        if problems:
            raise CheckpointProblems(self.path, problems)

    def add_copies(self) -> None:
        """Show the embedding and the head a second time in each MTP layer, as a release does."""
        originals = {tensor.path: tensor.huggingface for tensor in self.tensors() if not tensor.copy}
        for tensor in self.tensors():
            if tensor.copy and originals[tensor.path] in self.stored:
                self.stored[tensor.huggingface] = self.stored[originals[tensor.path]]

    def scales(self, name: str) -> np.ndarray:
        """Return the block scales of the FP8 weight `name`."""
        stored = self.stored[scale_name(name)]
        return stored.read(0, stored.shape[0])


@lru_cache
def model_arrays(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every array of a model, by path: "params/embed", "biases/layers/3/moe/bias" ..."""
    from dsjax.model.transformer import abstract_parameters

    params, biases = abstract_parameters(config)
    arrays = flatten({"params": params, "biases": biases})
    return MappingProxyType({path: tuple(leaf.shape) for path, leaf in arrays.items()})


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by path."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts of leaves by path; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def differences(
    config: ModelConfig, stored: Mapping[str, Stored], unreadable: frozenset[str] = frozenset()
) -> list[str]:
    """Return a line for each tensor that is missing, unexpected, misshapen or of a wrong dtype."""
    problems, expected = [], {}
    wanted = tensors(model_arrays(config))
    absent_modules = _absent_modules(config, [*stored, *unreadable])
    for layer in absent_modules:
        problems.append(
            f"layer {layer} (MTP) is absent, although num_nextn_predict_layers is {config.num_nextn_predict_layers}"
        )
    for tensor in wanted:
        name = tensor.huggingface
        if any(name.startswith(f"model.layers.{layer}.") for layer in absent_modules):
            continue
        expected[name] = tensor.shape
        if name not in stored:
            problems += [] if tensor.copy or name in unreadable else [f"missing: {name} {list(tensor.shape)}"]
            continue
        here = stored[name]
        if here.shape != tensor.shape:
            problems.append(f"wrong shape: {name} is {list(here.shape)}, the config says {list(tensor.shape)}")
        allowed = ("F32", "BF16", "F8_E4M3") if tensor.storage == "fp8" else ("F32", "BF16")
        if here.dtype not in allowed:
            problems.append(f"wrong dtype: {name} is {here.dtype}, it may be {', '.join(allowed)}")
        if here.dtype == "F8_E4M3" and tensor.storage == "fp8":
            scales, shape = scale_name(name), scale_shape(tensor.shape)
            expected[scales] = shape
            if scales in unreadable:
                continue
            if scales not in stored:
                problems.append(f"missing: {scales} {list(shape)}, the scales of an FP8 weight")
            elif stored[scales].shape != shape:
                problems.append(f"wrong shape: {scales} is {list(stored[scales].shape)}, should be {list(shape)}")
            elif stored[scales].dtype != "F32":
                problems.append(f"wrong dtype: {scales} is {stored[scales].dtype}, should be F32")
    problems += [f"unexpected: {name} {list(stored[name].shape)}" for name in stored if name not in expected]
    return problems


def _absent_modules(config: ModelConfig, names: list[str]) -> list[int]:
    """Return MTP layers of which a checkpoint has nothing at all, as transformers leaves it when it saves a model."""
    first = config.num_hidden_layers
    layers = range(first, first + config.num_nextn_predict_layers)
    return [layer for layer in layers if not any(name.startswith(f"model.layers.{layer}.") for name in names)]


@dataclass(frozen=True)
class InMemory:
    """An array that `host` gives, which may be one that reads what is indexed, or a piece of it."""

    host: Callable[[], Any]
    shape: tuple[int, ...]
    numpy_dtype: Any
    index: tuple[int, ...] = ()

    @property
    def dtype(self) -> str:
        """Dtype as safetensors calls it."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return names.get(np.dtype(self.numpy_dtype), str(self.numpy_dtype))

    def read(self, start: int, stop: int, columns: Columns = None) -> np.ndarray:
        """Return rows start to stop."""
        return self.host()[(*self.index, slice(start, stop), *([slice(*columns)] if columns else []))]


def show_arrays(arrays: Mapping[str, InMemory]) -> dict[str, Stored]:
    """Return the tensors of a release that are pieces of arrays, by Hugging Face name."""
    return {
        tensor.huggingface: replace(arrays[tensor.path], index=tensor.index, shape=tensor.shape)
        for tensor in tensors({path: array.shape for path, array in arrays.items()})
        if not tensor.copy
    }


@dataclass(frozen=True)
class Joined:
    """A tensor that several files hold shares of, along rows (axis 0) or columns (axis 1)."""

    parts: tuple[Stored, ...]
    axis: int

    @property
    def dtype(self) -> str:
        """Dtype of the whole."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    def read(self, start: int, stop: int, columns: Columns = None) -> np.ndarray:
        """Return rows start to stop."""
        low, high = (start, stop) if self.axis == 0 else columns or (0, self.shape[1])
        pieces, first = [], 0
        for part in self.parts:
            here = max(low - first, 0), min(high - first, part.shape[self.axis])
            if here[0] < here[1]:
                pieces.append(part.read(*here, columns) if self.axis == 0 else part.read(start, stop, here))
            first += part.shape[self.axis]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, self.axis)


@dataclass(frozen=True)
class Same:
    """A tensor that several files repeat; reading compares them."""

    name: str
    parts: tuple[Stored, ...]

    @property
    def dtype(self) -> str:
        """Dtype of each."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each."""
        return self.parts[0].shape

    def read(self, start: int, stop: int, columns: Columns = None) -> np.ndarray:
        """Return rows start to stop. Raises CheckpointProblems if the files disagree."""
        first, *others = (part.read(start, stop, columns) for part in self.parts)
        for number, other in enumerate(others, start=1):
            if first.tobytes() != other.tobytes():
                raise CheckpointProblems(self.name, [f"{self.name} is not the same in files 0 and {number}"])
        return first


def open_files(paths: Iterable[Path], problems: list[str]) -> dict[Path, Any]:
    """Open tensor files, .safetensors or PyTorch's, adding what is wrong with any to `problems`."""
    opened = {}
    for path in paths:
        try:
            if not path.exists():
                problems.append(f"{path.name}: no such file")
            elif path.suffix == ".safetensors":
                opened[path] = SafetensorsFile(path)
            elif path.suffix in (".bin", ".pt", ".pth"):
                from dsjax.checkpoint.torch_files import TorchFile

                opened[path] = TorchFile(path)
            else:
                problems.append(f"{path.name}: not a file of weights: neither .safetensors nor .bin, .pt or .pth")
        except OSError as error:
            problems.append(f"{path.name}: {error.strerror}")
        except ValueError as error:
            pointer = path.stat().st_size < 1024 and path.read_bytes().startswith(_POINTER)
            reason = f"{path}: a pointer of Git LFS, not the file itself: run git lfs pull" if pointer else str(error)
            problems.append(reason.replace(f"{path}", path.name))
    return opened


def are_file_names(names: Iterable[Any]) -> bool:
    """Return whether all are names of files in one folder: an index must not lead elsewhere."""
    return all(isinstance(name, str) and name and Path(name).name == name for name in names)


def checkpoints_of(path: Path) -> Path:
    """Return the folder of a run's checkpoints, which may be named itself."""
    return path / RUN_FOLDER if (path / RUN_FOLDER).is_dir() else path


def is_run(path: Path) -> bool:
    """Return whether a folder is a run's, or that of its checkpoints."""
    return path.is_dir() and any(child.name.isdigit() for child in checkpoints_of(path).iterdir())


def read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """Return the object in a JSON file, or {} with a line in `problems`."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name}: no such file")
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
    except ValueError as error:
        problems.append(f"{path.name}: not JSON: {error}")
    else:
        if isinstance(contents, dict):
            return contents
        problems.append(f"{path.name}: not a JSON object")
    return {}


def piece(tensor: FileTensor, index: tuple[int, ...]) -> FileTensor:
    """Return the piece `tensor[index]`, which lies in the file in one stretch."""
    offset, shape = tensor.offset, tensor.shape
    for i in index:
        shape = shape[1:]
        offset += i * int(np.prod(shape, dtype=np.int64)) * DTYPES[tensor.dtype].itemsize
    return FileTensor(tensor.file, tensor.dtype, shape, offset)
