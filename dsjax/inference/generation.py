"""One prompt after the other, token by token."""

import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from dsjax.inference.cache import empty_cache
from dsjax.inference.load import Model
from dsjax.inference.programs import decode, prefill
from dsjax.inference.sampling import Sampling, choice

PIECES = (16, 256)
"""Lengths in which a prompt is read; each is a program of its own."""
STRIDE = 256
"""The capacity of a cache is a multiple of it, so that prompts of similar lengths share their programs."""


def generate(
    model: Model,
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    *,
    first: Bool[np.ndarray, " V"] | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, until the token at the end of a document or `max_tokens` of them.

    Args:
        model: parameters and tokenizer.
        prompt: ids, the one that opens a document included.
        sampling: how to choose.
        max_tokens: at most this many.
        first: which tokens the first may be; all by default.

    Raises:
        ValueError: no prompt, an id that the model has not, `max_tokens` below 1.
    """
    vocab_size = model.config.vocab_size
    if not prompt:
        raise ValueError("the prompt has no tokens: it must begin with the one that opens a document")
    if wrong := [id for id in prompt if not 0 <= id < vocab_size]:
        raise ValueError(f"prompt: token {wrong[0]} must be below model.vocab_size = {vocab_size}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens}: must be at least 1")
    how = choice([sampling])
    allowed = jnp.asarray(np.ones((1, vocab_size), bool) if first is None else first[None])
    capacity = -(-(len(prompt) + max_tokens) // STRIDE) * STRIDE
    cache = empty_cache(model.config, 1, capacity, model.runtime.compute_dtype)
    common = {"config": model.config, "runtime": model.runtime}
    for tokens, count in pieces(prompt):
        following, cache = prefill(model.params, model.biases, cache, tokens, count, how, allowed, **common)
    for left in reversed(range(max_tokens)):
        token = following
        if left:
            # Under way before the token is looked at: the device does not wait for the host.
            following, cache = decode(model.params, model.biases, cache, token, how, **common)
        if (id := int(token[0])) == model.tokenizer.eos:
            return
        yield id


def pieces(prompt: Sequence[int]) -> Iterator[tuple[Int[np.ndarray, "1 N"], Int[np.ndarray, " 1"]]]:
    """Cut a prompt into pieces of few lengths, the last one padded; yield each with the number of its real tokens."""
    for part in itertools.batched(prompt, PIECES[-1]):
        length = next(size for size in PIECES if size >= len(part))
        yield np.array([[*part, *[0] * (length - len(part))]], np.int32), np.array([len(part)], np.int32)
