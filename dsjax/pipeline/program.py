"""A schedule as an integer table that one SPMD executor runs: opcodes, buffer slots, transfers.

An executor is, per tick and on every rank: read a row of the table; branch on its opcode; read inputs and gradients;
run the ops, which read and write residuals and tapes in any order, for no slot is both read and written; last, the
transfers, and the writes of what they bring. `check` is such an executor, of symbols. Buffers (`Pools`) have a fixed
depth; which value lies where is decided here, by colouring intervals.
"""

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from dsjax.pipeline.schedule import Action, Kind, Schedule, event
from dsjax.pipeline.simulate import Cost, Tick, assign_ticks, fuse


class Field(IntEnum):
    """The columns of a program's table. Fields of a role mean nothing where the opcode has no op of that role."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return count

    OPCODE = auto()
    """Index into `Program.opcodes`; 0 does nothing."""
    F_MICRO_BATCH = auto()
    """The micro-batch whose tokens (first stage) and labels (last stage) an F needs."""
    F_INPUT = auto()
    """Slot of its input activation; trash in the first stage, whose input is the embedding."""
    F_RESIDUAL = auto()
    """Slot that its residuals go to."""
    F_FIRST = auto()
    """1 in the first stage: embed the tokens."""
    F_LAST = auto()
    """1 in the last stage: compute the loss and the gradient of the output at once."""
    F_TURN = auto()
    """Activation slot for its output, where the next stage is on the same rank (the turn of a vee); else trash."""
    F_LOSS = auto()
    """Gradient slot for the gradient of its output, in the last stage; else trash."""
    B_MICRO_BATCH = auto()
    """The micro-batch of a B or I; the first stage needs its tokens for the gradient of the embedding."""
    B_INPUT = auto()
    """Slot of the gradient of its output."""
    B_RESIDUAL = auto()
    """Slot of its residuals, free afterwards."""
    B_TAPE = auto()
    """Slot that the tape of an I goes to."""
    B_FIRST = auto()
    """1 in the first stage: the gradient of its input is that of the embedding."""
    B_LAST = auto()
    """1 in the last stage."""
    B_TURN = auto()
    """Gradient slot for the gradient of its input, where the previous stage is on the same rank; else trash."""
    W_MICRO_BATCH = auto()
    """The micro-batch of a W."""
    W_TAPE = auto()
    """Slot of its tape, free afterwards."""
    RECEIVE_ACTIVATION_RIGHT = auto()
    """Activation slot for what arrives from the left neighbour at the end of the tick; trash if nothing does."""
    RECEIVE_ACTIVATION_LEFT = auto()
    """The same from the right neighbour."""
    RECEIVE_GRADIENT_RIGHT = auto()
    """Gradient slot for what arrives from the left neighbour."""
    RECEIVE_GRADIENT_LEFT = auto()
    """The same from the right neighbour."""


Payload = Literal["activation", "gradient"]
Pair = tuple[int, int]
"""Source and destination rank."""


class Channel(NamedTuple):
    """A sort of message: outputs of F or of B (I), to the next rank on one side."""

    payload: Payload
    step: int
    """+1: to the right. -1: to the left."""

    @property
    def field(self) -> Field:
        """The column of the slot that it is received in."""
        return Field[f"RECEIVE_{self.payload.upper()}_{'RIGHT' if self.step > 0 else 'LEFT'}"]


CHANNELS = tuple(Channel(payload, step) for payload in ("activation", "gradient") for step in (1, -1))

Opcode = tuple[tuple[Kind, int], ...]
"""Kind and physical slot of the ops of a rank's tick: at most an F, then a B or I, then a W."""


class Pools(NamedTuple):
    """How many values each buffer of a rank holds."""

    activations: int
    """Inputs of F. The buffer has one slot more, the last: trash, which is written to and never read."""
    gradients: int
    """Gradients of outputs, for B and I. One slot more as well."""
    residuals: int
    """What F keeps for its B or I."""
    tapes: int
    """What I keeps for its W."""


class Transfer(NamedTuple):
    """One `ppermute`: outputs of F or of B, before the next tick."""

    payload: Payload
    pairs: tuple[Pair, ...]
    """Sources and destinations; a rank is each of them once at most."""
    channels: tuple[Channel, ...]
    """What it carries. The slot to receive in is the minimum over their fields: trash is the highest slot."""


class Phase(NamedTuple):
    """A tick as a segment's body has it."""

    opcodes: tuple[int, ...]
    """All that occur, ascending; where there is only one, no branch is needed."""
    transfers: tuple[Transfer, ...]


class Segment(NamedTuple):
    """Ticks `start` to `stop` - 1: one `scan` whose body is the phases, one after the other."""

    start: int
    stop: int
    phases: tuple[Phase, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A schedule, ready to be executed."""

    schedule: Schedule
    ticks: tuple[Tick, ...]
    """Which actions the ticks are of."""
    table: Int32[np.ndarray, "ticks ranks fields"]
    """Columns: `Field`."""
    opcodes: tuple[Opcode, ...]
    pools: Pools
    parity: bool
    """Physical slot = slot XOR (rank & 1): the neighbours of a steady DualPipe, which run opposite directions, then run
    the same opcode."""
    stages: tuple[tuple[int, ...], ...]
    """The model's stage in each physical slot of each rank."""
    pairs: tuple[Mapping[Channel, tuple[Pair, ...]], ...]
    """Who sends to whom at the end of each tick; channels without a message are left out."""
    segments: tuple[Segment, ...]
    """Ramp up, steady state, ramp down; one alone if there is no steady state, none of them empty."""

    def defers(self, segment: Segment) -> bool:
        """Return whether tapes are written or read in a segment."""
        codes = {code for phase in segment.phases for code in phase.opcodes}
        return any(kind in (Kind.I, Kind.W) for code in codes for kind, _ in self.opcodes[code])

    def is_waiting(self, tick: int) -> bool:
        """Return whether a tape waits for its W when a tick begins, on any rank."""
        waiting = [sum((kind is Kind.I) - (kind is Kind.W) for kind, _ in opcode) for opcode in self.opcodes]
        return bool(np.asarray(waiting)[self.table[:tick, :, Field.OPCODE]].sum(axis=0).any())

    @property
    def trash(self) -> Mapping[Payload, int]:
        """The slot of either receiving buffer that nobody reads."""
        return {"activation": self.pools.activations, "gradient": self.pools.gradients}


Interval = tuple[float, float, tuple[int, int]]
"""First and last tick of a value, and its (slot, micro-batch)."""


def compile_program(
    schedule: Schedule, cost: Cost | None = None, *, parity: bool = True, bundled: bool = True
) -> Program:
    """Assign ticks, colour buffers and write the table.

    cost: what decides which actions share a tick. bundled: see `assign_ticks`.
    """
    route, ranks = schedule.route, schedule.ranks
    parity = parity and route.slots == 2
    ticks = assign_ticks(schedule, cost, bundled)
    ops = [[fuse(bundle) for bundle in tick] for tick in ticks]
    colours, pools = _colour_pools(schedule, ops)
    activations, gradients, residuals, tapes = colours
    opcodes: dict[Opcode, int] = {(): 0}
    table = np.zeros((len(ticks), ranks, len(Field)), np.int32)
    for field in Field:
        if field.name.startswith("RECEIVE_ACTIVATION") or field in (Field.F_INPUT, Field.F_TURN):
            table[:, :, field] = pools.activations
        if field.name.startswith("RECEIVE_GRADIENT") or field in (Field.F_LOSS, Field.B_INPUT, Field.B_TURN):
            table[:, :, field] = pools.gradients
    pairs: list[dict[Channel, list[Pair]]] = []
    for t, tick in enumerate(ops):
        sent: dict[Channel, list[Pair]] = {}
        for rank, action in enumerate(tick):
            row = table[t, rank]
            opcode = tuple((op.kind, op.slot ^ (rank & 1) if parity else op.slot) for op in action)
            row[Field.OPCODE] = opcodes.setdefault(opcode, len(opcodes))
            for op in action:
                here = (rank, op.slot, op.micro_batch)
                first, last = route.previous(rank, op.slot) is None, route.next(rank, op.slot) is None
                if op.kind is Kind.W:
                    row[[Field.W_MICRO_BATCH, Field.W_TAPE]] = op.micro_batch, tapes[here]
                    continue
                forward = op.kind is Kind.F
                arriving = activations if forward else gradients
                if forward:
                    row[[Field.F_MICRO_BATCH, Field.F_RESIDUAL]] = op.micro_batch, residuals[here]
                    row[[Field.F_FIRST, Field.F_LAST]] = first, last
                    if not first:
                        row[Field.F_INPUT] = activations[here]
                    if last:
                        row[Field.F_LOSS] = gradients[here]
                else:
                    row[[Field.B_MICRO_BATCH, Field.B_RESIDUAL]] = op.micro_batch, residuals[here]
                    row[[Field.B_FIRST, Field.B_LAST]] = first, last
                    row[Field.B_INPUT] = gradients[here]
                    row[Field.B_TAPE] = tapes.get(here, 0)
                target = route.target(rank, op)
                if target is None:
                    continue
                slot = arriving[*target, op.micro_batch]
                if target[0] == rank:
                    row[Field.F_TURN if forward else Field.B_TURN] = slot
                else:
                    channel = Channel("activation" if forward else "gradient", target[0] - rank)
                    sent.setdefault(channel, []).append((rank, target[0]))
                    table[t, target[0], channel.field] = slot
        pairs.append(sent)
    exact = tuple({channel: tuple(tick[channel]) for channel in CHANNELS if channel in tick} for tick in pairs)
    stages = tuple(
        tuple(route.stage(rank, slot ^ (rank & 1) if parity else slot) for slot in range(route.slots))
        for rank in range(ranks)
    )
    segments = _segments(table[:, :, Field.OPCODE], exact)
    return Program(schedule, ticks, table, tuple(opcodes), pools, parity, stages, exact, segments)


Colours = dict[tuple[int, int, int], int]
"""The slot in a buffer of a value, by rank, slot and micro-batch."""


def _colour_pools(schedule: Schedule, ops: list[list[Action]]) -> tuple[tuple[Colours, ...], Pools]:
    """Give each value a place in its buffer from the tick that writes it to the tick that reads it last."""
    route = schedule.route
    when = {event(rank, op): t for t, tick in enumerate(ops) for rank, action in enumerate(tick) for op in action}
    intervals: list[list[list[Interval]]] = [[[] for _ in range(schedule.ranks)] for _ in Pools._fields]
    activations, gradients, residuals, tapes = intervals

    def arrival(role: Kind, rank: int, slot: int, micro_batch: int) -> float:
        """What an op delivers is written after all reads of its tick, and may take the place of what these read."""
        return when[role, rank, slot, micro_batch] + 0.5

    for tick in ops:
        for rank, action in enumerate(tick):
            for op in action:
                key, now = (op.slot, op.micro_batch), when[event(rank, op)]
                if op.kind is Kind.F:
                    # Closed at both ends: a pair writes the F's residuals while it reads the B's.
                    residuals[rank].append((now, when[Kind.B, rank, *key], key))
                    if previous := route.previous(rank, op.slot):
                        activations[rank].append((arrival(Kind.F, *previous, op.micro_batch), now, key))
                if op.kind in (Kind.B, Kind.I):
                    following = route.next(rank, op.slot)
                    origin = (Kind.B, *following) if following else (Kind.F, rank, op.slot)
                    gradients[rank].append((arrival(*origin, op.micro_batch), now, key))
                if op.kind is Kind.I:
                    tapes[rank].append((now, when[Kind.W, rank, *key], key))
    colours = tuple(
        {(rank, *key): c for rank, of_rank in enumerate(pool) for key, c in colour(of_rank).items()}
        for pool in intervals
    )
    return colours, Pools(*(max(places.values(), default=-1) + 1 for places in colours))


def colour[Key](intervals: Iterable[tuple[float, float, Key]]) -> dict[Key, int]:
    """Give closed intervals that overlap different colours, of the fewest possible; lowest first."""
    colours: dict[Key, int] = {}
    free: list[int] = []
    running: list[tuple[float, int]] = []
    for start, end, key in sorted(intervals):
        while running and running[0][0] < start:
            insort(free, running.pop(0)[1])
        colours[key] = free.pop(0) if free else len(running)
        insort(running, (end, colours[key]))
    return colours


def _segments(
    opcodes: Int32[np.ndarray, "ticks ranks"], pairs: tuple[Mapping[Channel, tuple[Pair, ...]], ...]
) -> tuple[Segment, ...]:
    """Cut out the longest run of ticks whose opcodes repeat with a period of 1, 2 or 3, at least three times.

    DualPipe has period 2, the two directions; 1F1B too, F and B; ZB1P 3, F, I and W. A single rank's F and B are a
    turn of a loop however few there are: nothing outlives it.
    """
    repeats = 3 if opcodes.shape[1] > 1 else 1
    count = len(opcodes)
    best, best_period = (0, 0), 1
    for period in (1, 2, 3):
        same = [*(opcodes[period:] == opcodes[:-period]).all(axis=1), False]
        start = 0
        for t, equal in enumerate(same):
            if equal:
                continue
            stop = t + period
            stop -= (stop - start) % period
            if stop <= count and stop - start >= repeats * period and stop - start > best[1] - best[0]:
                best, best_period = (start, stop), period
            start = t + 1
    bounds = ((0, best[0], 1), (*best, best_period), (best[1], count, 1))
    return tuple(
        Segment(start, stop, tuple(_phase(opcodes, pairs, range(start + i, stop, period)) for i in range(period)))
        for start, stop, period in bounds
        if start < stop
    )


def _phase(
    opcodes: Int32[np.ndarray, "ticks ranks"], pairs: tuple[Mapping[Channel, tuple[Pair, ...]], ...], ticks: range
) -> Phase:
    """What the ticks that share a body need together."""
    transfers = []
    for payload in ("activation", "gradient"):
        by_channel = {
            channel: sorted({pair for t in ticks for pair in pairs[t].get(channel, ())})
            for channel in CHANNELS
            if channel.payload == payload
        }
        by_channel = {channel: found for channel, found in by_channel.items() if found}
        every = sorted(pair for found in by_channel.values() for pair in found)
        # Right and left in one go, where no rank sends or receives both: the swaps of neighbours in steady state.
        if all(len({pair[end] for pair in every}) == len(every) for end in (0, 1)):
            by_groups = [(tuple(by_channel), every)] if every else []
        else:
            by_groups = [((channel,), found) for channel, found in by_channel.items()]
        transfers += [Transfer(payload, tuple(found), channels) for channels, found in by_groups]
    return Phase(tuple(sorted({int(code) for t in ticks for code in opcodes[t]})), tuple(transfers))


Value = tuple[str, int, int]
"""A symbol: "activation" (a stage's input), "gradient" (of its output), "residual" or "tape"; stage; micro-batch."""


def check(program: Program) -> None:
    """Execute a program on symbols, as an executor does on arrays; AssertionError unless every op finds its inputs.

    Also: every stage runs every micro-batch once, and no op of a tick writes residuals or tapes that another one reads.
    """
    table, pools, ranks = program.table, program.pools, program.schedule.ranks
    last_stage = max(map(max, program.stages))
    depths = (pools.activations + 1, pools.gradients + 1, pools.residuals, pools.tapes)
    buffers: list[dict[str, list[Value | None]]] = [
        {
            name: [None] * depth
            for name, depth in zip(("activation", "gradient", "residual", "tape"), depths, strict=True)
        }
        for _ in range(ranks)
    ]
    done: list[Value] = []

    def execute(rank: int, row: Int32[np.ndarray, " fields"]) -> dict[str, Value]:
        """Run a rank's row: its outputs by payload."""
        outputs: dict[str, Value] = {}
        read: list[tuple[str, int]] = []
        write: list[tuple[str, int, Value]] = []

        def take(name: str, slot: int, expected: Value) -> None:
            found = buffers[rank][name][slot]
            assert found == expected, f"rank {rank}, {name} slot {slot}: {found} in place of {expected}"
            read.append((name, slot))

        for kind, physical in program.opcodes[row[Field.OPCODE]]:
            stage = program.stages[rank][physical]
            if kind is Kind.W:
                micro_batch = int(row[Field.W_MICRO_BATCH])
                take("tape", row[Field.W_TAPE], ("tape", stage, micro_batch))
            elif kind is Kind.F:
                micro_batch = int(row[Field.F_MICRO_BATCH])
                assert (row[Field.F_FIRST], row[Field.F_LAST]) == (stage == 0, stage == last_stage)
                if stage > 0:
                    take("activation", row[Field.F_INPUT], ("activation", stage, micro_batch))
                outputs["activation"] = ("activation", stage + 1, micro_batch)
                write.append(("residual", row[Field.F_RESIDUAL], ("residual", stage, micro_batch)))
                write.append(("activation", row[Field.F_TURN], outputs["activation"]))
                if stage == last_stage:
                    write.append(("gradient", row[Field.F_LOSS], ("gradient", stage, micro_batch)))
            else:
                micro_batch = int(row[Field.B_MICRO_BATCH])
                assert (row[Field.B_FIRST], row[Field.B_LAST]) == (stage == 0, stage == last_stage)
                take("gradient", row[Field.B_INPUT], ("gradient", stage, micro_batch))
                take("residual", row[Field.B_RESIDUAL], ("residual", stage, micro_batch))
                outputs["gradient"] = ("gradient", stage - 1, micro_batch)
                write.append(("gradient", row[Field.B_TURN], outputs["gradient"]))
                if kind is Kind.I:
                    write.append(("tape", row[Field.B_TAPE], ("tape", stage, micro_batch)))
            done.append((kind.role, stage, micro_batch))
            if kind is Kind.B:
                done.append((Kind.W, stage, micro_batch))
        for name, slot, value in write:
            assert name in ("activation", "gradient") or (name, slot) not in read, f"rank {rank}: {name} slot {slot}"
            buffers[rank][name][slot] = value
        return outputs

    expected_start = 0
    for segment in program.segments:
        assert segment.start == expected_start and (segment.stop - segment.start) % len(segment.phases) == 0
        expected_start = segment.stop
        for t in range(segment.start, segment.stop):
            phase = segment.phases[(t - segment.start) % len(segment.phases)]
            assert set(table[t, :, Field.OPCODE]) <= set(phase.opcodes)
            outputs = [execute(rank, table[t, rank]) for rank in range(ranks)]
            for payload, pairs, channels in phase.transfers:
                source = {destination: origin for origin, destination in pairs}
                assert len(source) == len(pairs) == len({origin for origin, _ in pairs})
                for rank in range(ranks):
                    slot = min(table[t, rank, channel.field] for channel in channels)
                    # Where nothing is sent a `ppermute` brings zeros.
                    arrived = outputs[source[rank]].get(payload) if rank in source else None
                    buffers[rank][payload][slot] = arrived
    assert expected_start == len(table)
    every = [(role, stage, m) for stage in range(last_stage + 1) for m in range(program.schedule.micro_batches)
             for role in (Kind.F, Kind.B, Kind.W)]  # fmt: skip
    assert sorted(done) == sorted(every)
