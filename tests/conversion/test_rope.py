"""Interleaved rotary features become half-split ones."""

import numpy as np

from llama_jax.conversion.rope import half_split_order


def test_pairs_of_neighbours_end_half_a_head_apart():
    order = half_split_order(8)
    assert order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    first, second = np.split(order, 2)
    assert np.array_equal(second, first + 1)
