"""The most memory that a process and its devices have held."""

import resource
import sys

import jax


def peak_of_process() -> int:
    """Return the most bytes of resident memory so far; of a run on CPUs, that is its arrays too."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of_devices() -> int | None:
    """Return the most bytes in use so far on any device of this process; None where the backend does not count."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)
