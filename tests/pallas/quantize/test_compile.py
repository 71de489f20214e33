"""Kernels of DeepSeek-V3's shapes: lowered for CUDA; and compiled for Hopper, for which the CUDA plugin suffices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.pallas.choice import SHARED_MEMORY
from dsjax.pallas.quantize import api
from dsjax.planning.aot import can_compile_for_gpus, gpu_devices
from dsjax.runtime import made_for

ROWS = 4096
BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn


def norm(x, gain, power_of_two):
    return api.rms_norm_tiles(x, gain, 1e-6, power_of_two=power_of_two)


def transpose(codes, power_of_two):
    return api.transpose(codes)


def backward(gate_up, weights, dy, power_of_two):
    return api.swiglu_backward(gate_up, weights, dy)


def pack(x, power_of_two):
    return api.pack_e5m6(x)


def unpack(words, scales, power_of_two):
    return api.unpack_e5m6(words, scales, dtype=BF16)


def twelve_bits(width):
    return (ROWS, 3 * width // 8, jnp.uint32), (ROWS, width // 128, F32)


def swiglu(width, dtype):
    return (ROWS, 2 * width, dtype), (ROWS, F32)


WIDTHS = [7168, 2048, 4096, 18432, 1536, 512, 16384]
CASES = {f"tiles {width}": (api.tiles, (ROWS, width, BF16)) for width in WIDTHS}
CASES |= {f"tiles_transposed {width}": (api.tiles_transposed, (ROWS, width, BF16)) for width in WIDTHS}
CASES |= {
    f"requantize_transposed {width}": (api.requantize_transposed, (ROWS, width, E4M3), (ROWS, width // 128, F32))
    for width in WIDTHS
}
CASES |= {f"swiglu_tiles {width}": (api.swiglu_tiles, *swiglu(width, BF16)) for width in (2048, 18432)}
CASES |= {f"swiglu_backward {width}": (backward, *swiglu(width, BF16), (ROWS, width, BF16)) for width in (2048, 18432)}
CASES |= {f"rms_norm_tiles {width}": (norm, (ROWS, width, BF16), (width, F32)) for width in (7168, 1536, 512)}
WEIGHTS = [
    (2048, 7168),
    (7168, 2048),
    (18432, 7168),
    (7168, 18432),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
]
CASES |= {f"blocks {n} {k}": (api.blocks, (n, k, F32)) for n, k in WEIGHTS}
CASES |= {f"transpose {n} {k}": (transpose, (n, k, E4M3)) for n, k in WEIGHTS}
CASES |= {"pack_e5m6 16384": (pack, (ROWS, 16384, BF16)), "unpack_e5m6 16384": (unpack, *twelve_bits(16384))}
CASES["blocks of 8 experts"] = (api.blocks, (8, 4096, 7168, BF16))
CASES["transpose of 8 experts"] = (transpose, (8, 4096, 7168, E4M3))
PARTIAL = {
    "tiles": (api.tiles, (4128, 7232, BF16)),
    "tiles_transposed": (api.tiles_transposed, (4128, 7232, BF16)),
    "swiglu_tiles": (api.swiglu_tiles, (4128, 2 * 2080, BF16), (4128, F32)),
    "swiglu_backward": (backward, (4128, 2 * 2080, BF16), (4128, F32), (4128, 2080, BF16)),
    "requantize_transposed": (api.requantize_transposed, (4128, 7232, E4M3), (4128, 57, F32)),
    "rms_norm_tiles": (norm, (4128, 1536, BF16), (1536, F32)),
    "blocks": (api.blocks, (3, 160, 7232, F32)),
    "transpose": (transpose, (3, 160, 7232, E4M3)),
    "pack_e5m6": (pack, (96, 640, BF16)),
    "unpack_e5m6": (unpack, (96, 240, jnp.uint32), (96, 5, F32)),
}
"""Of which the last tiles are partial, but nothing is padded."""
CASES |= {f"partial {name}": case for name, case in PARTIAL.items()}
WIDEST = {
    "tiles": (api.tiles, (ROWS, 7168, F32)),
    "tiles_transposed": (api.tiles_transposed, (ROWS, 7168, F32)),
    "swiglu_tiles": (api.swiglu_tiles, *swiglu(2048, F32)),
    "swiglu_backward": (backward, *swiglu(2048, F32), (ROWS, 2048, F32)),
    "rms_norm_tiles": (norm, (ROWS, 7168, F32), (7168, F32)),
    "pack_e5m6": (pack, (ROWS, 16384, F32)),
}
"""The same in float32, of which more does not fit."""
COMPILED = WIDEST | {
    f"{name} in BF16": CASES[case]
    for name, case in {
        "tiles": "tiles 7168",
        "tiles_transposed": "tiles_transposed 7168",
        "swiglu_tiles": "swiglu_tiles 2048",
        "swiglu_backward": "swiglu_backward 2048",
        "rms_norm_tiles": "rms_norm_tiles 7168",
        "blocks": "blocks of 8 experts",
        "pack_e5m6": "pack_e5m6 16384",
        "unpack_e5m6": "unpack_e5m6 16384",
    }.items()
}
COMPILED |= {f"partial {name}": case for name, case in PARTIAL.items()}
COMPILED |= {name: CASES[name] for name in ("requantize_transposed 7168", "blocks 576 7168", "transpose of 8 experts")}
BOTH = pytest.mark.parametrize("power_of_two", [False, True])
WITHOUT_SCALES = {backward, transpose, unpack}


def lowered(case, power_of_two, sharding=None):
    f, *shapes = case
    arrays = [jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding) for *shape, dtype in shapes]
    return jax.jit(lambda *args: f(*args, power_of_two=power_of_two)).trace(*arrays)


@pytest.mark.parametrize("name", [*CASES, *WIDEST])
def test_auto_lowers_to_one_kernel_on_hopper(name):
    with made_for("gpu"):
        text = lowered((CASES | WIDEST)[name], False).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    assert "stablehlo.pad" not in text


@pytest.mark.parametrize("name", [name for name, case in WIDEST.items() if case[0] not in WITHOUT_SCALES])
def test_scales_of_powers_of_two_lower(name):
    with made_for("gpu"):
        text = lowered(WIDEST[name], True).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1


def test_auto_is_xla_where_there_is_no_kernel():
    with made_for("gpu"):
        for f, *shapes in (
            (lambda x: api.tiles(x, tile=32, power_of_two=True), (64, 64)),
            (lambda x: api.tiles(x.astype(jnp.float16)), (64, 64)),
            (lambda x: norm(x, jnp.ones(100), False), (64, 100)),
            (lambda x: api.pack_e5m6(x.astype(jnp.float16)), (64, 64)),
        ):
            arrays = [jax.ShapeDtypeStruct(shape, F32) for shape in shapes]
            assert "mosaic_gpu" not in jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(
    not can_compile_for_gpus(), reason="JAX's CUDA plugin is not installed: uv run --extra cuda13 pytest"
)
@BOTH
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_for_hopper(name, power_of_two, monkeypatch, tmp_path):
    """Registers suffice, shared memory too, and divisions by scales are those of `division`, correctly rounded."""
    f, *_ = COMPILED[name]
    if power_of_two and f in WITHOUT_SCALES:
        pytest.skip("makes no scales")
    if f is pack and not power_of_two:
        pytest.skip("always has powers of two")
    for kind in ("PTX", "PTXAS"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{kind}", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with gpu_devices(nodes=1, per_node=1) as devices:
            sharding = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
            lowered(COMPILED[name], power_of_two, sharding).lower().compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)

    def dumped(suffix):
        (path,) = tmp_path.glob(f"*{suffix}")
        return path.read_text()

    log, ptx = dumped(".ptxas"), dumped(".ptx")
    assert re.findall(r"(\d+) bytes spill", log) == ["0", "0"], log
    shared = int(re.search(r"smem_scratch_bytes=(\d+)", dumped("resources.txt"))[1])
    assert shared <= SHARED_MEMORY
    if f in (pack, unpack):  # three words lie where no access of two or four may
        assert ("st.shared.v" if f is pack else "ld.shared.v") not in ptx
    if f in WITHOUT_SCALES:
        return
    assert "max.NaN.f32" in ptx and "max.f32" not in ptx
    values = 64 if f is not api.blocks else 128  # of a thread
    if f is api.swiglu_tiles:
        assert ptx.count("div.full.f32") == values  # of the sigmoid, itself not exact
    else:
        assert "div.full" not in ptx and "div.approx" not in ptx
    steps = ptx.count("fma.rn.f32")
    assert steps < 4 * values if power_of_two else steps >= 4 * values
