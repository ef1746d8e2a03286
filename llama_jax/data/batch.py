"""What one step reads. B rows, T positions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of tokens, and what is to be predicted at each position: a pytree.

    Attributes:
      tokens: what the model reads.
      targets: the token after each.
      weights: how much each prediction counts; 0 for padding.
      segments: which document of its row a token belongs to; None if documents may
        see each other.
    """

    tokens: Int[Any, "B T"]
    targets: Int[Any, "B T"]
    weights: Float[Any, "B T"]
    segments: Int[Any, "B T"] | None


def batch_rows(
    rows: Sequence[np.ndarray], *, length: int, bos_id: int | None = None
) -> Batch:
    """Lay rows of at most `length` + 1 tokens under each other.

    What a short row lacks weighs nothing. An empty row is all padding: it fills up
    the last batch of a pass, so that every batch has one shape.

    Args:
      rows: pieces of packed documents; each overlaps the next by one token.
      length: positions, T.
      bos_id: the token that opens a document, if the documents of a row are to be
        told apart.
    """
    tokens_BU = np.zeros((len(rows), length + 1), np.int32)  # U = T + 1
    weights_BT = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        tokens_BU[i, : len(row)] = row
        weights_BT[i, : max(0, len(row) - 1)] = 1
    tokens_BT = tokens_BU[:, :-1]
    segments_BT = None
    if bos_id is not None:
        segments_BT = np.cumsum(tokens_BT == bos_id, axis=1, dtype=np.int32)
    return Batch(
        tokens=tokens_BT,
        targets=tokens_BU[:, 1:],
        weights=weights_BT,
        segments=segments_BT,
    )
