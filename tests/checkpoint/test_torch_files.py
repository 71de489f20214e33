"""PyTorch files as a source. `tests/oracle/check_torch.py` checks how they are read, in an environment with torch."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from dsjax.checkpoint import torch_files
from dsjax.checkpoint.audit import compare_values
from dsjax.checkpoint.conversion import convert
from dsjax.checkpoint.files import SafetensorsFile
from dsjax.checkpoint.forms import make_plan, open_checkpoint
from dsjax.checkpoint.sources import CheckpointProblems

GOLDEN = Path(__file__).parents[1] / "golden"
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.mark.skipif(HAS_TORCH, reason="torch is installed")
def test_without_torch_the_reason_is_told(tmp_path):
    shutil.copy(GOLDEN / "v2" / "hf" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever")
    with pytest.raises(CheckpointProblems) as error:
        open_checkpoint(tmp_path)
    assert error.value.problems == ["pytorch_model.bin: PyTorch files need torch, which is not installed"]


@pytest.mark.parametrize("indexed", [False, True])
def test_bin_files_are_a_source_like_any_other(tmp_path, monkeypatch, indexed):
    """With a reader that finds safetensors in them, which needs no torch."""
    monkeypatch.setattr(torch_files, "TorchFile", SafetensorsFile)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(GOLDEN / "v2" / "hf" / "config.json", source)
    name = "pytorch_model-00001-of-00001.bin" if indexed else "pytorch_model.bin"
    shutil.copy(GOLDEN / "v2" / "hf" / "model.safetensors", source / name)
    if indexed:
        names = SafetensorsFile(source / name).tensors
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    opened = open_checkpoint(source)
    convert(opened, make_plan(opened, "dsjax"), tmp_path / "ours")
    assert compare_values(open_checkpoint(tmp_path / "ours"), open_checkpoint(GOLDEN / "v2" / "hf")) == []


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_files_of_torch_save(tmp_path):
    import torch
    from safetensors.torch import load_file

    shutil.copy(GOLDEN / "v2" / "hf" / "config.json", tmp_path)
    torch.save(load_file(GOLDEN / "v2" / "hf" / "model.safetensors"), tmp_path / "model.pt")
    assert compare_values(open_checkpoint(tmp_path), open_checkpoint(GOLDEN / "v2" / "hf")) == []
