"""What samplers leave by their definitions, and what came, held against it."""

import numpy as np
import scipy.stats

from llama_jax.config.sampling import MinP, Sampler, TopK, TopP


def distribution(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    """Probabilities of each token, float64, from the definition of the sampler."""
    scaled = np.asarray(logits, np.float64) / sampler.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    match sampler:
        case TopK(k):
            kept = order[:k]
        case TopP(p):
            before = np.cumsum(probs[order]) - probs[order]
            kept = order[before <= p]
        case MinP(p):
            kept = np.flatnonzero(probs >= p * probs.max())
    left = np.zeros_like(probs)
    left[kept] = probs[kept] / probs[kept].sum()
    return left


def chi_squared(tokens: np.ndarray, probs: np.ndarray) -> tuple[float, int, float]:
    """Pearson's statistic, its degrees of freedom, and the probability of as much.

    Tokens that are expected less than five times are counted as one.
    """
    counts = np.bincount(tokens, minlength=len(probs))
    assert counts[probs == 0].sum() == 0, "what was left out came"
    expected = len(tokens) * probs
    often = expected >= 5
    rare = (probs > 0) & ~often
    observed, expected = (
        np.append(x[often], x[rare].sum()) if rare.any() else x[often]
        for x in (counts, expected)
    )
    statistic = float(((observed - expected) ** 2 / expected).sum())
    degrees = len(observed) - 1
    return statistic, degrees, float(scipy.stats.chi2.sf(statistic, degrees))
