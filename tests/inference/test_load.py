"""Models come from runs and from released weights, whole, or with an error that says what is wrong."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint.huggingface import save_huggingface
from dsjax.inference.load import load_model
from dsjax.model.layout import unstack


def assert_trees_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture
def copy(run, tmp_path):
    """A run to be spoilt."""
    return shutil.copytree(run, tmp_path / "copy")


@pytest.mark.parametrize("ema", [False, True])
def test_a_run(run, small, random_parameters, tokenizer, ema):
    model = load_model(run, ema=ema)
    params, biases = random_parameters(replace(small, num_nextn_predict_layers=1), 2)
    del params["mtp"], biases["mtp"]
    assert_trees_equal(model.params, jax.tree.map(lambda leaf: leaf * 0.5, params) if ema else params)
    assert_trees_equal(model.biases, biases)
    assert model.config == small
    assert (model.opening, model.context) == (tokenizer.eos, 64)
    assert "step 2 of" in model.origin and ("averaged" in model.origin) == ema


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_with_its_modules(run, small, random_parameters, ema):
    model, config = load_model(run, ema=ema, mtp=True), replace(small, num_nextn_predict_layers=1)
    params, biases = random_parameters(config, 2)
    assert model.config == config
    assert_trees_equal(model.params, jax.tree.map(lambda leaf: leaf * 0.5, params) if ema else params)
    assert_trees_equal(model.biases, biases)
    without, plain = model.with_modules(0), load_model(run, ema=ema)
    assert without.config == plain.config
    assert_trees_equal((without.params, without.biases), (plain.params, plain.biases))


def test_released_weights_with_modules(tmp_path, small, random_parameters, tokenizer):
    config = replace(small, num_nextn_predict_layers=2)
    params, biases = random_parameters(config)
    save_huggingface(tmp_path / "weights", config, unstack(params, config), unstack(biases, config), "fp32")
    tokenizer.save(tmp_path / "weights" / "tokenizer.json")
    model = load_model(tmp_path / "weights", mtp=True)
    assert_trees_equal((model.params, model.biases), (params, biases))
    first, plain = model.with_modules(1), load_model(tmp_path / "weights")
    assert_trees_equal(first.params["mtp"], jax.tree.map(lambda leaf: leaf[:1], params["mtp"]))
    assert first.config.num_nextn_predict_layers == 1
    assert "mtp" not in plain.params
    assert plain.config.num_nextn_predict_layers == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copy, caplog):
    # All files, because arrays that generating does not need may lie in any one, differently from save to save.
    for victim in (copy / "checkpoints" / "2").rglob("d/*"):
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    assert "step 1 of" in load_model(copy).origin
    assert "checkpoints/2 is damaged" in caplog.text


def test_released_weights(tmp_path, small, random_parameters, tokenizer):
    params, biases = random_parameters(small)
    folder = tmp_path / "weights"
    save_huggingface(folder, small, unstack(params, small), unstack(biases, small), "fp32")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_model(folder)
    tokenizer.save(folder / "tokenizer.json")
    model = load_model(folder)
    assert_trees_equal(model.params, params)
    assert_trees_equal(model.biases, biases)
    assert replace(model.config, name="test", initializer_range=small.initializer_range) == small
    assert (model.opening, model.context) == (tokenizer.bos, 4096)
    assert model.params["embed"].dtype == jnp.float32
    with pytest.raises(ValueError, match="only a run has averaged weights"):
        load_model(folder, ema=True)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")


def test_neither_run_nor_weights(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda folder: [shutil.rmtree(step) for step in folder.iterdir()]])
def test_no_checkpoint_yet(copy, spoil):
    spoil(copy / "checkpoints")
    with pytest.raises(ValueError, match="the run has no checkpoint yet"):
        load_model(copy)


def test_no_whole_checkpoint(copy):
    for file in (copy / "checkpoints").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="no usable checkpoint"):
        load_model(copy)


def test_no_average(copy):
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("ema_decay = 0.999", "ema_decay = 0.0"))
    with pytest.raises(ValueError, match="keeps no average"):
        load_model(copy, ema=True)


def test_a_tokenizer_of_another_model(copy):
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("vocab_size = 320", "vocab_size = 300"))
    with pytest.raises(ValueError, match=r"vocab_size|embed"):
        load_model(copy)
