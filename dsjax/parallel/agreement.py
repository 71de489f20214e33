"""What the processes of a run must do once, or alike. With a single process everything here is immediate."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import UInt8

from dsjax.parallel.mesh import AXES

_LONGEST_MESSAGE = 4096


def on_first(act: Callable[[], None]) -> None:
    """Run `act` on process 0 while the others wait; if it raises ValueError or OSError there, all raise ValueError."""
    if jax.process_count() == 1:
        act()
        return
    message = ""
    if jax.process_index() == 0:
        try:
            act()
        except (ValueError, OSError) as error:
            message = str(error) or "no reason given"
    message = bytes(multihost_utils.broadcast_one_to_all(_as_numbers(message))).rstrip(b"\0").decode(errors="ignore")
    if message:
        raise ValueError(message)


def require_same(value: str, what: str) -> None:
    """Raise ValueError on every process if `value` is not the same on all.

    Args:
        what: it is, for the message.
    """
    if jax.process_count() == 1:
        return
    own = _as_numbers(value)
    differing = (multihost_utils.process_allgather(own) != multihost_utils.broadcast_one_to_all(own)).any(axis=1)
    if differing.any():
        who = ", ".join(map(str, np.flatnonzero(differing)))
        raise ValueError(f"{what}: not the same in process {who} as in process 0")


def _as_numbers(text: str) -> UInt8[np.ndarray, " bytes"]:
    """Return a text's bytes in an array of one length for all, as collectives want it; what is too long is cut."""
    encoded = text.encode()[:_LONGEST_MESSAGE]
    return np.pad(np.frombuffer(encoded, np.uint8), (0, _LONGEST_MESSAGE - len(encoded)))


class Vote:
    """Whether any process wants something, known to all after the same step.

    A vote is counted on the devices, between two steps, and read when the next one is cast: nobody waits for it.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._one_each = NamedSharding(mesh, PartitionSpec(AXES))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None

    def __call__(self, wanted: bool) -> bool:
        """Cast a vote and return the result: of this one in a single process, else of the one before."""
        if jax.process_count() == 1:
            return wanted
        result = self._before is not None and bool(self._before)
        votes = jax.make_array_from_callback(
            (self._one_each.num_devices,), self._one_each, lambda index: np.full(1, wanted)
        )
        self._before = self._any(votes)
        return result
