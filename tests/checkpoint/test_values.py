"""NaN and infinity are found wherever they are, and rounding says what it cannot do."""

import ml_dtypes
import numpy as np
import pytest

from llama_jax.checkpoint.values import all_finite, round_to
from llama_jax.errors import CheckpointError

DTYPES = [np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    array = np.linspace(-3, 3, 3 * 70_000).reshape(3, 70_000).astype(dtype)
    array[0, :4] = [0, -0.0, np.finfo(np.float16).max, -65504]
    for view in (array, array.T, array[:, 1:]):
        assert all_finite(view)
    for place in ((0, 5), (1, 65_536), (2, 69_999)):
        changed = array.copy()
        changed[place] = value
        for view in (changed, changed.T, changed[:, 1:]):
            assert not all_finite(view), place
    assert all_finite(array[:0])


def test_subnormals_and_the_largest_numbers_are_finite():
    for dtype in DTYPES:
        limits = ml_dtypes.finfo(dtype)
        assert all_finite(np.array([limits.max, limits.min, limits.smallest_subnormal]))


def test_rounding_is_to_nearest_even():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -2.5, np.nan, np.inf], np.float32)
    rounded = round_to(np.dtype(ml_dtypes.bfloat16), values, what="w")
    expected = [1.0, 1 + 2**-6, -2.5, np.nan, np.inf]
    np.testing.assert_array_equal(rounded.astype(np.float32), np.float32(expected))
    assert round_to(np.dtype(np.float32), values, what="w") is values


def test_a_number_that_becomes_infinite_is_an_error():
    values = np.array([65504, 65520, -7e4, np.inf], np.float32)
    with pytest.raises(CheckpointError, match=r"w has 2 values, up to 7e\+04, that fl"):
        round_to(np.dtype(np.float16), values, what="w")
    assert round_to(np.dtype(np.float16), values[:1], what="w") == 65504
