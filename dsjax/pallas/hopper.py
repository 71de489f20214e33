"""What the kernels for Hopper (sm_90a, Mosaic GPU) share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir.dialects import nvvm

from dsjax.config import Fp8Kernel


def interpreter(impl: Fp8Kernel) -> dict[str, Any]:
    """Return the arguments by which `plgpu.kernel` interprets a kernel on a CPU and looks for races; none otherwise."""
    if impl != "interpret":
        return {}
    # Stands in for the inline function below, which it knows by its name.
    return {"interpret": plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="_hack_model_inline_mgpu_tokamax")}


def traced_once(*static: str) -> Callable[[Callable], Callable]:
    """Decorate what runs a kernel: one tracing serves all calls of the same shapes and `static` arguments.

    JAX lowers a kernel again, for a third of a second, whenever it has been traced again.
    """
    return functools.partial(jax.jit, static_argnames=static, inline=True)


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
