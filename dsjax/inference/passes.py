"""The engine's device side: its state, and passes over it by programs of few sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from dsjax.inference.cache import bytes_per_token, empty_cache
from dsjax.inference.load import Model
from dsjax.inference.programs import Batch, State, decode, mark_seen, prefill, read_page, write_page
from dsjax.inference.sampling import Drawn, Sampling, choice
from dsjax.inference.settings import SMALLEST_PIECE, EngineSettings, fitting, sizes

CPU_BYTES, ACCELERATOR_SHARE = 4 * 2**30, 0.8
"""What a cache may take by itself: see `EngineSettings.cache_bytes`."""
PADDING = Sampling(temperature=0.0)
"""Settings of a batch's empty places."""


@dataclass(frozen=True)
class Row:
    """A request's place in a pass."""

    owner: int
    """Whose pages these are: they only ever grow in number."""
    slot: int
    pages: Sequence[int]
    """With those for the new tokens."""
    length: int
    """Tokens that the cache has."""
    sampling: Sampling


class Passes:
    """Runs programs on the state. A call returns when the device has its work, not when that is done.

    Attributes:
        context: most tokens of a sequence.
        pages: of the cache, with page 0.
        page_bytes: bytes of a page.
    """

    def __init__(self, model: Model, settings: EngineSettings):
        """Makes an empty state.

        Raises:
            ValueError: no room for two pages; weights on several devices.
        """
        self._vocab_size, self._slots = model.config.vocab_size, settings.slots
        devices = jax.tree.leaves(model.params)[0].devices()
        if len(devices) > 1:
            raise ValueError(f"the model's weights are on {len(devices)} devices: must be on one")
        # All arrays are committed to it: those that are not would have programs compiled again.
        (self._device,) = devices
        self._weights = jax.device_put((model.params, model.biases), self._device)
        self.context = settings.context or model.context
        dtype, page_size = model.runtime.compute_dtype, settings.page_size
        self.page_bytes = page_size * bytes_per_token(model.config, dtype, settings.cache_format)
        needed = -(-self.context // page_size)
        self.pages = _pages(settings, needed, self.page_bytes)
        cache = empty_cache(model.config, self.pages, page_size, dtype, settings.cache_format)
        state = State(
            cache=cache,
            tokens=jnp.zeros(settings.slots + 1, jnp.int32),
            seen=jnp.zeros((settings.slots + 1, model.config.vocab_size), bool),
        )
        self._state = jax.device_put(state, self._device)
        self._everything = jax.device_put(np.ones((1, model.config.vocab_size), bool), self._device)
        self._common = {"config": model.config, "runtime": model.runtime}
        self._batch_sizes = sizes(1, settings.slots)
        self._table_sizes = sizes(max(1, settings.shortest_table // page_size), needed)
        self._piece_sizes = sizes(SMALLEST_PIECE, settings.prefill_tokens)
        self._continuing: list[tuple[int, int, int]] = []
        self._batch: Batch | None = None

    @property
    def largest_piece(self) -> int:
        """Most tokens that one pass reads of a prompt."""
        return self._piece_sizes[-1]

    def prefill(self, row: Row, piece: Sequence[int], first: Bool[np.ndarray, " V"] | None, *, last: bool) -> Drawn:
        """Read a piece of a prompt; return the token chosen behind it, which counts if it is the last piece."""
        length = fitting(self._piece_sizes, len(piece))
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(piece)] = piece
        allowed = self._everything if first is None else jax.device_put(first[None], self._device)
        counts, ends = np.array([len(piece)], np.int32), np.array([last])
        drawn, self._state = prefill(
            *self._weights, self._state, self._new_batch([row], 1), tokens, counts, allowed, ends, **self._common
        )
        return drawn

    def decode(self, rows: Sequence[Row]) -> Drawn:
        """Read the last token of each request, and choose the next; results are in the order of `rows`."""
        # While the same requests are on the same pages, the device itself knows the next step's batch.
        if self._batch is None or [(row.owner, len(row.pages), row.length) for row in rows] != self._continuing:
            self._batch = self._new_batch(rows, fitting(self._batch_sizes, len(rows)))
        self._continuing = [(row.owner, len(row.pages), row.length + 1) for row in rows]
        drawn, self._state, self._batch = decode(*self._weights, self._state, self._batch, **self._common)
        return drawn

    def mark_seen(self, slot: int, ids: Sequence[int]) -> None:
        """Let a slot have seen these tokens and no others."""
        seen = np.zeros(self._vocab_size, bool)
        seen[list(ids)] = True
        self._state = mark_seen(self._state, np.int32(slot), seen)

    def read_page(self, page: int) -> dict[str, np.ndarray]:
        """Return what is on a page."""
        return jax.device_get(read_page(self._state.cache, np.int32(page)))

    def write_page(self, page: int, arrays: dict[str, np.ndarray]) -> None:
        """Set a page to these bytes."""
        shapes = {name: (a.shape[0], *a.shape[2:]) for name, a in self._state.cache.arrays.items()}
        typed = {
            name: arrays[name].view(self._state.cache.arrays[name].dtype).reshape(shape)
            for name, shape in shapes.items()
        }
        self._state = write_page(self._state, np.int32(page), typed)

    def warm_up(self) -> None:
        """Run every program once, with padding alone."""
        nobody = Row(-1, self._slots, (), 0, PADDING)
        page_size = self._state.cache.page_size
        for pages in self._table_sizes:
            row = Row(-1, self._slots, (0,) * pages, 0, PADDING)
            for shorter, length in zip([0, *self._piece_sizes], self._piece_sizes, strict=False):
                if shorter < pages * page_size:
                    self.prefill(row, [0] * length, None, last=False)
            for count in self._batch_sizes:
                self.decode([row] + [nobody] * (count - 1))
        self.mark_seen(self._slots, [])
        self.write_page(0, self.read_page(0))
        self._batch = None
        jax.block_until_ready(self._state)

    def _new_batch(self, rows: Sequence[Row], size: int) -> Batch:
        width = fitting(self._table_sizes, max(len(row.pages) for row in rows))
        tables, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        slots = np.full(size, self._slots, np.int32)
        for i, row in enumerate(rows):
            slots[i], lengths[i] = row.slot, row.length
            tables[i, : len(row.pages)] = row.pages
        settings = choice([row.sampling for row in rows] + [PADDING] * (size - len(rows)))
        return jax.device_put(Batch(slots, tables, lengths, settings), self._device)


def _pages(settings: EngineSettings, needed: int, page_bytes: int) -> int:
    """Return the pages of the cache, with page 0."""
    if settings.cache_bytes:
        pages = settings.cache_bytes // page_bytes
        if pages < 2:
            raise ValueError(f"cache_bytes = {settings.cache_bytes}: must be at least {2 * page_bytes}, two pages")
        return pages
    memory = jax.local_devices()[0].memory_stats()
    free = (memory["bytes_limit"] - memory["bytes_in_use"]) * ACCELERATOR_SHARE if memory else CPU_BYTES
    return max(2, min(settings.slots * needed + 1, int(free) // page_bytes))
