"""When the ops of a schedule run, what waits meanwhile, and in which lock-step ticks one SPMD program can run them."""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dsjax.pipeline.schedule import Action, Event, Kind, Op, Schedule, event, in_order


@dataclass(frozen=True)
class Cost:
    """Times of ops, in any unit."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    backward: float | None = None
    """A whole backward pass; None is the sum of its two parts."""
    overlapped: float | None = None
    """A forward and a whole backward pass as a pair; None is their sum, that is, nothing gained."""
    transfer: float = 0.0
    """From the end of an op until its result is at the next rank, which may compute meanwhile."""

    def of(self, action: Action, rank: int = 0) -> float:
        """The time of an action of a rank; here all ranks are alike."""
        kinds = sorted(op.kind for op in action)
        if kinds == [Kind.B, Kind.F] and self.overlapped is not None:
            return self.overlapped
        return sum(self._of_kind(kind) for kind in kinds)

    def _of_kind(self, kind: Kind) -> float:
        match kind:
            case Kind.F:
                return self.forward
            case Kind.I:
                return self.backward_input
            case Kind.W:
                return self.backward_weight
        whole = self.backward_input + self.backward_weight
        return whole if self.backward is None else self.backward


class Span(NamedTuple):
    """An action of a rank in time."""

    rank: int
    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Timeline:
    """A schedule in time."""

    schedule: Schedule
    spans: tuple[Span, ...]
    """Every action; those of a rank in order."""

    @cached_property
    def makespan(self) -> float:
        return max(span.end for span in self.spans)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """How long each rank computes."""
        return tuple(sum(s.end - s.start for s in self.of(rank)) for rank in range(self.schedule.ranks))

    @property
    def bubble(self) -> tuple[float, ...]:
        """How long each rank waits."""
        return tuple(self.makespan - busy for busy in self.busy)

    def of(self, rank: int) -> list[Span]:
        return [span for span in self.spans if span.rank == rank]


def simulate(schedule: Schedule, cost: Cost | None = None) -> Timeline:
    """Every action starts as soon as its rank is free and what it needs is there."""
    cost = cost or Cost()
    end: dict[Event, float] = {}
    free = [0.0] * schedule.ranks
    spans = []
    for rank, action in in_order(schedule):
        start = free[rank]
        for op in action:
            for need in schedule.needs(rank, op):
                start = max(start, end[need] + (cost.transfer if need[1] != rank else 0.0))
        free[rank] = start + cost.of(action, rank)
        spans.append(Span(rank, start, free[rank], action))
        end.update((event(rank, op), free[rank]) for op in action)
    return Timeline(schedule, tuple(spans))


def report_bubble(schedule: Schedule, cost: Cost) -> float:
    """The bubble of the report's Table 2 (and GPipe's, which is 1F1B's).

    1F1B's is exact. Those of ZB1P and DualPipe are where F = I = W, whatever an overlapped pair costs.
    """
    forward, weight = cost.forward, cost.backward_weight
    backward, pair = cost.of((Op(Kind.B, 0, 0),)), cost.of((Op(Kind.F, 0, 0), Op(Kind.B, 0, 0)))
    ranks = schedule.ranks
    match schedule.name:
        case "GPipe" | "1F1B":
            return (ranks - 1) * (forward + backward)
        case "ZB1P":
            return (ranks - 1) * (forward + backward - 2 * weight)
        case "DualPipe":
            return (ranks / 2 - 1) * (pair + backward - 3 * weight)
        case "DualPipeV":
            return (ranks - 1) * (pair + backward - 3 * weight)
    raise ValueError(f"{schedule.name}: not in Table 2")


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """How many micro-batches each rank holds the activations of at most: from F to B, or to I where that is split."""
    return _peaks(schedule, begins={Kind.F}, ends={Kind.B, Kind.I})


def peak_deferred(schedule: Schedule) -> tuple[int, ...]:
    """How many weight gradients of each rank wait at most: from I to W."""
    return _peaks(schedule, begins={Kind.I}, ends={Kind.W})


def _peaks(schedule: Schedule, begins: set[Kind], ends: set[Kind]) -> tuple[int, ...]:
    peaks = []
    for actions in schedule.lists:
        held = peak = 0
        for action in actions:
            held += sum(op.kind in begins for op in action)
            peak = max(peak, held)
            held -= sum(op.kind in ends for op in action)
        peaks.append(peak)
    return tuple(peaks)


Bundle = tuple[Action, ...]
"""What a rank runs in one tick, in order."""

Tick = tuple[Bundle, ...]
"""What every rank runs in one tick; () for none."""


class _Align(NamedTuple):
    """Ticks of a ramp in which ranks keep to the beat of the steady state: see `assign_ticks`."""

    start: int
    stop: int
    beat: int
    """0 or 1: in which of two ticks rank 0 begins an F of slot 0; other slot, backward and neighbour each turn it."""
    budget: float
    """What a rank may always fit into a tick."""


def assign_ticks(schedule: Schedule, cost: Cost | None = None, bundled: bool = True) -> tuple[Tick, ...]:
    """Cut the lists into ticks, at whose end all values move: what an op needs was computed in an earlier tick.

    A rank runs the next of its actions that are ready while they fit into the longest that any rank begins the tick
    with; else unit ops would wait for an overlapped pair next door. At most one op of a role (F; B or I; W) per rank
    and tick: one message of each sort. An I whose W fits as well runs as one B.

    In a steady DualPipe a rank alternates between directions, its neighbours the other way round. A ramp that reaches
    this state out of step loses whole ticks (P = 16: bubble 20 where 14 is ideal). So the ranks are also made to fall
    into the beat early, in a few ways, and the ticks that are fastest count (P = 16: 16).

    bundled: False for one action per rank and tick.
    """
    cost = cost or Cost()
    plain = _assign(schedule, cost, bundled, None)
    pairs = [sum(len(action) > 1 for bundle in tick for action in bundle) for tick in plain]
    if not bundled or not any(pairs):
        return plain
    first = next(t for t, count in enumerate(pairs) if count)
    steady = next((t for t, count in enumerate(pairs) if count == schedule.ranks), len(plain))
    whole = cost.of((Op(Kind.B, 0, 0),))
    ways = itertools.product((first - 2, first - 1), (steady,), (0, 1), (0.0, whole))
    found = [plain, *(_assign(schedule, cost, True, _Align(*way)) for way in ways)]
    return min(found, key=lambda ticks: (round(simulate_ticks(schedule, ticks, cost).makespan, 9), len(ticks)))


def _assign(schedule: Schedule, cost: Cost, bundled: bool, align: _Align | None) -> tuple[Tick, ...]:
    """Ticks, as early as possible or, where `align` says so, on the beat."""
    needs = [[[(op.kind, schedule.needs(rank, op)) for op in action] for action in actions]
             for rank, actions in enumerate(schedule.lists)]  # fmt: skip
    room = math.inf if schedule.max_deferred is None else schedule.max_deferred
    done: dict[Event, int] = {}
    position = [0] * schedule.ranks
    waiting = [0] * schedule.ranks
    ticks: list[Tick] = []
    while any(position[rank] < len(actions) for rank, actions in enumerate(schedule.lists)):
        now = len(ticks)
        aligned = align is not None and align.start <= now < align.stop

        def ready(rank: int, bundle: Bundle, now: int = now, aligned: bool = aligned) -> Action | None:
            """The next action of a rank if it can run now; a W can follow its own I."""
            if position[rank] == len(schedule.lists[rank]):
                return None
            action = schedule.lists[rank][position[rank]]
            op = action[0]
            if aligned and op.kind is not Kind.W and (op.slot + (op.kind is not Kind.F) + rank + now + align.beat) % 2:
                return None
            own = {event(rank, op) for before in bundle for op in before}
            for kind, needed in needs[rank][position[rank]]:
                for need in needed:
                    if done.get(need, now) >= now and not (kind is Kind.W and need in own):
                        return None
            return action

        first = [ready(rank, ()) for rank in range(schedule.ranks)]
        # Waiting for the beat takes one tick at most.
        assert any(first) or aligned, f"{schedule.name}: no rank can run"
        budget = max((cost.of(action) for action in first if action), default=0.0) if bundled else 0.0
        budget = max(budget, align.budget) if aligned else budget
        tick: list[Bundle] = []
        for rank in range(schedule.ranks):
            bundle: Bundle = ()
            while action := ready(rank, bundle):
                longer = (*bundle, action)
                if bundle and not (
                    sum(map(cost.of, longer)) <= budget * (1 + 1e-9)
                    and _one_of_each(longer)
                    and (room == math.inf or _is_plain(longer))
                    and _tapes(longer, waiting[rank]) <= room
                ):
                    break
                bundle = longer
                position[rank] += 1
            kinds = [op.kind for action in bundle for op in action]
            waiting[rank] += kinds.count(Kind.I) - kinds.count(Kind.W)
            tick.append(bundle)
        for rank, bundle in enumerate(tick):
            done.update((event(rank, op), now) for action in bundle for op in action)
        ticks.append(tuple(tick))
    return tuple(tick for tick in ticks if any(tick))


def _tapes(bundle: Bundle, waiting: int) -> int:
    """How many tapes a rank holds in a tick: one that a W reads is still there when an I writes its own."""
    return waiting + sum(op.kind is Kind.I for op in fuse(bundle))


def _one_of_each(bundle: Bundle) -> bool:
    roles = [op.kind.role for op in fuse(bundle)]
    return len(roles) == len(set(roles))


def _is_plain(bundle: Bundle) -> bool:
    """Whether it is no F with a W alone. Where stages differ in layers, XLA copied all tapes in every branch of a ramp
    that had such; where tapes are few, memory counts more than the unit or so that it saves."""
    return {op.kind.role for op in fuse(bundle)} != {Kind.F, Kind.W}


def fuse(bundle: Bundle) -> Action:
    """The ops of a bundle as the compiler gets them: F, then B or I, then W; an I and its own W as one B."""
    ops = [op for action in bundle for op in action]
    for op in [op for op in ops if op.kind is Kind.I]:
        deferred = op._replace(kind=Kind.W)
        if deferred in ops:
            ops.remove(deferred)
            ops[ops.index(op)] = op._replace(kind=Kind.B)
    return tuple(sorted(ops, key=lambda op: "FBIW".index(op.kind)))


def simulate_ticks(schedule: Schedule, ticks: tuple[Tick, ...], cost: Cost | None = None) -> Timeline:
    """Ticks in time: at the end of a tick a rank that sends waits for the one that receives, and conversely."""
    cost = cost or Cost()
    clock = [0.0] * schedule.ranks
    spans = []
    for tick in ticks:
        for rank, bundle in enumerate(tick):
            for action in bundle:
                start, clock[rank] = clock[rank], clock[rank] + cost.of(action, rank)
                spans.append(Span(rank, start, clock[rank], action))
        met = list(clock)
        for rank, bundle in enumerate(tick):
            for op in fuse(bundle):
                place = schedule.route.target(rank, op)
                if place and place[0] != rank:
                    both = max(clock[rank], clock[place[0]]) + cost.transfer
                    met[rank], met[place[0]] = max(met[rank], both), max(met[place[0]], both)
        clock = met
    return Timeline(schedule, tuple(spans))
