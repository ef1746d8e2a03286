"""Leaves and matrices: slabs cover each row once, and nothing moves on the way back."""

import itertools

import numpy as np
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.conversion import layout, names

CONFIG = LlamaConfig.tiny()
SIZES = names.axis_sizes(CONFIG)
WEIGHTS = names.weights(CONFIG)


def test_weights_are_in_the_order_of_a_model():
    found = [weight.name for weight in WEIGHTS]
    assert found[0] == "model.embed_tokens.weight"
    assert found[1] == "model.layers.0.input_layernorm.weight"
    assert found[9:11] == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
    ]
    assert found[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert len(set(found)) == len(found) == 3 + 9 * CONFIG.num_layers


@pytest.mark.parametrize("slab_bytes", [1, 1000, 2**25])
def test_slabs_cover_each_row_once(monkeypatch, slab_bytes):
    monkeypatch.setattr(layout, "SLAB_BYTES", slab_bytes)
    for weight in WEIGHTS:
        num_rows = weight.parameter.hf.shape(SIZES)[0]
        bounds = list(layout.slabs(weight, SIZES, itemsize=2))
        assert bounds[0][0] == 0 and bounds[-1][1] == num_rows
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
        unit = layout.row_unit(weight, SIZES)
        assert all(start % unit == 0 for start, _ in bounds)


def test_a_70bs_slabs_are_small():
    sizes = names.axis_sizes(LlamaConfig.llama2_70b())
    for weight in names.weights(LlamaConfig.llama2_70b())[:11]:
        num_rows, *columns = weight.parameter.hf.shape(sizes)
        for start, stop in layout.slabs(weight, sizes, itemsize=2):
            assert (stop - start) * int(np.prod(columns)) * 2 <= layout.SLAB_BYTES


def test_rows_become_a_part_of_the_leaf_and_rows_again(monkeypatch):
    monkeypatch.setattr(layout, "SLAB_BYTES", 1000)
    rng = np.random.default_rng(0)
    for weight in WEIGHTS:
        shape = weight.parameter.hf.shape(SIZES)
        matrix = rng.integers(0, 2**15, shape).astype(np.int16)
        leaf = np.zeros([SIZES[axis] for axis in weight.parameter.axes], np.int16)
        for start, stop in layout.slabs(weight, SIZES, itemsize=2):
            index = layout.leaf_index(weight, SIZES, start, stop)
            part = layout.to_leaf(matrix[start:stop], weight, leaf[index].shape)
            assert part.flags.c_contiguous
            leaf[index] = part
            block = leaf[index] if weight.layer is None else leaf[index][0]
            back = layout.to_matrix(block, weight)
            assert back.flags.c_contiguous
            assert np.array_equal(back, matrix[start:stop]), weight.name
        # Features of a head stay together; a kernel is the matrix transposed.
        whole = leaf if weight.layer is None else leaf[weight.layer]
        flat = matrix if weight.axes == weight.parameter.hf.axes else matrix.T
        assert np.array_equal(whole.reshape(flat.shape), flat)


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (40, 16), (3, 100)])
def test_a_transposed_matrix_is_copied_in_strips(shape):
    matrix = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    copied = layout.contiguous(matrix.T)
    assert copied.flags.c_contiguous and np.array_equal(copied, matrix.T)
    assert layout.contiguous(matrix) is matrix
    columns = matrix[:, ::2]
    assert np.array_equal(layout.contiguous(columns), columns)
