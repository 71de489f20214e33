"""The choice between kernels for Hopper and their definitions.

Mosaic takes a second and 90 MB to import, so what only chooses is apart from it, and kernels are imported when they are
called.
"""

from typing import get_args

import jax

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
        raise ValueError("kernels.fp8 = 'mosaic': they need a Hopper GPU (H100, H200, H800); 'xla' runs everywhere")
    return impl


def _for_hopper() -> bool:
    if target_platform() != "gpu":
        return False
    if jax.default_backend() != "gpu":  # compiled ahead of time, for a description of a Hopper GPU
        return True
    return jax.devices()[0].compute_capability.startswith("9.")
