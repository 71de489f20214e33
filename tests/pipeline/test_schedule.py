"""Schedules: the published lists op by op, Table 2 of the report, and laws for every size."""

import itertools
import re
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.pipeline.schedule import SCHEDULES, Kind, Op, dualpipe, dualpipe_v, gpipe, one_f_one_b, validate, zb1p
from dsjax.pipeline.simulate import (
    Cost,
    assign_ticks,
    peak_activations,
    peak_deferred,
    report_bubble,
    simulate,
    simulate_ticks,
)

# What github.com/deepseek-ai/DualPipe runs with 20 micro-batches: kind, direction and micro-batch of that direction.
# I is a backward pass of zero bubble; brackets are overlapped pairs. The other half of the ranks is the mirror image.
FOUR = [
    "F0.0 F0.1 F0.2 F1.0 I1.0 W1.0 F1.1 [F0.3&B1.1] [F1.2&B0.0] [F0.4&B1.2] [F1.3&B0.1] [F0.5&B1.3] [F1.4&B0.2] "
    "[F0.6&B1.4] [F1.5&B0.3] [F0.7&B1.5] [F1.6&B0.4] [F0.8&B1.6] [F1.7&B0.5] [F0.9&B1.7] [F1.8&B0.6] B1.8 [F1.9&B0.7] "
    "B1.9 I0.8 W0.8 I0.9 W0.9",
    "F0.0 F1.0 F0.1 F1.1 F0.2 B1.0 [F1.2&B0.0] [F0.3&B1.1] [F1.3&B0.1] [F0.4&B1.2] [F1.4&B0.2] [F0.5&B1.3] "
    "[F1.5&B0.3] [F0.6&B1.4] [F1.6&B0.4] [F0.7&B1.5] [F1.7&B0.5] [F0.8&B1.6] [F1.8&B0.6] [F0.9&B1.7] [F1.9&B0.7] "
    "B1.8 B0.8 I1.9 I0.9 W1.9 W0.9",
]
EIGHT = [
    "F0.0 F0.1 F0.2 F0.3 F0.4 F0.5 F0.6 F1.0 I1.0 W1.0 F1.1 I1.1 W1.1 F1.2 I1.2 W1.2 F1.3 [F0.7&B1.3] [F1.4&B0.0] "
    "[F0.8&B1.4] [F1.5&B0.1] [F0.9&B1.5] [F1.6&B0.2] B1.6 [F1.7&B0.3] B1.7 [F1.8&B0.4] B1.8 [F1.9&B0.5] B1.9 I0.6 "
    "W0.6 I0.7 W0.7 I0.8 W0.8 I0.9 W0.9",
    "F0.0 F0.1 F0.2 F0.3 F0.4 F1.0 F0.5 F1.1 I1.0 W1.0 F1.2 I1.1 W1.1 F1.3 [F0.6&B1.2] [F1.4&B0.0] [F0.7&B1.3] "
    "[F1.5&B0.1] [F0.8&B1.4] [F1.6&B0.2] [F0.9&B1.5] [F1.7&B0.3] B1.6 [F1.8&B0.4] B1.7 [F1.9&B0.5] B1.8 B0.6 I1.9 "
    "I0.7 W1.9 I0.8 W0.7 I0.9 W0.8 W0.9",
    "F0.0 F0.1 F0.2 F1.0 F0.3 F1.1 F0.4 F1.2 I1.0 W1.0 F1.3 [F0.5&B1.1] [F1.4&B0.0] [F0.6&B1.2] [F1.5&B0.1] "
    "[F0.7&B1.3] [F1.6&B0.2] [F0.8&B1.4] [F1.7&B0.3] [F0.9&B1.5] [F1.8&B0.4] B1.6 [F1.9&B0.5] B1.7 B0.6 B1.8 I0.7 "
    "I1.9 I0.8 W0.7 I0.9 W1.9 W0.8 W0.9",
    "F0.0 F1.0 F0.1 F1.1 F0.2 F1.2 F0.3 F1.3 F0.4 B1.0 [F1.4&B0.0] [F0.5&B1.1] [F1.5&B0.1] [F0.6&B1.2] [F1.6&B0.2] "
    "[F0.7&B1.3] [F1.7&B0.3] [F0.8&B1.4] [F1.8&B0.4] [F0.9&B1.5] [F1.9&B0.5] B1.6 B0.6 B1.7 B0.7 I1.8 I0.8 I1.9 I0.9 "
    "W1.8 W0.8 W1.9 W0.9",
]

# Where F = I = W and B <= F&B <= F + B; the formulas for ZB1P and DualPipe hold there.
balanced = st.builds(
    lambda unit, pair: Cost(unit, unit, unit, overlapped=pair * unit),
    st.integers(1, 9),
    st.integers(8, 12).map(lambda n: n / 4),
)
any_cost = st.builds(Cost, *[st.integers(1, 9)] * 3, overlapped=st.none() | st.integers(3, 20))


@st.composite
def sizes(draw, names=tuple(SCHEDULES)):
    """A builder's name and what it can build."""
    name = draw(st.sampled_from(names))
    if name == "dualpipe":
        ranks = 2 * draw(st.integers(1, 5))
        return name, ranks, 2 * ranks + 2 * draw(st.integers(0, 6))
    if name == "dualpipev":
        ranks = draw(st.integers(1, 6))
        return name, ranks, 2 * ranks + draw(st.integers(0, 9))
    return name, draw(st.integers(1, 9)), draw(st.integers(1, 24))


def parse(text, flip, offset):
    """The actions of a published list, its directions swapped if `flip`, micro-batches counted from `offset` in 1."""
    actions = []
    for word in text.split():
        ops = []
        for kind, direction, micro_batch in re.findall(r"([FBIW])(\d)\.(\d+)", word):
            slot = int(direction) ^ flip
            ops.append(Op(Kind(kind), slot, int(micro_batch) + offset * slot))
        actions.append(tuple(ops))
    return tuple(actions)


@pytest.mark.parametrize("published", [FOUR, EIGHT])
def test_dualpipe_is_the_published_one(published):
    ranks = 2 * len(published)
    expected = [parse(text, 0, 10) for text in published] + [parse(text, 1, 10) for text in reversed(published)]
    assert dualpipe(ranks, 20).lists == tuple(expected)


def test_dualpipe_v_is_the_published_one():
    assert dualpipe_v(4, 10).lists == tuple(parse(text, 0, 0) for text in EIGHT)


@given(sizes(), st.none() | st.integers(0, 5))
def test_every_size_is_valid(size, limit):
    name, ranks, micro_batches = size
    schedule = SCHEDULES[name](ranks, micro_batches, max_deferred=limit)
    validate(schedule)
    assert limit is None or max(peak_deferred(schedule)) <= limit
    # Nothing gets lost: every rank's work is the same with and without a bound.
    assert simulate(schedule).busy == simulate(SCHEDULES[name](ranks, micro_batches)).busy


@given(sizes(("zb1p", "dualpipe", "dualpipev")))
def test_a_bound_that_does_not_bind_changes_nothing(size):
    name, ranks, micro_batches = size
    free = SCHEDULES[name](ranks, micro_batches)
    bounded = SCHEDULES[name](ranks, micro_batches, max_deferred=max(peak_deferred(free)))
    assert bounded.lists == free.lists


@given(st.integers(1, 9), st.integers(1, 24))
def test_zb1p_that_may_not_defer_is_1f1b(ranks, micro_batches):
    assert zb1p(ranks, micro_batches, max_deferred=0).lists == one_f_one_b(ranks, micro_batches).lists


def test_a_bound_of_two_costs_little():
    """For 16 ranks and 64 micro-batches the fewer tapes, the slower, but never by 4 %."""
    spans = [simulate(dualpipe(16, 64, max_deferred=limit)).makespan for limit in (8, 6, 4, 3, 2, 1)]
    assert spans == [206, 206, 208, 210, 211, 213]


def test_one_rank_accumulates():
    expected = tuple((Op(kind, 0, m),) for m in range(3) for kind in (Kind.F, Kind.B))
    assert gpipe(1, 3).lists == one_f_one_b(1, 3).lists == (expected,)


def test_what_cannot_be_is_refused_with_what_can():
    for build, sizes_, nearest in (
        (dualpipe, (5, 20), "ranks = 5: .* even and at least 2; nearest: 4 or 6"),
        (dualpipe, (1, 20), "ranks = 1: .*; nearest: 2"),
        (dualpipe, (8, 14), r"micro_batches = 14: .* at least 16 \(twice the ranks\); nearest: 16"),
        (dualpipe, (8, 21), "micro_batches = 21: .*; nearest: 20 or 22"),
        (dualpipe_v, (4, 7), "micro_batches = 7: .*; nearest: 8"),
        (one_f_one_b, (0, 7), "ranks = 0: .*; nearest: 1"),
        (gpipe, (2, 0), "micro_batches = 0: .*; nearest: 1"),
    ):
        with pytest.raises(ValueError, match=nearest):
            build(*sizes_)
    with pytest.raises(ValueError, match="max_deferred = -1"):
        dualpipe(2, 4, max_deferred=-1)


def test_broken_schedules_are_found():
    good = dualpipe(4, 8)

    def broken(rank, change):
        lists = list(good.lists)
        lists[rank] = change(lists[rank])
        return replace(good, lists=tuple(lists))

    for schedule, message in (
        (broken(0, lambda actions: actions[1:]), "rank 0, slot 0: F of"),
        (broken(1, lambda actions: actions[:-1]), "rank 1: every I needs one W"),
        (broken(2, lambda actions: (*actions, actions[0])), "rank 2, slot 1: F of"),
        (broken(3, lambda actions: actions[::-1]), "wait for each other"),
        (broken(3, lambda actions: ((Op(Kind.F, 2, 0),), *actions)), "rank 3: no slot for F2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            validate(schedule)


@given(st.integers(1, 9), st.integers(1, 24), any_cost)
def test_table_2_without_splitting(ranks, micro_batches, cost):
    for build in (gpipe, one_f_one_b):
        schedule = build(ranks, micro_batches)
        assert simulate(schedule, cost).bubble == (report_bubble(schedule, cost),) * ranks
    # 1F1B: as many activations as ranks.
    assert max(peak_activations(schedule)) == min(ranks, micro_batches)


@given(sizes(("dualpipe", "dualpipev")), balanced)
def test_table_2_of_dualpipe(size, cost):
    schedule = SCHEDULES[size[0]](*size[1:])
    stages = schedule.route.stages
    assert max(simulate(schedule, cost).bubble) == pytest.approx(report_bubble(schedule, cost))
    assert simulate(schedule).bubble == (report_bubble(schedule, Cost()),) * schedule.ranks
    assert peak_activations(schedule) == (stages + 1,) * schedule.ranks
    assert max(peak_deferred(schedule)) == stages // 2


@given(st.integers(1, 9), st.integers(0, 15))
def test_table_2_of_zb1p(ranks, more):
    schedule = zb1p(ranks, ranks + more)
    assert simulate(schedule).bubble == (report_bubble(schedule, Cost()),) * ranks
    assert max(peak_activations(schedule)) == ranks


@given(st.integers(1, 5), st.integers(0, 6), st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_table_2_is_a_bound_where_backward_is_slower(half, more, weight, forward, slower, gain):
    """Specification 4.2: for I >= F and I >= W the formula is an upper bound."""
    forward = max(1, forward)
    cost = Cost(forward, max(forward, weight) + slower, weight)
    cost = replace(cost, overlapped=forward + cost.backward_input + weight - min(gain, forward - 1))
    schedule = dualpipe(2 * half, 4 * half + 2 * more)
    assert max(simulate(schedule, cost).bubble) <= report_bubble(schedule, cost) + 1e-9


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "makespan"), [(4, 20, 62), (8, 20, 66), (16, 32, 110), (16, 120, 374)]
)
def test_published_makespans(ranks, micro_batches, makespan):
    assert simulate(dualpipe(ranks, micro_batches)).makespan == makespan


@given(sizes(), any_cost, st.integers(0, 3))
def test_nothing_runs_before_what_it_needs(size, cost, transfer):
    schedule = SCHEDULES[size[0]](*size[1:])
    timeline = simulate(schedule, replace(cost, transfer=transfer))
    end = {(op.kind.role, s.rank, op.slot, op.micro_batch): s.end for s in timeline.spans for op in s.action}
    for span in timeline.spans:
        for op in span.action:
            for need in schedule.needs(span.rank, op):
                assert end[need] + transfer * (need[1] != span.rank) <= span.start
    for rank in range(schedule.ranks):
        spans = timeline.of(rank)
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))


@given(sizes(), any_cost, st.none() | st.integers(0, 2))
@settings(max_examples=60)
def test_ticks(size, cost, limit):
    """Lists in order; messages between ticks only; at most one op of a role; never faster than without ticks."""
    schedule = SCHEDULES[size[0]](*size[1:], max_deferred=limit)
    ticks = assign_ticks(schedule, cost)
    for rank, actions in enumerate(schedule.lists):
        assert tuple(action for tick in ticks for action in tick[rank]) == actions
    done, before = {}, defaultdict(int)
    for t, tick in enumerate(ticks):
        assert any(tick)
        for rank, bundle in enumerate(tick):
            ops = [op for action in bundle for op in action]
            for op in ops:
                for need in schedule.needs(rank, op):
                    own_tape = op.kind is Kind.W and op._replace(kind=Kind.I) in ops
                    assert done[need] < t or own_tape
                done.setdefault((op.kind.role, rank, op.slot, op.micro_batch), t)
                before[rank, t, op.kind.role] += 1
            fused = sum(op._replace(kind=Kind.I) in ops for op in ops if op.kind is Kind.W)
            assert before[rank, t, Kind.F] <= 1 and before[rank, t, Kind.B] <= 1
            assert before[rank, t, Kind.W] - fused <= 1
    assert simulate_ticks(schedule, ticks, cost).makespan >= simulate(schedule, cost).makespan - 1e-9


@pytest.mark.parametrize("cost", [Cost(), Cost(overlapped=2.4)])
def test_ticks_cost_next_to_nothing(cost):
    def ratio(schedule):
        return simulate_ticks(schedule, assign_ticks(schedule, cost), cost).makespan / simulate(schedule, cost).makespan

    for schedule in (dualpipe(4, 20), dualpipe(8, 20), dualpipe_v(4, 20), zb1p(8, 20), one_f_one_b(8, 20)):
        assert ratio(schedule) == pytest.approx(1)
    assert ratio(dualpipe(16, 64)) <= (1.01 if cost.overlapped is None else 1.016)
    assert ratio(dualpipe_v(8, 64)) <= 1.01
