"""A small run whose compiled steps the tests of this folder share."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import SMALL

from dsjax.config import CheckpointConfig, Config, DataConfig, OptimizerConfig, TrainConfig
from dsjax.runtime import Runtime
from dsjax.settings import to_toml
from dsjax.training.state import initial_state
from dsjax.training.step import make_train_step


@pytest.fixture(scope="session")
def small_run() -> Config:
    """One dense and two MoE layers and one MTP module; float32 moments and no clipping, so that they show gradients."""
    return Config(
        model=replace(SMALL.model, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2),
        data=DataConfig(sequence_length=16),
        train=TrainConfig(steps=100, batch_size=4, balance_weight=0.01),
        optimizer=OptimizerConfig(moment_dtype="fp32", clip_norm=0.0),
        precision="fp32",
    )


@pytest.fixture(scope="session")
def tokens(small_run):
    """Four sequences, as int32[4, S + 1]."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 64, (4, small_run.data.sequence_length + 1)), jnp.int32)


@pytest.fixture(scope="session")
def start(small_run):
    """Return a new copy of the first state at each call, because a step takes its state's memory."""
    state = initial_state(small_run)
    return lambda: jax.tree.map(jnp.copy, state)


@pytest.fixture(scope="session")
def train_step(small_run):
    return make_train_step(small_run, Runtime())


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder of text: thirty documents of counting."""
    folder = tmp_path_factory.mktemp("text")
    for document in range(30):
        lines = (f"line {i} of document {document}: {i * document}\n" for i in range(60))
        (folder / f"{document:02d}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def short_run(small_run, text, tmp_path_factory) -> Config:
    """Twenty steps, a checkpoint after ten."""
    return replace(
        small_run,
        model=replace(small_run.model, vocab_size=300),
        data=DataConfig(source="text", path=str(text), cache=str(tmp_path_factory.mktemp("cache")), sequence_length=32),
        train=TrainConfig(
            steps=20, batch_size=4, validate_every=10, validation_sequences=8, log_every=2, remat="none", ema_decay=0.9
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=10),
        run=str(tmp_path_factory.mktemp("runs") / "short"),
    )


@pytest.fixture(scope="session")
def command(short_run, tmp_path_factory):
    """Start `python -m dsjax.train` on the short run in a folder; with `code`, that code in its place."""
    toml = tmp_path_factory.mktemp("toml") / "short.toml"
    toml.write_text(to_toml(short_run))
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }

    def start(folder: Path, *options: str, code: str = "") -> subprocess.Popen[str]:
        program = ["-c", code] if code else ["-m", "dsjax.train"]
        words = [sys.executable, *program, str(toml), "--run", str(folder), *options]
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start
