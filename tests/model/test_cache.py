"""The cache: writes at a place of each row, in one layer, and reads."""

import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.model import KVCache
from llama_jax.model.count import cache_bytes_per_token

CONFIG = LlamaConfig.tiny()


def test_an_empty_cache_takes_the_bytes_that_are_counted():
    cache = KVCache.empty(CONFIG, batch=2, slots=6, dtype=jnp.bfloat16)
    assert cache.keys.shape == cache.values.shape == (2, 2, 6, 4, 8)
    assert cache.num_slots == 6
    per_token = cache_bytes_per_token(CONFIG, dtype=jnp.bfloat16)
    assert cache.keys.nbytes + cache.values.nbytes == 2 * 6 * per_token


def test_write_and_read():
    cache = KVCache.empty(CONFIG, batch=2, slots=6, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(2, 2, 4, 8)).astype(np.float32) for _ in range(2))
    written = cache.write(jnp.int32(1), jnp.array([0, 3]), jnp.array(k), jnp.array(v))
    keys, values = (np.asarray(x) for x in written.read(jnp.int32(1)))
    for row, start in enumerate((0, 3)):
        np.testing.assert_array_equal(keys[row, start : start + 2], k[row])
        np.testing.assert_array_equal(values[row, start : start + 2], v[row])
    # Nothing else is touched: not the other slots, the other layer, the old cache.
    assert np.count_nonzero(keys) == k.size
    assert np.count_nonzero(written.read(jnp.int32(0))) == 0
    assert np.count_nonzero(cache.keys) == 0


def test_what_is_written_is_rounded_to_the_caches_type():
    cache = KVCache.empty(CONFIG, batch=1, slots=2, dtype=jnp.bfloat16)
    third = jnp.full((1, 1, 4, 8), 1 / 3)
    written = cache.write(jnp.int32(0), jnp.array([1]), third, third)
    assert written.keys.dtype == jnp.bfloat16
    assert (written.keys[0, 0, 1] == jnp.bfloat16(1 / 3)).all()
