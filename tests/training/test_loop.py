"""Whole runs: from settings and text to pictures, killed, damaged, interrupted and resumed."""

import json
import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dsjax.benchmarks.train_step import measure
from dsjax.checkpoint.native import Checkpoints
from dsjax.config import CheckpointConfig, Config
from dsjax.model.layout import unstack
from dsjax.runtime import runtime_of
from dsjax.settings import load_config
from dsjax.training.folder import RunFolder
from dsjax.training.loop import TrainingFailed, train
from dsjax.training.metrics import OF_THE_MACHINE, RECORD_KEYS, read_metrics
from dsjax.training.schedule import Schedule
from dsjax.training.start import first_state
from dsjax.training.state import abstract_state
from dsjax.training.step import accumulated_loss_and_grads


def quiet_train(config: Config, **options):
    return train(config, console=Console(quiet=True), **options)


@pytest.fixture(scope="session")
def finished(short_run):
    """The summary of the whole run."""
    return quiet_train(short_run)


@pytest.fixture
def copy(finished, short_run, tmp_path) -> Config:
    """The finished run, in a folder of its own."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    return replace(short_run, run=str(tmp_path / "copy"))


def arrays_of(folder: Path, config: Config, step: int) -> list[np.ndarray]:
    abstract = abstract_state(config)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        _, tree, _ = checkpoints.restore(abstract | {"ema": abstract["params"]}, step)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_a_model_of_dense_layers(short_run, tmp_path):
    model = replace(short_run.model, num_hidden_layers=1, num_nextn_predict_layers=0)
    train_config = replace(short_run.train, steps=2, validate_every=2)
    summary = quiet_train(replace(short_run, model=model, train=train_config, run=str(tmp_path / "dense")))
    (record,) = read_metrics(summary.folder / "metrics.jsonl")
    assert record["expert_load_max_over_mean"] == 0 and record["expert_load_max_over_mean_per_layer"] == []
    assert {path.name for path in (summary.folder / "pictures").iterdir()} == {"loss.png", "schedule.png"}


def test_a_run_leaves_what_it_promises(finished, short_run):
    folder = finished.folder
    assert finished.finished and finished.steps == 20
    assert load_config([str(folder / "config.toml")]) == short_run
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(2, 21, 2))
    assert set(RECORD_KEYS) <= set(records[0])
    assert [record["tokens"] for record in records] == [record["step"] * 4 * 32 for record in records]
    assert records[-1]["loss"] < records[0]["loss"]
    validated = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    assert set(validated) == {10, 20} and validated[20] == finished.val_loss < validated[10]
    assert {"val_loss_ema", "val_loss_mtp"} <= set(records[-1])
    assert all(record["expert_load_max_over_mean"] >= 1 for record in records)
    assert len(records[0]["expert_load_max_over_mean_per_layer"]) == 3  # two main layers and the MTP module
    pictures = {"loss.png", "expert_load.png", "expert_placement.png", "schedule.png"}
    assert {path.name for path in (folder / "pictures").iterdir()} == pictures
    assert set(finished.baselines) == {"Kneser-Ney bigram", "Kneser-Ney trigram"}
    assert list((folder / "tensorboard").iterdir()) and (folder / "tokenizer.json").exists()
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [10, 20]


def test_a_finished_run_has_nothing_to_do(copy, finished):
    again = quiet_train(copy)
    assert (again.steps, again.finished, again.val_loss) == (20, True, finished.val_loss)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(copy, finished, caplog):
    largest = max((Path(copy.run) / "checkpoints" / "20").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(data)
    with caplog.at_level(logging.WARNING, "dsjax.checkpoint"):
        quiet_train(copy)
    assert f"checkpoint {Path(copy.run).absolute() / 'checkpoints' / '20'} is damaged" in caplog.text
    assert_same_bits(arrays_of(Path(copy.run), copy, 20), arrays_of(finished.folder, copy, 20))


def test_a_setting_newer_than_the_checkpoint_was_at_its_default(copy, monkeypatch):
    newest = RunFolder._newest_metadata

    def older(folder):
        metadata = newest(folder)
        del metadata["config"]["kernels"]["fp8_gradient_blocks"], metadata["config"]["data"]["sequence_length"]
        return metadata

    monkeypatch.setattr(RunFolder, "_newest_metadata", older)
    with pytest.raises(ValueError, match=r"other settings \(data.sequence_length: 4096 in the checkpoint, 32 now\)"):
        quiet_train(copy)


def test_refusals(copy, short_run, tmp_path):
    def refused(config: Config, **options) -> str:
        with pytest.raises(ValueError) as error:
            quiet_train(config, **options)
        return str(error.value)

    name = f"run = {copy.run!r}: "
    changed = replace(copy, train=replace(copy.train, seed=1), optimizer=replace(copy.optimizer, beta1=0.8))
    assert refused(changed) == (
        name + "its checkpoint was made with other settings (optimizer.beta1: 0.9 in the checkpoint, 0.8 now; "
        "train.seed: 0 in the checkpoint, 1 now); set them back, name another folder, or begin anew with "
        "--fresh --overwrite"
    )
    other = tmp_path / "other.txt"
    other.write_text("something else\n" * 400)
    assert refused(replace(copy, data=replace(copy.data, path=str(other)))) == (
        name + "its checkpoint was made from other data than the source gives now; put the data back, name another "
        "folder, or begin anew with --fresh --overwrite"
    )
    assert refused(copy, fresh=True) == (
        name + "a run is there, which --fresh would lose; add --overwrite, or name another folder"
    )
    assert refused(copy, overwrite=True) == (
        "--overwrite goes with --fresh: without it, the same command resumes the run"
    )
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    photos = str(tmp_path / "photos")
    assert refused(replace(short_run, run=photos)) == (
        f"run = {photos!r}: the folder holds something else than a run; name another"
    )
    assert (tmp_path / "photos" / "cat.png").exists()


def test_what_does_not_change_the_numbers_may_change(copy):
    train_settings = replace(copy.train, log_every=5, validate_every=20, max_bad_steps=3)
    quiet_train(replace(copy, train=train_settings, checkpoint=CheckpointConfig(every=7, keep=1)))


def test_fresh_and_overwrite_begin_anew(copy):
    summary = quiet_train(replace(copy, train=replace(copy.train, steps=4)), fresh=True, overwrite=True)
    assert summary.steps == 4
    assert [record["step"] for record in read_metrics(Path(copy.run) / "metrics.jsonl")] == [2, 4]


def test_too_many_steps_without_numbers_end_the_run(short_run, tmp_path):
    config = replace(short_run, run=str(tmp_path / "bad"), train=replace(short_run.train, max_bad_steps=3))
    sound = accumulated_loss_and_grads(config, runtime_of(config))

    def broken(params, biases, micro_batches, mtp_weight):
        parts, grads = sound(params, biases, micro_batches, mtp_weight)
        return parts._replace(main=parts.main * jnp.nan), grads

    with pytest.raises(
        TrainingFailed, match=r"^losses or gradients of 3 steps in a row, up to step 3, were not finite"
    ):
        quiet_train(config, loss_and_grads=broken)
    records = read_metrics(tmp_path / "bad" / "metrics.jsonl")
    assert [(r["step"], r["loss"], r["skipped_steps"]) for r in records] == [(1, None, 1), (2, None, 2), (3, None, 3)]


def test_micro_batches_ramp_and_document_mask(short_run, tmp_path):
    train_settings = replace(
        short_run.train, steps=8, batch_size=8, micro_batch_size=2, batch_ramp_start=2, batch_ramp_fraction=0.5
    )
    config = replace(
        short_run, run=str(tmp_path / "ramp"), train=replace(train_settings, log_every=1, ema_decay=0.0),
        data=replace(short_run.data, document_mask=True),
    )  # fmt: skip
    quiet_train(config)
    records = read_metrics(tmp_path / "ramp" / "metrics.jsonl")
    schedule = Schedule(config)
    assert [r["batch_size"] for r in records] == [schedule.batch_size(step) for step in range(8)]
    assert records[0]["batch_size"] == 2 and records[-1]["batch_size"] == 8
    assert [r["tokens"] for r in records] == [schedule.first_sequence(step + 1) * 32 for step in range(8)]
    assert "val_loss_ema" not in records[-1]


def test_benchmark(short_run):
    measured = json.loads(json.dumps(measure(short_run, 2)))
    assert measured["tokens_per_step"] == 128
    assert measured["compile_s"] > 0 and measured["peak_memory_process_bytes"] > 1e8
    assert measured["tokens_per_s"] == pytest.approx(128 * measured["steps_per_s"])
    assert measured["mfu"] > 0


def test_a_run_begins_with_the_weights_of_another(finished, short_run, tmp_path):
    config = replace(short_run, run=str(tmp_path / "second"))
    config = replace(config, train=replace(config.train, initial_weights=str(finished.folder)))
    state = first_state(config)
    with Checkpoints(finished.folder / "checkpoints") as checkpoints:
        abstract = {"params": abstract_state(config)["params"]}
        _, saved, _ = checkpoints.restore(abstract, 20, partial=True)
    assert int(state.step) == 0
    found = jax.tree.leaves(unstack(state.params, config.model))
    assert_same_bits([np.asarray(a) for a in found], [np.asarray(a) for a in jax.tree.leaves(saved["params"])])
    wider = replace(config, model=replace(config.model, hidden_size=64))
    with pytest.raises(ValueError, match=r"another model's; model.hidden_size: 32 in the weights, 64 now$"):
        first_state(wider)
    alone = replace(config, model=replace(config.model, num_nextn_predict_layers=0))
    assert "mtp" not in first_state(alone).params
    deeper = replace(config, model=replace(config.model, num_nextn_predict_layers=2))
    with pytest.raises(ValueError, match=r"model.num_nextn_predict_layers: 1 in the weights, 2 now$"):
        first_state(deeper)


KILLED = """
import os, signal, sys
from dsjax.training import loop
step = loop.Run._step
def killed(self, at, *rest):
    if at == 13:
        self.folder.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, at, *rest)
loop.Run._step = killed
from dsjax.train import main
main(sys.argv[1:])
"""


def test_a_killed_run_resumes_to_the_same_bits(command, short_run, tmp_path):
    undisturbed = command(tmp_path / "undisturbed")
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    killed = command(tmp_path / "killed", code=KILLED)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    resumed = command(tmp_path / "killed")
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert "resumed   from step 10 of 20" in out
    expected = arrays_of(tmp_path / "undisturbed", short_run, 20)
    assert_same_bits(arrays_of(tmp_path / "killed", short_run, 20), expected)
    lines = [
        [
            {k: v for k, v in record.items() if k not in OF_THE_MACHINE}
            for record in read_metrics(tmp_path / n / "metrics.jsonl")
        ]
        for n in ("undisturbed", "killed")
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(command, tmp_path, number):
    process = command(tmp_path / "run", "--train.steps", "100000", "--checkpoint.every", "100000")
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"{number.name}: saving and stopping" in out
    assert "to resume, run the command without --fresh" in out
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        (step,) = checkpoints.steps()
    assert f"stopped at step {step} of 100000, saved" in out


def test_a_second_ctrl_c_stops_at_once(command, tmp_path):
    process = command(tmp_path / "run", "--train.steps", "100000")
    for line in process.stdout:
        if line.startswith("compiling"):
            break
    process.send_signal(signal.SIGINT)
    for line in process.stdout:
        if line.startswith("SIGINT"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode in (130, 0), err
    assert process.returncode == 0 or "stopped at once; the last complete checkpoint is as it was" in err
