"""Checkpoints in Hugging Face's form: folders with config.json and safetensors files, whole or in shards."""

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from dsjax.checkpoint.arrays import Arrays
from dsjax.checkpoint.conversion import (
    SHARD_BYTES,
    Format,
    Output,
    Part,
    Plan,
    Report,
    config_document,
    convert,
    shards,
    target_dtype,
)
from dsjax.checkpoint.families import config_from_huggingface, config_to_huggingface
from dsjax.checkpoint.files import Stored
from dsjax.checkpoint.names import scale_name
from dsjax.checkpoint.sources import (
    CheckpointProblems,
    InMemory,
    Source,
    are_file_names,
    flatten,
    model_arrays,
    open_files,
    read_json,
    show_arrays,
    unflatten,
)
from dsjax.config import ModelConfig

__all__ = [
    "Weights",
    "config_from_huggingface",
    "config_to_huggingface",
    "load",
    "load_huggingface",
    "open_huggingface",
    "save_huggingface",
]

INDEX = "model.safetensors.index.json"
_INDEXES = (INDEX, "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin", "model.pt")


class Weights(NamedTuple):
    """A model's weights in the canonical layout."""

    config: ModelConfig
    params: PyTree
    biases: PyTree


def open_huggingface(path: Path, config: ModelConfig | None = None) -> Source:
    """Open a folder, an index or a single file of weights; `config` is read from config.json beside it if not given.

    Raises:
        CheckpointProblems: there are no weights, or the config cannot be used.
    """
    path = Path(path)
    folder, problems = path if path.is_dir() else path.parent, []
    data = read_json(folder / "config.json", problems if config is None else [])
    if config is None and not problems:
        try:
            config = config_from_huggingface(data)
        except ValueError as error:
            problems += str(error).splitlines()
    names = [path.name] if path.is_file() else [name for name in (*_INDEXES, *_SINGLE) if (folder / name).exists()]
    if not names and any(folder.glob("model-*-of-*.safetensors")):
        problems.append(f"{INDEX}: no such file, though there are shards of weights")
    elif not names:
        problems.append(f"no weights: none of {', '.join((*_INDEXES, *_SINGLE))} is there")
    if problems and (config is None or not names):
        raise CheckpointProblems(path, problems)
    first = folder / names[0]
    stored, unreadable, files = _read_index(first, problems) if first.suffix == ".json" else _read_file(first, problems)
    assert config is not None
    source = Source("huggingface", path, config, stored, data or None, problems=problems, unreadable=unreadable)
    source.copies = any(name.endswith("shared_head.head.weight") for name in stored)
    source.power_of_two_scales = (data.get("quantization_config") or {}).get("scale_fmt") == "ue8m0"
    source.close = lambda: [file.close() for file in files]
    return source


_Found = tuple[dict[str, Stored], frozenset[str] | None, list[Any]]
"""Tensors by name, names that only broken files hold, open files."""


def _read_file(path: Path, problems: list[str]) -> _Found:
    files = open_files([path], problems)
    return (dict(files[path].tensors), frozenset(), [files[path]]) if files else ({}, None, [])


def _read_index(path: Path, problems: list[str]) -> _Found:
    """Open the shards that an index names, and compare what it says with what they hold."""
    before = len(problems)
    places = read_json(path, problems).get("weight_map")
    if not isinstance(places, dict):
        problems += [f"{path.name}: has no weight_map"] if len(problems) == before else []
        return {}, None, []
    if not are_file_names(places.values()):
        problems.append(f"{path.name}: its weight_map names what is no file beside it")
        return {}, None, []
    files = open_files([path.parent / name for name in sorted(set(places.values()))], problems)
    stored, unreadable = {}, set()
    for name, file in places.items():
        if path.parent / file not in files:
            unreadable.add(name)
        elif name in files[path.parent / file].tensors:
            stored[name] = files[path.parent / file].tensors[name]
        else:
            problems.append(f"{path.name} names {name} in {file}, which does not hold it")
            unreadable.add(name)
    for file in files.values():
        strangers = [name for name in file.tensors if name not in places]
        problems += [f"{file.path.name} holds {name}, which {path.name} does not name" for name in strangers]
    return stored, frozenset(unreadable), list(files.values())


def load_huggingface(
    path: Path | str,
    config: ModelConfig | None = None,
    shardings: PyTree | None = None,
    dtype: DTypeLike = np.float32,
) -> Weights:
    """Return a checkpoint's weights as jax arrays, FP8 weights multiplied out.

    Only the bytes that this process's devices hold are read.

    Args:
        path: folder, index, or a single file of weights.
        config: the model; by default that of config.json.
        shardings: {"params": tree, "biases": tree} of a sharding per array; by default all on the default device.
        dtype: of the parameters; the router biases are float32.

    Raises:
        CheckpointProblems: lists every tensor that is missing, unexpected, misshapen or of a wrong dtype.
    """
    source = open_huggingface(Path(path), config)
    try:
        source.check()
        return load(source, shardings, dtype)
    finally:
        source.close()


def load(source: Source, shardings: PyTree | None = None, dtype: DTypeLike = np.float32) -> Weights:
    """Return the weights of an open checkpoint of any form; see `load_huggingface`."""
    arrays = Arrays(source)
    places = flatten(shardings) if shardings is not None else {}
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    flat = {}
    for path, shape in arrays.shapes.items():
        kind = np.dtype(np.float32 if path.startswith("biases/") else dtype)
        read = partial(arrays.read, path, dtype=kind)
        flat[path] = jax.make_array_from_callback(shape, places.get(path, local), read)
    tree = unflatten(flat)
    return Weights(source.config, tree["params"], tree.get("biases", {}))


def plan_huggingface(source: Source, wanted: Format, shard_bytes: int) -> Plan:
    """Plan to write a checkpoint in Hugging Face's form: one file if it fits, else shards and an index."""
    outputs = []
    for tensor in source.tensors():
        name = tensor.huggingface
        if name in source.stored:  # Copies may be missing.
            dtype = target_dtype(tensor, source.stored[name].dtype, wanted)
            scale = scale_name(name) if dtype == "F8_E4M3" else None
            outputs.append(Output(name, dtype, tensor.shape, (Part(name, (0, tensor.shape[0])),), scale))

    def file_name(i: int, n: int) -> str:
        return f"model-{i + 1:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors"

    files = shards(outputs, shard_bytes, file_name)
    documents = {"config.json": config_document(source, files)}
    if len(files) > 1:
        places = {spec.name: file.name for file in files for output in file.outputs for spec in output.specs()}
        size = sum(file.nbytes for file in files)
        documents[INDEX] = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    return Plan(files, documents)


def save_huggingface(
    path: Path | str,
    config: ModelConfig,
    params: PyTree,
    biases: PyTree,
    dtype: Literal["bf16", "fp32", "fp8"] = "bf16",
    base: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Write weights as a folder that transformers and the serving engines read.

    Args:
        path: folder to be made.
        config: the model.
        params: parameters, canonical layout, jax or numpy arrays of float32 or bfloat16.
        biases: router biases, canonical layout.
        dtype: format of the matrices; `fp8` quantizes those that the releases do, and leaves the others in BF16.
        base: an earlier config.json of the model, whose other entries are kept.
        shard_bytes: size of a file.

    Raises:
        FileExistsError: the folder exists.
        CheckpointProblems: arrays are missing, unexpected, misshapen, of a wrong dtype, or not finite.
    """
    source = memory_source(Path(path), config, params, biases, base)
    source.check()
    return convert(source, plan_huggingface(source, dtype, shard_bytes), Path(path))


def memory_source(
    path: Path, config: ModelConfig, params: PyTree, biases: PyTree, base: Mapping[str, Any] | None = None
) -> Source:
    """Show weights in memory as a checkpoint; `path` is what its errors call it."""
    arrays = flatten({"params": params, "biases": biases})
    problems = [f"missing: {name} {list(shape)}" for name, shape in model_arrays(config).items() if name not in arrays]
    source = Source("memory", path, config, {}, dict(base) if base else None, problems=problems)
    host = lru_cache(maxsize=1)(lambda name: np.asarray(arrays[name]))
    views = {name: InMemory(partial(host, name), array.shape, array.dtype) for name, array in arrays.items()}
    try:
        source.stored = show_arrays(views)
    except ValueError as error:  # An array that no model has.
        source.problems.append(f"unexpected: {error}")
    source.add_copies()
    return source
