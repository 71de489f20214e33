"""From logits to the next token: repetition penalty, temperature, top-k, top-p, and a seed per request.

A draw is a pure function of a request's logits, settings, seed and position. It depends neither on what else is in the
batch nor on how the tokens before came about.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

MOST_LOGPROBS = 20
"""Likeliest tokens that can be told of."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request chooses its tokens."""

    temperature: float = 1.0
    """What logits are divided by; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability, at least one."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 for all. It applies before `top_p`."""
    seed: int = 0
    """Same seed, same tokens."""
    repetition_penalty: float = 1.0
    """What positive logits of tokens that are in the prompt or the answer are divided by, and negative ones multiplied
    with, as transformers does; before all else."""
    logprobs: int | None = None
    """Tell the log-probability of each token, and of this many likeliest ones: natural logarithms, of the model's own
    distribution, before any of the settings above. None tells nothing."""

    def __post_init__(self) -> None:
        laws = {
            "temperature": (0 <= self.temperature < float("inf"), "at least 0, and finite"),
            "top_p": (0 < self.top_p <= 1, "greater than 0 and at most 1"),
            "top_k": (0 <= self.top_k < 2**31, "at least 0 and below 2**31"),
            "seed": (0 <= self.seed < 2**32, "at least 0 and below 2**32"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "greater than 0, and finite"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}"),
        }
        for name, (holds, right) in laws.items():
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {right}")


class Choice(NamedTuple):
    """The `Sampling` of B requests as arrays, so that a program is not compiled again for other settings."""

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    seed: UInt32[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    logprobs: Bool[Array, " B"]
    """Whether a request wants any."""


class Drawn(NamedTuple):
    """The chosen tokens of B requests, and their log-probabilities where any of the requests wants some, else zeros."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    likeliest: Int[Array, "B n"]
    """The likeliest tokens, best first; n is `MOST_LOGPROBS`, or the vocabulary if that is smaller."""
    likeliest_logprobs: Float[Array, "B n"]


def choice(requests: Sequence[Sampling]) -> Choice:
    """Return the settings of a batch of requests."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(request, name) for request in requests], dtype)

    return Choice(
        temperature=column("temperature", np.float32),
        top_p=column("top_p", np.float32),
        top_k=column("top_k", np.int32),
        seed=column("seed", np.uint32),
        repetition_penalty=column("repetition_penalty", np.float32),
        logprobs=np.array([request.logprobs is not None for request in requests]),
    )


def draw(
    logits: Float[Array, "B V"],
    choice: Choice,
    positions: Int[Array, " B"],
    seen: Callable[[], Bool[Array, "B V"]],
    first: Bool[Array, "#B V"] | None = None,
) -> Drawn:
    """Return a token for each request, and what it wants to know about it.

    Args:
        logits: float32, the model's own.
        choice: settings of the requests.
        positions: see `sample`.
        seen: gives the tokens that repetition penalties are for; only read where there is one.
        first: which tokens may be chosen; by default all.
    """
    scores = penalized(logits, choice, seen)
    tokens = sample(scores if first is None else jnp.where(first, scores, -jnp.inf), choice, positions)
    count = min(MOST_LOGPROBS, logits.shape[1])

    def told() -> Drawn:
        values = jax.nn.log_softmax(logits, axis=-1)
        best, likeliest = jax.lax.top_k(values, count)
        return Drawn(tokens, jnp.take_along_axis(values, tokens[:, None], axis=1)[:, 0], likeliest, best)

    def untold() -> Drawn:
        nothing = jnp.zeros((len(tokens), count), jnp.int32)
        return Drawn(tokens, jnp.zeros(len(tokens), jnp.float32), nothing, nothing.astype(jnp.float32))

    return jax.lax.cond(choice.logprobs.any(), told, untold)


def penalized(
    logits: Float[Array, "B V"], choice: Choice, seen: Callable[[], Bool[Array, "B V"]]
) -> Float[Array, "B V"]:
    """Return logits after the repetition penalties; `seen` is read where there is one."""

    def lowered() -> Float[Array, "B V"]:
        penalty = choice.repetition_penalty[:, None]
        return jnp.where(seen(), jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

    return jax.lax.cond((choice.repetition_penalty != 1).any(), lowered, lambda: logits)


def sample(logits: Float[Array, "B V"], choice: Choice, positions: Int[Array, " B"]) -> Int[Array, " B"]:
    """Return a token for each request, int32.

    Args:
        logits: float32; -inf for what must not be chosen.
        choice: settings of the requests.
        positions: place of the token in its sequence, which with the seed gives the random numbers.
    """
    greedy = jnp.argmax(logits, axis=-1)

    def draw() -> Int[Array, " B"]:
        scaled = logits / jnp.where(choice.temperature > 0, choice.temperature, 1)[:, None]
        cuts = ((choice.top_p < 1) | (choice.top_k > 0)).any()
        # Sorting a large vocabulary takes longer than all else here.
        kept = jax.lax.cond(cuts, lambda: allowed(scaled, choice), lambda: jnp.ones(scaled.shape, bool))
        # The noise belongs to the tokens and not to their ranks: whether the batch was sorted changes nothing.
        noise = jax.vmap(lambda seed, at: jax.random.gumbel(_key(seed, at), logits.shape[1:], jnp.float32))
        drawn = jnp.argmax(jnp.where(kept, scaled, -jnp.inf) + noise(choice.seed, positions), axis=-1)
        return jnp.where(choice.temperature > 0, drawn, greedy)

    return jax.lax.cond((choice.temperature > 0).any(), draw, lambda: greedy).astype(jnp.int32)


def allowed(logits: Float[Array, "B V"], choice: Choice) -> Bool[Array, "B V"]:
    """Return which tokens are among the `top_k` and then the `top_p` likeliest; equals of the last one are too."""
    ranks = _ordered_bits(logits)
    top_k = jnp.where(choice.top_k > 0, choice.top_k, logits.shape[-1])
    in_top_k = _likeliest(ranks, jnp.ones(logits.shape, jnp.int32), top_k)
    probabilities = jax.nn.softmax(jnp.where(in_top_k, logits, -jnp.inf), axis=-1)
    # All probabilities may add up to a little less than 1; then all tokens are kept.
    return in_top_k & _likeliest(ranks, probabilities, choice.top_p)


def _likeliest(ranks: UInt32[Array, "B V"], weights: Array, wanted: Array) -> Bool[Array, "B V"]:
    """Mark the fewest tokens of highest rank whose weights add up to at least `wanted`; all, where none do.

    The lowest rank among them is found bit by bit: 32 passes are much faster than a sort of a large vocabulary.
    """

    def set_bit(i: Array, lowest: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
        higher = lowest | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough = jnp.where(ranks >= higher[:, None], weights, 0).sum(axis=-1) >= wanted
        return jnp.where(enough, higher, lowest)

    lowest = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(ranks.shape[0], jnp.uint32))
    return ranks >= lowest[:, None]


def _ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Return unsigned integers in the order of float32 numbers: positive ones above, negative ones turned around."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)  # -0 equals 0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _key(seed: UInt32[Array, ""], position: Int[Array, ""]) -> Array:
    return jax.random.fold_in(jax.random.key(seed), position)
