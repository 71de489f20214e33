"""What the makers' data sheets say of chips, for plans and for compiling ahead of time.

Rates are per second and, of links, per device in one direction. A name that JAX gives a device finds its peak in
`model.flops`; here are the chips that a run can be planned for.
"""

from dataclasses import dataclass
from typing import Literal, get_args

ChipName = Literal["h800", "h100", "h200", "b200", "tpu_v5p"]


@dataclass(frozen=True)
class Chip:
    """A device and its links."""

    name: str
    """As JAX has it."""
    platform: Literal["gpu", "tpu"]
    memory_bytes: int
    """As the driver reports it, where that is known."""
    bf16_flops: float
    """Dense."""
    fp8_flops: float | None
    """Dense; None where there is no FP8."""
    memory_bandwidth: float
    node_bandwidth: float
    """To devices of the same node."""
    network_bandwidth: float
    """To other nodes."""
    devices_per_node: int


_HOPPER = {"platform": "gpu", "bf16_flops": 989e12, "fp8_flops": 1979e12, "devices_per_node": 8}

CHIPS = {
    # 400 GB/s of NVLink and 400 Gbit/s of InfiniBand: report section 3.1.
    "h800": Chip(
        name="NVIDIA H800",
        memory_bytes=84_942_979_072,
        memory_bandwidth=3.35232e12,
        node_bandwidth=200e9,
        network_bandwidth=50e9,
        **_HOPPER,
    ),
    "h100": Chip(
        name="NVIDIA H100 80GB HBM3",
        memory_bytes=84_942_979_072,
        memory_bandwidth=3.35232e12,
        node_bandwidth=450e9,
        network_bandwidth=50e9,
        **_HOPPER,
    ),
    "h200": Chip(
        name="NVIDIA H200",
        memory_bytes=151_397_597_184,
        memory_bandwidth=4.8e12,
        node_bandwidth=450e9,
        network_bandwidth=50e9,
        **_HOPPER,
    ),
    "b200": Chip(
        name="NVIDIA B200",
        platform="gpu",
        memory_bytes=180_000_000_000,
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        memory_bandwidth=8e12,
        node_bandwidth=900e9,
        network_bandwidth=50e9,
        devices_per_node=8,
    ),
    # All links are alike within a pod: 1,200 Gbit/s to each of six neighbours, both directions together 4,800.
    "tpu_v5p": Chip(
        name="TPU v5p",
        platform="tpu",
        memory_bytes=95_000_000_000,
        bf16_flops=459e12,
        fp8_flops=None,
        memory_bandwidth=2.765e12,
        node_bandwidth=300e9,
        network_bandwidth=300e9,
        devices_per_node=4,
    ),
}
"""By the name that a command takes."""

assert set(CHIPS) == set(get_args(ChipName))
