"""Small models and runs to generate with."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from engines import SMALL, TEXT
from jaxtyping import PyTree

from dsjax.checkpoint.native import Checkpoints
from dsjax.config import Config, DataConfig, ModelConfig, TrainConfig, YarnConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.model.layout import unstack
from dsjax.model.transformer import initial_parameters
from dsjax.settings import to_dict, to_toml

YARN = YarnConfig(factor=4.0, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=0.7)
V2 = {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False}
VARIANTS = {
    "v3": SMALL,
    "v3-yarn": replace(SMALL, rope_scaling=YARN),
    "v2-yarn": replace(SMALL, rope_scaling=YARN, n_shared_experts=2, **V2),
    "v2-lite": replace(SMALL, q_lora_rank=0, n_group=1, topk_group=1, **V2 | {"topk_method": "greedy"}),
    "dense": replace(SMALL, num_hidden_layers=2, first_k_dense_replace=2),
    "sparse": replace(SMALL, num_hidden_layers=2, first_k_dense_replace=0),
}


def draw_parameters(config: ModelConfig, seed: int = 0) -> tuple[PyTree, PyTree]:
    """Return stacked parameters, and biases that change what the routers choose."""
    params, biases = jax.jit(lambda: initial_parameters(config, seed))()
    keys = iter(jax.random.split(jax.random.key(seed), 2))
    return params, jax.tree.map(lambda b: 0.1 * jax.random.normal(next(keys), b.shape), biases)


@pytest.fixture(scope="session")
def random_parameters():
    """`draw_parameters`."""
    return draw_parameters


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    """A V3 with a query LoRA and without YaRN."""
    return SMALL


@pytest.fixture(scope="session", params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request) -> ModelConfig:
    """One of every kind of model."""
    return request.param


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE with a few merges: most characters that are not ASCII are several tokens."""
    return Tokenizer.train([TEXT], SMALL.vocab_size)


@pytest.fixture(scope="session")
def run(tmp_path_factory, tokenizer) -> Path:
    """The folder of a run with two checkpoints, whose average weights differ from the live ones."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    model = replace(SMALL, num_nextn_predict_layers=1)
    config = Config(model=model, train=TrainConfig(steps=2, batch_size=1), data=DataConfig(sequence_length=64))
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(config))
    tokenizer.save(folder / "tokenizer.json")
    with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            params, biases = draw_parameters(model, step)
            params, biases = unstack(params, model), unstack(biases, model)
            ema = jax.tree.map(lambda leaf: leaf * 0.5, params)
            state = {"step": jnp.int32(step), "params": params, "biases": biases, "ema": ema}
            checkpoints.save(step, state, {"config": to_dict(config)})
    return folder
