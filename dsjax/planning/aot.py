"""Compiling for GPUs that are not there: XLA needs a description of the chip, and the CUDA plugin, but no GPU.

    with gpu_devices(nodes=8, per_node=8) as devices:
        jax.jit(f).lower(*shapes_with_shardings_on(devices)).compile(COMPILER_OPTIONS)

`uv run --extra cuda13` installs the plugin. Without a GPU no kernel is timed, so XLA chooses algorithms by its model of
the chip: memory and the order of operations are indications.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Literal, get_args
from unittest import mock

import jax
from jax.experimental import topologies

from dsjax.planning.chips import CHIPS, Chip
from dsjax.runtime import made_for

HopperName = Literal["h800", "h100", "h200"]
HOPPER = get_args(HopperName)
"""Chips that XLA has a description of here."""

_CUDNN = 91000  # 9.10, the first whose attention has values narrower than keys

COMPILER_OPTIONS = {"xla_gpu_experimental_use_collective_kernels": ""}
"""For `compile`: XLA takes all devices of a description for those of one host, and its own kernels of small all-reduces
do not compile for 64."""


def can_compile_for_gpus() -> bool:
    """Return whether JAX's CUDA plugin is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def require_plugin() -> None:
    """Raise RuntimeError if JAX's CUDA plugin is not installed."""
    if not can_compile_for_gpus():
        raise RuntimeError("compiling for GPUs needs JAX's CUDA plugin: uv run --extra cuda13 ...")


@contextlib.contextmanager
def traced_for(chip: Chip) -> Iterator[None]:
    """Inside, programs are traced as on a chip, with the kernels that it has."""
    with made_for(chip.platform), contextlib.ExitStack() as stack:
        if chip.platform == "gpu":
            # JAX asks the GPU of this process whether cuDNN's attention can be; all chips here are Hopper or later.
            where = "jax._src.cudnn.fused_attention_stablehlo"
            stack.enter_context(mock.patch(f"{where}.check_compute_capability", lambda capability: True))
            stack.enter_context(mock.patch(f"{where}.check_cudnn_version", lambda: _CUDNN))
        yield


@contextlib.contextmanager
def gpu_devices(nodes: int, per_node: int, chip: HopperName = "h100") -> Iterator[list[jax.Device]]:
    """Give devices to compile for; inside, programs are traced as for GPUs.

    Raises:
        RuntimeError: the CUDA plugin is not installed.
    """
    require_plugin()
    description = topologies.get_topology_desc(
        platform="cuda", topology=f"1x{nodes}x{per_node}", target_config=_target_config(CHIPS[chip])
    )
    with traced_for(CHIPS[chip]):
        yield list(description.devices)


def _target_config(gpu: Chip) -> str:
    """Return a `stream_executor.GpuTargetConfigProto` in text form: data sheet and CUDA's limits of Hopper (SXM5)."""
    # Keys are XLA's numbers of element types; a unit does so many operations per clock.
    scalar = {4: (64, 1), 8: (64, 1), 10: (128, 2), 11: (128, 1), 12: (64, 1), 16: (128, 2)}
    eight_bits = (2, 6, 19, 20, 23, 24, 25, 28, 29, 33, 35, 36)
    matrix = dict.fromkeys(eight_bits, (4, 1024)) | {10: (4, 512), 16: (4, 512), 11: (4, 256), 12: (4, 32)}

    def rates(clock: float, units: dict[int, tuple[int, int]]) -> str:
        return " ".join(
            f"rate_infos {{ key: {key} "
            f"value {{ clock_rate_ghz: {clock} units_per_core: {count} ops_per_clock: {operations} }} }}"
            for key, (count, operations) in sorted(units.items())
        )

    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          memory_bandwidth: {int(gpu.memory_bandwidth)} device_memory_size: {gpu.memory_bytes} l2_cache_size: 52428800
          cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
          scalar_unit_description {{ {rates(1.98, scalar)} }}
          matrix_unit_description {{ {rates(1.83, matrix)} }}
          device_vendor: "NVIDIA Corporation" name: "{gpu.name}" model_str: "sm_9.0a"
          platform_version: "Compute Capability 9.0a" device_address_bits: 64
          pcie_bandwidth: 34359738368 ecc_enabled: true device_interconnect_info {{ active_links: 18 }}
          driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.10.0"
          collective_memory_granularity: 2097152
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{gpu.name}"
    """
