"""Checkpoints in the form of DeepSeek's demo: `model{i}-mp{n}.safetensors`, one file per rank of n.

Each file has a share of the rows or columns of a matrix, whole experts, or a copy of what is not divided. The demo has
no MTP module: its layers go to a file of their own, `mtp.safetensors`, under Hugging Face's names, which the demo does
not read and we do.
"""

import re
from dataclasses import replace
from pathlib import Path

from dsjax.checkpoint.blocks import BLOCK
from dsjax.checkpoint.conversion import (
    Format,
    Output,
    OutputFile,
    Part,
    Plan,
    config_document,
    is_fp8,
    target_dtype,
)
from dsjax.checkpoint.families import config_from_demo, config_from_huggingface, config_to_demo
from dsjax.checkpoint.files import Stored
from dsjax.checkpoint.names import Tensor, scale_name
from dsjax.checkpoint.sources import CheckpointProblems, Joined, Same, Source, open_files, read_json
from dsjax.config import ModelConfig

MTP_FILE = "mtp.safetensors"
DEMO_CONFIG = "deepseek.json"
_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


def is_deepseek(path: Path) -> bool:
    """Return whether a folder is in the demo's form."""
    return path.is_dir() and any(_FILE.fullmatch(file.name) for file in path.iterdir())


def open_deepseek(path: Path, config: ModelConfig | None = None) -> Source:
    """Open a folder in the demo's form; its config is `config.json` (Hugging Face's) or `deepseek.json` (the demo's).

    Raises CheckpointProblems if files of ranks are missing or the config cannot be used.
    """
    problems: list[str] = []
    data = None
    if config is None:
        config, data = _read_config(path, problems)
    numbers = [tuple(map(int, _FILE.fullmatch(f.name).groups())) for f in path.iterdir() if _FILE.fullmatch(f.name)]
    counts = sorted({n for _, n in numbers})
    if len(counts) > 1:
        problems.append(f"files of {' and '.join(map(str, counts))} ranks are mixed")
    if config is None or len(counts) > 1:
        raise CheckpointProblems(path, problems)
    (count,) = counts
    ranks = [path / f"model{i}-mp{count}.safetensors" for i in range(count)]
    side = [path / MTP_FILE] if (path / MTP_FILE).exists() else []
    files = open_files([*ranks, *side], problems)
    notes = []
    if not side and config.num_nextn_predict_layers:
        config = replace(config, num_nextn_predict_layers=0)
        notes.append(f"no MTP layer: the demo's form has none, and there is no {MTP_FILE}")
    source = Source("deepseek", path, config, {}, data, problems=problems, notes=notes)
    source.close = lambda: [file.close() for file in files.values()]
    source.unreadable = None if problems else frozenset()
    if not problems:
        used = {file: set() for file in ranks}
        for tensor in source.tensors():
            if tensor.deepseek:
                _collect(source, tensor, [files[rank].tensors for rank in ranks], list(used.values()))
        for rank, names in used.items():
            problems += [f"unexpected: {name} in {rank.name}" for name in files[rank].tensors if name not in names]
        for file in side:
            source.stored |= files[file].tensors
        source.copies = any(name.endswith("shared_head.head.weight") for name in source.stored)
    return source


def _read_config(path: Path, problems: list[str]) -> tuple[ModelConfig | None, dict | None]:
    try:
        if (path / "config.json").exists():
            data = read_json(path / "config.json", problems)
            return (None, None) if problems else (config_from_huggingface(data), data)
        if (path / DEMO_CONFIG).exists():
            data = read_json(path / DEMO_CONFIG, problems)
            return (None, None) if problems else (config_from_demo(data), None)
    except ValueError as error:
        problems += str(error).splitlines()
    else:
        problems.append(f"neither config.json nor {DEMO_CONFIG} is there; name one with --config")
    return None, None


def _collect(source: Source, tensor: Tensor, ranks: list[dict[str, Stored]], used: list[set[str]]) -> None:
    """Find a tensor's shares in the files of the ranks, and those of its scales."""
    pairs = [(tensor.deepseek, tensor.huggingface)]
    if tensor.storage == "fp8":
        pairs.append((scale_name(tensor.deepseek, "deepseek"), scale_name(tensor.huggingface)))
    for name, huggingface in pairs:
        if tensor.cut == "experts":
            home = tensor.index[0] * len(ranks) // source.config.n_routed_experts
            here = [home] if name in ranks[home] else []
        else:
            here = [i for i, rank in enumerate(ranks) if name in rank]
        for i in here:
            used[i].add(name)
        shares = tuple(ranks[i][name] for i in here)
        complete = 1 if tensor.cut == "experts" else len(ranks)
        if 0 < len(shares) < complete:
            absent = ", ".join(str(i) for i in range(len(ranks)) if i not in here)
            source.problems.append(f"missing: {name} of ranks {absent}")
        elif len({(share.dtype, share.shape) for share in shares}) > 1:
            source.problems.append(f"wrong shape: {name} differs between ranks")
        elif len(shares) == 1:
            source.stored[huggingface] = shares[0]
        elif shares and tensor.cut:
            source.stored[huggingface] = Joined(shares, 0 if tensor.cut == "rows" else 1)
        elif shares:
            source.stored[huggingface] = Same(name, shares)


def plan_deepseek(source: Source, wanted: Format, ranks: int) -> Plan:
    """Plan to write a checkpoint in the demo's form for `ranks` GPUs.

    Raises CheckpointProblems if something cannot be divided among so many: FP8 matrices are cut between blocks only.
    """
    outputs: list[list[Output]] = [[] for _ in range(ranks)]
    side, problems = [], []
    for tensor in source.tensors():
        name = tensor.huggingface
        if name not in source.stored:  # A copy that the source does without.
            continue
        dtype = target_dtype(tensor, source.stored[name].dtype, wanted)
        scaled = dtype == "F8_E4M3"
        if tensor.deepseek is None:
            part = Part(name, (0, tensor.shape[0]))
            side.append(Output(name, dtype, tensor.shape, (part,), scale_name(name) if scaled else None))
            continue
        scale = scale_name(tensor.deepseek, "deepseek") if scaled else None
        try:
            for rank, part, shape in _divide(tensor, ranks, scaled, source.config.n_routed_experts):
                outputs[rank].append(Output(tensor.deepseek, dtype, shape, (part,), scale))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointProblems(source.path, dict.fromkeys(problems))
    files = [OutputFile(f"model{i}-mp{ranks}.safetensors", tuple(outputs[i])) for i in range(ranks)]
    notes = [f"the demo has no MTP module: its layer is in {MTP_FILE}"] if side else []
    files += [OutputFile(MTP_FILE, tuple(side))] if side else []
    fp8, power = is_fp8(files), source.power_of_two_scales
    demo = config_to_demo(source.config, fp8=fp8, power_of_two_scales=fp8 and power)
    return Plan(tuple(files), {DEMO_CONFIG: demo, "config.json": config_document(source, files)}, tuple(notes))


def _divide(tensor: Tensor, ranks: int, scaled: bool, experts: int) -> list[tuple[int, Part, tuple[int, ...]]]:
    """Return which rank gets which part of a tensor, and the part's shape."""
    name, whole = tensor.huggingface, (0, tensor.shape[0])
    if tensor.cut == "experts":
        if experts % ranks:
            raise ValueError(f"{experts} experts cannot be divided among {ranks} ranks")
        return [(tensor.index[0] // (experts // ranks), Part(name, whole), tensor.shape)]
    if tensor.cut is None or ranks == 1:
        return [(rank, Part(name, whole), tensor.shape) for rank in range(ranks)]
    axis = 0 if tensor.cut == "rows" else 1
    size = tensor.shape[axis]
    if size % ranks or (scaled and size // ranks % BLOCK):
        unit = f"whole blocks of {BLOCK}" if scaled else tensor.cut
        raise ValueError(f"{name}: its {size} {tensor.cut} do not make {ranks} equal shares of {unit}")
    share = size // ranks
    shape = tuple(share if i == axis else n for i, n in enumerate(tensor.shape))
    spans = [(rank * share, (rank + 1) * share) for rank in range(ranks)]
    if axis == 0:
        return [(rank, Part(name, span), shape) for rank, span in enumerate(spans)]
    return [(rank, Part(name, whole, span), shape) for rank, span in enumerate(spans)]
