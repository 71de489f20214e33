"""The whole recipe in one run (`configs/tiny_v3.toml`) against one device, with the data and the steps of a run."""

from dataclasses import replace

import numpy as np
import pytest

from dsjax.config import MeshConfig, YarnConfig
from dsjax.pipeline.stages import schedule_of
from dsjax.settings import load_config
from dsjax.training.loop import train
from dsjax.training.metrics import read_metrics
from dsjax.training.schedule import Schedule


@pytest.fixture(scope="module")
def recipe(text, tmp_path_factory):
    """Five steps of 8, 8, 12, 16 and 16 sequences: two sizes under ZB1P, one under DualPipe."""
    config = load_config(["tiny_v3"])
    cache = str(tmp_path_factory.mktemp("cache"))
    data = replace(config.data, source="text", path=str(text), cache=cache, sequence_length=64, fim_rate=0.0)
    model = replace(config.model, vocab_size=300, num_hidden_layers=4)
    small = replace(
        config.train, steps=5, batch_ramp_fraction=0.6, validate_every=5, validation_sequences=8, log_every=1
    )
    return replace(config, model=model, data=data, train=small)


def records_of(config, folder):
    folder = train(replace(config, run=str(folder))).folder
    return read_metrics(folder / "metrics.jsonl")


def test_the_ramp_has_three_programs(recipe):
    sizes = Schedule(recipe).batch_sizes()
    schedules = [schedule_of(recipe, size // recipe.train.micro_batch_size) for size in sizes]
    assert [(s.name, s.micro_batches) for s in schedules] == [("ZB1P", 2), ("ZB1P", 3), ("DualPipe", 4)]


@pytest.mark.slow
def test_in_float32_losses_are_those_of_one_device(recipe, tmp_path):
    """Pipeline, expert parallelism, ZeRO-1, MTP, average and ramp together: equal to 1e-5 for five steps."""
    exact = replace(recipe, precision="fp32", optimizer=replace(recipe.optimizer, moment_dtype="fp32"))
    recipe_records = records_of(exact, tmp_path / "recipe")
    alone = records_of(replace(exact, mesh=MeshConfig()), tmp_path / "alone")
    assert [record["batch_size"] for record in alone] == [8, 8, 12, 16, 16]
    for key in ("loss", "loss_mtp", "loss_balance", "grad_norm"):
        found, expected = ([record[key] for record in records] for records in (recipe_records, alone))
        np.testing.assert_allclose(found, expected, rtol=1e-5 if key != "grad_norm" else 1e-4, err_msg=key)
    for key in ("val_loss", "val_loss_ema"):
        np.testing.assert_allclose(recipe_records[-1][key], alone[-1][key], rtol=1e-5)


@pytest.mark.slow
def test_in_fp8_it_learns_as_in_bf16_on_one_device(recipe, tmp_path):
    """Five steps; a hundred are a measurement, see docs/benchmarks.md."""
    found, expected = (
        [record["loss"] for record in records_of(config, tmp_path / name)]
        for name, config in {"fp8": recipe, "bf16": replace(recipe, precision="bf16", mesh=MeshConfig())}.items()
    )
    np.testing.assert_allclose(found, expected, rtol=5e-3)
    assert not np.allclose(found, expected, rtol=1e-6), "nothing was quantized"


@pytest.mark.slow
def test_a_longer_context_begins_where_the_run_ended(short_run, tmp_path):
    """YaRN and sequences of twice the length, from a finished run: what it learned is there in the first step."""
    short = replace(short_run, run=str(tmp_path / "short"))
    before = read_metrics(train(short).folder / "metrics.jsonl")
    yarn = YarnConfig(factor=2.0, original_max_position_embeddings=short.data.sequence_length)
    longer = replace(
        short,
        model=replace(short.model, rope_scaling=yarn),
        data=replace(short.data, sequence_length=2 * short.data.sequence_length),
        train=replace(short.train, steps=4, batch_size=2, log_every=1, validate_every=4, initial_weights=short.run),
        optimizer=replace(short.optimizer, learning_rate=1e-4, warmup=0.0),
    )
    extended = records_of(longer, tmp_path / "longer")
    drawn = records_of(replace(longer, train=replace(longer.train, initial_weights="")), tmp_path / "drawn")
    assert extended[0]["loss"] < before[-1]["loss"] + 0.3 < drawn[0]["loss"] - 1
    assert extended[-1]["val_loss"] < drawn[-1]["val_loss"] - 1
