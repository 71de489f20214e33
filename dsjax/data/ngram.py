"""Interpolated Kneser-Ney bigram and trigram models: what counting alone makes of a corpus, to compare a model with.

Modified discounts as in Chen and Goodman 1999, section 3: three per order, from the counts of counts. Lower orders
count in how many contexts a token was seen, not how often; the lowest is interpolated with the uniform distribution.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Integer

MOST = 2**25
"""Training tokens that are counted at most, the first ones: they cost about 50 bytes each while they are sorted."""


@dataclass(frozen=True)
class Baselines:
    """Cross-entropy in nats per token, and the number of training tokens it took."""

    bigram: float
    trigram: float
    tokens: int


def baselines(
    train: Integer[np.ndarray, " train_tokens"],
    windows: Integer[np.ndarray, "windows length"],
    vocab_size: int,
) -> Baselines:
    """Counts n-grams of the training tokens and predicts every token of the windows but each one's first.

    These are the predictions of the model's main head. Like the model, neither sees beyond its window: the trigram
    predicts a window's second token as the bigram does.

    Args:
        train: the packed training tokens.
        windows: what the model is validated on, `Windows.rows(...)`.
        vocab_size: all ids are below it.
    """
    model = KneserNey(train[:MOST], vocab_size)
    windows = windows.astype(np.int64)
    bigram = np.log(model.bigram(windows[:, :-1], windows[:, 1:]))
    trigram = np.log(model.trigram(windows[:, :-2], windows[:, 1:-1], windows[:, 2:]))
    return Baselines(
        bigram=-float(bigram.mean()),
        trigram=-float(np.concatenate([bigram[:, :1], trigram], axis=1).mean()),
        tokens=min(len(train), MOST),
    )


class KneserNey:
    """Bigram and trigram probabilities; both sum to 1 over the vocabulary in every context."""

    def __init__(self, tokens: Integer[np.ndarray, " tokens"], vocab_size: int) -> None:
        """Counts the n-grams of at least two tokens below `vocab_size`, which is below 2^21."""
        assert vocab_size <= 2**21, vocab_size  # three ids are one int64
        self._size = size = vocab_size
        ids = tokens.astype(np.int64)
        pairs = ids[:-1] * size + ids[1:]
        bigrams, bigram_counts = np.unique(pairs, return_counts=True)
        trigrams, trigram_counts = np.unique(pairs[:-1] * size + ids[2:], return_counts=True)
        self._bigram = _Order(bigrams, bigram_counts, size)
        self._unigram_below_bigram = _Order(*np.unique(bigrams % size, return_counts=True), size)
        self._trigram = _Order(trigrams, trigram_counts, size)
        self._bigram_below_trigram = _Order(*np.unique(trigrams % size**2, return_counts=True), size)

    def bigram(self, before: Int[np.ndarray, "*n"], token: Int[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        """Returns P(token | before)."""
        return self._bigram(before, token, self._unigram(token))

    def trigram(
        self, before: Int[np.ndarray, "*n"], last: Int[np.ndarray, "*n"], token: Int[np.ndarray, "*n"]
    ) -> Float[np.ndarray, "*n"]:
        """Returns P(token | before, last)."""
        lower = self._bigram_below_trigram(last, token, self._unigram(token))
        return self._trigram(before * self._size + last, token, lower)

    def _unigram(self, token: Int[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        return self._unigram_below_bigram(np.zeros_like(token), token, 1 / self._size)


class _Order:
    """One order: P(token | context) = (count - discount) / total + left / total * lower."""

    def __init__(self, keys: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"], size: int) -> None:
        self._size = size
        self._keys, self._counts = keys, counts
        self._discounts = _discounts(counts)
        self._contexts, start = np.unique(keys // size, return_index=True)
        if len(keys):
            self._totals = np.add.reduceat(counts, start)
            self._left = np.add.reduceat(self._discounts[np.minimum(counts, 3)], start)

    def __call__(self, context: np.ndarray, token: np.ndarray, lower: np.ndarray | float) -> np.ndarray:
        lower = np.broadcast_to(lower, token.shape)
        if not len(self._keys):
            return lower
        row, known = _find(self._contexts, context)
        entry, seen = _find(self._keys, context * self._size + token)
        counts = np.where(seen, self._counts[entry], 0)
        kept = counts - self._discounts[np.minimum(counts, 3)]
        return np.where(known, (kept + self._left[row] * lower) / self._totals[row], lower)


def _discounts(counts: Int[np.ndarray, " n"]) -> Float[np.ndarray, "4"]:
    """Returns what is taken from a count of 0, 1, 2, and 3 or more; between 0 and the count, so that all stay valid."""
    once, twice, *more = (np.count_nonzero(counts == count) for count in (1, 2, 3, 4))
    if not (once and twice and all(more)):
        return np.array([0, 0.5, 0.5, 0.5])  # too few n-grams for an estimate
    share = once / (once + 2 * twice)
    estimate = [1 - 2 * share * twice / once, 2 - 3 * share * more[0] / twice, 3 - 4 * share * more[1] / more[0]]
    return np.array([0, *np.clip(estimate, 0.05, [0.95, 1.9, 2.9])])


def _find(table: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return found, table[found] == values
