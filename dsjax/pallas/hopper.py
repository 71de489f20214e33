"""What the kernels for Hopper (sm_90a, Mosaic GPU) share, and the choice between them and their definitions."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir.dialects import nvvm

from dsjax.config import Fp8Kernel
from dsjax.runtime import target_platform

NUM_SMS = 132
"""Streaming multiprocessors of an H100, H200 or H800 (SXM)."""
SHARED_MEMORY = 232_448
"""Bytes that a block may have."""


def resolve(impl: Fp8Kernel) -> Fp8Kernel:
    """Return what `impl` is for the target: `auto` is `mosaic` on Hopper and `xla` elsewhere.

    Raises:
        ValueError: no such implementation, or Mosaic's elsewhere than on Hopper.
    """
    if impl not in get_args(Fp8Kernel):
        raise ValueError(f"FP8 kernels: no implementation {impl!r}; there are {', '.join(get_args(Fp8Kernel))}")
    if impl == "auto":
        return "mosaic" if _for_hopper() else "xla"
    if impl == "mosaic" and not _for_hopper():
        raise ValueError("FP8 kernels 'mosaic' need a Hopper GPU (H100, H200, H800); 'xla' runs everywhere")
    return impl


def _for_hopper() -> bool:
    if target_platform() != "gpu":
        return False
    if jax.default_backend() != "gpu":  # compiled ahead of time, for a description of a Hopper GPU
        return True
    return jax.devices()[0].compute_capability.startswith("9.")


def interpreter(impl: Fp8Kernel) -> dict[str, Any]:
    """Return the arguments by which `plgpu.kernel` interprets a kernel on a CPU and looks for races; none otherwise."""
    if impl != "interpret":
        return {}
    # Stands in for the inline function below, which it knows by its name.
    return {"interpret": plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="_hack_model_inline_mgpu_tokamax")}


@plgpu.inline_mgpu()
def fence_async_shared_cta(_):
    """Order what threads have read of shared memory before what TMA writes there."""
    nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)


def tiled_smem(shape: tuple[int, ...], dtype: DTypeLike) -> plgpu.SMEM:
    """Return shared memory in the layout that TMA writes and wgmma reads, the last axis swizzled."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(min(shape[-1] * bits, 1024))
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
