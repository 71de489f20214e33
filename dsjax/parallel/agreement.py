"""What the processes of a run must do once, or alike. With a single process everything here is immediate.

Words are passed through the store of JAX's coordination service and not by collectives: these need as many devices in
every process, and the same program, which is what words are to make sure of.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # JAX has no public name for the store
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.parallel.mesh import AXES
from dsjax.settings import in_one_line

_PATIENCE = 7 * 24 * 3600 * 1000
"""Milliseconds. Process 0 may make tokens of a corpus meanwhile; if it is lost, JAX ends those that wait."""
_meetings = itertools.count()


def own_process() -> int:
    """Return the number of this process; unlike `jax.process_index` it needs no devices."""
    return global_state.process_id


def gather(record: Any) -> list[Any]:
    """Return what every process gives, by process; to be called by all, in the same order. Values are those of JSON."""
    if global_state.num_processes == 1:
        return [record]
    client, key = global_state.client, f"dsjax/{next(_meetings)}"
    client.key_value_set(f"{key}/{own_process()}", json.dumps(record))
    client.wait_at_barrier(f"{key}/given", _PATIENCE)
    found = {int(name.rpartition("/")[2]): json.loads(text) for name, text in client.key_value_dir_get(f"{key}/")}
    # If one of them fails over what it reads, it does not take the store away before the others have read too.
    client.wait_at_barrier(f"{key}/taken", _PATIENCE)
    return [found[process] for process in range(global_state.num_processes)]


def on_first(act: Callable[[], None]) -> None:
    """Run `act` on process 0 while the others wait; if it raises ValueError or OSError there, all raise ValueError."""
    if global_state.num_processes == 1:
        act()
        return
    message = None
    if own_process() == 0:
        try:
            act()
        except (ValueError, OSError) as error:
            message = in_one_line(error)
    message = gather(message)[0]
    if message:
        raise ValueError(message)


def require_same(value: str, what: str) -> None:
    """Raise ValueError on every process if `value` is not the same on all.

    Args:
        what: it is, for the message.
    """
    values = gather(value)
    differing = [process for process, other in enumerate(values) if other != values[0]]
    if differing:
        raise ValueError(f"{what}: not the same in process {', '.join(map(str, differing))} as in process 0")


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
