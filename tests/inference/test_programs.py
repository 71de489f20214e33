"""Decoding with a paged latent cache equals the full forward, however tokens come; programs are compiled once."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.inference.cache import empty_cache, write
from dsjax.inference.forward import Batch, forward
from dsjax.inference.machine import Machine
from dsjax.inference.programs import State, decode, prefill
from dsjax.inference.sampling import Sampling, choice
from dsjax.model.layers import cast_weights
from dsjax.model.layout import stack
from dsjax.model.transformer import Transformer, abstract_parameters, logits, split

BATCH, LENGTH = 2, 21
PAGE, TABLE = 4, 8
GREEDY = Sampling(temperature=0.0)


def batch_of(count, lengths, pages=64, seed=0):
    """Sequences on pages that lie anywhere."""
    places = np.random.default_rng(seed).permutation(np.arange(1, pages))[: count * TABLE]
    tables = places.reshape(count, TABLE).astype(np.int32)
    return Batch(jnp.arange(count), jnp.asarray(tables), jnp.asarray(lengths, jnp.int32), choice([GREEDY] * count))


def extend(params, biases, cache, batch, tokens, counts, **how):
    """States behind new tokens, and the cache with them."""
    read = forward(params, biases, cache, batch, tokens, counts, **how)
    return read.hidden, write(cache, read.entries, batch.tables, batch.lengths, counts)


class Reader:
    """Reads tokens piece by piece and keeps the logits of every position."""

    def __init__(self, config, params, biases, batch, runtime=None, cache_format="compute", pages=64, seed=0):
        runtime = runtime or Machine()
        self.programs = {
            form: jax.jit(partial(extend, config=config, runtime=runtime, expanded=form)) for form in (False, True)
        }
        self.params, self.biases = params, biases
        self.cache = empty_cache(config, pages, PAGE, runtime.compute_dtype, cache_format)
        self.batch = batch_of(batch, [0] * batch, pages, seed)

    def read(self, tokens, counts=None, expanded=False):
        counts = jnp.asarray(counts if counts is not None else [tokens.shape[1]] * len(tokens), jnp.int32)
        run = self.programs[expanded]
        hidden, self.cache = run(self.params, self.biases, self.cache, self.batch, tokens, counts)
        self.batch = self.batch._replace(lengths=self.batch.lengths + counts)
        return logits(self.params, hidden)

    def in_pieces(self, tokens, size, expanded):
        found = []
        for start in range(0, tokens.shape[1], size):
            piece = tokens[:, start : start + size]
            count = piece.shape[1]
            piece = jnp.pad(piece, ((0, 0), (0, size - count)), constant_values=7)
            found.append(self.read(piece, [count] * len(tokens), expanded)[:, :count])
        return jnp.concatenate(found, axis=1)


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


def test_cached_logits_equal_the_full_forward(variant, monkeypatch):
    monkeypatch.setattr("dsjax.inference.forward.BLOCK", 2 * PAGE)  # the memory is several blocks
    full, params, biases = make(variant)
    tokens = some_tokens()
    expected = full(tokens)
    assert jnp.abs(expected - full(tokens.at[:, 0].set(0))).max() > 0.1  # the past matters
    for size, expanded in ((1, False), (8, False), (8, True)):
        found = Reader(variant, params, biases, BATCH).in_pieces(tokens, size, expanded)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_place_of_pages_changes_nothing(small, model):
    _, params, biases = model
    one, other = (Reader(small, params, biases, BATCH, seed=seed) for seed in (0, 1))
    assert (one.batch.tables != other.batch.tables).any()
    tokens = some_tokens()
    assert (one.in_pieces(tokens, 8, True) == other.in_pieces(tokens, 8, True)).all()


def test_a_prompt_in_one_go_and_a_batch_of_strangers(small, model):
    full, params, biases = model
    tokens, counts = some_tokens(3, 8), np.array([8, 3, 1])
    reader = Reader(small, params, biases, 3)
    first = reader.read(tokens, counts)
    then = reader.read(tokens[:, :1] + 1)
    for i, count in enumerate(counts):
        alone = jnp.zeros((1, 9), int).at[0, :count].set(tokens[i, :count]).at[0, count].set(tokens[i, 0] + 1)
        expected = full(alone)[0]  # what comes behind is not seen
        np.testing.assert_allclose(first[i, :count], expected[:count], rtol=0, atol=1e-5)
        np.testing.assert_allclose(then[i, 0], expected[count], rtol=0, atol=1e-5)


@pytest.mark.parametrize("expanded", [False, True], ids=["absorbed", "expanded"])
def test_what_others_left_on_a_page_is_not_seen(small, model, expanded):
    """Even if it is no number, and although what is masked is multiplied with a weight of zero."""
    _, params, biases = model
    tokens, clean, dirty = some_tokens(), *(Reader(small, params, biases, BATCH) for _ in range(2))
    dirty.cache = jax.tree.map(lambda array: array.at[:].set(jnp.nan), dirty.cache)
    assert (clean.in_pieces(tokens, 8, expanded) == dirty.in_pieces(tokens, 8, expanded)).all()


def test_only_the_places_of_real_tokens_are_written(small, model):
    _, params, biases = model
    reader = Reader(small, params, biases, 1)
    reader.read(some_tokens(1, 6), [6])
    reader.read(some_tokens(1, 6), [1])
    entries, table = reader.cache.arrays["entries"], reader.batch.tables[0]
    assert jnp.abs(entries[:, table[0]]).min() > 0
    assert jnp.abs(entries[:, table[1], :3]).min() > 0
    others = entries.at[:, table[0]].set(0).at[:, table[1], :3].set(0).at[:, 0].set(0)
    assert not others.any()


def test_fp8_is_near(small, model):
    """Bounds are those of E4M3 with a scale per token, 2^-4 of a value at most; keys are in BF16."""
    full, params, biases = model
    tokens = some_tokens()
    plain, coded = (Reader(small, params, biases, BATCH, cache_format=form) for form in ("compute", "fp8"))
    plain.read(tokens)
    coded.read(tokens)
    assert {name: str(array.dtype) for name, array in coded.cache.arrays.items()} == {
        "codes": "float8_e4m3fn",
        "scales": "float32",
        "keys": "bfloat16",
    }
    exact = plain.cache.arrays["entries"][:, plain.batch.tables].reshape(4, BATCH, -1, 18)[:, :, :LENGTH]
    parts = [coded.cache.arrays[name][:, coded.batch.tables] for name in ("codes", "scales", "keys")]
    codes, scales, keys = (part.reshape(4, BATCH, TABLE * PAGE, -1)[:, :, :LENGTH] for part in parts)
    latent = codes.astype(jnp.float32) * scales
    error = jnp.abs(latent - exact[..., :12])
    assert (error <= jnp.maximum(jnp.abs(exact[..., :12]) / 16, scales * 2.0**-10)).all()
    assert (jnp.abs(keys.astype(jnp.float32) - exact[..., 12:]) <= jnp.abs(exact[..., 12:]) / 256).all()

    found, expected = Reader(small, params, biases, BATCH, cache_format="fp8").in_pieces(tokens, 1, False), full(tokens)
    # The first token sees itself as it is. A router may choose another expert for a few of the others.
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=0, atol=1e-5)
    assert 0 < jnp.median(jnp.abs(found - expected)) < 0.05 * jnp.median(jnp.abs(expected))


def state_of(config, pages=64, slots=3):
    cache = empty_cache(config, pages, PAGE, jnp.float32)
    return State(cache, jnp.zeros(slots, jnp.int32), jnp.zeros((slots, config.vocab_size), bool))


def test_decode_continues_prefill_with_the_likeliest_token(small, model):
    full, params, biases = model
    text = jnp.zeros((1, 12), int).at[:, :5].set(some_tokens(1, 5))
    shared = {"config": small, "runtime": Machine()}
    everything, batch = jnp.ones((1, small.vocab_size), bool), batch_of(1, [0])
    state = state_of(small)
    five, last = jnp.array([5]), jnp.array([True])
    drawn, state = prefill(params, biases, state, batch, text[:, :5], five, everything, last, **shared)
    batch = batch._replace(lengths=jnp.array([5], jnp.int32))
    for at in range(5, 12):
        assert drawn.tokens.tolist() == [int(full(text)[0, at - 1].argmax())]
        text = text.at[:, at].set(drawn.tokens)
        drawn, state, batch = decode(params, biases, state, batch, **shared)
    assert set(text[0, 5:].tolist()) <= set(jnp.flatnonzero(state.seen[0]).tolist())
    assert not state.seen[1:].any()


def test_decode_is_compiled_once_and_writes_in_place(small, model):
    _, params, biases = model
    state, batch = state_of(small, pages=65), batch_of(1, [0], pages=65)
    compiled = decode.alone._cache_size()
    for step in range(12):
        how = {"temperature": step / 4, "top_p": 1 - step / 20, "top_k": step, "seed": step}
        how |= {"repetition_penalty": 1 + step / 10, "logprobs": step if step % 2 else None}
        batch = batch._replace(choice=jax.tree.map(jnp.asarray, choice([Sampling(**how)])))
        given = state.cache.arrays["entries"]
        _, state, batch = decode(params, biases, state, batch, config=small, runtime=Machine())
        assert given.is_deleted()
    assert decode.alone._cache_size() == compiled + 1


def test_a_step_touches_the_pages_of_its_requests_only(small, model):
    """XLA counts as many bytes of temporary memory, and copies no array, whatever else the cache holds."""
    _, params, biases = model

    def compiled(pages):
        batch = batch_of(2, [0, 0])
        shapes = jax.eval_shape(lambda: state_of(small, pages))
        return decode.alone.lower(params, biases, shapes, batch, config=small, runtime=Machine()).compile()

    few, many = compiled(64), compiled(64_000)
    assert few.memory_analysis().temp_size_in_bytes == many.memory_analysis().temp_size_in_bytes
    assert few.memory_analysis().temp_size_in_bytes < 2**20 < 64_000 * PAGE * 4 * 18 * 4


def test_programs_do_not_grow_with_depth(small):
    def lines(layers):
        config = replace(small, num_hidden_layers=layers)
        params = [stack(tree, config) for tree in abstract_parameters(config)]
        program = partial(decode, config=config, runtime=Machine())
        return str(jax.make_jaxpr(program)(*params, state_of(config), batch_of(1, [0]))).count("\n")

    assert lines(40) == lines(4)


def test_bfloat16(small, model):
    full, params, biases = model
    tokens = some_tokens()
    reader = Reader(small, cast_weights(params, jnp.bfloat16), biases, BATCH, Machine(jnp.bfloat16))
    found, expected = reader.read(tokens), full(tokens)
    assert reader.cache.arrays["entries"].dtype == jnp.bfloat16
    # A router may choose another expert for a few of the tokens.
    assert jnp.median(jnp.abs(found - expected)) < 0.05 * jnp.median(jnp.abs(expected))
