"""Tokens are drawn from the right distribution, by their own seed only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.inference.sampling import Sampling, allowed, choice, draw, sample

VOCAB = 12
jitted = jax.jit(allowed)


def scores(batch=1, vocab=VOCAB, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, vocab)) * 2


def test_temperature_0_takes_the_likeliest():
    logits = scores(8)
    how = choice([Sampling(temperature=0.0, top_p=0.1 * i + 0.1, top_k=i, seed=i) for i in range(8)])
    assert (sample(logits, how, jnp.arange(8)) == logits.argmax(-1)).all()


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.6}, {"top_p": 0.7}, {"top_k": 3}, {"temperature": 1.7, "top_k": 6, "top_p": 0.8}]
)
def test_frequencies(how):
    """A chi-squared test at a fixed seed; 40 is far out for at most 11 degrees of freedom (p < 1e-4)."""
    draws, logits = 20_000, scores()
    request = Sampling(seed=7, **how)
    column = jax.tree.map(lambda leaf: jnp.repeat(leaf, draws), choice([request]))
    tokens = jax.jit(sample)(jnp.repeat(logits, draws, axis=0), column, jnp.arange(draws))
    counts = np.bincount(tokens, minlength=VOCAB)
    expected = draws * reference(logits[0], request.temperature, request.top_p, request.top_k)
    possible = expected > 0
    assert not counts[~possible].any()
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 40


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-3.0, -0.5, -0.0, 0.0, 0.25, 1.0, 1.5, 4.0]), min_size=VOCAB, max_size=VOCAB),
    st.integers(0, VOCAB + 3),
    st.sampled_from([1e-6, 0.1, 0.35, 0.62, 0.9, 0.9999, 1.0]),
)
def test_allowed_with_ties(logits, top_k, top_p):
    found = jitted(jnp.array([logits]), choice([Sampling(top_p=top_p, top_k=top_k)]))[0]
    assert (np.asarray(found) == (reference(logits, 1, top_p, top_k) > 0)).all()


def test_a_large_flat_vocabulary_is_kept_whole():
    """Where many small probabilities add up to a little less than 1."""
    assert allowed(jnp.zeros((1, 100_003)), choice([Sampling()])).all()


def test_what_is_forbidden_is_never_drawn():
    logits = jnp.full((512, VOCAB), -jnp.inf).at[:, 3].set(-80.0).at[:, 5].set(-81.0)
    for how in (
        Sampling(temperature=100.0),
        Sampling(temperature=100.0, top_p=0.99999),
        Sampling(temperature=9.0, top_k=9),
    ):
        drawn = sample(logits, choice([how] * 512), jnp.arange(512))
        assert set(drawn.tolist()) == {3, 5}


def test_a_draw_depends_on_its_own_request_only():
    requests = [Sampling(seed=4), Sampling(seed=4, top_p=0.5), Sampling(temperature=0.0), Sampling(seed=5, top_k=4)]
    logits, positions = scores(4, vocab=1000), jnp.array([3, 9, 9, 3])
    together = sample(logits, choice(requests), positions)
    for i, request in enumerate(requests):
        alone = sample(logits[i : i + 1], choice([request]), positions[i : i + 1])
        assert alone.tolist() == [int(together[i])]


def test_penalties_and_logprobs_belong_to_their_own_request():
    requests = [
        Sampling(temperature=0.0),
        Sampling(temperature=0.0, repetition_penalty=2.0, logprobs=1),
        Sampling(temperature=0.0, repetition_penalty=0.5),
    ]
    logits = jnp.tile(jnp.array([-1.0, 1.0, 0.7, -0.2]), (3, 1))
    seen = jnp.zeros((3, 4), bool).at[:, jnp.array([0, 1])].set(True)
    drawn = draw(logits, choice(requests), jnp.arange(3), lambda: seen)
    assert drawn.tokens.tolist() == [1, 2, 1]
    assert drawn.likeliest.tolist() == [[1, 2, 3, 0]] * 3
    np.testing.assert_allclose(drawn.logprobs, jax.nn.log_softmax(logits)[jnp.arange(3), drawn.tokens], atol=1e-6)
    below = draw(logits - 2, choice(requests), jnp.arange(3), lambda: seen)
    assert below.tokens.tolist() == [1, 2, 1]
    first = jnp.array([[False, True, False, True]])
    assert draw(logits, choice(requests), jnp.arange(3), lambda: seen, first).tokens.tolist() == [1, 1, 1]


def test_seeds_and_positions_give_other_tokens():
    logits = jnp.zeros((1, 50_000))

    def draw(seed, position):
        return int(sample(logits, choice([Sampling(seed=seed)]), jnp.array([position]))[0])

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(seed, position) for seed in (0, 1, 2**32 - 1) for position in (0, 1, 2)}) == 9


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be at least 0, and finite"),
        ({"temperature": float("nan")}, "temperature = nan: must be at least 0, and finite"),
        ({"top_p": 0.0}, "top_p = 0.0: must be greater than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5: must be greater than 0 and at most 1"),
        ({"top_k": -1}, "top_k = -1: must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0: must be greater than 0, and finite"),
        ({"logprobs": 21}, "logprobs = 21: must be 0 to 20"),
        ({"seed": 2**32}, "seed = 4294967296: must be at least 0 and below"),
    ],
)
def test_errors(how, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        Sampling(**how)
