"""Eight bits: how far off they are, and that nothing becomes something."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.int8 import Quantized


def vectors(*shape) -> np.ndarray:
    """Of many magnitudes, by vector."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-6, 6, (*shape[:-1], 1))
    return (rng.normal(size=shape) * sizes).astype(np.float32)


@pytest.mark.parametrize("shape", [(40, 64), (3, 5, 7, 16), (9,)])
def test_what_comes_back_is_off_by_half_a_scale_at_most(shape):
    x = vectors(*shape)
    kept = Quantized.of(jnp.asarray(x))
    assert kept.values.dtype == jnp.int8 and kept.scale.dtype == jnp.float32
    assert kept.shape == shape and kept.scale.shape == shape[:-1]
    np.testing.assert_allclose(kept.scale, np.abs(x).max(-1) / 127, rtol=1e-6)
    off = np.abs(np.asarray(kept.widened(jnp.float32)) - x)
    assert (off <= np.asarray(kept.scale)[..., None] * 0.5 * (1 + 1e-4)).all()
    # The whole range is used, and no more than it.
    assert (np.abs(np.asarray(kept.values)).max(-1) == 127).all()


def test_whole_numbers_come_back_as_they_were():
    x = jnp.concatenate([jnp.arange(-127, 128.0), jnp.array([127.0])]).reshape(2, -1)
    np.testing.assert_array_equal(Quantized.of(x).widened(jnp.float32), x)


def test_a_vector_of_zeros_stays_one():
    x = jnp.zeros((3, 8)).at[1].set(5.0)
    kept = Quantized.of(x)
    assert np.isfinite(kept.scale).all()
    np.testing.assert_array_equal(kept.widened(jnp.float32), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_goes_in_and_any_type_comes_out(dtype):
    x = jnp.asarray(vectors(6, 32), jnp.bfloat16)
    kept = Quantized.of(x)
    wide = kept.widened(dtype)
    assert wide.dtype == dtype and kept.scale.dtype == jnp.float32
    exact = np.asarray(kept.values, np.float32) * np.asarray(kept.scale)[:, None]
    np.testing.assert_array_equal(wide, jnp.asarray(exact, dtype))


def test_it_is_a_tree_of_two_arrays():
    kept = Quantized.of(jnp.ones((2, 4)))
    halved = jax.tree.map(lambda x: x[:1], kept)
    assert isinstance(halved, Quantized) and halved.shape == (1, 4)
