"""Losses of scores against the formulas in float64, with their gradients."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.data import Rating
from llama_jax.data import ComparisonBatch
from llama_jax.data.prepared import RATINGS, SAFE, UNSAFE
from llama_jax.finetune import reward
from llama_jax.finetune.preference import MARGINS, ranking_loss, safety_loss
from llama_jax.finetune.reward import Preferences

DRAW = np.random.default_rng(0)
# What the formulas are given in float64 is what the losses get in float32.
CHOSEN, REJECTED, MARGIN = DRAW.normal(0, 3, (3, 200)).astype("f4").astype("f8")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_margins_are_those_of_table_27():
    by_rating = {
        name: dict(zip(RATINGS, values.tolist(), strict=True))
        for name, values in MARGINS.items()
    }
    names: list[Rating] = list(get_args(Rating))
    assert names[0] == "significantly better"
    assert [by_rating["none"][name] for name in names] == [0, 0, 0, 0]
    assert [by_rating["small"][name] for name in names] == pytest.approx(
        [1, 2 / 3, 1 / 3, 0]
    )
    assert [by_rating["large"][name] for name in names] == [3, 2, 1, 0]
    assert {values[None] for values in by_rating.values()} == {0}


def test_ranking_loss():
    given = [jnp.float32(x) for x in (CHOSEN, REJECTED, MARGIN)]
    chance = sigmoid(CHOSEN - REJECTED - MARGIN)
    np.testing.assert_allclose(ranking_loss(*given), -np.log(chance), rtol=1e-6)
    grads = jax.grad(lambda *x: ranking_loss(*x).sum(), argnums=(0, 1, 2))(*given)
    for grad, sign in zip(grads, (-1, 1, 1), strict=True):
        np.testing.assert_allclose(grad, sign * (1 - chance), rtol=1e-6, atol=1e-7)


def test_a_pair_by_hand():
    """Scores 2 and 1 where they are to be 1 apart: as if they were equal."""
    loss, grads = jax.value_and_grad(ranking_loss, argnums=(0, 1))(2.0, 1.0, 1.0)
    assert float(loss) == pytest.approx(np.log(2), rel=1e-6)
    assert [float(grad) for grad in grads] == pytest.approx([-0.5, 0.5], rel=1e-6)


def test_a_batch_by_hand(monkeypatch):
    """Two pairs in a row, labels, and a row of padding, which teaches nothing."""
    monkeypatch.setattr(reward, "_scores", lambda sharded, scores, batch: scores)
    empty = np.zeros((2, 8), np.int32)
    rating, rejected, safety = empty.copy(), empty.copy(), empty.copy()
    weights = np.zeros((2, 8), np.float32)
    weights[0, [1, 5]] = 1
    rejected[0, [1, 5]] = 3, 7
    rating[0, [1, 5]] = RATINGS.index("better"), RATINGS.index(None)
    safety[0, [1, 3, 7]] = SAFE, UNSAFE, UNSAFE
    batch = ComparisonBatch(
        tokens=empty,
        segments=empty,
        weights=weights,
        rejected=rejected,
        rating=rating,
        safety=safety,
    )
    scores = DRAW.normal(0, 3, (2, 8)).astype(np.float32)
    objective = Preferences(margin="large", safety_weight=0.5)
    (loss, num_pairs), grads = jax.value_and_grad(
        lambda scores: objective.loss(None, scores, batch), has_aux=True
    )(jnp.asarray(scores))

    a, b, c, d = scores[0, [1, 3, 5, 7]].astype(np.float64)
    chances = sigmoid(np.array([a - b - 2, c - d, a, -b, -d]))
    expected = -np.log(chances) @ [1, 1, 0.5, 0.5, 0.5]
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert num_pairs == 2
    pair, other, safe, first, second = 1 - chances
    slopes = np.zeros((2, 8))
    slopes[0, [1, 3, 5, 7]] = (
        -pair - safe / 2,
        pair + first / 2,
        -other,
        other + second / 2,
    )
    np.testing.assert_allclose(grads, slopes, rtol=1e-6, atol=1e-7)


def test_safety_loss():
    is_safe = DRAW.random(200) < 0.5
    target, chance = is_safe.astype(float), sigmoid(CHOSEN)
    expected = -(target * np.log(chance) + (1 - target) * np.log(1 - chance))
    score = jnp.float32(CHOSEN)
    np.testing.assert_allclose(safety_loss(score, is_safe), expected, rtol=1e-6)
    grad = jax.grad(lambda x: safety_loss(x, is_safe).sum())(score)
    np.testing.assert_allclose(grad, chance - target, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_scores_that_are_far_apart_give_no_infinity(far):
    value, grad = jax.value_and_grad(ranking_loss)(far, 0.0, 0.0)
    assert (float(value), float(grad)) == (max(0.0, -far), float(far < 0) * -1)
    assert float(safety_loss(jnp.float32(far), jnp.bool_(True))) == max(0.0, -far)
