"""Checks of whole checkpoints: against a list of tensors, against another checkpoint, against their own checksums."""

import gzip
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint.conversion import REPORT
from dsjax.checkpoint.files import DTYPES
from dsjax.checkpoint.names import scale_name, scale_shape, tensors
from dsjax.checkpoint.sources import Source, are_file_names, model_arrays, open_files, read_json
from dsjax.config import ModelConfig

Listing = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of tensors, by name."""
_CHUNK = 1 << 23
_DTYPES = {"fp8": "F8_E4M3", "bf16": "BF16", "fp32": "F32"}


def released_listing(config: ModelConfig, *, fp8: bool = True) -> Listing:
    """Return all tensors of a release of a model, by Hugging Face name; in BF16 if not FP8."""
    listing: Listing = {}
    for tensor in tensors(model_arrays(config)):
        quantized = fp8 and tensor.storage == "fp8"
        storage = "bf16" if tensor.storage == "fp8" and not fp8 else tensor.storage
        listing[tensor.huggingface] = (_DTYPES[storage], tensor.shape)
        if quantized:
            listing[scale_name(tensor.huggingface)] = ("F32", scale_shape(tensor.shape))
    return listing


def read_listing(path: Path) -> Listing:
    """Read a list of tensors from JSON, plain or gzipped: {name: {"dtype": "BF16", "shape": [8, 4]}}.

    Raises ValueError for anything else.
    """
    data = path.read_bytes()
    try:
        entries = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, OSError, EOFError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of tensors {{name: {{dtype, shape}}}} in JSON") from error


def compare_listings(ours: Listing, reference: Listing) -> list[str]:
    """Return a line for each tensor in which two lists differ."""
    problems = [f"not in the reference: {name}" for name in ours if name not in reference]
    problems += [f"only in the reference: {name}" for name in reference if name not in ours]
    for name, (dtype, shape) in ours.items():
        if name in reference and reference[name] != (dtype, shape):
            theirs, their_shape = reference[name]
            problems.append(f"{name}: {dtype}{list(shape)}, the reference has {theirs}{list(their_shape)}")
    return problems


def compare_values(left: Source, right: Source, progress: Callable[[int], None] = lambda count: None) -> list[str]:
    """Return a line for each tensor in which two checkpoints of any form differ in name, shape, dtype or any byte."""
    problems = [f"only in {left.path}: {name}" for name in left.stored if name not in right.stored]
    problems += [f"only in {right.path}: {name}" for name in right.stored if name not in left.stored]
    for name in (name for name in left.stored if name in right.stored):
        a, b = left.stored[name], right.stored[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            problems.append(f"{name}: {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}")
            continue
        rows = max(1, _CHUNK // nbytes(a.dtype, a.shape[1:]))
        for start in range(0, a.shape[0], rows):
            stop = min(start + rows, a.shape[0])
            x, y = (side.read(start, stop).reshape(stop - start, -1) for side in (a, b))
            progress(x.nbytes)
            same = x.view(np.uint8) == y.view(np.uint8)
            if not same.all():
                row = start + int(np.argmin(same.all(axis=1)))
                problems.append(f"{name}: bytes differ, first in row {row}")
                break
    return problems


def verify_checksums(folder: Path, progress: Callable[[int], None] = lambda count: None) -> list[str] | None:
    """Read every byte of a converted folder and compare with the checksums of its report; None if it has no report."""
    if not (folder / REPORT).exists():
        return None
    problems: list[str] = []
    report = read_json(folder / REPORT, problems)
    sums = report.get("crc32")
    if not isinstance(sums, dict) or not are_file_names(sums) or not all(isinstance(s, dict) for s in sums.values()):
        return problems or [f"{REPORT}: has no checksums"]
    strangers = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in sums)
    problems += [f"{name}: {REPORT} has no checksums of it" for name in strangers]
    files = open_files([folder / name for name in sums], problems)
    for file in files.values():
        unknown = [name for name in file.tensors if name not in sums[file.path.name]]
        problems += [f"{REPORT} has no checksum of {name} in {file.path.name}" for name in unknown]
        for name, expected in sums[file.path.name].items():
            tensor, crc = file.tensors.get(name), 0
            if tensor is None:
                problems.append(f"missing: {name} in {file.path.name}")
                continue
            rows = max(1, _CHUNK // nbytes(tensor.dtype, tensor.shape[1:]))
            for start in range(0, tensor.shape[0], rows):
                data = tensor.read(start, min(start + rows, tensor.shape[0])).reshape(-1).view(np.uint8)
                crc = zlib.crc32(data, crc)
                progress(data.nbytes)
            if f"{crc:08x}" != expected:
                problems.append(f"checksum does not match: {name} in {file.path.name}")
        file.close()
    return problems


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of an array."""
    return DTYPES[dtype].itemsize * int(np.prod(shape, dtype=np.int64))


def describe(source: Source) -> str:
    """Return what a person wants to know of a checkpoint, from its headers alone."""
    config = source.config
    copies = {tensor.huggingface for tensor in source.tensors() if tensor.copy}
    counts, sizes = Counter(), defaultdict(int)
    for stored in source.stored.values():
        counts[stored.dtype] += 1
        sizes[stored.dtype] += nbytes(stored.dtype, stored.shape)
    parameters = sum(int(np.prod(shape, dtype=np.int64)) for shape in model_arrays(config).values())
    dense, moe = config.first_k_dense_replace, config.num_hidden_layers - config.first_k_dense_replace
    experts = f"{config.n_routed_experts} experts, {config.num_experts_per_tok} active"
    lines = [
        f"{source.path}",
        f"form        {source.form}",
        f"model       {config.name}: {parameters:,} parameters, router biases included",
        f"layers      {dense} dense + {moe} MoE ({experts}) + {config.num_nextn_predict_layers} MTP",
        f"tensors     {len(source.stored):,}, of which {len(copies & set(source.stored))} are copies",
        *(f"  {dtype:9} {counts[dtype]:,} tensors, {sizes[dtype]:,} bytes" for dtype in sorted(counts)),
    ]
    scales = "powers of two (ue8m0)" if source.power_of_two_scales else "float32"
    lines += [f"scales      {scales}, per 128x128 block"] if counts["F8_E4M3"] else []
    return "\n".join([*lines, *(f"note        {note}" for note in source.notes)])


def as_json(listing: Listing) -> Mapping[str, Any]:
    """Return a list of tensors in the form that `read_listing` reads."""
    return {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in listing.items()}
