"""Generated tokens are what the model calls likeliest, end where they should, and compile nothing anew."""

from copy import copy
from dataclasses import replace
from itertools import islice

import jax
import numpy as np
import pytest

from dsjax.inference.generation import PIECES, generate, pieces
from dsjax.inference.load import Model
from dsjax.inference.programs import decode, prefill
from dsjax.inference.sampling import Sampling
from dsjax.model.context import context
from dsjax.model.transformer import hidden_states, logits
from dsjax.runtime import Runtime

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model(small, random_parameters, tokenizer):
    """A model that does not end its documents by itself."""
    return Model(small, Runtime(), *random_parameters(small), ending(tokenizer, -1), opening=0, context=64, origin="")


def ending(tokenizer, eos):
    """A tokenizer with another token at the end of documents."""
    tokenizer = copy(tokenizer)
    tokenizer.eos = eos
    return tokenizer


@pytest.fixture(scope="module")
def likeliest(model):
    """The greedy continuation of a prompt by full forward passes."""
    config = {"config": model.config, "runtime": model.runtime}

    @jax.jit
    def full(tokens):
        ctx = context(model.config, tokens.shape[1])
        hidden, _ = hidden_states(model.params, model.biases, model.params["embed"][tokens], ctx, **config)
        return logits(model.params, hidden)[0].argmax(-1)

    def continuation(prompt, count):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + count):
            tokens[0, at] = full(tokens)[at - 1]
        return tokens[0, len(prompt) : len(prompt) + count].tolist()

    return continuation


@pytest.mark.parametrize("length", [1, 16, 30])
def test_greedy(model, likeliest, length):
    prompt = [(7 * i * i + 3) % 320 for i in range(length)]
    assert list(generate(model, prompt, GREEDY, 20)) == likeliest(prompt, 20)


def test_a_long_prompt_is_read_in_pieces(model):
    prompt = [i % 300 for i in range(PIECES[-1] + 20)]
    cut = list(pieces(prompt))
    assert [tokens.shape for tokens, _ in cut] == [(1, 256), (1, 256)]
    assert [id for tokens, count in cut for id in tokens[0, : count[0]].tolist()] == prompt
    assert [tokens.shape[1] for tokens, _ in pieces(prompt[: PIECES[-1] + 1])] == [256, 16]


def test_the_end_of_the_document(model, likeliest):
    expected = likeliest([5], 8)
    stop = next(i for i in range(1, 8) if expected[i] not in expected[:i])
    model = replace(model, tokenizer=ending(model.tokenizer, expected[stop]))
    assert list(generate(model, [5], GREEDY, 20)) == expected[:stop]


def test_the_first_token_may_be_confined(model):
    first = np.zeros(320, bool)
    first[[17, 44]] = True
    for seed in range(4):
        token, _ = generate(model, [1, 2], Sampling(seed=seed), 2, first=first)
        assert token in (17, 44)


def test_same_seed_same_tokens(model):
    def tokens(seed, **how):
        return list(generate(model, [1, 2], Sampling(seed=seed, **how), 12))

    assert tokens(1) == tokens(1) != tokens(2)
    assert len(tokens(1, top_p=0.5)) == 12


def test_nothing_is_compiled_for_another_prompt_or_other_settings(model):
    def programs():
        return prefill._cache_size(), decode._cache_size()

    list(generate(model, [1], GREEDY, 3))
    before = programs()
    list(generate(model, [1] * 16, Sampling(temperature=2.0, top_k=5), 50))
    list(islice(generate(model, [4, 5], Sampling(top_p=0.5, seed=9), 9), 4))
    assert programs() == before


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 5, "the prompt has no tokens"),
        ([3, 320], 5, "token 320 must be below model.vocab_size = 320"),
        ([3], 0, "max_tokens = 0: must be at least 1"),
    ],
)
def test_errors(model, prompt, count, message):
    with pytest.raises(ValueError, match=message):
        next(generate(model, prompt, GREEDY, count))
