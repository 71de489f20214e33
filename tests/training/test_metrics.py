"""What a run writes down survives crashes and resumption."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dsjax.training.memory import peak_of_devices, peak_of_process
from dsjax.training.metrics import RECORD_KEYS, MetricsFile, Recorder, StepFacts, load_over_mean, read_metrics
from dsjax.training.phases import Phases
from dsjax.training.progress import shares_of_time

from .test_phases import Clock


class Kept:
    """A sink that keeps records."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


def numbers(loss=2.0, finite=True):
    loads = np.array([[3, 1], [2, 2]], np.int32)
    return {
        **{key: np.float32(loss) for key in ("loss", "loss_mtp", "loss_balance", "grad_norm")},
        "finite": np.bool_(finite),
        "loads": loads,
    }


def facts(step):
    return StepFacts(
        step=step, tokens=step * 8, step_tokens=8, epoch=0.1, batch_size=2, micro_batches=1, learning_rate=1e-3,
        mtp_weight=0.3, bias_speed=1e-3,
    )  # fmt: skip


def recorder(sink, **changes):
    settings = {"every": 2, "last_step": 5, "main_layers": 1, "flops_per_token": 10.0, "peak_flops": 1e3}
    return Recorder([sink], **settings | changes)


def test_records_come_one_step_late_and_only_some_are_written():
    sink, seen = Kept(), []
    made = recorder(sink, on_record=lambda record: seen.append(record["step"]))
    for step in range(1, 6):
        made.step(facts(step), numbers())
        assert seen == list(range(1, step))
    made.flush()
    assert [record["step"] for record in sink.records] == [2, 4, 5]
    record = sink.records[-1]
    assert record["expert_load_max_over_mean"] == 1.5
    assert record["expert_load_max_over_mean_per_layer"] == [1.5, 1.0]
    assert record["expert_load_over_mean_last_layer"] == [1.5, 0.5]
    assert record["mfu"] == pytest.approx(record["tokens_per_s"] * 10.0 / 1e3)


def test_an_unknown_peak_gives_no_mfu():
    sink = Kept()
    made = recorder(sink, peak_flops=None)
    for step in (1, 2):
        made.step(facts(step), numbers())
    made.flush()
    assert sink.records[0]["tokens_per_s"] and sink.records[0]["mfu"] is None


def test_skipped_steps_are_counted_and_always_written():
    sink = Kept()
    made = recorder(sink, every=100, last_step=100, skipped=4)
    for step, finite in ((1, True), (2, False), (3, False), (4, True)):
        made.step(facts(step), numbers(finite=finite))
    made.flush()
    assert [(r["step"], r["skipped_steps"]) for r in sink.records] == [(2, 5), (3, 6)]
    assert made.skipped_in_a_row == 0


def test_validation_joins_the_record_of_its_step():
    sink = Kept()
    made = recorder(sink, every=100, last_step=100)
    made.step(facts(1), numbers())
    with made.pause():
        made.validation({"val_loss": 3.0})
    made.step(facts(2), numbers())
    assert [(r["step"], r["val_loss"]) for r in sink.records] == [(1, 3.0)]


def test_a_resumed_run_rewrites_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (10, 20, 30)]
    path.write_text("\n".join(lines) + '\n{"step": 40, "lo')  # a crash cut the last line short
    assert [record["step"] for record in read_metrics(path)] == [10, 20, 30]
    file = MetricsFile(path, last_step=20)
    assert [record["step"] for record in file.kept] == [10, 20]
    file.write({"step": 25, "loss": float("nan"), "val_loss": float("inf")})
    file.close()
    assert path.read_text() == f'{lines[0]}\n{lines[1]}\n{{"step": 25, "loss": null, "val_loss": null}}\n'


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a line of metrics; delete it: 'nonsense'$"):
        read_metrics(path)


def test_load_over_mean_of_an_idle_layer_is_zero():
    np.testing.assert_allclose(load_over_mean(np.array([[4, 0], [0, 0]])), [[2, 0], [0, 0]])


def test_a_line_says_where_the_time_since_the_line_before_went():
    sink, clock = Kept(), Clock()
    phases = Phases(clock)
    made = recorder(sink, phases=phases)
    for step in range(1, 5):
        with phases("data"):
            clock.wait(1)
        with phases("compilation" if step == 1 else "step"):
            clock.wait(10)
        made.step(facts(step), numbers())
    with phases("save"):
        clock.wait(7)
    made.flush()
    spent = ("data", "step", "compilation", "validation", "save")
    # A record is written when the next step has been started.
    assert [[record[f"{name}_seconds"] for name in spent] for record in sink.records] == [
        [3, 20, 10, 0, 0],
        [1, 10, 0, 0, 7],
    ]
    assert set(RECORD_KEYS) == set(sink.records[0])
    assert shares_of_time(phases.total()) == "step 58.8 %, compilation 19.6 %, save 13.7 %, data 7.8 %"


def test_memory_is_the_process_or_the_fullest_device(monkeypatch):
    before = peak_of_process()
    held = np.ones(2**25)  # 256 MiB
    assert peak_of_process() >= before and peak_of_process() > held.nbytes and peak_of_devices() is None
    devices = [SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak}) for peak in (3, 9, 5)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_of_devices() == 9
