"""Between a weight as it is here and the matrix that other formats hold.

Files hold [out, in]; here a product is x @ kernel, so most leaves are such a matrix
transposed, with its heads unfolded. Rows are gone through in slabs, so that no step
needs a whole matrix: a stacked one of a 70B is 38 GB, one layer of it 470 MB.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from llama_jax.conversion.names import Weight

# Bytes of the rows that one step reads, converts and writes.
SLAB_BYTES = 2**25
# D is stored in this many chunks where it divides: meshes split it over many devices,
# and each should read its own part alone.
WIDTH_CHUNKS = 16
# Rows copied at once when a matrix is transposed: 32 bytes of each row of the result,
# at which the copy is five times faster than NumPy's own order.
_STRIP = 16


def slabs(
    weight: Weight, sizes: Mapping[str, int], itemsize: int
) -> Iterator[tuple[int, int]]:
    """The first row of each slab of a weight's matrix, and the one after its last."""
    num_rows, *columns = weight.parameter.hf.shape(sizes)
    step = slab_rows(weight, sizes, itemsize) if columns else num_rows
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def slab_rows(weight: Weight, sizes: Mapping[str, int], itemsize: int) -> int:
    """Rows in a slab: whole heads, or whole chunks of D; as many in each as can be."""
    num_rows, num_columns = weight.parameter.hf.shape(sizes)
    unit = row_unit(weight, sizes)
    most = max(1, SLAB_BYTES // (unit * num_columns * itemsize))
    num_units = num_rows // unit
    num_slabs = math.ceil(num_units / most)
    return math.ceil(num_units / num_slabs) * unit


def row_unit(weight: Weight, sizes: Mapping[str, int]) -> int:
    """Rows that stay together: a head, a chunk of D, or one."""
    letters = weight.parameter.hf.dims.split()[0]
    if letters == "D":
        return width_chunk(sizes)
    return sizes["H"] if letters.endswith("H") else 1


def width_chunk(sizes: Mapping[str, int]) -> int:
    """How much of D is in one chunk."""
    D = sizes["D"]
    return D if D % WIDTH_CHUNKS else D // WIDTH_CHUNKS


def leaf_index(
    weight: Weight, sizes: Mapping[str, int], start: int, stop: int
) -> tuple[slice, ...]:
    """Where rows of a weight's matrix are in its leaf; of heads, whole ones."""
    letters = weight.parameter.hf.dims.split()[0]
    if letters.endswith("H"):
        assert start % sizes["H"] == stop % sizes["H"] == 0, (start, stop)
        start, stop = start // sizes["H"], stop // sizes["H"]
    part = {letters[0]: slice(start, stop)}
    return weight.index(
        tuple(part.get(axis, slice(0, sizes[axis])) for axis in weight.axes)
    )


def to_matrix(block: np.ndarray, weight: Weight) -> np.ndarray:
    """A part of a leaf, with no axis for layers, as rows of the matrix [out, in]."""
    stored = weight.parameter.hf
    unfolded = block.transpose([weight.axes.index(axis) for axis in stored.axes])
    return contiguous(unfolded.reshape(_folded(unfolded.shape, stored.dims)))


def to_leaf(matrix: np.ndarray, weight: Weight, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of the matrix [out, in] as a part of the leaf, which has this shape."""
    transposed = weight.axes != weight.parameter.hf.axes
    return contiguous(matrix.T if transposed else matrix).reshape(shape)


def contiguous(matrix: np.ndarray) -> np.ndarray:
    """The same in C order: itself if it is, else copied in strips if transposed."""
    if matrix.flags.c_contiguous:
        return matrix
    if matrix.ndim != 2 or abs(matrix.strides[0]) >= abs(matrix.strides[1]):
        return np.ascontiguousarray(matrix)
    copied = np.empty(matrix.shape, matrix.dtype)
    for start in range(0, matrix.shape[1], _STRIP):
        strip = slice(start, start + _STRIP)
        copied[:, strip] = matrix[:, strip]
    return copied


def _folded(shape: tuple[int, ...], dims: str) -> list[int]:
    """The shape with the axes of each stored dimension multiplied."""
    lengths = iter(shape)
    return [
        int(np.prod([next(lengths) for _ in dim], dtype=int)) for dim in dims.split()
    ]
