"""Absorbed decoding with a latent cache equals the full forward, however tokens come; programs are compiled once."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.inference.cache import empty_cache
from dsjax.inference.programs import decode, extend, prefill
from dsjax.inference.sampling import Sampling, choice
from dsjax.model.layers import cast_weights
from dsjax.model.layout import stack
from dsjax.model.transformer import Transformer, abstract_parameters, logits, split
from dsjax.runtime import Runtime

BATCH, LENGTH = 2, 21
GREEDY = choice([Sampling(temperature=0.0)])


class Reader:
    """Reads tokens piece by piece and keeps the logits of every position."""

    def __init__(self, config, params, biases, batch, runtime=None, capacity=32):
        runtime = runtime or Runtime()
        self.extend = jax.jit(partial(extend, config=config, runtime=runtime))
        self.params, self.biases = params, biases
        self.cache = empty_cache(config, batch, capacity, runtime.compute_dtype)

    def read(self, tokens, counts=None):
        counts = jnp.asarray(counts if counts is not None else [tokens.shape[1]] * len(tokens))
        hidden, self.cache = self.extend(self.params, self.biases, self.cache, tokens, counts)
        return logits(self.params, hidden)


def make(config):
    """Return a model's full forward, and its parameters stacked; its biases change what the routers choose."""
    module = Transformer(config, nnx.Rngs(0))
    for i, layer in enumerate(module.layers):
        if config.topk_method == "noaux_tc" and i >= config.first_k_dense_replace:
            layer.moe.bias[...] = 0.1 * jax.random.normal(jax.random.key(i), layer.moe.bias.shape)
    params, biases = (stack(tree, config) for tree in split(module))
    return jax.jit(lambda tokens: module(tokens)[0]), params, biases


@pytest.fixture(scope="module")
def model(small):
    """The plain model."""
    return make(small)


def some_tokens(batch=BATCH, length=LENGTH):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, 320)


def test_cached_logits_equal_the_full_forward(variant):
    full, params, biases = make(variant)
    tokens = some_tokens()
    expected = full(tokens)
    assert jnp.abs(expected - full(tokens.at[:, 0].set(0))).max() > 0.1  # the past matters
    reader = partial(Reader, variant, params, biases, BATCH)

    single = reader()
    one_by_one = jnp.concatenate([single.read(tokens[:, i : i + 1]) for i in range(LENGTH)], axis=1)
    pieces, padded = reader(), []
    for start in range(0, LENGTH, 8):
        piece = tokens[:, start : start + 8]
        count = piece.shape[1]
        piece = jnp.pad(piece, ((0, 0), (0, 8 - count)), constant_values=7)
        padded.append(pieces.read(piece, [count] * BATCH)[:, :count])

    for found in (one_by_one, jnp.concatenate(padded, axis=1)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert pieces.cache.lengths.tolist() == single.cache.lengths.tolist() == [LENGTH] * BATCH
    np.testing.assert_allclose(pieces.cache.entries, single.cache.entries, rtol=0, atol=1e-5)


def test_a_prompt_in_one_go_and_a_batch_of_strangers(small, model):
    full, params, biases = model
    tokens, counts = some_tokens(3, 8), np.array([8, 3, 1])
    reader = Reader(small, params, biases, 3)
    first = reader.read(tokens, counts)
    assert reader.cache.lengths.tolist() == counts.tolist()
    then = reader.read(tokens[:, :1] + 1)
    for i, count in enumerate(counts):
        alone = jnp.zeros((1, 9), int).at[0, :count].set(tokens[i, :count]).at[0, count].set(tokens[i, 0] + 1)
        expected = full(alone)[0]  # what comes behind is not seen
        np.testing.assert_allclose(first[i, :count], expected[:count], rtol=0, atol=1e-5)
        np.testing.assert_allclose(then[i, 0], expected[count], rtol=0, atol=1e-5)


def test_nothing_is_written_behind_what_was_read_nor_past_the_end(small, model):
    _, params, biases = model
    reader = Reader(small, params, biases, 1, capacity=8)
    reader.read(some_tokens(1, 6), [2])
    assert jnp.abs(reader.cache.entries[:, :, :2]).min() > 0
    assert not reader.cache.entries[:, :, 2:].any()
    before = reader.cache.entries
    reader.read(some_tokens(1, 6), [6])
    reader.read(some_tokens(1, 6), [6])  # more than there is room for
    assert (reader.cache.entries[:, :, :2] == before[:, :, :2]).all()


def test_decode_continues_prefill_with_the_likeliest_token(small, model):
    full, params, biases = model
    text = jnp.zeros((1, 12), int).at[:, :5].set(some_tokens(1, 5))
    shared = {"config": small, "runtime": Runtime()}
    everything = jnp.ones((1, small.vocab_size), bool)
    cache = empty_cache(small, 1, 32, jnp.float32)
    token, cache = prefill(params, biases, cache, text[:, :5], jnp.array([5]), GREEDY, everything, **shared)
    for at in range(5, 12):
        assert token.tolist() == [int(full(text)[0, at - 1].argmax())]
        text = text.at[:, at].set(token)
        token, cache = decode(params, biases, cache, token, GREEDY, **shared)


def test_decode_is_compiled_once_and_writes_in_place(small, model):
    _, params, biases = model
    cache, token = empty_cache(small, 1, 40, jnp.float32), jnp.array([3], jnp.int32)
    compiled = decode._cache_size()
    for step in range(12):
        how = choice([Sampling(temperature=step / 4, top_p=1 - step / 20, top_k=step, seed=step)])
        given = cache.entries
        token, cache = decode(params, biases, cache, token, how, config=small, runtime=Runtime())
        assert given.is_deleted()
    assert decode._cache_size() == compiled + 1


def test_programs_do_not_grow_with_depth(small):
    def lines(layers):
        config = replace(small, num_hidden_layers=layers)
        params = [stack(tree, config) for tree in abstract_parameters(config)]
        cache, token = empty_cache(config, 1, 32, jnp.float32), jnp.array([3], jnp.int32)
        program = partial(decode, config=config, runtime=Runtime())
        return str(jax.make_jaxpr(program)(*params, cache, token, GREEDY)).count("\n")

    assert lines(40) == lines(4)


def test_bfloat16(small, model):
    full, params, biases = model
    tokens = some_tokens()
    reader = Reader(small, cast_weights(params, jnp.bfloat16), biases, BATCH, Runtime(jnp.bfloat16))
    found, expected = reader.read(tokens), full(tokens)
    assert reader.cache.entries.dtype == jnp.bfloat16
    # A router may choose another expert for a few of the tokens.
    assert jnp.median(jnp.abs(found - expected)) < 0.05 * jnp.median(jnp.abs(expected))
