"""The moving average of the weights, in host memory, off the critical path (report section 3.2.3)."""

from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Array, Bool, PyTree


class HostEma:
    """Average of float32 weights: `average = decay * average + (1 - decay) * weights` after every step that moved them.

    A step pays for starting a copy to host memory; the arithmetic happens on a thread, at most one step behind.
    """

    def __init__(self, params: PyTree, decay: float):
        """Start the average at `params`, arrays of JAX or NumPy."""
        self.decay = decay
        self._average = jax.tree.map(lambda leaf: np.array(leaf, np.float32), params)
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
        """Return a copy of the average, float32 NumPy arrays, after all updates so far."""
        self._wait()
        return jax.tree.map(np.copy, self._average)

    def _add(self, on_host: PyTree, moved: Bool[Array, ""] | bool) -> None:
        if not moved:
            return

        def add(average: np.ndarray, leaf: jax.Array) -> None:
            step = np.subtract(leaf, average)
            step *= 1 - self.decay
            average += step

        jax.tree.map(add, self._average, on_host)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
