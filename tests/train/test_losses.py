"""The loss, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.train.losses import next_token_loss

RNG = np.random.default_rng(0)
LOGITS = (RNG.normal(size=(2, 5, 11)) * 5).astype(np.float32)
TARGETS = RNG.integers(0, 11, (2, 5), dtype=np.int32)
WEIGHTS = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 0.5, 0]], np.float32)


def _numpy_loss(weights):
    wide = LOGITS.astype(np.float64)
    log_probs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, TARGETS[..., None], -1)[..., 0]
    return -(chosen * weights).sum()


def test_sums_of_loss_and_weights():
    total, count = jax.jit(next_token_loss)(LOGITS, TARGETS, WEIGHTS)
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, _numpy_loss(WEIGHTS), rtol=1e-6)
    assert float(count) == 4.5


def test_the_gradient_is_probability_minus_target_and_0_where_masked():
    gradient = jax.jit(jax.grad(lambda x: next_token_loss(x, TARGETS, WEIGHTS)[0]))(
        LOGITS
    )
    wide = np.exp(LOGITS.astype(np.float64))
    expected = wide / wide.sum(-1, keepdims=True) - np.eye(11)[TARGETS]
    np.testing.assert_allclose(gradient, expected * WEIGHTS[..., None], atol=1e-6)
    assert np.count_nonzero(np.asarray(gradient)[WEIGHTS == 0]) == 0


def test_nothing_to_predict_is_0_with_a_gradient_of_0():
    nothing = np.zeros_like(WEIGHTS)
    value, gradient = jax.value_and_grad(
        lambda x: next_token_loss(x, TARGETS, nothing)[0]
    )(jnp.asarray(LOGITS))
    assert float(value) == 0
    assert np.count_nonzero(gradient) == 0


def test_logits_too_large_for_an_exponential_stay_finite():
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    target, weight = jnp.array([[1]]), jnp.ones((1, 1))
    assert float(next_token_loss(logits, target, weight)[0]) == 1e4
