"""The two orders of rotary features."""

import numpy as np

from llama_jax.conversion.rope import half_split_order, interleaved_order


def test_the_half_split_order_of_eight_features():
    assert half_split_order(8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_the_interleaved_order_of_eight_features():
    assert interleaved_order(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_each_undoes_the_other():
    for width in (2, 16, 128):
        both = half_split_order(width)[interleaved_order(width)]
        assert np.array_equal(both, np.arange(width))
