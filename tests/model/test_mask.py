"""Masks drawn whole, against the sentence that defines them."""

import jax.numpy as jnp
import numpy as np

from llama_jax.model import mask


def test_causal():
    np.testing.assert_array_equal(mask.causal(5).allowed(), np.tri(5, dtype=bool)[None])


def test_segments():
    segments = [0, 0, 1, 1, 1]
    drawn = mask.causal(5, jnp.array([segments])).allowed()
    for query in range(5):
        for key in range(5):
            expected = key <= query and segments[key] == segments[query]
            assert bool(drawn[0, query, key]) == expected


def test_rows_that_are_cached_see_their_own_past():
    """Two rows at different places, three new positions, a cache of six slots."""
    places = jnp.array([[0, 1, 2], [3, 4, 5]])
    drawn = np.asarray(mask.Mask(places, jnp.arange(6)[None]).allowed())
    assert drawn.shape == (2, 3, 6)
    np.testing.assert_array_equal(drawn.sum(-1), [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(drawn[1, 0], [1, 1, 1, 1, 0, 0])
