import jax
import numpy as np

from llama_jax.data.batch import batch_rows

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


def test_a_batch_is_a_pytree():
    batch = batch_rows([np.array([1, 5, 6, 7])], length=3)
    assert len(jax.tree.leaves(batch)) == 3
    doubled = jax.jit(lambda batch: jax.tree.map(lambda x: 2 * x, batch))(batch)
    np.testing.assert_array_equal(doubled.targets, [[10, 12, 14]])
    assert doubled.segments is None
