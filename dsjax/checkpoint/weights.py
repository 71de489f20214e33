"""dsjax's own form of weights: a folder of our canonical arrays, in safetensors files, with `dsjax.json`.

An array of ours is one tensor, the experts of a layer stacked; since a released tensor is always one stretch of it, a
conversion copies bytes, and any sharding reads just the bytes it needs. FP8 weights stay codes, with their scales
beside them under `<path>.scale`. Training takes such a folder as starting weights, and `generate` runs it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax.checkpoint.conversion import Format, Output, Part, Plan, shards, target_dtype
from dsjax.checkpoint.names import scale_name, scale_shape
from dsjax.checkpoint.sources import (
    CheckpointProblems,
    Source,
    are_file_names,
    model_arrays,
    open_files,
    piece,
    read_json,
)
from dsjax.config import ModelConfig
from dsjax.settings import from_dict, to_dict

DOCUMENT = "dsjax.json"
_FORMAT = "dsjax weights 1"


def open_weights(path: Path) -> Source:
    """Open a folder of dsjax weights. Raises CheckpointProblems if `dsjax.json` cannot be used."""
    problems: list[str] = []
    document = read_json(path / DOCUMENT, problems)
    if not problems and document.get("format") != _FORMAT:
        problems.append(f"{DOCUMENT}: format is {document.get('format')!r}, this version reads {_FORMAT!r}")
    problems += _wrong_fields(document) if not problems else []
    if problems:
        raise CheckpointProblems(path, problems)
    config = from_dict(ModelConfig, document["model"])
    files = open_files([path / name for name in sorted(set(document["arrays"].values()))], problems)
    arrays = {name: tensor for file in files.values() for name, tensor in file.tensors.items()}
    shapes = model_arrays(config)
    problems += [f"missing: {name} {list(shape)}" for name, shape in shapes.items() if name not in arrays]
    known = {*shapes, *(f"{name}.scale" for name in shapes)}
    problems += [f"unexpected: {name} {list(arrays[name].shape)}" for name in arrays if name not in known]
    for name, shape in shapes.items():
        for array, right in ((name, shape), (f"{name}.scale", None)):
            if array in arrays and right is None:
                right = scale_shape(shape)
            if array in arrays and arrays[array].shape != tuple(right):
                problems.append(f"wrong shape: {array} is {list(arrays[array].shape)}, should be {list(right)}")
    source = Source("dsjax", path, config, {}, document.get("huggingface"), document.get("mtp_copies", True))
    source.power_of_two_scales = document.get("power_of_two_scales", False)
    source.problems = problems
    source.unreadable = None if problems else frozenset()
    source.close = lambda: [file.close() for file in files.values()]
    if not problems:
        for tensor in source.tensors():
            if not tensor.copy:
                source.stored[tensor.huggingface] = piece(arrays[tensor.path], tensor.index)
                if f"{tensor.path}.scale" in arrays:
                    scales = piece(arrays[f"{tensor.path}.scale"], tensor.index)
                    source.stored[scale_name(tensor.huggingface)] = scales
        if source.copies:
            source.add_copies()
    return source


def _wrong_fields(document: Mapping[str, Any]) -> list[str]:
    """Return a line for each field of `dsjax.json` that is not what a conversion writes."""
    problems = []
    try:
        from_dict(ModelConfig, document["model"])
    except ValueError as error:
        problems.append(f"{DOCUMENT}: model: {error}")
    except (AttributeError, KeyError):
        problems.append(f"{DOCUMENT}: has no model")
    arrays = document.get("arrays")
    if not isinstance(arrays, dict) or not are_file_names(arrays.values()):
        problems.append(f"{DOCUMENT}: its arrays are not names of files beside it")
    if not isinstance(document.get("huggingface") or {}, dict):
        problems.append(f"{DOCUMENT}: huggingface is not the contents of a config.json")
    return problems


def plan_weights(source: Source, wanted: Format, shard_bytes: int) -> Plan:
    """Plan to write a checkpoint in dsjax's form.

    Raises CheckpointProblems if the tensors that become one array are stored in different formats.
    """
    shapes = model_arrays(source.config)
    pieces: dict[str, list] = {path: [] for path in shapes}
    copies: dict[str, list[str]] = {}
    for tensor in source.tensors():
        if tensor.copy:
            copies.setdefault(tensor.path, []).extend([tensor.huggingface] * (tensor.huggingface in source.stored))
        else:
            pieces[tensor.path].append(tensor)
    outputs, problems = [], []
    for path, shape in shapes.items():
        parts, dtypes = [], set()
        # A file has the pieces of an array in the order of their indices, the table rule by rule.
        for tensor in sorted(pieces[path], key=lambda tensor: tensor.index):
            dtypes.add(target_dtype(tensor, source.stored[tensor.huggingface].dtype, wanted))
            same = tuple(copies.get(path, ()))
            parts.append(Part(tensor.huggingface, (0, tensor.shape[0]), copies=same))
        if len(dtypes) > 1:
            problems.append(
                f"{path}: its {len(parts)} tensors are stored as {' and '.join(sorted(dtypes))}; "
                "choose one with --dtype bf16, fp32 or fp8"
            )
        dtype = dtypes.pop()
        outputs.append(Output(path, dtype, shape, tuple(parts), f"{path}.scale" if dtype == "F8_E4M3" else None))
    if problems:
        raise CheckpointProblems(source.path, problems)
    files = shards(outputs, shard_bytes, lambda i, n: f"weights-{i + 1:05d}-of-{n:05d}.safetensors")
    document = {
        "format": _FORMAT,
        "model": to_dict(source.config),
        "power_of_two_scales": source.power_of_two_scales,
        "mtp_copies": source.copies,
        "huggingface": source.huggingface,
        "arrays": {output.name: file.name for file in files for output in file.outputs},
    }
    return Plan(files, {DOCUMENT: document})
