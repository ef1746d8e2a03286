"""An interpolated Kneser-Ney language model: what a Llama has to beat.

Kneser and Ney (1995) in the interpolated form of Chen and Goodman (1999): n-grams are
counted, a discount is taken off each count, and what that frees goes to the model of
the next shorter context, where a token counts not for how often it occurs but for how
many different tokens it follows. One discount for each order, tuned on a slice of the
training tokens.

V is the size of the vocabulary; an n-gram is one integer, its tokens the digits in
base V.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

# The share of the training tokens, at their end, on which discounts are tuned.
_TUNING_SHARE = 0.05
_DISCOUNTS = [percent / 100 for percent in range(2, 100, 2)]
_TUNING_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class _Evidence:
    """What one order knows of each token to be predicted: three arrays.

    Attributes:
      counts: of the n-gram that ends with the token.
      totals: sum of the counts of all n-grams with the same context; 0 if unseen.
      types: how many such n-grams there are.
    """

    counts: np.ndarray
    totals: np.ndarray
    types: np.ndarray


class _Counts:
    """n-grams of one order, sorted, and the sums over those that share a context."""

    def __init__(self, ngrams: np.ndarray, counts: np.ndarray, vocab_size: int) -> None:
        self.ngrams, self._counts, self._vocab_size = ngrams, counts, vocab_size
        self._contexts, first, self._types = np.unique(
            ngrams // vocab_size, return_index=True, return_counts=True
        )
        self._totals = np.add.reduceat(counts, first)

    def evidence(self, ngrams: np.ndarray) -> _Evidence:
        contexts = ngrams // self._vocab_size
        return _Evidence(
            _look_up(self.ngrams, self._counts, ngrams),
            _look_up(self._contexts, self._totals, contexts),
            _look_up(self._contexts, self._types, contexts),
        )


class KneserNey:
    """A model of the given order, estimated on a stream of tokens.

    Args:
      tokens: the stream.
      order: 2 for a bigram, 3 for a trigram.
      vocab_size: V; V ** order has to fit 63 bits.
      start: the token that is taken to come before the stream, as often as needed.
      discounts: one for each order, from the unigram up; tuned if not given.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        order: int,
        vocab_size: int,
        start: int,
        discounts: Sequence[float] | None = None,
    ) -> None:
        self._order, self._vocab_size, self._start = order, vocab_size, start
        if discounts is None:
            cut = round(len(tokens) * (1 - _TUNING_SHARE))
            most = KneserNey(
                tokens[:cut],
                order=order,
                vocab_size=vocab_size,
                start=start,
                discounts=[0.5] * order,
            )
            discounts = most._tune(tokens[cut:])
        self.discounts = list(discounts)
        ngrams, counts = np.unique(self._ngrams(tokens), return_counts=True)
        self._levels = [_Counts(ngrams, counts, vocab_size)]
        for n in range(order - 1, 0, -1):
            # Each distinct longer n-gram counts once for the n-gram at its end.
            ngrams, counts = np.unique(ngrams % vocab_size**n, return_counts=True)
            self._levels.insert(0, _Counts(ngrams, counts, vocab_size))

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """Minus the log probability of every token of a stream but the first."""
        evidence = self._evidence(self._ngrams(tokens))
        return -np.log(self._probabilities(evidence, self.discounts))

    def probabilities(self, context: Sequence[int]) -> np.ndarray:
        """The distribution over V after `order` - 1 tokens."""
        before = 0
        for token in context:
            before = before * self._vocab_size + token
        ngrams = before * self._vocab_size + np.arange(self._vocab_size)
        return self._probabilities(self._evidence(ngrams), self.discounts)

    def _ngrams(self, tokens: np.ndarray) -> np.ndarray:
        """The n-gram that ends at each token but the first."""
        before = np.full(self._order - 2, self._start)
        padded = np.concatenate([before, tokens]).astype(np.int64)
        ngrams = np.zeros(len(tokens) - 1, np.int64)
        for i in range(self._order):
            ngrams = ngrams * self._vocab_size + padded[i : i + len(ngrams)]
        return ngrams

    def _evidence(self, ngrams: np.ndarray) -> list[_Evidence]:
        return [
            level.evidence(ngrams % self._vocab_size ** (n + 1))
            for n, level in enumerate(self._levels)
        ]

    def _probabilities(
        self, evidence: list[_Evidence], discounts: Sequence[float]
    ) -> np.ndarray:
        shorter = np.full(len(evidence[0].counts), 1 / self._vocab_size)
        for known, discount in zip(evidence, discounts, strict=True):
            kept = np.maximum(known.counts - discount, 0) + discount * (
                known.types * shorter
            )
            shorter = np.where(
                known.totals, kept / np.maximum(known.totals, 1), shorter
            )
        return shorter

    def _tune(self, tokens: np.ndarray) -> list[float]:
        """The discounts that predict these tokens best, one varied at a time."""
        evidence = self._evidence(self._ngrams(tokens))
        best = list(self.discounts)
        for _ in range(_TUNING_ROUNDS):
            for n in range(self._order):
                trials = [[*best[:n], d, *best[n + 1 :]] for d in _DISCOUNTS]
                best = max(
                    trials,
                    key=lambda trial: np.log(
                        self._probabilities(evidence, trial)
                    ).sum(),
                )
        return best


def stream(rows: Iterable[np.ndarray]) -> np.ndarray:
    """The tokens that were packed into rows, of which each begins the next."""
    rows = list(rows)
    return np.concatenate([*(row[:-1] for row in rows), rows[-1][-1:]])


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 for one that is not there; keys are sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
