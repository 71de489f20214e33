"""A conversion holds a few MB at a time, whatever the size of the tensors."""

import shutil
from pathlib import Path

import pytest

from dsjax.benchmarks.conversion import convert_watched, idle_memory, v3_cut, write_synthetic


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_bounded(tmp_path):
    config = v3_cut(experts=8, vocab_size=49152, width=1024)
    nbytes = write_synthetic(tmp_path / "source", config, shard_bytes=50_000_000)
    idle = idle_memory()
    for dtype in ("keep", "bf16"):
        out = tmp_path / dtype
        _, most = convert_watched("from-hf", str(tmp_path / "source"), str(out), "--dtype", dtype, "--workers", "2")
        # The checkpoint has more than 200 MB, its embedding and its head 100 MB each.
        assert nbytes > 200_000_000
        assert most - idle < 80_000_000
        shutil.rmtree(out)
    shutil.rmtree(tmp_path / "source")
