"""Requests as rows of ids: checked, and padded to sizes that may be compiled already.

Padding changes no answer: attention is causal, and rows ignore each other.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from llama_jax.build import ShardedLlama
from llama_jax.errors import GenerationError
from sharding.axes import BATCH
from sharding.mesh import axis_size

# Positions that are compiled for at the least, and that are read at a time at the most:
# enough to keep the matrix units busy, few enough for scores to be small.
_LEAST_POSITIONS = 64
_CHUNK = 512


def require_ids(ids: ArrayLike, *, name: str, vocab_size: int) -> list[int]:
    """The ids as a list, each of which has an embedding.

    Raises:
      GenerationError: there are none, or something else than ids of the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of several lengths within
        array = np.asarray(None)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise GenerationError(
            f"{name} is {ids!r:.60}: give a list of token ids, which are integers."
        )
    if not array.size:
        raise GenerationError(
            f"{name} has no token ids, and nothing can follow nothing: begin with BOS, "
            "which is what the text '' does."
        )
    wrong = (array < 0) | (array >= vocab_size)
    if wrong.any():
        position = int(wrong.argmax())
        raise GenerationError(
            f"{name} has the id {array[position]} at position {position}, but the "
            f"model's vocabulary is 0 to {vocab_size - 1}: encode the text with the "
            "model's own tokenizer, and leave out padding."
        )
    return array.tolist()


def padded(
    rows: Sequence[Sequence[int]], num_rows: int, length: int
) -> Int[np.ndarray, "B T"]:
    """Rows of ids, each padded at its end, and rows of padding after them: int32."""
    tokens = np.zeros((num_rows, length), np.int32)
    for row, ids in zip(tokens, rows, strict=False):
        row[: len(ids)] = ids
    return tokens


def num_rows_for(sharded: ShardedLlama, num_rows: int) -> int:
    """The rows to compile for, a multiple of the devices that share them.

    Each has 1, 2, 3, 4, 6, 8, 12, ...: two sizes per doubling.
    """
    num_devices = axis_size(sharded.mesh, sharded.rules.mesh_axes(BATCH))
    share = -(-num_rows // num_devices)
    doubled = _doubled(share, least=1)
    between = doubled * 3 // 4
    return num_devices * (between if 1 < share <= between else doubled)


def length_bucket(length: int, most: int) -> int:
    """The positions to compile for: 64, 128, 256, ..., at most `most`."""
    assert length <= most, (length, most)
    return min(_doubled(length, least=_LEAST_POSITIONS), most)


def chunks(start: int, stop: int, num_slots: int) -> Iterator[tuple[int, int]]:
    """The first position and the size of each chunk that together reach `stop`.

    All but the last are of one size, and that is padded to a bucket. Where its padding
    would leave the slots of the cache, it begins earlier, and reads some tokens again.
    """
    while start < stop:
        size = length_bucket(min(stop - start, _CHUNK, num_slots), num_slots)
        first = min(start, num_slots - size)
        yield first, size
        start = first + size


def chunk_sizes(num_slots: int) -> list[int]:
    """All sizes that `chunks` gives, the smallest first."""
    return sorted(
        {length_bucket(n, num_slots) for n in range(1, min(num_slots, _CHUNK) + 1)}
    )


def _doubled(size: int, *, least: int) -> int:
    while least < size:
        least *= 2
    return least
