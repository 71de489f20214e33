"""Convert checkpoints that torch itself has written (`.bin`, `.pt`) with the whole of `python -m dsjax.convert`.

    python3.12 -m venv torchjax && torchjax/bin/pip install -e . torch
    torchjax/bin/python tests/oracle/check_torch_conversion.py > tests/oracle/check_torch_conversion.json

The project's own environment has no torch, so that its tests cannot do this. The committed result is of torch's build
for CUDA from PyPI, on a machine without a GPU. Prints JSON, and fails if anything is not as it should be.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import safetensors
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SOURCES = {
    "v3 float32": GOLDEN / "v3" / "hf",
    "v3 fp8": GOLDEN / "v3" / "hf_fp8",
    "v2 float32": GOLDEN / "v2" / "hf",
}


class Evil:
    """What a pickle may do to whoever loads it."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def command(*words: object) -> subprocess.CompletedProcess:
    """Run `python -m dsjax.convert`, and return how it ended."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-m", "dsjax.convert", *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment)


def done(*words: object) -> str:
    """Run it, insist on success, and return what it printed."""
    ended = command(*words)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def refused(*words: object) -> str:
    """Run it, insist on status 1, and return what it said."""
    ended = command(*words)
    assert (ended.returncode, ended.stdout) == (1, ""), ended
    return ended.stderr


def write_single(state: dict[str, torch.Tensor], folder: Path) -> None:
    """One file, as `torch.save(model.state_dict())` makes it, of parameters."""
    parameters = {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}
    torch.save(parameters, folder / "pytorch_model.bin")


def write_sharded(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Three files with an index, as transformers made them before safetensors."""
    names, places = list(state), {}
    for i in range(3):
        file = f"pytorch_model-{i + 1:05d}-of-00003.bin"
        torch.save({name: state[name] for name in names[i::3]}, folder / file)
        places |= dict.fromkeys(names[i::3], file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_nested(state: dict[str, torch.Tensor], folder: Path) -> None:
    """A training script's file: nested, matrices saved as transposed views, in torch's old format.

    torch itself cannot read FP8 back from the old format.
    """
    fp8 = any(tensor.dtype == torch.float8_e4m3fn for tensor in state.values())
    views = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in state.items()}
    torch.save({"model": views}, folder / "model.pt", _use_new_zipfile_serialization=fp8)


FORMS = {"single": write_single, "sharded": write_sharded, "nested": write_nested}


def contents(folder: Path) -> dict[str, dict]:
    """Return dtype, shape and bytes of every tensor, as the safetensors library reads them."""
    return dict(t for file in folder.glob("*.safetensors") for t in safetensors.deserialize(file.read_bytes()))


def check_conversion(original: Path, form: str, folder: Path) -> dict[str, int]:
    """From torch's files to dsjax's, to Hugging Face's, bit for bit; to BF16 the same as from safetensors."""
    source = folder / "source"
    source.mkdir()
    shutil.copy(original / "config.json", source)
    FORMS[form](load_file(original / "model.safetensors"), source)
    done("from-hf", source, folder / "ours")
    done("to-hf", folder / "ours", folder / "back")
    before, after = contents(original), contents(folder / "back")
    assert after == before
    verified = done("verify", source, "--against", original)
    assert verified.splitlines()[-1] == f"{len(before)} tensors are those of {original}, bit for bit"
    done("to-hf", source, folder / "a", "--dtype", "bf16")
    done("to-hf", original, folder / "b", "--dtype", "bf16")
    assert contents(folder / "a") == contents(folder / "b") != before
    return {"tensors": len(after), "bytes": sum(len(tensor["data"]) for tensor in after.values())}


def check_refusals(folder: Path) -> list[str]:
    """A pickle that is more than tensors is not run, and nothing is written; neither are broken files."""
    source, state = folder / "source", load_file(GOLDEN / "v3" / "hf" / "model.safetensors")
    source.mkdir()
    shutil.copy(GOLDEN / "v3" / "hf" / "config.json", source)
    file = source / "pytorch_model.bin"
    said = []

    def refuse(message: str) -> None:
        assert refused("from-hf", source, folder / "out") == f"dsjax: {source}: 1 problem\n  {message}\n"
        assert [path.name for path in folder.iterdir()] == ["source"], "nothing is left"
        said.append(message)

    torch.save(state | {"model.norm.weight": Evil()}, file)
    refuse("pytorch_model.bin: holds more than tensors (posix.mkdir), and is not loaded")
    torch.save(state | {"model.norm.weight": Evil()}, file, _use_new_zipfile_serialization=False)
    refuse("pytorch_model.bin: holds more than tensors (posix.mkdir), and is not loaded")
    torch.save(state | {"step": 3}, file)
    refuse("pytorch_model.bin: not a state dict: step are no plain tensors")
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:100_000])
    refuse("pytorch_model.bin: not a whole PyTorch file")
    torch.save({name: tensor for name, tensor in state.items() if name != "model.norm.weight"}, file)
    refuse("missing: model.norm.weight [64]")
    torch.save(state | {"model.norm.weight": state["model.norm.weight"].half()}, file)
    refuse("wrong dtype: model.norm.weight is F16, it may be F32, BF16")
    assert not Path("evil").exists()
    return said


def main() -> None:
    """Run all checks and print what was checked."""
    result = {"commands": [line.strip() for line in __doc__.splitlines() if line.startswith("    ")]}
    result |= {"python": platform.python_version(), "torch": torch.__version__, "jax": jax.__version__}
    result |= {"numpy": np.__version__}
    for name, original in SOURCES.items():
        for form in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                result[f"{name}, {form}"] = check_conversion(original, form, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        result["refused"] = check_refusals(Path(folder))
    print(json.dumps(result | {"ok": True}, indent=2))


if __name__ == "__main__":
    main()
