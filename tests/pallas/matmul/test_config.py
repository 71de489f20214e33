"""The choice of cuts, and their timing on a GPU that takes the time we say."""

import itertools
from typing import get_args

import jax.numpy as jnp
import pytest

from dsjax.pallas.choice import SHARED_MEMORY
from dsjax.pallas.matmul import config as configs
from dsjax.pallas.matmul.config import Config, Kind, candidates, config_for
from dsjax.pallas.matmul.tune import example, tune

KINDS = get_args(Kind)
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


@pytest.fixture(params=[True, False], ids=["registers move", "registers stay"])
def registers(request, monkeypatch):
    """An assembler with and without `setmaxnreg`."""
    candidates.cache_clear()
    monkeypatch.setattr(configs, "registers_move", lambda: request.param)
    yield request.param
    candidates.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_candidates_are_possible(registers, kind, dtype):
    for config, speed in candidates(kind, dtype).items():
        config.check(kind, dtype, num_sms=2)
        assert config.shared_memory(kind, dtype) < SHARED_MEMORY
        assert speed < 1979  # TFLOPS of an H100's tensor cores


def test_threads_have_no_more_registers_than_there_are():
    for warpgroups in (1, 2, 3):
        copying, multiplying = Config(warpgroups=warpgroups).registers
        assert 128 * (copying + warpgroups * multiplying) <= 65536


def test_without_moving_registers_no_tile_needs_many(registers):
    """An accumulator and a sum of 128 x 192 are 192 of the 168 registers that every thread has then."""
    for kind, dtype in itertools.product(KINDS, (BF16, F32)):
        widths = {config.tile_n for config in candidates(kind, dtype)}
        assert (192 in widths) == (registers and not kind.endswith("16bit"))


@pytest.mark.parametrize(
    "kind, m, n, dtype, tile, cluster",
    [
        ("dense", 8192, 24576, BF16, (128, 192), "n"),
        ("dense", 64, 7168, BF16, (64, 64), None),
        ("grouped", 32768, 4096, BF16, (128, 192), "n"),
        ("wgrad", 4096, 7168, F32, (128, 192), "n"),
        ("grouped_16bit", 32768, 4096, BF16, (128, 256), "n"),
    ],
)
def test_the_choice(registers, kind, m, n, dtype, tile, cluster):
    if not registers and tile[1] == 192:
        tile = (128, 128)
    config = config_for(kind, m, n, dtype)
    assert ((config.tile_m, config.tile_n), config.cluster) == (tile, cluster)


def test_a_single_sm_has_no_clusters():
    assert config_for("dense", 8192, 24576, BF16, num_sms=1).cluster is None


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_ranks_what_it_times(kind):
    times = iter([3e-3, 1e-3])

    def timer(run):
        result = run()
        assert result.ndim == (2 if kind.startswith(("dense", "grouped")) else 3)
        return next(times)

    cuts = [Config(snake=snake) for snake in (1, 2, 3)]
    first, second, failed = tune(kind, 128, 64, 256, groups=1, configs=cuts, impl="xla", timer=timer)
    assert (first.config.snake, second.config.snake, failed.config.snake) == (2, 1, 3)
    assert first.tflops == pytest.approx(2 * 128 * 64 * 256 / 1e-3 / 1e12)
    assert failed.seconds == float("inf") and "StopIteration" in failed.error


def test_tuning_tries_every_candidate_by_default():
    timings = tune("dense", 16, 64, 128, impl="xla", timer=lambda run: 1.0)
    assert {timing.config.tile_n for timing in timings} == {config.tile_n for config in candidates("dense", BF16)}


def test_tuning_takes_time():
    (timing,) = tune("dense", 16, 64, 128, impl="xla", configs=[Config()])
    assert not timing.error and 0 < timing.seconds < 1


def test_groups_that_are_not_even_are_refused():
    with pytest.raises(ValueError, match="300 rows are not 2 groups"):
        example("grouped", 300, 64, 128, groups=2)
