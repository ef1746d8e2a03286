"""Losses of scores against the formulas in float64, with their gradients."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.data import Rating
from llama_jax.data.prepared import RATINGS
from llama_jax.finetune.preference import MARGINS, ranking_loss, safety_loss

DRAW = np.random.default_rng(0)
CHOSEN, REJECTED, MARGIN = DRAW.normal(0, 3, (3, 200))


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
        np.testing.assert_allclose(grad, sign * (1 - chance), rtol=1e-5, atol=1e-6)


def test_safety_loss():
    is_safe = DRAW.random(200) < 0.5
    target, chance = is_safe.astype(float), sigmoid(CHOSEN)
    expected = -(target * np.log(chance) + (1 - target) * np.log(1 - chance))
    score = jnp.float32(CHOSEN)
    np.testing.assert_allclose(safety_loss(score, is_safe), expected, rtol=1e-6)
    grad = jax.grad(lambda x: safety_loss(x, is_safe).sum())(score)
    np.testing.assert_allclose(grad, chance - target, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_scores_that_are_far_apart_give_no_infinity(far):
    value, grad = jax.value_and_grad(ranking_loss)(far, 0.0, 0.0)
    assert (float(value), float(grad)) == (max(0.0, -far), float(far < 0) * -1)
    assert float(safety_loss(jnp.float32(far), jnp.bool_(True))) == max(0.0, -far)
