"""The distribution that each sampler leaves, and what is drawn from it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.sampling import Greedy, MinP, TopK, TopP
from llama_jax.errors import GenerationError
from llama_jax.generate.sample import Rule, draw, filtered

LOGITS = np.log(np.array([[0.1, 0.4, 0.05, 0.3, 0.15]], np.float32)) + 3


def left(sampler, logits) -> np.ndarray:
    """The probabilities that are drawn from."""
    return np.asarray(jax.nn.softmax(filtered(Rule.of(sampler), jnp.asarray(logits))))


def test_top_p_leaves_what_meta_leaves(reference, agree):
    path = reference / "sampling" / "top_p_vectors.json"
    rows = [row for row in json.loads(path.read_text())["rows"] if row["top_p"] > 0]
    assert len(rows) > 10
    for row in rows:
        probs = np.array(row["probs"], np.float32)
        with np.errstate(divide="ignore"):
            logits = np.log(probs)[None]
        found = left(TopP(row["top_p"], temperature=1), logits)[0]
        off = np.abs(found - np.array(row["filtered_renormalised_probs"])).max()
        agree("top-p distribution", off, within=1e-6)
        assert np.count_nonzero(found) == row["n_kept"]


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (TopP(0.1, temperature=1), [0, 1, 0, 0, 0]),
        (TopP(0.6, temperature=1), [0, 4 / 7, 0, 3 / 7, 0]),
        (TopP(1, temperature=1), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (TopK(1, temperature=1), [0, 1, 0, 0, 0]),
        (TopK(2, temperature=1), [0, 4 / 7, 0, 3 / 7, 0]),
        (TopK(9, temperature=1), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (MinP(1, temperature=1), [0, 1, 0, 0, 0]),
        (MinP(0.7, temperature=1), [0, 4 / 7, 0, 3 / 7, 0]),
        # The temperature comes first: squared, the others are 9/16 and less.
        (MinP(0.7, temperature=0.5), [0, 1, 0, 0, 0]),
        (TopK(2, temperature=0.5), [0, 16 / 25, 0, 9 / 25, 0]),
    ],
)
def test_what_is_left(sampler, expected):
    np.testing.assert_allclose(left(sampler, LOGITS)[0], expected, atol=1e-6)


def test_of_equally_probable_tokens_the_first_stay():
    equal = np.zeros((1, 8), np.float32)
    for sampler in (TopK(3, temperature=1), TopP(0.3, temperature=1)):
        np.testing.assert_allclose(left(sampler, equal)[0], [1 / 3] * 3 + [0] * 5)


def test_no_temperature_overflows():
    logits = np.array([[1e4, -1e4, 1e4 - 1]], np.float32)
    for temperature in (1e-37, 1e-9, 1.0, 1e9):
        probs = left(TopP(0.9, temperature=temperature), logits)
        assert np.isfinite(probs).all() and probs.argmax() == 0


@pytest.mark.parametrize("kind", [TopK, TopP, MinP])
@pytest.mark.parametrize("temperature", [0, 1e-60])
def test_temperature_0_is_greedy(kind, temperature):
    assert Rule.of(kind(1, temperature=temperature)) == Rule.of(Greedy())


def test_what_is_no_sampler_is_refused():
    with pytest.raises(GenerationError, match=r"sampler is 0.9: give Greedy\(\)"):
        Rule.of(0.9)


def test_draws_follow_the_distribution():
    sampler = TopP(0.9, temperature=0.7)
    num_draws = 20_000
    keys = jax.random.split(jax.random.key(0), num_draws)
    logits = jnp.broadcast_to(LOGITS, (num_draws, 5))
    tokens, logprobs = jax.jit(draw)(Rule.of(sampler), logits, keys)
    shares = np.bincount(np.asarray(tokens), minlength=5) / num_draws
    expected = left(sampler, LOGITS)[0]
    # Five standard deviations.
    np.testing.assert_allclose(shares, expected, atol=5 * 0.5 / num_draws**0.5)
    assert (shares > 0).tolist() == (expected > 0).tolist()
    # Temperature and selection leave the log-probability alone.
    own = np.log([0.1, 0.4, 0.05, 0.3, 0.15])
    np.testing.assert_allclose(logprobs, own[np.asarray(tokens)], atol=1e-6)


def test_greedy_takes_the_best_and_its_probability():
    logits = jnp.asarray(np.concatenate([LOGITS, LOGITS[:, ::-1]]))
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, logprobs = draw(Rule.of(Greedy()), logits, keys)
    assert tokens.tolist() == [1, 3] and tokens.dtype == jnp.int32
    np.testing.assert_allclose(logprobs, np.log([0.4, 0.4]), atol=1e-6)
