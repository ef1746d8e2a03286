"""Where the positions of a split row go, and rows that cannot be split."""

import numpy as np
import pytest

from sharding import MeshConfig, ShardingError, abstract_mesh, training_rules
from sharding.context import placement, places, require_positions_divide


def test_each_device_keeps_one_early_and_one_late_chunk():
    np.testing.assert_array_equal(placement(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])
    for parts in (2, 4, 8):
        chunk = 48 // (2 * parts)
        for i, kept in enumerate(placement(48, parts).reshape(parts, 2, chunk)):
            np.testing.assert_array_equal(kept[0], np.arange(chunk) + i * chunk)
            late = (2 * parts - 1 - i) * chunk
            np.testing.assert_array_equal(kept[1], np.arange(chunk) + late)


def test_one_device_keeps_the_order():
    np.testing.assert_array_equal(placement(7, 1), np.arange(7))
    np.testing.assert_array_equal(places(7, 1), np.arange(7))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_places_puts_rows_back(parts):
    rows = np.random.default_rng(parts).normal(size=(2, 48))
    order = placement(48, parts)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(rows[:, order][:, places(48, parts)], rows)
    np.testing.assert_array_equal(order[places(48, parts)], np.arange(48))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_every_device_has_the_same_number_of_keys_to_read(parts):
    """Which is what the order is for; cut into runs, the last device has most."""
    position = placement(64, parts).reshape(parts, -1)
    keys = (position + 1).sum(axis=1)
    assert (keys == keys[0]).all() and keys.sum() == 64 * 65 // 2


def test_a_row_that_does_not_divide_is_refused():
    with pytest.raises(ShardingError) as caught:
        placement(20, 4)
    assert str(caught.value) == (
        "a row of 20 positions does not divide into 2 x 4 = 8 chunks, two for each "
        "device of the mesh axis 'context': make the row 16 or 24 long, or the axis "
        "one of [1, 2]."
    )
    with pytest.raises(ShardingError, match="make the row 8 long, .* one of .1, 3.."):
        placement(6, 4)


def _require(length, *, sequence_parallel, **sizes):
    mesh = abstract_mesh(MeshConfig(**sizes), 8)
    rules = training_rules(sequence_parallel=sequence_parallel)
    require_positions_divide(mesh, rules, length)


def test_what_the_rules_split_must_divide():
    _require(12, context=2, tensor=4, sequence_parallel=False)
    with pytest.raises(
        ShardingError,
        match=r"12 positions .* 8 devices of mesh axes context x tensor, .*"
        r"multiple of 8 .* one of \[1, 2, 3, 4, 6\]",
    ):
        _require(12, context=2, tensor=4, sequence_parallel=True)
    with pytest.raises(ShardingError, match="18 positions does not divide into 2 x 4"):
        _require(18, context=4, sequence_parallel=True)
    _require(16, context=4, tensor=2, sequence_parallel=True)
    _require(7, sequence_parallel=True)
