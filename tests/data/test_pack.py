import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.pack import pack

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
