"""The baseline against the textbook's sums, written out one n-gram at a time."""

from collections import Counter

import numpy as np
import pytest

from scripts.kneser_ney import KneserNey, stream

V, START = 7, 2
DISCOUNTS = [0.3, 0.6, 0.8]


def tokens(num: int, *, seed: int = 0) -> np.ndarray:
    """A chain in which each token depends on the two before; token 6 never comes."""
    draw = np.random.default_rng(seed)
    chain = [0, 1]
    for _ in range(num - 2):
        likely = (chain[-1] + 2 * chain[-2]) % 6
        chain.append(likely if draw.random() < 0.6 else int(draw.integers(6)))
    return np.array(chain)


def textbook(chain: list[int], order: int) -> dict[tuple[int, ...], float]:
    """P(w | context) for every n-gram (context, w), by recursion on dictionaries."""
    padded = [START] * (order - 2) + chain
    counts = {
        order: Counter(
            tuple(padded[i : i + order]) for i in range(len(padded) - order + 1)
        )
    }
    for n in range(order - 1, 0, -1):
        counts[n] = Counter(ngram[1:] for ngram in counts[n + 1])

    def probability(ngram: tuple[int, ...]) -> float:
        if not ngram:
            return 1 / V
        n, context = len(ngram), ngram[:-1]
        same = {g: c for g, c in counts[n].items() if g[:-1] == context}
        shorter = probability(ngram[1:])
        if not same:
            return shorter
        d, total = DISCOUNTS[n - 1], sum(same.values())
        kept = max(same.get(ngram, 0) - d, 0) / total
        return kept + d * len(same) / total * shorter

    return {ngram: probability(ngram) for ngram in np.ndindex(*[V] * order)}


@pytest.mark.parametrize("order", [2, 3])
def test_equals_the_textbook(order):
    train, held_out = tokens(60), tokens(40, seed=1)
    model = KneserNey(
        train, order=order, vocab_size=V, start=START, discounts=DISCOUNTS[:order]
    )
    expected = textbook(train.tolist(), order)
    for context in np.ndindex(*[V] * (order - 1)):
        np.testing.assert_allclose(
            model.probabilities(context),
            [expected[*context, w] for w in range(V)],
            rtol=1e-12,
        )
    padded = [START] * (order - 2) + held_out.tolist()
    np.testing.assert_allclose(
        model.nats(held_out),
        [
            -np.log(expected[tuple(padded[i : i + order])])
            for i in range(len(held_out) - 1)
        ],
        rtol=1e-12,
    )


@pytest.mark.parametrize("order", [2, 3])
def test_distributions_sum_to_one(order):
    model = KneserNey(tokens(500), order=order, vocab_size=V, start=START)
    for context in np.ndindex(*[V] * (order - 1)):
        probabilities = model.probabilities(context)
        assert probabilities.min() > 0  # also of what was never seen
        np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-12)


def test_tuned_discounts_are_better_than_others():
    train, held_out = tokens(3000), tokens(3000, seed=1)

    def loss(discounts):
        model = KneserNey(
            train, order=3, vocab_size=V, start=START, discounts=discounts
        )
        return model.nats(held_out).mean(), model.discounts

    tuned, discounts = loss(None)
    assert all(0 < discount < 1 for discount in discounts)
    assert tuned < loss([0.02] * 3)[0]
    assert tuned < loss([0.98] * 3)[0]


def test_a_longer_context_helps():
    train, held_out = tokens(3000), tokens(1000, seed=1)
    bigram, trigram = (
        KneserNey(train, order=order, vocab_size=V, start=START).nats(held_out).mean()
        for order in (2, 3)
    )
    assert trigram < bigram - 0.1 < np.log(6)


def test_the_stream_of_packed_rows():
    rows = [np.array([1, 5, 6]), np.array([6, 7, 2]), np.array([2, 9])]
    assert stream(rows).tolist() == [1, 5, 6, 7, 2, 9]
