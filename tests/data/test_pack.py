import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.pack import pack, pack_whole
from llama_jax.text import Example

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


def example(number: int, size: int) -> Example:
    return Example([number] * size, [True] * size)


@given(st.lists(st.integers(1, 9), max_size=900))
def test_dialogs_stay_whole_and_each_comes_once(sizes):
    examples = [example(i, size) for i, size in enumerate(sizes)]
    rows = list(pack_whole(examples, row_length=8))
    assert sorted(e.tokens[0] for row in rows for e in row) == list(range(len(sizes)))
    assert all(0 < sum(len(e.tokens) for e in row) <= 9 for row in rows)


def test_rows_are_nearly_full():
    """Of dialogs as long as a tenth of a row to half of it, in any order."""
    draw = np.random.default_rng(0)
    examples = [example(i, draw.integers(400, 2000)) for i in range(3000)]
    rows = list(pack_whole(examples, row_length=4096))
    used = sum(len(e.tokens) for e in examples) / (4097 * len(rows))
    assert used > 0.96


def test_a_full_row_does_not_wait_for_more():
    examples = (example(i, 9) for i in range(9))
    rows = pack_whole(examples, row_length=8)
    assert [next(rows)[0].tokens[0] for _ in range(3)] == [0, 1, 2]
    assert next(examples).tokens[0] == 3
