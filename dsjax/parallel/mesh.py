"""The mesh: every device of a run at a place along four axes."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from dsjax.config import MeshConfig

AXES = ("pipe", "data", "node", "local")
"""From the links that carry least to those that carry most: neighbours along `local` share a node."""
BATCH_AXES = ("data", "node", "local")
"""Axes over which the sequences of a micro-batch are divided."""
EXPERT_AXES = ("node", "local")
"""Axes over which the experts of a layer are divided."""

Axes = str | tuple[str, ...]
"""One axis of a mesh, or several as one: devices are counted along the first first."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a run.

    Args:
        devices: by default all there are. A single process may leave some of its own idle.

    Raises:
        ValueError: there are too few devices, or idle ones in a run of several processes.
    """
    devices = jax.devices() if devices is None else list(devices)
    wanted = config.devices
    shape = tuple(getattr(config, axis) for axis in AXES)
    processes = len({device.process_index for device in devices})
    if wanted > len(devices) or (processes > 1 and wanted != len(devices)):
        in_processes = f" in {processes} processes, and none may be idle" if processes > 1 else ""
        raise ValueError(
            f"{' x '.join(f'mesh.{axis}' for axis in AXES)} = {' x '.join(map(str, shape))} = {wanted} devices: there "
            f"are {len(devices)}{in_processes}"
        )
    return jax.make_mesh(shape, AXES, devices=devices[:wanted], axis_types=(AxisType.Auto,) * len(AXES))
