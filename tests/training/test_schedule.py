"""The schedule against the milestones of the report (section 4.2), and laws for any run."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import Config, OptimizerConfig, TrainConfig
from dsjax.settings import load_model_config
from dsjax.training.schedule import RAMP_SIZES, Schedule

TINY = load_model_config("tiny")


def schedule(steps=1000, optimizer=None, **train):
    train = {"batch_size": 1, **train}
    return Schedule(
        Config(model=TINY, train=TrainConfig(steps=steps, **train), optimizer=optimizer or OptimizerConfig())
    )


def test_milestones_of_the_report():
    """14.8T tokens in 14,800 steps: the parts of the run are those of the report, to a thousandth of it."""
    report = schedule(14_800)
    rates = [report.learning_rate(step) for step in range(14_800)]
    assert rates[0] == pytest.approx(2.2e-4 / 126)
    assert rates[125] == rates[126] == rates[10_000] == 2.2e-4, "constant until 10T tokens"
    assert rates[10_010] < 2.2e-4
    middle = (10_000 + 14_300) // 2
    assert rates[middle] == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=0.01), "halfway down the cosine"
    assert rates[14_297] == pytest.approx(2.2e-5), "after another 4.3T"
    assert rates[14_630] == pytest.approx(2.2e-5), "for 333B"
    assert rates[14_640] == rates[-1] == pytest.approx(7.3e-6, rel=0.002), "for the last 167B"
    assert rates[126:] == sorted(rates[126:], reverse=True)


def test_mtp_weight_and_bias_speed_of_the_report():
    report = schedule(14_800)
    assert [report.mtp_weight(step) for step in (0, 10_000, 10_010, 14_799)] == [0.3, 0.3, 0.1, 0.1]
    assert [report.bias_speed(step) for step in (0, 14_290, 14_300, 14_799)] == [1e-3, 1e-3, 0.0, 0.0]


def test_batch_ramp_of_the_report():
    """3072 to 15360 sequences, in whole micro-batches, over the first 469B tokens."""
    ramp = schedule(batch_size=15360, micro_batch_size=64, batch_ramp_start=3072, batch_ramp_fraction=0.05)
    sizes = [ramp.batch_size(step) for step in range(1000)]
    assert sizes[0] == 3072 and sizes[50] == sizes[-1] == 15360 and sizes[49] < 15360
    assert sorted(set(sizes)) == [3072, 6144, 9216, 12288, 15360]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(0, 100), st.integers(0, 100))
def test_warm_up_rises_evenly_to_the_peak(steps, percent, more):
    """For any length, although a percentage of it is rarely exact in binary."""
    warmup, constant = percent / 100, min(percent + more, 100) / 100
    optimizer = OptimizerConfig(warmup=warmup, constant=constant, decay=1.0, second_tail_start=1.0)
    plan = schedule(steps, optimizer)
    rates = [plan.learning_rate(step) for step in range(steps)]
    warm = -(-percent * steps // 100)
    peak = optimizer.learning_rate
    assert rates[:warm] == pytest.approx([peak * (step + 1) / warm for step in range(warm)])
    constant_until = -(-min(percent + more, 100) * steps // 100)
    assert rates[warm:constant_until] == [peak] * (constant_until - warm)
    assert max(rates) <= peak and min(rates) > 0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 20), st.integers(0, 20), st.integers(1, 100))
def test_batches_are_whole_growing_and_counted(steps, micro, start, more, percent):
    ramp = schedule(
        steps,
        batch_size=micro * (start + more),
        micro_batch_size=micro,
        batch_ramp_start=micro * start,
        batch_ramp_fraction=percent / 100,
    )
    sizes = [ramp.batch_size(step) for step in range(steps)]
    assert sizes[0] == micro * start
    assert all(size % micro == 0 for size in sizes) and sizes == sorted(sizes)
    ramp_end = -(-percent * steps // 100)
    assert set(sizes[ramp_end:]) <= {micro * (start + more)}
    assert len(set(sizes)) <= RAMP_SIZES + 1
    for step in {0, 1, ramp_end // 2, ramp_end, ramp_end + 1, steps - 1}:
        assert ramp.first_sequence(step) == sum(ramp.batch_size(s) for s in range(step))


def test_no_ramp_and_no_warm_up():
    plain = schedule(10, replace(OptimizerConfig(), warmup=0.0), batch_size=6)
    assert [plain.batch_size(step) for step in (0, 9)] == [6, 6] and plain.first_sequence(7) == 42
    assert plain.learning_rate(0) == 2.2e-4


def test_all_batch_sizes_are_known():
    """Those that the steps have, and no others."""
    plain = TrainConfig(steps=100, batch_size=16)
    ramp = TrainConfig(steps=100, batch_size=16, micro_batch_size=2, batch_ramp_start=4, batch_ramp_fraction=0.3)
    for train in (plain, ramp):
        schedule = Schedule(Config(model=load_model_config("tiny"), train=train))
        assert schedule.batch_sizes() == sorted({schedule.batch_size(step) for step in range(100)})
