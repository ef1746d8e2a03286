"""Sizes that are compiled for: few, and never much too large."""

import math

import pytest

from llama_jax.generate.rows import (
    chunk_sizes,
    chunks,
    length_bucket,
    num_rows_for,
    padded,
)
from tests.generate.models import COPIES, EIGHT, ONE, ROWS, model

SLOTS = [2, 32, 64, 65, 100, 256, 1000, 1024, 4096]


def test_buckets_double_from_64():
    sizes = {length_bucket(length, 1000) for length in range(1, 1001)}
    assert sizes == {64, 128, 256, 512, 1000}
    for length in range(1, 1001):
        assert length <= length_bucket(length, 1000) <= max(64, 2 * length - 1)
    assert length_bucket(5, 32) == 32


@pytest.mark.parametrize("slots", SLOTS)
def test_chunks_reach_the_end_and_leave_no_hole(slots):
    """Whatever is known already, in the cache's slots, in sizes that are listed."""
    sizes = chunk_sizes(slots)
    assert len(sizes) <= math.log2(max(slots, 64) / 64) + 1 + (slots % 64 > 0)
    starts = {0, 1, 5, 63, 64, 65, slots // 2, slots - 2}
    for start in (start for start in starts if 0 <= start < slots - 1):
        for stop in range(start + 1, slots):
            reached = start
            for first, size in chunks(start, stop, slots):
                assert size in sizes and first <= reached < first + size <= slots
                reached = first + size
            assert reached >= stop


@pytest.mark.parametrize("slots", SLOTS)
def test_at_most_twice_as_much_is_read_as_there_is(slots):
    for stop in range(1, slots):
        num_read = sum(size for _, size in chunks(0, stop, slots))
        assert num_read <= max(64, 2 * stop)


def test_a_last_chunk_begins_earlier_where_it_would_leave_the_cache():
    assert list(chunks(50, 90, 100)) == [(36, 64)]
    assert list(chunks(0, 90, 100)) == [(0, 100)]
    assert list(chunks(0, 990, 1000)) == [(0, 512), (488, 512)]
    assert list(chunks(0, 1100, 4096)) == [(0, 512), (512, 512), (1024, 128)]
    assert list(chunks(7, 7, 100)) == []


def test_rows_have_two_sizes_per_doubling():
    sharded, _ = model()
    sizes = [num_rows_for(sharded, number) for number in range(1, 14)]
    assert sizes == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [(ONE, [1, 5, 17]), (COPIES, [1, 5, 17]), (EIGHT, [1, 3, 9]), (ROWS, [1, 5, 17])],
    ids=["one", "copies", "eight", "rows"],
)
def test_devices_share_rows_evenly(mesh, sizes):
    sharded, _ = model(mesh)
    num_devices = mesh.data * mesh.fsdp
    for number in sizes:
        size = num_rows_for(sharded, number)
        assert number <= size <= max(num_devices, 1.5 * number + num_devices)
        assert size % num_devices == 0


def test_rows_of_padding_come_last():
    assert padded([[5], [6, 7]], 3, 4).tolist() == [
        [5, 0, 0, 0],
        [6, 7, 0, 0],
        [0, 0, 0, 0],
    ]
