"""Pipeline schedules as data: which rank runs what in which order. GPipe, 1F1B, ZB1P, DualPipe and DualPipeV.

A rank holds one or two chunks of layers, its slots. A schedule lists, for every rank, the forward and backward passes
of its slots in order; when each of them runs follows from the lists alone (`dsjax.pipeline.simulate`).
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, NamedTuple


class Kind(StrEnum):
    """What an op computes of one micro-batch in one chunk."""

    F = "F"
    """The forward pass."""
    B = "B"
    """The whole backward pass: gradients of the input and of the weights."""
    I = "I"  # noqa: E741 (the letter that the field uses)
    """The gradient of the input only; what the gradient of the weights needs is set aside, on a tape."""
    W = "W"
    """The gradient of the weights, from the tape of an earlier I."""

    @property
    def role(self) -> "Kind":
        """The kind, or B for I: what the next rank waits for is the gradient of the input, which both give."""
        return Kind.B if self is Kind.I else self


class Op(NamedTuple):
    """One pass of one micro-batch through one of a rank's chunks."""

    kind: Kind
    slot: int
    """Which of the rank's chunks. With two of them: 0 has its next stage on the right, 1 on the left."""
    micro_batch: int
    """From 0 to `micro_batches` - 1 over all directions."""

    def __str__(self) -> str:
        return f"{self.kind}{self.slot}.{self.micro_batch}"


Action = tuple[Op, ...]
"""Ops that a rank runs together: one, or the overlapped pair of an F and a B."""

Place = tuple[int, int]
"""A rank and one of its slots."""

Event = tuple[Kind, int, int, int]
"""What others wait for: the role of an op, its rank, its slot and its micro-batch."""


@dataclass(frozen=True)
class Route:
    """Where the model's stages are, and so where an activation goes next.

    single: rank r holds stage r. bidirectional: it holds stage r in slot 0 and stage P-1-r in slot 1, and half of the
    micro-batches enter at either end. vee: stages r and 2P-1-r, so that micro-batches go right and come back.
    """

    kind: Literal["single", "bidirectional", "vee"]
    ranks: int

    @property
    def slots(self) -> int:
        return 1 if self.kind == "single" else 2

    @property
    def stages(self) -> int:
        return 2 * self.ranks if self.kind == "vee" else self.ranks

    def stage(self, rank: int, slot: int) -> int:
        """The stage in a slot."""
        return rank if slot == 0 else self.stages - 1 - rank

    def next(self, rank: int, slot: int) -> Place | None:
        """Where the stage after this one is; None after the last."""
        if slot == 1:
            return (rank - 1, 1) if rank > 0 else None
        if rank + 1 < self.ranks:
            return rank + 1, 0
        return (rank, 1) if self.kind == "vee" else None

    def previous(self, rank: int, slot: int) -> Place | None:
        """Where the stage before this one is; None before the first."""
        if slot == 0:
            return (rank - 1, 0) if rank > 0 else None
        if rank + 1 < self.ranks:
            return rank + 1, 1
        return (rank, 0) if self.kind == "vee" else None

    def target(self, rank: int, op: Op) -> Place | None:
        """Where the result of an op is sent: an F's to the next stage, a B's or I's to the previous, a W's nowhere."""
        if op.kind is Kind.W:
            return None
        return self.next(rank, op.slot) if op.kind is Kind.F else self.previous(rank, op.slot)


@dataclass(frozen=True)
class Schedule:
    """What every rank runs, in order."""

    name: str
    route: Route
    micro_batches: int
    lists: tuple[tuple[Action, ...], ...]
    """The actions of every rank."""
    max_deferred: int | None = None
    """How many weight gradients a rank may have waiting; None if nobody asked for a bound."""

    @property
    def ranks(self) -> int:
        return self.route.ranks

    def micro_batches_of(self, slot: int) -> range:
        """The micro-batches that pass through a slot of every rank."""
        if self.route.kind != "bidirectional":
            return range(self.micro_batches)
        half = self.micro_batches // 2
        return range(slot * half, (slot + 1) * half)

    def needs(self, rank: int, op: Op) -> tuple[Event, ...]:
        """What has to be done before an op of a rank."""
        place, micro_batch = (rank, op.slot), op.micro_batch
        match op.kind:
            case Kind.F:
                previous = self.route.previous(*place)
                return ((Kind.F, *previous, micro_batch),) if previous else ()
            case Kind.W:
                return ((Kind.B, *place, micro_batch),)
        following = self.route.next(*place)
        gradient = ((Kind.B, *following, micro_batch),) if following else ()
        return ((Kind.F, *place, micro_batch), *gradient)


def event(rank: int, op: Op) -> Event:
    """What is done when an op of a rank is."""
    return op.kind.role, rank, op.slot, op.micro_batch


def gpipe(ranks: int, micro_batches: int, *, max_deferred: int | None = None) -> Schedule:
    """All forward passes, then all backward passes, last first (arXiv 1811.06965).

    On one rank there is nobody to wait for: each backward pass follows its forward pass, which is plain accumulation.
    """
    _require("GPipe", ranks, micro_batches)
    if ranks == 1:
        return replace(one_f_one_b(1, micro_batches, max_deferred=max_deferred), name="GPipe")
    order = range(micro_batches)
    actions = tuple([(Op(Kind.F, 0, m),) for m in order] + [(Op(Kind.B, 0, m),) for m in reversed(order)])
    return _finish("GPipe", Route("single", ranks), micro_batches, [actions] * ranks, max_deferred)


def one_f_one_b(ranks: int, micro_batches: int, *, max_deferred: int | None = None) -> Schedule:
    """One forward, one backward (PipeDream-Flush, arXiv 2104.04473): at most `ranks` activations wait."""
    _require("1F1B", ranks, micro_batches)
    lists = []
    for rank in range(ranks):
        warm = min(ranks - 1 - rank, micro_batches)
        forward = [(Op(Kind.F, 0, m),) for m in range(micro_batches)]
        backward = [(Op(Kind.B, 0, m),) for m in range(micro_batches)]
        steady = [action for pair in zip(forward[warm:], backward, strict=False) for action in pair]
        lists.append((*forward[:warm], *steady, *backward[micro_batches - warm :]))
    return _finish("1F1B", Route("single", ranks), micro_batches, lists, max_deferred)


def zb1p(ranks: int, micro_batches: int, *, max_deferred: int | None = None) -> Schedule:
    """ZB-H1 (arXiv 2401.10241): 1F1B, its backward split; rank r runs its weight gradients r micro-batches late."""
    _require("ZB1P", ranks, micro_batches)
    lists = []
    for rank, actions in enumerate(one_f_one_b(ranks, micro_batches).lists):
        split: list[Action] = []
        for (op,) in actions:
            if op.kind is Kind.F:
                split.append((op,))
                continue
            split.append((op._replace(kind=Kind.I),))
            if op.micro_batch >= rank:
                split.append((Op(Kind.W, 0, op.micro_batch - rank),))
        late = range(max(0, micro_batches - rank), micro_batches)
        lists.append((*split, *((Op(Kind.W, 0, m),) for m in late)))
    return _finish("ZB1P", Route("single", ranks), micro_batches, lists, max_deferred)


def dualpipe(ranks: int, micro_batches: int, *, max_deferred: int | None = None) -> Schedule:
    """DualPipe (report section 3.2.1): micro-batches enter at both ends, every rank holds two stages.

    In steady state a rank runs the F of one direction and the B of the other together, so that each hides the other's
    all-to-all. Op for op the lists of github.com/deepseek-ai/DualPipe.
    """
    _require("DualPipe", ranks, micro_batches, even=True)
    half = micro_batches // 2
    lists = []
    for rank in range(ranks):
        near = min(rank, ranks - 1 - rank)
        # On the right half of the ranks the near end is the right one, where direction 1 begins.
        flip = int(rank >= ranks // 2)
        lists.append(_dual_rank(ranks // 2, near, half, flip, offsets=(0, half)))
    return _finish("DualPipe", Route("bidirectional", ranks), micro_batches, lists, max_deferred)


def dualpipe_v(ranks: int, micro_batches: int, *, max_deferred: int | None = None) -> Schedule:
    """DualPipeV, DualPipe cut in half: rank r does what it does among 2P ranks, without a second copy of parameters."""
    _require("DualPipeV", ranks, micro_batches)
    lists = [_dual_rank(ranks, rank, micro_batches, 0, offsets=(0, 0)) for rank in range(ranks)]
    return _finish("DualPipeV", Route("vee", ranks), micro_batches, lists, max_deferred)


Builder = Callable[..., Schedule]
SCHEDULES: dict[str, Builder] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipe_v,
}
"""The builders by name, each `(ranks, micro_batches, *, max_deferred=None) -> Schedule`."""


def _require(name: str, ranks: int, micro_batches: int, even: bool = False) -> None:
    """Refuse what a schedule cannot do, with the nearest that it can."""
    step = 2 if even else 1
    per_rank = 2 if name.startswith("DualPipe") else 0
    for setting, value, least in (
        ("ranks", ranks, step),
        ("micro_batches", micro_batches, max(1, per_rank * ranks)),
    ):
        if value >= least and value % step == 0:
            continue
        below = value - value % step
        nearest = [str(n) for n in (below, below + step) if n >= least] or [str(least)]
        bound = f"{least} (twice the ranks)" if per_rank and setting == "micro_batches" else str(least)
        right = f"{'even and ' if even else ''}at least {bound}"
        raise ValueError(f"{setting} = {value}: {name} needs it {right}; nearest: {' or '.join(nearest)}")


def _finish(
    name: str, route: Route, micro_batches: int, lists: list[tuple[Action, ...]], max_deferred: int | None
) -> Schedule:
    schedule = Schedule(name, route, micro_batches, tuple(lists))
    return schedule if max_deferred is None else bound_deferred(schedule, max_deferred)


_Step = tuple[str, ...]
"""Ops of an action: F, B or I and 0 for the chunk of the near end, 1 for that of the far one; or W, the oldest."""


def _dual_steps(half: int, near: int, count: int) -> Iterator[_Step]:
    """The eight phases of a DualPipe rank.

    half: ranks from an end to the middle. near: ranks between this one and its near end. count: micro-batches per
    direction.
    """
    lead, core = half - 1 - near, near + 1
    yield from [("F0",)] * (2 * lead)
    yield from [("F0",), ("F1",)] * core
    yield from [("I1",), ("W",), ("F1",)] * lead
    pairs = [("F0", "B1"), ("F1", "B0")] * (count - 2 * half + core)
    # The middle ranks run their first pair apart: their neighbour waits for the F.
    yield from pairs if lead else [("F0",), ("B1",), *pairs[1:]]
    yield from [("B1",), ("F1", "B0")] * lead
    # From the middle of the ramp on, weight gradients are put off until there is nothing better to do.
    whole = 2 * (core // 2) + (near % 2 == 0)
    yield from [(f"{'B' if i < whole else 'I'}{1 - i % 2}",) for i in range(2 * core)]
    yield from [("W",), ("I0",)] * lead
    yield from [("W",)] * core


def _dual_rank(half: int, near: int, count: int, flip: int, offsets: tuple[int, int]) -> tuple[Action, ...]:
    """The actions of a DualPipe rank; `flip` is the slot of its near end, `offsets` the first micro-batch of slots."""
    done = {(role, slot): offset for role in "FB" for slot, offset in enumerate(offsets)}
    waiting: deque[Op] = deque()

    def op(code: str) -> Op:
        if code == "W":
            return waiting.popleft()
        kind, slot = Kind(code[0]), int(code[1]) ^ flip
        micro_batch = done[kind.role, slot]
        done[kind.role, slot] += 1
        if kind is Kind.I:
            waiting.append(Op(Kind.W, slot, micro_batch))
        return Op(kind, slot, micro_batch)

    actions = tuple(tuple(map(op, step)) for step in _dual_steps(half, near, count))
    assert not waiting
    return actions


def bound_deferred(schedule: Schedule, limit: int) -> Schedule:
    """Let at most `limit` weight gradients wait on a rank: where there would be more, some I become B.

    The last ones stay split, because the ramp down is where the gradient of the input is urgent: P = 16, M = 64 and a
    bound of 2 make DualPipe 2.4 % slower, and keeping the first ones 2.9 %. Each W left belongs to the oldest I that
    waits. A bound of 0 splits nothing.
    """
    if limit < 0:
        raise ValueError(f"max_deferred = {limit}: must be at least 0")
    lists = []
    for actions in schedule.lists:
        # From the end: a W begins a wait, if there is room for one more, and an I ends it, or is none.
        kept: set[Op] = set()
        waits = 0
        for op in reversed([op for action in actions for op in action]):
            if op.kind is Kind.W and waits < limit:
                waits += 1
                kept.add(op)
            elif op.kind is Kind.I and waits:
                waits -= 1
                kept.add(op)
        bounded: list[Action] = []
        waiting: deque[Op] = deque()
        for action in actions:
            ops = []
            for op in action:
                if op.kind is Kind.I and op not in kept:
                    op = op._replace(kind=Kind.B)
                elif op.kind is Kind.I:
                    waiting.append(op._replace(kind=Kind.W))
                elif op.kind is Kind.W:
                    if op not in kept:
                        continue
                    op = waiting.popleft()
                ops.append(op)
            if ops:
                bounded.append(tuple(ops))
        lists.append(tuple(bounded))
    return replace(schedule, lists=tuple(lists), max_deferred=limit)


def validate(schedule: Schedule) -> None:
    """Raise ValueError unless every rank runs each micro-batch once, after what it needs, and none waits for ever."""
    for rank, actions in enumerate(schedule.lists):
        ops = [op for action in actions for op in action]
        if foreign := [op for op in ops if op.slot not in range(schedule.route.slots)]:
            raise ValueError(f"{schedule.name}, rank {rank}: no slot for {foreign[0]}")
        for slot in range(schedule.route.slots):
            for roles in ({Kind.F}, {Kind.B, Kind.I}):
                got = sorted(op.micro_batch for op in ops if op.slot == slot and op.kind in roles)
                if got != list(schedule.micro_batches_of(slot)):
                    raise ValueError(f"{schedule.name}, rank {rank}, slot {slot}: {'/'.join(sorted(roles))} of {got}")
        split, deferred = ({(op.slot, op.micro_batch) for op in ops if op.kind is kind} for kind in (Kind.I, Kind.W))
        if split != deferred or len(deferred) != sum(op.kind is Kind.W for op in ops):
            raise ValueError(f"{schedule.name}, rank {rank}: every I needs one W, and every W an I")
    for _ in in_order(schedule):
        pass


def in_order(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """Every action of every rank, none before what it needs; ValueError where the lists wait for each other."""
    done: set[Event] = set()
    position = [0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.lists):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if not all(need in done for op in action for need in schedule.needs(rank, op)):
                    break
                yield rank, action
                done.update(event(rank, op) for op in action)
                position[rank] += 1
                moved = True
    stuck = {
        rank: " & ".join(map(str, actions[position[rank]]))
        for rank, actions in enumerate(schedule.lists)
        if position[rank] < len(actions)
    }
    if stuck:
        raise ValueError(f"{schedule.name}: ranks wait for each other at {stuck}")
