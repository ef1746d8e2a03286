"""The arithmetic, against NumPy in float64 written another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import layers, mask

attend = jax.jit(layers.attend)
RNG = np.random.default_rng(0)


def _normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def _silu(x):
    return x / (1 + np.exp(-x))


def test_rms_norm():
    x, scale = _normal(2, 3, 16) * 5, _normal(16)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.1)
    got = layers.rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=0.1)
    np.testing.assert_allclose(got, expected * scale, rtol=2e-6)


def test_rms_norm_is_scaled_after_it_is_rounded():
    """Meta casts to the input's type first and multiplies by the weight then."""
    x = jnp.asarray(_normal(4, 64), jnp.bfloat16)
    scale = jnp.asarray(1 + 0.1 * _normal(64), jnp.float32)
    got = layers.rms_norm(x, scale, eps=1e-5)
    wide = np.asarray(x, np.float32)
    quotient = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    expected = jnp.asarray(quotient, jnp.bfloat16) * scale.astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    # The quotient may round to its other neighbour where NumPy sums in another order.
    assert np.mean(np.asarray(got != expected)) < 0.01


def test_rms_norm_survives_squares_beyond_the_type():
    x = jnp.full((1, 8), 300.0, jnp.float16)  # 300² is out of float16's range
    got = layers.rms_norm(x, jnp.ones(8), eps=1e-5)
    np.testing.assert_allclose(np.asarray(got, np.float32), 1.0, rtol=1e-3)


def _turned_as_complex_numbers(x, positions, theta):
    """Feature i and i + H / 2 are one number; position p turns it by p θ^(-2i/H)."""
    half = x.shape[-1] // 2
    number = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    frequency = theta ** (-2.0 * np.arange(half) / (2 * half))
    number = number * np.exp(1j * positions[..., None] * frequency)[:, :, None]
    return np.concatenate([number.real, number.imag], axis=-1)


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rotate_is_a_product_of_complex_numbers(theta):
    x = _normal(2, 5, 3, 16)
    positions = np.array([[0, 1, 2, 3, 4], [7, 257, 1000, 2047, 4095]])
    angle = layers.rotary_angles(jnp.asarray(positions), head_dim=16, theta=theta)
    got = layers.rotate(jnp.asarray(x), angle)
    expected = _turned_as_complex_numbers(x, positions, theta)
    # An angle of 4095 radians is a float32 with an error of 1.2e-4.
    np.testing.assert_allclose(got, expected, atol=1e-3)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    np.testing.assert_array_equal(got[0, 0], x[0, 0])


def test_scores_of_rotated_vectors_depend_on_their_distance_alone():
    q, k = _normal(1, 1, 1, 16), _normal(1, 1, 1, 16)

    def score(query_position, key_position):
        turned = [
            layers.rotate(
                jnp.asarray(x),
                layers.rotary_angles(jnp.array([[p]]), head_dim=16, theta=1e4),
            )
            for x, p in ((q, query_position), (k, key_position))
        ]
        return float(jnp.vdot(*turned))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_angles_are_float32_whatever_the_rest_is():
    angle = layers.rotary_angles(jnp.array([[257]]), head_dim=8, theta=1e4)
    assert angle.dtype == jnp.float32
    assert float(angle[0, 0, 0]) == 257.0
    assert layers.rotate(jnp.ones((1, 1, 1, 8), jnp.bfloat16), angle).dtype == (
        jnp.bfloat16
    )


def _attended(q, k, v, allowed):
    """Each query head by itself, its key head repeated for it; softmax in float64."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x.astype(np.float64), repeats, axis=2) for x in (k, v))
    out = np.empty(q.shape)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[b, :, n] @ k[b, :, n].T / np.sqrt(q.shape[-1])
        weights = np.exp(scores) * allowed[min(b, len(allowed) - 1)]
        out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ v[b, :, n]
    return out


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_attend(num_kv_heads):
    q, k, v = (_normal(2, 7, n, 8) for n in (6, num_kv_heads, num_kv_heads))
    got = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), mask.causal(7))
    expected = _attended(q, k, v, np.tri(7)[None])
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_attend_within_segments():
    q, k, v = (_normal(2, 5, n, 8) for n in (4, 2, 2))
    segments = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]])
    got = attend(
        jnp.asarray(q),
        jnp.asarray(k),
        jnp.asarray(v),
        mask.causal(5, jnp.asarray(segments)),
    )
    allowed = np.tri(5) * (segments[:, :, None] == segments[:, None])
    np.testing.assert_allclose(got, _attended(q, k, v, allowed), atol=1e-6)


def test_the_weights_and_their_normaliser():
    """What ring attention needs to join pieces of a sequence."""
    q, k = _normal(1, 4, 4, 8), _normal(1, 4, 2, 8)
    weights, normaliser = layers.attention_weights(
        jnp.asarray(q), jnp.asarray(k), mask.causal(4)
    )
    assert weights.shape == (1, 2, 2, 4, 4)
    assert weights.dtype == normaliser.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    later = np.broadcast_to(np.tri(4) == 0, weights.shape)
    np.testing.assert_array_equal(np.asarray(weights) == 0, later)
    # The first query sees one key: its normaliser is that key's score.
    score = q[0, 0, 3] @ k[0, 0, 1] / np.sqrt(8)
    assert float(normaliser[0, 1, 1, 0]) == pytest.approx(score, rel=1e-5)


def test_a_query_that_may_see_no_key_gives_finite_numbers():
    q, k, v = (jnp.asarray(_normal(1, 2, 2, 8)) for _ in range(3))
    nothing = mask.Mask(jnp.array([[-1, 0]]), jnp.array([[0, 1]]))

    def total(q, k, v):
        return attend(q, k, v, nothing).sum()

    got = attend(q, k, v, nothing)
    np.testing.assert_allclose(got[0, 0], np.asarray(v[0]).mean(0), rtol=1e-6)
    np.testing.assert_allclose(got[0, 1], v[0, 0], rtol=1e-6)
    assert all(
        np.isfinite(g).all() for g in jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
    )


def test_softmax_is_float32_under_bfloat16():
    """Scores near 300 differ by less than bfloat16 can say, and still count."""
    q = jnp.full((1, 2, 1, 64), 6.125, jnp.bfloat16)
    k = jnp.stack([jnp.full((1, 64), 6.0), jnp.full((1, 64), 6.03125)])[None]
    v = jnp.stack([jnp.zeros((1, 64)), jnp.ones((1, 64))])[None]
    got = attend(q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), mask.causal(2))
    difference = 6.125 * (6.03125 - 6.0) * 8
    assert got.dtype == jnp.bfloat16
    assert float(got[0, 1, 0, 0]) == pytest.approx(
        1 / (1 + np.exp(-difference)), abs=4e-3
    )


def test_swiglu():
    x, gate, up, down = _normal(2, 3, 4), _normal(4, 6), _normal(4, 6), _normal(6, 4)
    got = layers.swiglu(*map(jnp.asarray, (x, gate, up, down)))
    np.testing.assert_allclose(
        got, (_silu(x @ gate) * (x @ up)) @ down, rtol=1e-4, atol=1e-5
    )
