"""A trained model from disk, ready to generate: a run, or released weights in any form that `checkpoint/` reads."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jaxtyping import PyTree

from dsjax.checkpoint.forms import open_checkpoint
from dsjax.checkpoint.huggingface import load
from dsjax.checkpoint.native import Checkpoints, NoUsableCheckpoint
from dsjax.checkpoint.sources import RUN_FOLDER
from dsjax.config import ModelConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.model.layers import cast_weights
from dsjax.model.layout import stack
from dsjax.model.transformer import abstract_parameters
from dsjax.runtime import Runtime, compute_dtype
from dsjax.settings import load_config


@dataclass(frozen=True)
class Model:
    """All that generating needs; without MTP modules."""

    config: ModelConfig
    runtime: Runtime
    params: PyTree
    """Stacked, weights in the compute format."""
    biases: PyTree
    """Router biases, stacked."""
    tokenizer: Tokenizer
    opening: int
    """Id of the token in front of a document."""
    context: int
    """Tokens of the sequences that the model was made for; RoPE itself has no limit."""
    origin: str
    """Where the weights are from, for people."""


def load_model(path: str | Path, *, ema: bool = False) -> Model:
    """Load the newest undamaged checkpoint of a run, or released weights.

    Args:
        path: folder of a run, or of weights with their config and `tokenizer.json`.
        ema: whether to take the moving average of a run's weights.

    Raises:
        ValueError: no such folder; neither a run nor weights; no checkpoint yet, or none that is whole; no average;
            no tokenizer, or one with more tokens than the model.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    model = _load_run(path, ema) if (path / "config.toml").is_file() else _load_weights(path, ema)
    if model.tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{path / 'tokenizer.json'} has {model.tokenizer.vocab_size} tokens: must be at most the model's "
            f"vocab_size = {model.config.vocab_size}"
        )
    return model


def _load_run(path: Path, ema: bool) -> Model:
    run = load_config([str(path / "config.toml")])
    if ema and not run.train.ema_decay:
        raise ValueError(f"{path}: the run keeps no average of its weights (train.ema_decay = 0); leave --ema out")
    if not (path / RUN_FOLDER).is_dir():
        raise ValueError(f"{path}: the run has no checkpoint yet")
    config = replace(run.model, num_nextn_predict_layers=0)
    params, biases = abstract_parameters(config)
    tree = "ema" if ema else "params"
    try:
        with Checkpoints(path / RUN_FOLDER) as checkpoints:
            step, found, _ = checkpoints.restore({tree: params, "biases": biases}, partial=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: the run has no checkpoint yet") from None
    except NoUsableCheckpoint as error:
        raise ValueError(str(error)) from error
    tokenizer = _load_tokenizer(path)
    runtime = Runtime(compute_dtype=compute_dtype(run.precision))
    return Model(
        config,
        runtime,
        *_ready(found[tree], found["biases"], config, runtime),
        tokenizer,
        # In the packed sequences that a run learns from, a document follows the end of another.
        opening=tokenizer.eos,
        context=run.data.sequence_length,
        origin=f"step {step} of {path}" + (", averaged weights" if ema else ""),
    )


def _load_weights(path: Path, ema: bool) -> Model:
    if ema:
        raise ValueError(f"{path}: only a run has averaged weights, and this is none; leave --ema out")
    source = open_checkpoint(path, mtp=False)
    try:
        tokenizer, config, released = _load_tokenizer(path), source.config, source.huggingface or {}
        runtime = Runtime(compute_dtype=compute_dtype("auto"))
        weights = load(source, dtype=runtime.compute_dtype)
    finally:
        source.close()
    yarn = config.rope_scaling
    made_for = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else 4096
    return Model(
        config,
        runtime,
        *_ready(weights.params, weights.biases, config, runtime),
        tokenizer,
        opening=tokenizer.eos if tokenizer.bos is None else tokenizer.bos,
        context=released.get("max_position_embeddings", made_for),
        origin=str(path),
    )


def _load_tokenizer(path: Path) -> Tokenizer:
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: no tokenizer.json, without which a prompt cannot be read")
    return Tokenizer.load(path)


def _ready(params: PyTree, biases: PyTree, config: ModelConfig, runtime: Runtime) -> tuple[PyTree, PyTree]:
    arrange = jax.jit(lambda params: cast_weights(stack(params, config), runtime.compute_dtype))
    return arrange(params), stack(biases, config)
