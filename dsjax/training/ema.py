"""The moving average of the weights, in host memory, off the critical path (report section 3.2.3)."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Bool, PyTree


@dataclass(frozen=True)
class _OwnParts:
    """What this process keeps of one average: the parts of the weight that its devices hold, each once."""

    sharding: jax.sharding.Sharding
    shape: tuple[int, ...]
    parts: dict[tuple[slice, ...], np.ndarray]

    def add(self, weight: jax.Array, decay: float) -> None:
        for index, part in _own_parts(weight).items():
            step = np.subtract(part, self.parts[index])
            step *= 1 - decay
            self.parts[index] += step

    def value(self) -> jax.Array:
        # A copy, because arrays of a CPU share the memory that they are made from.
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.parts[index].copy())


class HostEma:
    """Average of float32 weights: `average = decay * average + (1 - decay) * weights` after every step that moved them.

    A step pays for starting a copy to host memory; the arithmetic happens on a thread, at most one step behind. Every
    process averages the parts of the weights that its own devices hold.
    """

    def __init__(self, params: PyTree, decay: float):
        """Start the average at `params`, and divide it as they are."""
        self.decay = decay
        self._average = jax.tree.map(
            lambda leaf: _OwnParts(
                leaf.sharding,
                leaf.shape,
                {index: np.array(part, np.float32) for index, part in _own_parts(leaf).items()},
            ),
            params,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._pending: Future[None] | None = None

    def update(self, params: PyTree, moved: Bool[Array, ""] | bool = True) -> None:
        """Take the weights of one more step; returns before they are averaged.

        Args:
            moved: False for a step that was skipped, after which the average stays as it is.
        """
        self._wait()
        # The copy is queued before the next step, which may then write over the weights' memory.
        on_host = jax.device_put(
            params, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), params)
        )
        self._pending = self._thread.submit(self._add, on_host, moved)

    def value(self) -> PyTree:
        """Return the average after all updates so far: float32 arrays on the devices, divided as the weights are."""
        self._wait()
        return jax.tree.map(_OwnParts.value, self._average)

    def _add(self, on_host: PyTree, moved: Bool[Array, ""] | bool) -> None:
        if moved:
            jax.tree.map(lambda average, leaf: average.add(leaf, self.decay), self._average, on_host)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def _own_parts(array: jax.Array) -> dict[tuple[slice, ...], np.ndarray]:
    """Return the parts of an array that this process' devices hold, by where they are; copies once."""
    return {shard.index: np.asarray(shard.data) for shard in array.addressable_shards}
