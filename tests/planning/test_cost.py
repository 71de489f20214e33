"""The cost model gives back the profile that its rates are from, scales as it should, and keeps the schedule's laws."""

from dataclasses import replace

import pytest

from dsjax.config import MeshConfig
from dsjax.pipeline.simulate import Cost, simulate
from dsjax.planning.chips import CHIPS
from dsjax.planning.cost import CostModel
from dsjax.planning.memory import CATEGORIES, Memory
from dsjax.planning.rates import EXCHANGE_MILLISECONDS, MILLISECONDS, PAIR_MILLISECONDS, published
from dsjax.settings import load_config

H800 = CHIPS["h800"]
# Of a device of the released run, rounded: what a traced program would say takes long, and times hardly depend on it.
HELD = dict.fromkeys(CATEGORIES, 0) | {
    "gradients": 6_500_000_000,
    "master_weights": 1_900_000_000,
    "moments": 1_900_000_000,
}
MEMORY = Memory(HELD, {}, activation_bytes=4096 * 7168 * 2)


@pytest.fixture(scope="module")
def v3():
    return load_config(["v3_671b"])


def model(config, chip=H800, system="report"):
    return CostModel(config, chip, published(chip, fp8=config.precision == "fp8"), MEMORY, system)


def test_the_profile_comes_back(v3):
    """A layer of the run that was profiled takes as long as it took."""
    layer = model(v3).layer
    for phase in ("forward", "input", "weight"):
        found = getattr(layer, {"forward": "forward"}.get(phase, f"backward_{phase}"))
        assert found * 1e3 == pytest.approx(MILLISECONDS[f"attention_{phase}"] + MILLISECONDS[f"mlp_{phase}"], rel=1e-3)
    for part, milliseconds in EXCHANGE_MILLISECONDS.items():
        assert layer.exchange[part] * 1e3 == pytest.approx(milliseconds, rel=1e-3)
    assert model(v3).pair * 1e3 == pytest.approx(PAIR_MILLISECONDS, rel=1e-3)


def test_the_report_own_run_is_as_fast_as_the_report_says(v3):
    """180K GPU hours for a trillion tokens are 1543 tokens/s/GPU; a step took 19.9 s, 0.29 of them the update."""
    step = model(v3).step()
    assert step.tokens_per_s_per_gpu == pytest.approx(1543, rel=0.15)
    assert step.total == pytest.approx(19.926, rel=0.15)
    assert step.update == pytest.approx(0.29, rel=0.3)
    assert step.bubble == pytest.approx(2.06, rel=0.3)
    assert step.total == step.pipeline + step.update


def test_the_program_takes_longer_than_the_report_system(v3):
    report, program = (model(v3, system=system) for system in ("report", "program"))
    assert program.pair > report.pair and program.ends.last > report.ends.last
    assert program.step().total > report.step().total


def test_times_are_proportional_to_tokens_and_inverse_to_rates(v3):
    twice = replace(v3, train=replace(v3.train, micro_batch_size=256))
    faster = replace(H800, bf16_flops=2 * H800.bf16_flops, fp8_flops=2 * H800.fp8_flops)
    better = replace(H800, network_bandwidth=2 * H800.network_bandwidth, node_bandwidth=2 * H800.node_bandwidth)
    layer = model(v3).layer
    assert model(twice).layer.forward == pytest.approx(2 * layer.forward)
    assert model(v3, faster).layer.forward == pytest.approx(layer.forward / 2)
    assert model(v3, better).layer.forward == layer.forward
    assert model(v3, better).layer.exchange["dispatch"] == pytest.approx(layer.exchange["dispatch"] / 2)
    # A network that is slower than computing sets the pace of a pair, one that is faster does not.
    slower = replace(H800, network_bandwidth=H800.network_bandwidth / 2)
    assert model(v3, slower).pair == pytest.approx(2 * sum(layer.exchange.values()))


def test_one_device_sends_nothing(v3):
    alone = replace(
        v3,
        mesh=MeshConfig(),
        pipeline=replace(v3.pipeline, max_deferred=0),
        train=replace(v3.train, micro_batch_size=1, batch_ramp_start=0, batch_ramp_fraction=0.0, batch_size=2),
    )
    found = model(alone, system="program")
    assert set(found.layer.exchange.values()) == {0.0} and found.transfer == 0.0
    assert found.hops("dispatch") == []
    assert found.step().bubble == pytest.approx(0, abs=1e-9)


def test_a_uniform_pipeline_is_simulated_as_with_uniform_costs(v3):
    """With layers in all stages alike, and ends that take no time, the model is `simulate` with five numbers."""
    config = replace(
        v3, model=replace(v3.model, num_hidden_layers=64, first_k_dense_replace=0, num_nextn_predict_layers=0)
    )
    found = model(config)
    found.ends = replace(found.ends, first_forward=0.0, first_backward=0.0, last=0.0)
    assert set(found.layout.counts) == {4}
    cost = Cost(
        forward=4 * found._alone("forward"),
        backward_input=4 * found._alone("input"),
        backward_weight=4 * found._alone("weight"),
        overlapped=4 * found.pair,
        transfer=found.transfer,
    )
    assert found.timeline.makespan == pytest.approx(simulate(found.schedule, cost).makespan)


def test_bf16_is_slower_and_sends_more(v3):
    fp8, bf16 = model(v3).layer, model(replace(v3, precision="bf16")).layer
    assert bf16.forward > fp8.forward
    assert bf16.exchange["dispatch"] == pytest.approx(fp8.exchange["dispatch"] * 14336 / 7392)
    assert bf16.exchange["combine"] == fp8.exchange["combine"]
