"""Kernels compiled for a GPU that is not there: what NVIDIA's assembler says of every candidate of `config`."""

import re
import shutil
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.pallas.choice import SHARED_MEMORY
from dsjax.pallas.matmul.calls import for_tma
from dsjax.pallas.matmul.config import Kind, candidates, registers_move
from dsjax.pallas.matmul.tune import example
from dsjax.planning.aot import can_compile_for_gpus, gpu_devices

pytestmark = pytest.mark.skipif(
    not can_compile_for_gpus(), reason="JAX's CUDA plugin is not installed: uv run --extra cuda13 pytest"
)
M, N, K, GROUPS = 1024, 576, 512, 2


@pytest.fixture
def dump(monkeypatch, tmp_path):
    """Where Mosaic leaves what it compiles; nothing is taken from a cache."""
    for name in ("PTX", "PTXAS", "SASS"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield tmp_path
    jax.config.update("jax_enable_compilation_cache", enabled)


def _compile(function, arguments, devices, **options):
    everywhere = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere) for a in arguments]
    return jax.jit(function, **options).lower(*shapes).compile()


def _read(folder: Path, ending: str) -> str:
    """The text of what was dumped under names with this ending; empty if nothing was."""
    return "\n".join(file.read_text() for file in sorted(folder.glob(f"*{ending}")))


def _check(folder: Path, kind: Kind) -> None:
    log, ptx, sass = _read(folder, ".ptxas"), _read(folder, ".ptx"), _read(folder, ".sass_ctrl")
    operands = "bf16.bf16" if kind.endswith("16bit") else "e4m3.e4m3"
    assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k(16|32)\.f32\.{operands}", ptx)
    assert not re.search(r"\bmma\.sync", ptx)
    assert {int(count) for count in re.findall(r"(\d+) bytes spill stores", log)} == {0}
    assert "setmaxnreg" in ptx and ("setmaxnreg' ignored" in log) == (not registers_move())
    used = re.findall(r"smem_scratch_bytes=(\d+)", _read(folder, "resources.txt"))
    assert len(used) == 1 and int(used[0]) <= SHARED_MEMORY
    if sass:  # where nvdisasm is installed
        assert ("HGMMA." if kind.endswith("16bit") else "QGMMA.") in sass
        assert not re.search(r"\bHMMA\b|\bSTL\b|\bLDL\b", sass)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_candidates_compile_well(dump, kind):
    with gpu_devices(nodes=1, per_node=1) as devices:
        m, k = (K, M) if kind.startswith("wgrad") else (M, K)
        arrays, product, out_dtype = example(kind, m, N, k, GROUPS)
        for config in candidates(kind, jnp.dtype(out_dtype)):
            shutil.rmtree(dump)
            dump.mkdir()
            _compile(lambda *a, config=config: product(*a, config=config), arrays, devices)
            _check(dump, kind)


@pytest.mark.parametrize("kind", ["wgrad", "wgrad_16bit"])
def test_gradients_are_added_in_place(dump, kind):
    with gpu_devices(nodes=1, per_node=1) as devices:
        arrays, product, _ = example(kind, 512, 576, M, GROUPS)
        into = jnp.zeros((GROUPS, 512, 576))
        compiled = _compile(lambda into, *a: product(*a, into=into), (into, *arrays), devices, donate_argnums=0)
    _check(dump, kind)
    assert "cp.reduce.async.bulk.tensor" in _read(dump, ".ptx")
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == into.nbytes
    assert memory.temp_size_in_bytes < into.nbytes / 10


def test_transpositions_of_scales_cancel(dump):
    """Scales that a quantizer has written the way TMA reads them are not copied."""
    (a, a_scales, b, b_scales), product, _ = example("dense", 1024, 576, 1024)
    with gpu_devices(nodes=1, per_node=1) as devices:
        as_read = _compile(lambda a, s, *b: product(a, s.T, *b), (a, for_tma(a_scales), b, b_scales), devices)
        as_defined = _compile(product, (a, a_scales, b, b_scales), devices)
    assert as_read.memory_analysis().temp_size_in_bytes == 0
    assert as_defined.memory_analysis().temp_size_in_bytes == a_scales.nbytes


def test_shapes_that_are_no_multiples_compile(dump):
    with gpu_devices(nodes=1, per_node=1) as devices:
        arrays, product, _ = example("dense", 101, 100, 300)
        _compile(product, arrays, devices)
    _check(dump, "dense")
