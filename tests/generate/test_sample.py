"""The distribution that each sampler leaves, what is drawn from it, and penalties."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.sampling import Greedy, MinP, Penalties, TopK, TopP
from llama_jax.errors import GenerationError
from llama_jax.generate.sample import (
    PenaltyRule,
    Rule,
    draw,
    filtered,
    logprob,
    penalised,
)
from tests.generate.frequencies import chi_squared, distribution

LOGITS = np.log(np.array([[0.1, 0.4, 0.05, 0.3, 0.15]], np.float32)) + 3


@jax.jit
def _left(rule, logits):
    return jax.nn.softmax(filtered(rule, logits))


def left(sampler, logits) -> np.ndarray:
    """The probabilities that are drawn from."""
    return np.asarray(_left(Rule.of(sampler), jnp.asarray(logits)))


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


SAMPLERS = [
    TopK(20, temperature=1.0),
    TopK(400, temperature=1.0),
    TopP(0.6, temperature=1.0),
    MinP(0.03, temperature=1.0),
    TopP(1, temperature=0.7),
    TopP(0.9, temperature=1.8),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_draws_follow_the_distribution(sampler):
    """By Pearson's test; a temperature that is wrong by a quarter would not pass."""
    num_draws = 16384
    logits = np.random.default_rng(0).normal(scale=2, size=1000).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), num_draws)
    rows = jnp.broadcast_to(logits, (num_draws, len(logits)))
    tokens = np.asarray(jax.jit(draw)(Rule.of(sampler), rows, keys))
    assert tokens.dtype == np.int32
    statistic, degrees, p = chi_squared(tokens, distribution(sampler, logits))
    print(f"{sampler}: chi-squared {statistic:.1f}, {degrees} degrees, p = {p:.3f}")
    assert degrees >= 10 and p > 1e-3
    # The same tokens left, and what draws among them a little too warm.
    left = distribution(sampler, logits)
    warm = np.where(left > 0, left**0.8, 0)
    statistic, _, p = chi_squared(tokens, warm / warm.sum())
    print(f"... of a temperature a quarter higher: {statistic:.1f}, p = {p:.1e}")
    assert p < 1e-6


@pytest.mark.parametrize(
    "sampler",
    [
        *SAMPLERS,
        # What leaves more than is sorted.
        TopK(256, temperature=1.0),
        TopK(257, temperature=1.0),
        TopK(700, temperature=2.0),
        TopK(5000, temperature=1.0),
        TopP(0.99, temperature=2.0),
        TopP(0.999999, temperature=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_pieces", [200, 1000])
def test_what_is_left_is_what_the_definitions_leave(sampler, num_pieces):
    """Of rows of every kind at once: one token, a few, nearly all, some that cannot."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, num_pieces)).astype(np.float32)
    logits *= np.array([[50.0], [4], [2], [1], [0.1], [1]], np.float32)
    logits[5, ::3] = -np.inf
    found = left(sampler, logits)
    for row, probs in zip(logits, found, strict=True):
        expected = distribution(sampler, row)
        np.testing.assert_allclose(probs, expected, rtol=0, atol=1e-6)
        # Rounding may move the border by a token, or by those of next to no weight.
        sure = expected > 1e-7
        assert abs(np.count_nonzero(probs) - np.count_nonzero(expected)) <= max(
            1, np.count_nonzero(~sure)
        )


def test_a_row_is_left_the_same_beside_any_other():
    """Also beside one of which more stays than is sorted."""
    steep, *others = np.random.default_rng(2).normal(scale=3, size=(6, 1000))
    flat = np.multiply(others, 0.01)
    for sampler in (TopP(0.9, temperature=1), TopK(30, temperature=1)):
        kept = [
            left(sampler, np.float32([steep, *beside]))[0] for beside in (others, flat)
        ]
        np.testing.assert_array_equal(*kept)


def test_of_many_equally_probable_tokens_the_first_stay():
    equal = np.zeros((6, 1000), np.float32)
    for sampler, num_left in (
        (TopK(3, temperature=1), 3),
        (TopK(600, temperature=1), 600),
        (TopP(0.5001, temperature=1), 501),
    ):
        kept = np.flatnonzero(left(sampler, equal)[0])
        assert kept.tolist() == list(range(num_left))


@pytest.mark.parametrize("size", [5, 128, 300, 32001])
def test_greedy_takes_the_first_of_equals(size):
    """In vocabularies of one part, of several, and of a part that is not full."""
    rng = np.random.default_rng(0)
    rows = [
        rng.integers(0, 4, size).astype(np.float32),
        np.where(np.arange(size) == size - 1, 0, -np.inf).astype(np.float32),
        np.full(size, -np.inf, np.float32),
        -np.arange(size, dtype=np.float32),
    ]
    logits = jnp.asarray(np.stack(rows))
    keys = jax.random.split(jax.random.key(0), len(rows))
    assert draw(Rule.of(Greedy()), logits, keys).tolist() == np.argmax(rows, 1).tolist()


def test_greedy_takes_the_best():
    logits = jnp.asarray(np.concatenate([LOGITS, LOGITS[:, ::-1]]))
    keys = jax.random.split(jax.random.key(0), 2)
    tokens = draw(Rule.of(Greedy()), logits, keys)
    assert tokens.tolist() == [1, 3] and tokens.dtype == jnp.int32


def test_log_probabilities_are_the_models_own():
    """Whatever the temperature is, and what is left out."""
    own = np.log([0.1, 0.4, 0.05, 0.3, 0.15])
    rows = jnp.broadcast_to(LOGITS[0], (5, 5))
    np.testing.assert_allclose(logprob(rows, jnp.arange(5)), own, atol=1e-6)


def penalise(penalties, logits, tokens, prompt, length):
    """One row, from the definitions of `Penalties`."""
    moved = logits.astype(np.float64)
    for token in set(tokens[:length]):
        if moved[token] > 0:
            moved[token] /= penalties.repetition
        else:
            moved[token] *= penalties.repetition
    for token, times in Counter(tokens[prompt:length]).items():
        moved[token] -= penalties.presence + times * penalties.frequency
    return moved


@pytest.mark.parametrize(
    "penalties",
    [
        Penalties(repetition=1.3),
        Penalties(repetition=0.8),
        Penalties(presence=0.7),
        Penalties(frequency=0.4),
        Penalties(frequency=-0.4),
        Penalties(repetition=1.1, presence=0.5, frequency=0.2),
    ],
    ids=str,
)
def test_penalties_are_what_they_say(penalties):
    """Also of tokens that stand behind a row's end, which are not there."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(6, 30)).astype(np.float32)
    tokens = rng.integers(30, size=(6, 16), dtype=np.int32)
    prompt = np.array([1, 4, 8, 16, 5, 2], np.int32)
    length = np.array([1, 9, 16, 16, 6, 14], np.int32)
    found = jax.jit(penalised)(
        PenaltyRule.of(penalties), logits, tokens, prompt, length
    )
    for i in range(6):
        row = tokens[i].tolist()
        expected = penalise(penalties, logits[i], row, prompt[i], length[i])
        np.testing.assert_allclose(found[i], expected, rtol=1e-6, atol=1e-6)
    assert np.abs(found - logits).max() > 0.1


def test_repetition_counts_the_prompt_and_frequency_only_the_answer():
    logits = np.array([[2.0, -2.0, 2.0, -2.0, 1.0]], np.float32)
    tokens = np.array([[0, 1, 2, 3, 3, 4]], np.int32)
    row = (logits, tokens, np.array([2]), np.array([5]))  # prompt 0 1, answer 2 3 3

    def moved(**numbers):
        return penalised(PenaltyRule.of(Penalties(**numbers)), *row)[0].tolist()

    assert moved(repetition=2.0) == [1, -4, 1, -4, 1]
    assert moved(presence=1.0) == [2, -2, 1, -3, 1]
    assert moved(frequency=1.0) == [2, -2, 1, -4, 1]


@pytest.mark.parametrize("penalties", [None, Penalties(), Penalties(repetition=1)])
def test_penalties_that_change_nothing_are_none(penalties):
    assert PenaltyRule.of(penalties) is None


def test_penalties_are_traced():
    rule = PenaltyRule.of(Penalties(repetition=1.1, presence=0.5))
    assert jax.tree.leaves(rule) == [1.1, 0.5, 0.0]
