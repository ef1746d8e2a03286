import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.pack import pack, pack_whole

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=8)


@given(DOCUMENTS, st.integers(1, 7))
def test_every_token_but_the_first_is_a_target_once(documents, row_length):
    stream = [token for document in documents for token in document]
    rows = list(pack(documents, row_length=row_length))
    assert [token for row in rows for token in row[1:]] == stream[1:]
    assert [token for row in rows for token in row[:-1]] == stream[:-1]
    assert all(len(row) == row_length + 1 for row in rows[:-1])
    assert all(2 <= len(row) <= row_length + 1 for row in rows[-1:])


def test_a_document_longer_than_many_rows():
    rows = list(pack([range(1000)], row_length=10))
    assert len(rows) == 100
    np.testing.assert_array_equal(rows[3], np.arange(30, 41))
    np.testing.assert_array_equal(rows[-1], np.arange(990, 1000))


def piece(number: int, size: int) -> np.ndarray:
    return np.full(size, number)


@given(st.lists(st.integers(1, 9), max_size=900))
def test_pieces_stay_whole_and_each_comes_once(sizes):
    pieces = [piece(i, size) for i, size in enumerate(sizes)]
    rows = list(pack_whole(pieces, room=9))
    assert all(0 < len(row) <= 9 for row in rows)
    found = [
        (int(run[0]), len(run))
        for row in rows
        for run in np.split(row, np.flatnonzero(np.diff(row)) + 1)
    ]
    assert sorted(found) == list(enumerate(sizes))


def test_rows_are_nearly_full():
    """Of dialogs as long as a tenth of a row to half of it, in any order."""
    draw = np.random.default_rng(0)
    pieces = [piece(i, draw.integers(400, 2000)) for i in range(3000)]
    rows = list(pack_whole(pieces, room=4097))
    used = sum(map(len, pieces)) / (4097 * len(rows))
    assert used > 0.96


def test_a_full_row_does_not_wait_for_more():
    pieces = (piece(i, 9) for i in range(9))
    rows = pack_whole(pieces, room=9)
    assert [next(rows)[0] for _ in range(3)] == [0, 1, 2]
    assert next(pieces)[0] == 3
