"""The engine's device side: its state, and passes over it by programs of few sizes.

A unit of several devices has a state of each of its groups, whose requests have the same number of rows in a pass.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, PyTree

from dsjax.inference.cache import bytes_per_page, empty_cache
from dsjax.inference.forward import Batch
from dsjax.inference.layout import AXES, check_engine, put
from dsjax.inference.load import Model
from dsjax.inference.machine import Machine
from dsjax.inference.programs import (
    OF_GROUPS,
    State,
    decode,
    mark_seen,
    prefill,
    read_page,
    take_loads,
    write_page,
)
from dsjax.inference.rebalance import Rebalancer, RebalanceSettings
from dsjax.inference.replicas import loads_with_shared
from dsjax.inference.sampling import Drawn, Sampling, choice
from dsjax.inference.settings import SMALLEST_PIECE, EngineSettings, batch_sizes, fitting, sizes
from dsjax.inference.speculation import Verified, prefill_and_draft, verify_and_draft
from dsjax.inference.weights import moe_layers
from dsjax.parallel.agreement import gather
from dsjax.parallel.placement import Placement

CPU_BYTES, ACCELERATOR_SHARE = 4 * 2**30, 0.8
"""What a cache may take by itself: see `EngineSettings.cache_bytes`."""
COUNTED_STEPS = 16
"""After which the loads of experts are looked at, where they are followed."""
PLANNING_STEPS = 20
"""That a new placement may take to be planned."""
PADDING = Sampling(temperature=0.0)
"""Settings of a batch's empty places."""


@dataclass(frozen=True)
class Row:
    """A request's place in a pass."""

    group: int
    """Of devices, which has it."""
    owner: int
    """Whose pages these are: they only ever grow in number."""
    slot: int
    pages: Sequence[int]
    """With those for the new tokens."""
    length: int
    """Tokens that the cache has; with speculation `decode` knows better."""
    sampling: Sampling
    end: int
    """Tokens that prompt and answer may have."""


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt that is to be read."""

    row: Row
    ids: Sequence[int]
    first: Bool[np.ndarray, " V"] | None
    """Which tokens may follow; None for all."""
    is_last: bool
    """Whether it is the last of the prompt; what is chosen behind others is of no account."""


class Passes:
    """Runs programs on the state. A call returns when the device has its work, not when that is done.

    Attributes:
        context: most tokens of a sequence.
        groups: of devices, each with slots and pages of its own.
        slots: of a group.
        pages: of a group's cache, with page 0.
        rebalancer: of the experts, where the layout has them follow the loads.
        page_bytes: bytes of a page.
    """

    def __init__(self, model: Model, settings: EngineSettings):
        """Makes an empty state.

        Args:
            model: with the MTP modules that draft, and no others.
            settings: of the engine.

        Raises:
            ValueError: no room for two pages; settings that cannot be divided over the groups.
        """
        layout, self._vocab_size = model.layout, model.config.vocab_size
        check_engine(settings, layout)
        self.groups, self._micro_batches = layout.groups, layout.micro_batches
        self.slots = settings.slots // self.groups
        machine = Machine.of(model.runtime, layout, model.mesh)
        self._of_prompts = {"config": model.config, "runtime": replace(machine, one_hop=False)}
        self._of_answers = {"config": model.config, "runtime": machine}
        self._weights = model.params, model.biases
        self.rebalancer = _rebalancer(model) if layout.rebalance else None
        self._steps, self._per_token = 0, model.config.num_experts_per_tok * layout.shared_as_routed
        self._loads: Array | None = None
        self.context = settings.context or model.context
        dtype, page_size = model.runtime.compute_dtype, settings.page_size
        self.page_bytes = bytes_per_page(model.config, page_size, dtype, settings.cache_format)
        needed = -(-self.context // page_size)
        self.pages = _pages(settings, self.slots, needed, self.page_bytes, model)
        self._speculates = settings.speculate > 0

        def empty() -> State:
            whole = self.groups * (self.slots + 1)
            state = State(
                cache=empty_cache(model.config, self.groups * self.pages, page_size, dtype, settings.cache_format),
                tokens=jnp.zeros(whole, jnp.int32),
                seen=jnp.zeros((whole, self._vocab_size), bool),
            )
            if self._speculates:
                drafts = jnp.zeros((whole, settings.speculate), jnp.int32)
                state = state._replace(lengths=jnp.zeros(whole, jnp.int32), drafts=drafts)
            if layout.rebalance:
                shape = layout.devices, moe_layers(model.config), model.config.n_routed_experts
                state = state._replace(loads=jnp.zeros(shape, jnp.int32))
            return state

        # All arrays are committed to their devices: those that are not would have programs compiled again.
        divided = model.shardings(jax.eval_shape(empty).spec)
        self._state = jax.jit(empty, out_shardings=divided)()
        self._shared, self._divided = model.shardings(PartitionSpec()), model.shardings(OF_GROUPS)
        self._take_loads = jax.jit(take_loads, donate_argnums=0, out_shardings=(self._shared, divided))
        # On a unit of one process a result is read from where it is; of several, each has all of it.
        self._spread = jax.jit(lambda tree: tree, out_shardings=self._shared) if model.processes > 1 else None
        self._everything: dict[int, Array] = {}
        rows = self._micro_batches
        self._batch_sizes = batch_sizes(rows, -(-self.slots // rows) * rows)
        self._table_sizes = sizes(max(1, settings.shortest_table // page_size), needed)
        self._piece_sizes = sizes(SMALLEST_PIECE, settings.prefill_tokens)
        self._continuing: list[tuple[int, ...]] = []
        self._batch: Batch | None = None

    @property
    def largest_piece(self) -> int:
        """Most tokens that one pass reads of a prompt."""
        return self._piece_sizes[-1]

    def most_pieces(self, longest: int) -> int:
        """Return the most pieces of a group in a pass, of which the longest has so many tokens."""
        return max(self._micro_batches, self.largest_piece // fitting(self._piece_sizes, longest))

    def prefill(self, pieces: Sequence[Piece]) -> tuple[Drawn, list[int]]:
        """Read pieces of prompts; return the tokens chosen behind them, and where in the results each piece is."""
        longest = max(len(piece.ids) for piece in pieces)
        few = max(Counter(piece.row.group for piece in pieces).values()) <= self._micro_batches
        count = self._micro_batches if few else self.most_pieces(longest)
        by_group, places = self._arranged([piece.row for piece in pieces], count)
        length = fitting(self._piece_sizes, longest)
        tokens, counts = np.zeros((self.groups * count, length), np.int32), np.ones(self.groups * count, np.int32)
        ends = np.zeros(self.groups * count, bool)
        allowed: Bool[np.ndarray, "B V"] | None = None
        for at, piece in zip(places, pieces, strict=True):
            tokens[at, : len(piece.ids)], counts[at], ends[at] = piece.ids, len(piece.ids), piece.is_last
            if piece.first is not None:
                allowed = np.ones((self.groups * count, self._vocab_size), bool) if allowed is None else allowed
                allowed[at] = piece.first
        run = prefill_and_draft if self._speculates else prefill
        first = self._all_tokens(len(tokens)) if allowed is None else put(allowed, self._divided)
        rest = *put((tokens, counts), self._divided), first, put(ends, self._divided)
        drawn, self._state = run(
            *self._weights, self._state, self._new_batch(by_group, count), *rest, **self._of_prompts
        )
        return (self._readable(drawn, by_group) if ends.any() else drawn), places

    def decode(self, rows: Sequence[Row]) -> tuple[Drawn | Verified, list[int]]:
        """Read the last token of each request, and choose the next; return also where in the results each row is."""
        size = fitting(self._batch_sizes, max(Counter(row.group for row in rows).values()))
        by_group, places = self._arranged(rows, size)
        # While the same requests are on the same pages, the device itself knows the next step's batch. With speculation
        # it alone knows how long the sequences are.
        moving = not self._speculates
        batch = [(row.owner, len(row.pages), row.length * moving) for row in rows]
        if self._batch is None or batch != self._continuing:
            self._batch = self._new_batch(by_group, size)
        self._continuing = [(owner, pages, length + moving) for owner, pages, length in batch]
        given = *self._weights, self._state, self._batch
        if self._speculates:
            result, self._state = verify_and_draft(*given, **self._of_answers)
        else:
            result, self._state, self._batch = decode(*given, **self._of_answers)
        return self._readable(result, by_group), places

    def _readable[R: Drawn | Verified](self, result: R, by_group: Sequence[Sequence[Row]]) -> R:
        """Return a result of which every process can read the tokens, and the rest where a request wants it."""
        if self._spread is None:
            return result
        drawn, counts = (result.drawn, result[1:]) if isinstance(result, Verified) else (result, ())
        tokens, *counts = self._spread((drawn.tokens, *counts))
        rest = tuple(drawn[1:])
        if any(row.sampling.logprobs is not None for rows in by_group for row in rows):
            rest = self._spread(rest)
        drawn = Drawn(tokens, *rest)
        return Verified(drawn, *counts) if isinstance(result, Verified) else drawn

    def follow_loads(self) -> None:
        """Do what is due of placing experts anew, between two steps."""
        if self.rebalancer is None:
            return
        if self._loads is not None:  # counted a step ago, so that nobody waits for them
            loads = np.asarray(self._loads)
            self.rebalancer.observe(loads_with_shared(loads, self._per_token) if self._per_token else loads)
            self._loads = None
        self._steps += 1
        if self._steps % COUNTED_STEPS == 0:
            self._loads, self._state = self._take_loads(self._state)
        self._move_experts(self.rebalancer.advance)

    def _move_experts(self, move: Callable[[PyTree], PyTree]) -> None:
        params, biases = self._weights
        layers = params["moe"]
        experts = move(layers["moe"]["experts"])
        layers = layers | {"moe": layers["moe"] | {"experts": experts}, "tables": self.rebalancer.tables}
        self._weights = params | {"moe": layers}, biases

    def close(self) -> None:
        """Stop what runs aside."""
        if self.rebalancer is not None:
            self.rebalancer.close()

    def mark_seen(self, group: int, slot: int, ids: Sequence[int]) -> None:
        """Let a slot have seen these tokens and no others."""
        seen = np.zeros(self._vocab_size, bool)
        seen[list(ids)] = True
        self._state = mark_seen(self._state, *self._at(group, slot), put(seen, self._shared), **self._where)

    def read_page(self, group: int, page: int) -> dict[str, Array]:
        """Return what is on a page when the device has done its work so far."""
        return read_page(self._state, *self._at(group, page), **self._where)

    def write_page(self, group: int, page: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Set a page to these bytes."""
        shapes = {name: (a.shape[0], *a.shape[2:]) for name, a in self._state.cache.arrays.items()}
        typed = {
            name: arrays[name].view(self._state.cache.arrays[name].dtype).reshape(shape)
            for name, shape in shapes.items()
        }
        contents = put(typed, self._shared)
        self._state = write_page(self._state, *self._at(group, page), contents, **self._where)

    def warming(self) -> Iterator[Callable[[], None]]:
        """Yield what runs each program once, with padding alone: to be called in this order, and to the last one."""
        page_size = self._state.cache.page_size
        wanting_all = replace(PADDING, logprobs=0)  # so that what brings results to all processes is compiled too
        for pages in self._table_sizes:
            row = Row(0, -1, self.slots, (0,) * pages, 0, wanting_all, 0)
            for shorter, length in zip([0, *self._piece_sizes], self._piece_sizes, strict=False):
                if shorter < pages * page_size:
                    piece = Piece(row, [0] * length, None, is_last=True)
                    for count in sorted({1, self.most_pieces(length)}):
                        yield partial(self.prefill, [piece] * count)
            for count in self._batch_sizes:
                yield partial(self.decode, [row] * count)
        yield self._warm_up_rest

    def _warm_up_rest(self) -> None:
        self.mark_seen(0, self.slots, [])
        self.write_page(0, 0, jax.device_get(self.read_page(0, 0)))
        if self.rebalancer is not None:
            self._move_experts(self.rebalancer.warm_up)
            _, self._state = self._take_loads(self._state)
        self._batch = None
        jax.block_until_ready(self._state)

    def _all_tokens(self, rows: int) -> Array:
        """Return that all tokens may follow, with a row for each request as where not all may: it is one program."""
        if rows not in self._everything:
            self._everything[rows] = put(np.ones((rows, self._vocab_size), bool), self._divided)
        return self._everything[rows]

    @property
    def _where(self) -> dict[str, Machine]:
        return {"runtime": self._of_answers["runtime"]}

    def _at(self, *place: int) -> tuple[Array, ...]:
        return put(tuple(np.int32(number) for number in place), self._shared)

    def _arranged(self, rows: Sequence[Row], size: int) -> tuple[list[list[Row]], list[int]]:
        """Return the rows of each group, and where all of them are if each has `size`."""
        by_group: list[list[Row]] = [[] for _ in range(self.groups)]
        places = []
        for row in rows:
            places.append(row.group * size + len(by_group[row.group]))
            by_group[row.group].append(row)
        return by_group, places

    def _new_batch(self, by_group: Sequence[Sequence[Row]], size: int) -> Batch:
        width = fitting(self._table_sizes, max(len(row.pages) for rows in by_group for row in rows))
        whole = self.groups * size
        tables, lengths = np.zeros((whole, width), np.int32), np.zeros(whole, np.int32)
        slots, ends = np.full(whole, self.slots, np.int32), np.zeros(whole, np.int32)
        settings = [PADDING] * whole
        for group, rows in enumerate(by_group):
            for at, row in enumerate(rows, start=group * size):
                slots[at], lengths[at], ends[at], settings[at] = row.slot, row.length, row.end, row.sampling
                tables[at, : len(row.pages)] = row.pages
        batch = Batch(slots, tables, lengths, choice(settings), ends if self._speculates else None)
        return put(batch, self._divided)


def _rebalancer(model: Model) -> Rebalancer:
    layout, placement = model.layout, model.placement
    layers = moe_layers(model.config)
    main = Placement(placement.expert_of_slot[:layers], placement.experts, placement.devices, placement.nodes)
    # A load is what is counted in some steps; half of the weight is on those since the last plan but one.
    settings = RebalanceSettings(
        steps=layout.rebalance,
        planning_steps=min(PLANNING_STEPS, layout.rebalance),
        half_life=max(1.0, layout.rebalance / COUNTED_STEPS),
        groups=1 if layout.shared_as_routed else model.config.n_group,
    )
    return Rebalancer(main, model.params["moe"]["moe"]["experts"], model.mesh, AXES, settings)


def _pages(settings: EngineSettings, slots: int, needed: int, page_bytes: int, model: Model) -> int:
    """Return the pages of a group's cache, with page 0."""
    if settings.cache_bytes:
        pages = settings.cache_bytes // page_bytes
        if pages < 2:
            raise ValueError(f"cache_bytes = {settings.cache_bytes}: must be at least {2 * page_bytes}, two pages")
        return pages
    free = _free_memory(model)
    room = CPU_BYTES if free is None else int(free * ACCELERATOR_SHARE)
    return max(2, min(slots * needed + 1, room // page_bytes))


def _free_memory(model: Model) -> int | None:
    """Return bytes that are free on each device of the model; None for those that have no memory of their own."""
    devices = jax.tree.leaves(model.params)[0].sharding.addressable_devices
    stats = [device.memory_stats() for device in devices]
    own = min(found["bytes_limit"] - found["bytes_in_use"] for found in stats) if all(stats) else None
    everywhere = gather(own) if model.processes > 1 else [own]
    return None if None in everywhere else min(everywhere)
