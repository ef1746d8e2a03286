"""Requests as rows of ids: checked, and padded to sizes that may be compiled already.

Padding changes no answer: attention is causal, and rows ignore each other.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from llama_jax.build import ShardedLlama
from llama_jax.errors import GenerationError
from sharding.axes import BATCH
from sharding.mesh import axis_size


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
    sharded: ShardedLlama, rows: Sequence[Sequence[int]]
) -> Int[np.ndarray, "B T"]:
    """Rows of ids, each padded at its end, and rows of padding after them: int32."""
    num_devices = axis_size(sharded.mesh, sharded.rules.mesh_axes(BATCH))
    num_rows = num_devices * _bucket(-(-len(rows) // num_devices), least=1)
    tokens = np.zeros((num_rows, length_bucket(sharded, max(map(len, rows)))), np.int32)
    for row, ids in zip(tokens, rows, strict=False):
        row[: len(ids)] = ids
    return tokens


def length_bucket(sharded: ShardedLlama, length: int) -> int:
    """The positions to compile for: 16, 24, 32, 48, 64, ..., at most `max_length`."""
    assert length <= sharded.config.max_length, length
    return min(_bucket(length, least=16), sharded.config.max_length)


def _bucket(size: int, *, least: int) -> int:
    """Two buckets per doubling, so that none is more than half too large."""
    doubled = least
    while doubled < size:
        doubled *= 2
    between = doubled * 3 // 4
    return between if least < doubled and size <= between else doubled
