"""The baselines are Kneser-Ney: proper distributions, equal to a literal implementation of the formulas."""

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from dsjax.data.ngram import KneserNey, baselines


class Literal:
    """Modified Kneser-Ney as the formulas of Chen and Goodman say it, with dictionaries."""

    def __init__(self, ids: list[int], size: int) -> None:
        self.size = size
        trigrams = Counter(zip(ids, ids[1:], ids[2:], strict=False))
        bigrams = Counter(pairwise(ids))
        self.tables = {
            "trigram": trigrams,
            "bigram": bigrams,
            "bigram below": Counter(gram[1:] for gram in trigrams),
            "unigram below": Counter(gram[1:] for gram in bigrams),
        }
        self.contexts = {}
        self.discounts = {}
        for name, table in self.tables.items():
            self.contexts[name] = defaultdict(dict)
            for (*context, token), count in table.items():
                self.contexts[name][tuple(context)][token] = count
            n = Counter(table.values())
            if all(n[i] for i in (1, 2, 3, 4)):
                y = n[1] / (n[1] + 2 * n[2])
                raw = [1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
                raw = [min(max(d, 0.05), most) for d, most in zip(raw, (0.95, 1.9, 2.9), strict=True)]
            else:
                raw = [0.5] * 3
            self.discounts[name] = raw

    def probability(self, order: str, context: tuple, token: int) -> float:
        lower = {
            "trigram": lambda: self.probability("bigram below", context[1:], token),
            "bigram": lambda: self.probability("unigram below", (), token),
            "bigram below": lambda: self.probability("unigram below", (), token),
            "unigram below": lambda: 1 / self.size,
        }[order]()
        seen = self.contexts[order].get(context)
        if not seen:
            return lower
        discounts = {other: self.discounts[order][min(count, 3) - 1] for other, count in seen.items()}
        total, freed = sum(seen.values()), sum(discounts.values())
        kept = seen[token] - discounts[token] if token in seen else 0.0
        return kept / total + freed / total * lower


def corpus(size: int, length: int, seed: int = 0) -> np.ndarray:
    """A random walk over ids of Zipf's frequencies, so that counts of every size occur."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.5, length), size) - 1
    ids[1:] = np.where(rng.random(length - 1) < 0.6, (ids[:-1] * 7 + 3) % size, ids[1:])
    return ids.astype(np.uint16)


@pytest.mark.parametrize(("size", "length"), [(40, 3000), (40, 60), (7, 12), (5, 2), (5, 1)])
def test_equal_to_the_literal_formulas(size, length):
    ids = corpus(size, length)
    fast, slow = KneserNey(ids, size), Literal(ids.tolist(), size)
    rng = np.random.default_rng(1)
    before, last, token = rng.integers(0, size, (3, 500))
    bigram, trigram = fast.bigram(last, token), fast.trigram(before, last, token)
    for row in range(500):
        u, v, w = int(before[row]), int(last[row]), int(token[row])
        assert math.isclose(bigram[row], slow.probability("bigram", (v,), w), rel_tol=1e-12)
        assert math.isclose(trigram[row], slow.probability("trigram", (u, v), w), rel_tol=1e-12)


@pytest.mark.parametrize(("size", "length"), [(300, 20_000), (300, 50), (2000, 20_000), (5, 2)])
def test_probabilities_sum_to_one(size, length):
    ids = corpus(size, length)
    model = KneserNey(ids, size)
    rng = np.random.default_rng(1)
    places = rng.integers(0, len(ids) - 1, 20)
    contexts = np.concatenate([rng.integers(0, size, (20, 2)), np.stack([ids[places], ids[places + 1]], 1)])
    every = np.broadcast_to(np.arange(size), (len(contexts), size))
    before, last = (np.broadcast_to(side[:, None], every.shape) for side in contexts.astype(np.int64).T)
    for found in (model.bigram(last, every), model.trigram(before, last, every)):
        assert found.min() > 0
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-10)


def test_ids_as_large_as_the_real_vocabulary():
    rng = np.random.default_rng(0)
    ids = rng.choice(np.array([0, 5, 64_000, 129_278, 129_279], np.uint32), 2000)
    model, small = KneserNey(ids, 129_280), Literal(ids.tolist(), 129_280)
    before, last, token = (column.astype(np.int64) for column in (ids[:-2], ids[1:-1], ids[2:]))
    found = model.trigram(before, last, token)
    for row in range(0, 1998, 97):
        context = (int(before[row]), int(last[row]))
        assert math.isclose(found[row], small.probability("trigram", context, int(token[row])), rel_tol=1e-12)


def test_cross_entropy_is_over_the_predictions_of_the_model():
    size, length = 40, 16
    train, held_out = corpus(size, 3000), corpus(size, 10 * length + 1, seed=5).astype(np.int32)
    windows = np.stack([held_out[i * length : i * length + length + 1] for i in range(10)])
    found = baselines(train, windows, size)
    slow = Literal(train.tolist(), size)
    bigram, trigram = [], []
    for window in windows.tolist():
        for place in range(1, length + 1):
            bigram.append(-math.log(slow.probability("bigram", (window[place - 1],), window[place])))
            context = tuple(window[max(place - 2, 0) : place])
            order = "trigram" if len(context) == 2 else "bigram"
            trigram.append(-math.log(slow.probability(order, context, window[place])))
    assert math.isclose(found.bigram, np.mean(bigram), rel_tol=1e-12)
    assert math.isclose(found.trigram, np.mean(trigram), rel_tol=1e-12)
    assert found.tokens == 3000 and found.bigram < math.log(size)
