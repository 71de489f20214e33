"""Speed and memory of `dsjax.convert` beside `cp`, on a synthetic FP8 checkpoint of V3's tensor shapes.

    python -m dsjax.benchmarks.conversion FOLDER [--layers 1] [--experts 32] [--repeats 5]

Writes a checkpoint with V3's embedding and head, one dense and `layers` MoE layers of `experts` experts (6 GB), then
in turn, `repeats` times: copies it with `cp --reflink=never` and `sync`, only inspects it (what starting costs),
converts it as it is, and converts it to BF16.
Prints JSON: medians in seconds, their ratios to the copy's, and the most anonymous memory that a conversion held above
that of a process that has only imported what it needs.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dsjax.checkpoint.audit import released_listing
from dsjax.checkpoint.families import config_to_huggingface
from dsjax.checkpoint.files import SafetensorsWriter, Spec
from dsjax.checkpoint.huggingface import INDEX
from dsjax.config import ModelConfig, YarnConfig

_SHARD = 1_000_000_000
_CHUNK = 1 << 24
_SETTLE = 10.0
"""Seconds of rest before each turn. A virtual machine gives freed memory back to its host within seconds, and getting
it again costs more than a copy: what runs at once after a deletion would look several times as fast."""
_IDLE = "import sys, dsjax.convert; sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.read()"


def v3_cut(layers: int = 1, experts: int = 32, vocab_size: int = 129280, width: int = 7168) -> ModelConfig:
    """Return V3 with one dense and few MoE layers of few experts, without MTP; `width` is the hidden size."""
    return ModelConfig(
        name="deepseek_v3",
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=1 + layers,
        first_k_dense_replace=1,
        intermediate_size=18432 * width // 7168,
        moe_intermediate_size=2048 * width // 7168,
        num_attention_heads=128 * width // 7168,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=experts,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope_scaling=YarnConfig(factor=40.0, original_max_position_embeddings=4096),
    )


def write_synthetic(folder: Path, config: ModelConfig, shard_bytes: int = _SHARD) -> int:
    """Write an FP8 checkpoint of a model, with random finite values, in Hugging Face's form; return its bytes."""
    folder.mkdir(parents=True)
    specs = [Spec(name, dtype, shape) for name, (dtype, shape) in released_listing(config).items()]
    groups: list[list[Spec]] = [[]]
    for spec in specs:
        if groups[-1] and sum(s.nbytes for s in groups[-1]) + spec.nbytes > shard_bytes:
            groups.append([])
        groups[-1].append(spec)
    codes = np.random.default_rng(0).integers(0, 0x7F, _CHUNK, dtype=np.uint8)
    codes[::3] |= 0x80
    places = {}
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        writer = SafetensorsWriter(folder / name, group)
        for spec in group:
            places[spec.name] = name
            for start in range(0, spec.nbytes, _CHUNK):
                count = min(_CHUNK, spec.nbytes - start)
                if spec.dtype == "F32":
                    data = np.full(count // 4, 2.5e-4, np.float32)
                else:
                    data = codes[:count] & (0xFF if spec.dtype == "F8_E4M3" else 0xBF)  # BF16 below 1 in magnitude.
                writer.write(spec.name, start, data)
        writer.close()
    size = sum(spec.nbytes for spec in specs)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(config, fp8=True)))
    return size


def anonymous_memory(pid: int) -> int:
    """Return the bytes of anonymous memory that a process holds now (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def idle_memory() -> int:
    """Return the anonymous memory of a process that has imported the converter and does nothing."""
    with subprocess.Popen([sys.executable, "-c", _IDLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        return anonymous_memory(process.pid)


def convert_watched(*arguments: str) -> tuple[float, int]:
    """Run `python -m dsjax.convert`; return its seconds and the most anonymous memory it was seen to hold."""
    started, most = time.perf_counter(), 0
    command = [sys.executable, "-m", "dsjax.convert", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            most = max(most, anonymous_memory(process.pid))
        except (OSError, StopIteration):  # It has just ended.
            break
        time.sleep(0.005)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return time.perf_counter() - started, most


def copy(source: Path, target: Path) -> float:
    """Copy a folder to the disk; return the seconds."""
    started = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", "-r", source, target], check=True)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    source, target = options.folder / "source", options.folder / "target"
    nbytes = write_synthetic(source, v3_cut(options.layers, options.experts))
    subprocess.run(["sync"], check=True)
    seconds: dict[str, list[float]] = {"cp": [], "start_up": [], "keep": [], "bf16": []}
    most: dict[str, int] = {}
    for repeat in range(options.repeats):
        seconds["start_up"].append(convert_watched("inspect", str(source))[0])
        turns = ["cp", "keep", "bf16"]
        for turn in turns[repeat % 3 :] + turns[: repeat % 3]:
            time.sleep(_SETTLE)
            if turn == "cp":
                seconds["cp"].append(copy(source, target))
            else:
                took, memory = convert_watched("from-hf", str(source), str(target), "--dtype", turn)
                seconds[turn].append(took)
                most[turn] = max(most.get(turn, 0), memory)
            shutil.rmtree(target)
            subprocess.run(["sync"], check=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    idle = idle_memory()
    result = {
        "bytes": nbytes,
        "seconds": {name: round(value, 2) for name, value in medians.items()},
        "all_seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "ratio_to_cp": {name: round(medians[name] / medians["cp"], 2) for name in ("keep", "bf16")},
        "anonymous_megabytes_above_idle": {name: round((value - idle) / 1e6) for name, value in most.items()},
        "idle_megabytes": round(idle / 1e6),
    }
    print(json.dumps(result, indent=2))
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
