"""The cache: writes at one place or at each row's, rounding, and what a part holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.model import KVCache
from llama_jax.model.count import cache_bytes_per_token
from llama_jax.model.int8 import Quantized

CONFIG = LlamaConfig.tiny()


def empty(dtype, *, batch=2, slots=6, **options) -> KVCache:
    return KVCache.empty(
        CONFIG, batch=batch, slots=slots, dtype=jnp.dtype(dtype), **options
    )


def new(num_new, *, batch=2):
    rng = np.random.default_rng(0)
    shape = (batch, 4, num_new, 8)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(2)]


def test_an_empty_cache_takes_the_bytes_that_are_counted():
    cache = empty(jnp.bfloat16)
    assert cache.keys.shape == cache.values.shape == (2, 4, 6, 8)
    assert cache.num_slots == 6
    per_token = cache_bytes_per_token(CONFIG, dtype=jnp.bfloat16)
    num_bytes = cache.keys.nbytes + cache.values.nbytes
    assert num_bytes * CONFIG.num_layers == 2 * 6 * per_token
    assert empty(jnp.float32, kv_copies=2).keys.shape == (2, 8, 6, 8)


def test_new_positions_of_all_rows_at_one_place():
    cache = empty(jnp.float32)
    k, v = new(2)
    written = cache.write(jnp.int32(3), jnp.asarray(k), jnp.asarray(v))
    for found, expected in ((written.keys, k), (written.values, v)):
        np.testing.assert_array_equal(found[:, :, 3:5], expected)
        assert np.count_nonzero(found) == expected.size
    assert np.count_nonzero(cache.keys) == 0


def test_one_position_of_each_row_at_its_own_place():
    k, v = new(1)
    written = empty(jnp.float32).write(
        jnp.array([5, 0]), jnp.asarray(k), jnp.asarray(v)
    )
    for found, expected in ((written.keys, k), (written.values, v)):
        for row, slot in enumerate((5, 0)):
            np.testing.assert_array_equal(found[row, :, slot], expected[row, :, 0])
        assert np.count_nonzero(found) == expected.size


def test_what_is_written_is_rounded_to_the_caches_type():
    third = jnp.full((1, 4, 1, 8), 1 / 3)
    written = empty(jnp.bfloat16, batch=1, slots=2).write(jnp.int32(1), third, third)
    assert written.keys.dtype == jnp.bfloat16
    assert (written.keys[0, :, 1] == jnp.bfloat16(1 / 3)).all()


@pytest.mark.parametrize(
    "start", [jnp.int32(4), jnp.array([4, 1])], ids=["one", "each"]
)
def test_eight_bits_have_a_scale_for_each_head_and_slot(start):
    cache = empty(jnp.int8)
    assert cache.keys.shape == (2, 4, 6, 8) and cache.num_slots == 6
    assert cache.keys.scale.shape == (2, 4, 6)
    # Scales of their own: heads and rows differ by orders of magnitude.
    k, v = (x * 10.0 ** np.arange(-4, 4).reshape(2, 4, 1, 1) for x in new(1))
    written = cache.write(start, jnp.asarray(k), jnp.asarray(v))
    for found, given in ((written.keys, k), (written.values, v)):
        assert isinstance(found, Quantized) and found.values.dtype == jnp.int8
        for row, slot in enumerate(np.broadcast_to(start, 2)):
            wide = np.asarray(found.widened(jnp.float32))[row, :, slot]
            largest = np.abs(given[row, :, 0]).max(-1, keepdims=True)
            assert (np.abs(wide - given[row, :, 0]) <= largest / 254 * 1.001).all()


def test_the_first_slots():
    k, v = new(6)
    whole = empty(jnp.int8).write(jnp.int32(0), jnp.asarray(k), jnp.asarray(v))
    part = whole.first(4)
    assert part.num_slots == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b[:, :, :4]), part, whole
    )
