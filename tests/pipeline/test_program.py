"""Programs: every read of every op finds its value, buffers are as small as can be, the steady state has no branch."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.pipeline.program import CHANNELS, Field, check, colour, compile_program
from dsjax.pipeline.schedule import SCHEDULES, Kind, dualpipe, dualpipe_v, gpipe, one_f_one_b, zb1p
from dsjax.pipeline.simulate import Cost

costs = st.builds(Cost, *[st.integers(1, 3)] * 3, overlapped=st.none() | st.integers(3, 7))


@st.composite
def schedules(draw):
    name, limit = draw(st.sampled_from(tuple(SCHEDULES))), draw(st.none() | st.integers(0, 3))
    match name:
        case "dualpipe":
            ranks = 2 * draw(st.integers(1, 5))
            micro_batches = 2 * ranks + 2 * draw(st.integers(0, 8))
        case "dualpipev":
            ranks = draw(st.integers(1, 5))
            micro_batches = 2 * ranks + draw(st.integers(0, 12))
        case _:
            ranks, micro_batches = draw(st.integers(1, 9)), draw(st.integers(1, 24))
    return SCHEDULES[name](ranks, micro_batches, max_deferred=limit)


@given(schedules(), costs, st.booleans(), st.booleans())
@settings(max_examples=150)
def test_every_read_finds_its_value(schedule, cost, parity, bundled):
    program = compile_program(schedule, cost, parity=parity, bundled=bundled)
    check(program)
    assert schedule.max_deferred is None or program.pools.tapes <= schedule.max_deferred


@given(schedules())
@settings(max_examples=50)
def test_where_tapes_wait(schedule):
    """Between an I and its W, slot by slot, and in no segment that has neither."""
    program = compile_program(schedule)
    waiting, by_tick = set(), []
    for row in program.table:
        by_tick.append(bool(waiting))
        for rank, fields in enumerate(row):
            for kind, _ in program.opcodes[fields[Field.OPCODE]]:
                if kind is Kind.W:
                    waiting.remove((rank, fields[Field.W_TAPE]))
            waiting |= {
                (rank, fields[Field.B_TAPE]) for kind, _ in program.opcodes[fields[Field.OPCODE]] if kind is Kind.I
            }
    assert not waiting
    assert [program.is_waiting(tick) for tick in range(len(by_tick))] == by_tick
    for segment in program.segments:
        ticks = range(segment.start, segment.stop)
        if not program.defers(segment):
            assert len({program.is_waiting(tick) for tick in ticks}) == 1


@pytest.mark.parametrize("schedule", [dualpipe(16, 64), dualpipe_v(8, 64), zb1p(16, 64)])
def test_every_read_finds_its_value_at_full_size(schedule):
    check(compile_program(schedule))


def test_the_checker_sees_damage():
    """Whichever field of whichever op is changed, a read misses its value."""
    program = compile_program(dualpipe(4, 8))
    used = {
        Kind.F: [Field.F_MICRO_BATCH, Field.F_RESIDUAL, Field.F_FIRST, Field.F_LAST],
        Kind.B: [Field.B_MICRO_BATCH, Field.B_INPUT, Field.B_RESIDUAL, Field.B_FIRST, Field.B_LAST],
        Kind.W: [Field.W_MICRO_BATCH, Field.W_TAPE],
    }
    seen = Counter()
    for t, rank in np.ndindex(program.table.shape[:2]):
        row = program.table[t, rank]
        fields = [field for kind, _ in program.opcodes[row[Field.OPCODE]] for field in used[kind.role]]
        fields += [c.field for c in CHANNELS if row[c.field] != program.trash[c.payload]]
        for field in fields:
            table = program.table.copy()
            received = field.name.startswith("RECEIVE")
            table[t, rank, field] = (
                program.trash["activation" if "ACT" in field.name else "gradient"]
                if received
                else 1 - min(row[field], 1)
            )
            if (table == program.table).all():
                continue
            with pytest.raises((AssertionError, IndexError)):
                check(replace(program, table=table))
            seen[field] += 1
    assert set(used[Kind.F] + used[Kind.B]) - {Field.B_INPUT} <= set(seen)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(4, 20), (8, 20), (16, 64)])
def test_buffers_hold_what_the_report_says(ranks, micro_batches):
    """Residuals of P + 1 micro-batches, of P for 1F1B and ZB1P, and at most `max_deferred` tapes."""
    for schedule in (dualpipe(ranks, micro_batches), dualpipe_v(ranks // 2, micro_batches)):
        pools = compile_program(schedule).pools
        assert pools.residuals == ranks + 1
        assert pools.tapes == ranks // 2
        assert max(pools.activations, pools.gradients) <= 3
    assert compile_program(one_f_one_b(ranks, micro_batches)).pools == (1, 1, ranks, 0)
    assert compile_program(zb1p(ranks, micro_batches)).pools == (1, 1, ranks, ranks)
    for limit in (0, 1, 2):
        assert compile_program(dualpipe(ranks, micro_batches, max_deferred=limit)).pools.tapes == limit


@pytest.mark.parametrize("build", [gpipe, one_f_one_b])
def test_one_rank_is_plain_accumulation(build):
    """F, B, F, B: one body of two ticks, nothing to branch on, nothing to send, one of everything."""
    program = compile_program(build(1, 6))
    assert program.pools == (0, 1, 1, 0)
    (segment,) = program.segments
    assert (segment.start, segment.stop) == (0, 12)
    codes = [[program.opcodes[code] for code in phase.opcodes] for phase in segment.phases]
    assert codes == [[((Kind.F, 0),)], [((Kind.B, 0),)]]
    assert not any(phase.transfers for phase in segment.phases)
    assert program.table[:, 0, Field.F_MICRO_BATCH][::2].tolist() == list(range(6))
    assert program.table[:, 0, Field.F_FIRST][::2].all() and program.table[:, 0, Field.F_LAST][::2].all()


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 12), (4, 20), (8, 20), (16, 64)])
def test_the_steady_state_has_no_branch(ranks, micro_batches):
    """One opcode, an overlapped pair, on all ranks of a tick; every rank swaps with one neighbour, then the other."""
    program = compile_program(dualpipe(ranks, micro_batches))
    _, steady, _ = program.segments
    assert len(steady.phases) == 2
    assert steady.stop - steady.start >= micro_batches - 2 * ranks
    codes = [[program.opcodes[code] for code in phase.opcodes] for phase in steady.phases]
    assert sorted(codes) == [[((Kind.F, 0), (Kind.B, 1))], [((Kind.F, 1), (Kind.B, 0))]]
    swaps = [{t.payload: t.pairs for t in phase.transfers} for phase in steady.phases]
    for swap in swaps:
        assert swap.get("activation") == swap.get("gradient")
    partners = sorted(sorted(swap.get("activation", ())) for swap in swaps)
    both_ways = [[(a + s, a + 1 - s) for a in range(start, ranks - 1, 2) for s in (0, 1)] for start in (0, 1)]
    assert partners == sorted(both_ways)


def test_parity_slots_hold_even_stages_first():
    program = compile_program(dualpipe(4, 8))
    assert program.stages == ((0, 3), (2, 1), (2, 1), (0, 3))
    assert compile_program(dualpipe(4, 8), parity=False).stages == ((0, 3), (1, 2), (2, 1), (3, 0))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=40))
def test_colouring_is_proper_and_optimal(drawn):
    intervals = [(start, start + length, i) for i, (start, length) in enumerate(drawn)]
    colours = colour(intervals)
    for a in intervals:
        for b in intervals:
            if a[2] != b[2] and a[0] <= b[1] and b[0] <= a[1]:
                assert colours[a[2]] != colours[b[2]]
    most = max((sum(a <= t <= b for a, b, _ in intervals) for t in range(40)), default=0)
    assert len(set(colours.values())) == most
