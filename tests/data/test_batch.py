import jax
import numpy as np

from llama_jax.data.batch import batch_rows
from llama_jax.data.prepared import record_type

BOS = 1


def test_targets_follow_tokens_and_padding_weighs_nothing():
    batch = batch_rows(
        [np.array([1, 5, 6, 7]), np.array([8, 9]), np.array([], int)], length=3
    )
    np.testing.assert_array_equal(batch.tokens, [[1, 5, 6], [8, 9, 0], [0, 0, 0]])
    np.testing.assert_array_equal(batch.targets, [[5, 6, 7], [9, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert batch.segments is None
    assert batch.tokens.dtype == batch.targets.dtype == np.int32
    assert batch.weights.dtype == np.float32


def test_segments_begin_at_bos():
    row = np.array([4, 2, BOS, 5, 2, BOS, 6])
    batch = batch_rows([row], length=6, bos_id=BOS)
    np.testing.assert_array_equal(batch.segments, [[0, 0, 1, 1, 1, 2]])


def test_of_dialogs_only_what_is_learnt_weighs():
    dtype = record_type("dialogs", np.dtype("<u2"))
    row = np.array(
        [(BOS, 0, 1), (5, 0, 0), (6, 1, 0), (BOS, 0, 1), (BOS, 0, 0), (7, 1, 0)], dtype
    )
    batch = batch_rows([row, np.array([], int)], length=7, bos_id=BOS)
    np.testing.assert_array_equal(batch.tokens[0], [1, 5, 6, 1, 1, 7, 0])
    np.testing.assert_array_equal(batch.targets[0], [5, 6, 1, 1, 7, 0, 0])
    np.testing.assert_array_equal(batch.weights[0], [0, 1, 0, 0, 1, 0, 0])
    # A turn of a dialog opens with BOS too, and is no dialog of its own.
    np.testing.assert_array_equal(batch.segments[0], [1, 1, 1, 2, 2, 2, 3])
    assert batch.weights[1].sum() == 0
    assert batch_rows([row], length=7).segments is None


def test_a_batch_is_a_pytree():
    batch = batch_rows([np.array([1, 5, 6, 7])], length=3)
    assert len(jax.tree.leaves(batch)) == 3
    doubled = jax.jit(lambda batch: jax.tree.map(lambda x: 2 * x, batch))(batch)
    np.testing.assert_array_equal(doubled.targets, [[10, 12, 14]])
    assert doubled.segments is None
