"""The estimators of RLHF, against their formulas in NumPy, float64.

Every function takes a mask, or the like, as its last argument; so one table holds what
each has to equal, and each test that all must pass goes through it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.finetune.estimators import (
    EPSILON,
    advantages_and_returns,
    clipped_policy_loss,
    clipped_value_loss,
    combined_scores,
    sampled_kl,
    token_rewards,
    whiten,
)
from sharding import MeshConfig, array_sharding, axes, make_mesh, training_rules

RNG = np.random.default_rng(0)
# Prompts and padding of all kinds: nothing before, behind, in between or at all.
MASK = np.array(
    [
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ],
    np.float32,
)
# For the largest of an array. The terms of a sum may cancel: it has this for each.
WITHIN = 1e-6
SUM_WITHIN = 1e-7


def _normal(*shape, scale=1.0):
    return (RNG.normal(size=shape) * scale).astype(np.float32)


# The formulas, one row and one token at a time.


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _logit(p):
    return np.log(p) - np.log1p(-p)


def _combined_scores(safety, helpfulness, about_safety, *, threshold):
    """As the paper writes it: through probabilities and back."""
    Rs, Rh = _sigmoid(safety), _sigmoid(helpfulness)
    return _logit(np.where(about_safety | (Rs < threshold), Rs, Rh))


def _whiten(values, weights):
    whitened = np.zeros_like(values)
    if weights.any():
        mean = np.average(values, weights=weights)
        variance = np.average((values - mean) ** 2, weights=weights)
        kept = weights > 0
        whitened[kept] = ((values - mean) / np.sqrt(variance + EPSILON))[kept]
    return whitened


def _sampled_kl(logprobs, reference, mask):
    return np.where(mask, logprobs - reference, 0)


def _exact_kl(logits, reference, mask):
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p0 = np.exp(reference) / np.exp(reference).sum(-1, keepdims=True)
    return np.where(mask, (p * np.log(p / p0)).sum(-1), 0)


def _token_rewards(scores, kl, mask, *, beta):
    rewards = np.zeros_like(kl)
    for row, response in enumerate(map(np.flatnonzero, mask)):
        for t in response:
            rewards[row, t] = -beta * kl[row, t]
        if response.size:
            rewards[row, response[-1]] += scores[row]
    return rewards


def _advantages_and_returns(rewards, values, mask, *, gamma, lam):
    """The sum over errors to come, not the recursion that the code uses."""
    advantages, returns = np.zeros_like(values), np.zeros_like(values)
    for row, response in enumerate(map(np.flatnonzero, mask)):
        r, V = rewards[row, response], np.append(values[row, response], 0)
        errors = r + gamma * V[1:] - V[:-1]
        for t, position in enumerate(response):
            advantages[row, position] = sum(
                (gamma * lam) ** n * error for n, error in enumerate(errors[t:])
            )
            returns[row, position] = advantages[row, position] + V[t]
    return advantages, returns


def _clipped_policy_loss(logprobs, old, advantages, weights, *, clip):
    loss = clipped = kl = 0.0
    for new, before, A, w in zip(
        *map(np.ravel, (logprobs, old, advantages, weights)), strict=True
    ):
        ratio = np.exp(new - before)
        inside = min(max(ratio, 1 - clip), 1 + clip)
        loss -= w * min(ratio * A, inside * A)
        clipped += w * (inside * A < ratio * A)
        kl += w * (ratio - 1 - np.log(ratio))
    return loss, weights.sum(), clipped, kl


def _clipped_value_loss(values, old, returns, weights, *, clip):
    loss = clipped = 0.0
    for V, before, R, w in zip(
        *map(np.ravel, (values, old, returns, weights)), strict=True
    ):
        near = before + min(max(V - before, -clip), clip)
        loss += w * 0.5 * max((V - R) ** 2, (near - R) ** 2)
        clipped += w * ((near - R) ** 2 > (V - R) ** 2)
    return loss, weights.sum(), clipped


class Case(NamedTuple):
    """A function, its formula, and what both are given: a mask comes last."""

    function: Callable[..., Any]
    formula: Callable[..., Any]
    arrays: tuple[np.ndarray, ...]
    mask: np.ndarray


def _case(function, formula, *arrays, mask=MASK, **numbers):
    return Case(
        jax.jit(functools.partial(function, **numbers)),
        functools.partial(formula, **numbers),
        arrays,
        mask,
    )


ROWS, TOKENS = (8,), (8, 6)
OLD = _normal(*TOKENS) - 2
CASES = {
    "combined_scores": _case(
        combined_scores,
        _combined_scores,
        _normal(*ROWS, scale=2),
        _normal(*ROWS, scale=2),
        mask=np.array([0, 1, 0, 0, 1, 0, 0, 0], bool),
        threshold=0.15,
    ),
    "whiten_rows": _case(
        whiten,
        _whiten,
        _normal(*ROWS, scale=3) + 5,
        mask=np.array([1, 1, 0, 1, 0.5, 0, 1, 1], np.float32),
    ),
    "whiten_tokens": _case(whiten, _whiten, _normal(*TOKENS, scale=0.1) - 1),
    "sampled_kl": _case(sampled_kl, _sampled_kl, OLD, _normal(*TOKENS) - 2),
    "token_rewards": _case(
        token_rewards, _token_rewards, _normal(*ROWS), _normal(*TOKENS), beta=0.01
    ),
    "advantages_and_returns": _case(
        advantages_and_returns,
        _advantages_and_returns,
        _normal(*TOKENS),
        _normal(*TOKENS),
        gamma=0.9,
        lam=0.95,
    ),
    "clipped_policy_loss": _case(
        clipped_policy_loss,
        _clipped_policy_loss,
        OLD + _normal(*TOKENS, scale=0.3),
        OLD,
        _normal(*TOKENS),
        mask=MASK * RNG.choice([0.5, 1.0], TOKENS).astype(np.float32),
        clip=0.2,
    ),
    "clipped_value_loss": _case(
        clipped_value_loss,
        _clipped_value_loss,
        _normal(*TOKENS),
        _normal(*TOKENS),
        _normal(*TOKENS),
        clip=0.2,
    ),
}
MASKED = {name: case for name, case in CASES.items() if name != "combined_scores"}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_masked_case = pytest.mark.parametrize("case", MASKED.values(), ids=MASKED)


def _wide(arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def _close(found, expected):
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        allowed = WITHIN * np.abs(other).max()
        allowed = max(allowed, WITHIN if np.ndim(other) else SUM_WITHIN * MASK.size)
        np.testing.assert_allclose(one, other, rtol=0, atol=allowed)


def _projected(function, *arguments):
    """One number of all results, so that it has one gradient."""
    directions = np.random.default_rng(1)
    return sum(
        (result * directions.normal(size=np.shape(result))).sum()
        for result in jax.tree.leaves(function(*arguments))
    )


@functools.cache
def _program(function):
    """Its results; and the gradient of `_projected` to each array."""

    def both(arrays, mask):
        gradients = jax.grad(lambda given: _projected(function, *given, mask))
        return function(*arrays, mask), gradients(arrays)

    return jax.jit(both)


def _values_and_gradients(case, arrays, mask):
    return _program(case.function)(tuple(arrays), mask)


def _slopes(case):
    """Central differences of the formula in float64."""
    arrays = _wide(case.arrays)
    for which, array in enumerate(arrays):
        slope = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = array.copy()
                moved[index] += step
                given = [*arrays[:which], moved, *arrays[which + 1 :]]
                sides.append(_projected(case.formula, *given, case.mask))
            slope[index] = (sides[0] - sides[1]) / 2e-6
        yield slope


@every_case
def test_equals_its_formula(case):
    found = case.function(*case.arrays, case.mask)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    _close(found, case.formula(*_wide(case.arrays), case.mask))


@every_case
def test_gradient_is_the_slope_of_its_formula(case):
    _, gradients = _values_and_gradients(case, case.arrays, case.mask)
    _close(gradients, list(_slopes(case)))
    assert all(np.abs(gradient).max() > 1e-3 for gradient in gradients)


@every_masked_case
@hypothesis.given(data=hypothesis.strategies.data())
def test_equals_its_formula_under_any_mask(case, data):
    masks = hypothesis.extra.numpy.arrays(bool, case.mask.shape)
    mask = data.draw(masks).astype(np.float32)
    _close(case.function(*case.arrays, mask), case.formula(*_wide(case.arrays), mask))


@every_masked_case
def test_a_mask_may_be_boolean(case):
    mask = case.mask > 0
    expected = case.function(*case.arrays, mask.astype(np.float32))
    found = case.function(*case.arrays, mask)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def _hidden(case, mask):
    """For each array, what the mask hides of it: tokens, or rows without any."""
    for array in case.arrays:
        rows = mask if array.ndim >= mask.ndim else mask.any(axis=1)
        hidden = (rows == 0).reshape(rows.shape + (1,) * (array.ndim - rows.ndim))
        yield np.broadcast_to(hidden, array.shape)


@every_masked_case
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38, -3e38])
@pytest.mark.parametrize("everything", [False, True], ids=["some", "all"])
def test_what_is_masked_reaches_neither_result_nor_gradient(case, garbage, everything):
    mask = np.zeros_like(case.mask) if everything else case.mask
    hidden = list(_hidden(case, mask))
    assert all(where.any() for where in hidden)
    dirty, clean = (
        [
            np.where(where, np.float32(value), array)
            for where, array in zip(hidden, case.arrays, strict=True)
        ]
        for value in (garbage, 0)
    )
    found, gradients = _values_and_gradients(case, dirty, mask)
    expected, expected_gradients = _values_and_gradients(case, clean, mask)
    for one, other in zip(
        jax.tree.leaves((found, gradients)),
        jax.tree.leaves((expected, expected_gradients)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
        assert not everything or np.count_nonzero(one) == 0
    for where, gradient in zip(hidden, gradients, strict=True):
        assert np.count_nonzero(np.asarray(gradient)[where]) == 0


@every_case
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=2, context=2)],
    ids=str,
)
def test_eight_devices_give_what_one_gives(case, mesh):
    """Sums are over all rows: the mean of a device's own would be another number."""
    devices, rules = make_mesh(mesh), training_rules(sequence_parallel=False)
    logical = (axes.BATCH, axes.SEQUENCE, None)
    arrays, mask = jax.tree.map(
        lambda array: jax.device_put(
            array, array_sharding(rules, devices, *logical[: array.ndim])
        ),
        (case.arrays, case.mask),
    )
    assert len(mask.addressable_shards) == 8 and not mask.sharding.is_fully_replicated
    with jax.set_mesh(devices):
        found = _values_and_gradients(case, arrays, mask)
    _close(found, _values_and_gradients(case, case.arrays, case.mask))


# By hand.


def test_the_safety_score_counts_if_asked_for_or_below_the_threshold():
    # logit(0.15) = log(0.15 / 0.85) = -1.7346: the first is below it, the second not.
    safety = np.array([-1.74, -1.73, 3.0, -1e4, 1e4], np.float32)
    helpfulness = np.array([2.0, 2.0, 1.0, 5.0, -1e4], np.float32)
    about_safety = np.array([False, False, True, False, False])
    found = combined_scores(safety, helpfulness, about_safety, threshold=0.15)
    # The last two would be infinite as the logits of probabilities that round to 0.
    np.testing.assert_array_equal(
        found, np.array([-1.74, 2.0, 3.0, -1e4, -1e4], np.float32)
    )


@hypothesis.given(data=hypothesis.strategies.data())
def test_scores_are_combined_as_probabilities_would_be(data):
    scores = hypothesis.strategies.floats(-15, 15, width=32)
    safety, helpfulness = (
        data.draw(hypothesis.extra.numpy.arrays(np.float32, ROWS, elements=scores))
        for _ in range(2)
    )
    about_safety = data.draw(hypothesis.extra.numpy.arrays(bool, ROWS))
    case = CASES["combined_scores"]
    _close(
        case.function(safety, helpfulness, about_safety),
        case.formula(*_wide((safety, helpfulness)), about_safety),
    )


def test_whitening_takes_the_variance_of_the_population():
    # Mean 3, variance (4 + 0 + 4) / 3; a sample's would be (4 + 0 + 4) / 2 = 2^2.
    found = whiten(jnp.array([1.0, 3.0, 5.0, 99.0]), jnp.array([1.0, 1.0, 1.0, 0.0]))
    np.testing.assert_allclose(
        found, [-math.sqrt(1.5), 0, math.sqrt(1.5), 0], rtol=1e-6
    )
    # As [0, 0, 0, 4]: mean 1, variance (3 * 1 + 9) / 4 = 3.
    found = whiten(jnp.array([0.0, 4.0]), jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(found, [-1 / math.sqrt(3), math.sqrt(3)], rtol=1e-6)


def test_whitened_scores_have_mean_0_and_variance_1_wherever_they_were():
    values, weights = CASES["whiten_rows"].arrays[0], CASES["whiten_rows"].mask
    found = np.asarray(whiten(values, weights), np.float64)
    assert abs(np.average(found, weights=weights)) < 1e-6
    assert abs(np.average(found**2, weights=weights) - 1) < 1e-6
    np.testing.assert_allclose(whiten(values * 4 - 100, weights), found, atol=1e-5)


@pytest.mark.parametrize("values", [[2.7] * 5, [1e-3]], ids=["equal", "one"])
def test_values_without_a_spread_are_whitened_to_0(values):
    found = whiten(jnp.array(values), jnp.ones(len(values)))
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_the_sampled_divergence_is_on_average_the_exact_one():
    logits, reference = _normal(*TOKENS, 11), _normal(*TOKENS, 11)
    policy, before = map(jax.nn.log_softmax, map(jnp.asarray, (logits, reference)))
    of_each_token = [
        np.exp(policy[..., v]) * sampled_kl(policy[..., v], before[..., v], MASK)
        for v in range(policy.shape[-1])
    ]
    expected = _exact_kl(logits, reference, MASK)
    np.testing.assert_allclose(np.sum(of_each_token, axis=0), expected, atol=1e-6)
    assert np.all(expected[MASK > 0] > 0.1)


def test_the_score_comes_with_the_last_token_and_the_divergence_with_each():
    kl = jnp.array([[9.0, 1.0, -2.0, 9.0], [3.0, 9.0, 9.0, 4.0], [9.0, 9.0, 9.0, 9.0]])
    mask = jnp.array([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0], [0.0] * 4])
    found = token_rewards(jnp.array([10.0, 20.0, 30.0]), kl, mask, beta=0.5)
    np.testing.assert_array_equal(
        found,
        [
            [0, -0.5, 10 + 1.0, 0],  # behind a prompt, before padding
            [-1.5, 0, 0, 20 - 2.0],  # in two parts: the second ends it
            [0, 0, 0, 0],  # no response
        ],
    )


@hypothesis.given(mask=hypothesis.extra.numpy.arrays(bool, TOKENS))
def test_rewards_sum_to_the_papers(mask):
    scores, kl = CASES["token_rewards"].arrays
    found = CASES["token_rewards"].function(scores, kl, mask.astype(np.float32))
    expected = np.where(mask.any(1), scores - 0.01 * (kl * mask).sum(1), 0)
    np.testing.assert_allclose(found.sum(1), expected, atol=1e-6)


REWARDS = jnp.array([[1.0, 2.0, 4.0, 9.0], [9.0, 9.0, 6.0, 9.0], [9.0, 1.0, 9.0, 2.0]])
VALUES = jnp.array([[1.0, 2.0, 3.0, 9.0], [9.0, 9.0, 5.0, 9.0], [9.0, 2.0, 9.0, 3.0]])
RESPONSE = jnp.array([[1, 1, 1, 0], [0, 0, 1, 0], [0, 1, 0, 1]], jnp.float32)


def test_advantages_of_responses_that_end_early():
    # Row 0, from its end, where nothing follows:
    #   d = 4 - 3              = 1      A = 1
    #   d = 2 + 0.5 * 3 - 2    = 1.5    A = 1.5 + 0.25 * 1   = 1.75
    #   d = 1 + 0.5 * 2 - 1    = 1      A = 1 + 0.25 * 1.75  = 1.4375
    # Row 1, of a single token: A = 6 - 5.
    # Row 2, whose next token is two positions on:
    #   d = 2 - 3              = -1     A = -1
    #   d = 1 + 0.5 * 3 - 2    = 0.5    A = 0.5 + 0.25 * -1  = 0.25
    advantages, returns = advantages_and_returns(
        REWARDS, VALUES, RESPONSE, gamma=0.5, lam=0.5
    )
    np.testing.assert_array_equal(
        advantages, [[1.4375, 1.75, 1, 0], [0, 0, 1, 0], [0, 0.25, 0, -1]]
    )
    np.testing.assert_array_equal(
        returns, [[2.4375, 3.75, 4, 0], [0, 0, 6, 0], [0, 2.25, 0, 2]]
    )


def test_lambda_1_trusts_rewards_and_lambda_0_the_next_value():
    _, returns = advantages_and_returns(REWARDS, VALUES, RESPONSE, gamma=1.0, lam=1.0)
    # What is still to come: of row 0 that is 1 + 2 + 4, 2 + 4, 4.
    np.testing.assert_array_equal(returns, [[7, 6, 4, 0], [0, 0, 6, 0], [0, 3, 0, 2]])
    _, returns = advantages_and_returns(REWARDS, VALUES, RESPONSE, gamma=1.0, lam=0.0)
    # The reward and the value of what follows: of row 0 that is 1 + 2, 2 + 3, 4.
    np.testing.assert_array_equal(returns, [[3, 5, 4, 0], [0, 0, 6, 0], [0, 4, 0, 2]])


def _policy_loss(ratios, advantages):
    """The sums for tokens with these ratios, and the gradient to their logarithms."""
    log_ratios = jnp.log(jnp.array([ratios]))
    old, advantages = jnp.full_like(log_ratios, -2.0), jnp.array([advantages])
    weights = jnp.ones_like(log_ratios)

    def loss(logprobs):
        sums = clipped_policy_loss(logprobs, old, advantages, weights, clip=0.2)
        return sums.loss, sums

    gradient, sums = jax.grad(loss, has_aux=True)(log_ratios + old)
    return sums, gradient[0]


def test_a_ratio_is_clipped_on_the_side_where_the_loss_would_gain():
    sums, gradient = _policy_loss([1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0])
    #            min(1.5, 1.2)  min(-1.5, -1.2)  min(0.5, 0.8)  min(-0.5, -0.8)
    np.testing.assert_allclose(sums.loss, -(1.2 - 1.5 + 0.5 - 0.8), rtol=1e-6)
    np.testing.assert_allclose(gradient, [0, 1.5, -0.5, 0], rtol=1e-6)
    assert (float(sums.clipped), float(sums.weight)) == (2, 4)
    expected = 2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5))
    np.testing.assert_allclose(sums.kl, expected, rtol=1e-6)


def test_the_first_step_is_the_policy_gradient():
    sums, gradient = _policy_loss([1.0, 1.0, 1.0], [2.0, -3.0, 0.0])
    np.testing.assert_array_equal(gradient, [-2, 3, 0])
    assert [float(x) for x in sums] == [1, 3, 0, 0]


def test_a_clipped_ratio_too_large_for_an_exponential_leaves_a_gradient_of_0():
    old, ones = jnp.array([[-1000.0, -1.0]]), jnp.ones((1, 2))

    def loss(logprobs):
        return clipped_policy_loss(logprobs, old, ones, ones, clip=0.2).loss

    value, gradient = jax.value_and_grad(loss)(jnp.array([[-1.0, -1.0]]))
    np.testing.assert_allclose(value, -1.2 - 1, rtol=1e-6)
    np.testing.assert_array_equal(gradient, [[0, -1]])


def test_a_value_gains_nothing_by_leaving_the_range():
    # Old value 0, range 0.5, return 2: (V - 2)^2 at 0.25, and (0.5 - 2)^2 past 0.5.
    # Return -2: the error at 1 is greater than at 0.5, and counts.
    values = jnp.array([[0.25, 1.0, 1.0]])
    returns = jnp.array([[2.0, 2.0, -2.0]])

    def loss(values, clip=0.5):
        sums = clipped_value_loss(
            values, jnp.zeros_like(values), returns, jnp.ones_like(values), clip=clip
        )
        return sums.loss, sums

    gradient, sums = jax.grad(loss, has_aux=True)(values)
    assert float(sums.loss) == (1.75**2 + 1.5**2 + 3**2) / 2
    assert (float(sums.weight), float(sums.clipped)) == (3, 1)
    np.testing.assert_array_equal(gradient, [[-1.75, 0, 3]])
    gradient, sums = jax.grad(functools.partial(loss, clip=math.inf), has_aux=True)(
        values
    )
    assert float(sums.loss) == (1.75**2 + 1**2 + 3**2) / 2
    assert float(sums.clipped) == 0
    np.testing.assert_array_equal(gradient, values - returns)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: combined_scores(x[0], x[0], x[0] > 0, threshold=0.0),
        lambda x: whiten(x, x[0]),
        lambda x: advantages_and_returns(x, x, x, gamma=1.1, lam=1.0),
        lambda x: clipped_policy_loss(x, x, x, x, clip=1.0),
        lambda x: clipped_value_loss(x, x, x, x, clip=0.0),
    ],
    ids=["threshold", "shapes", "gamma", "clip", "value_clip"],
)
def test_what_no_recipe_can_ask_for_is_our_bug(call):
    with pytest.raises(AssertionError):
        call(jnp.ones((2, 3)))
