"""What one step reads, or answers. B rows, T positions."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from llama_jax.data.prepared import CHOSEN, REJECTED, Kind, record_type


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonBatch:
    """Rows of pairs of answers, each answer after its dialog: a pytree.

    Attributes:
      tokens: what the model reads.
      segments: which answer, with its dialog, a token belongs to.
      weights: 1 at the last token of a chosen answer, else 0; the sum counts pairs.
      rejected: there, the position of the last token of the other answer.
      rating: there, how much better the chosen answer is, a place in
        `prepared.RATINGS`.
      safety: at the last token of any answer, `prepared.UNSAFE` or `SAFE`, or 0 where
        nobody said.
    """

    tokens: Int[Any, "B T"]
    segments: Int[Any, "B T"]
    weights: Float[Any, "B T"]
    rejected: Int[Any, "B T"]
    rating: Int[Any, "B T"]
    safety: Int[Any, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts to answer, on the host.

    Attributes:
      tokens: each padded at its end.
      lengths: tokens of each; 0 for a row that is all padding.
      about_safety: whether each is there to elicit unsafe answers.
    """

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    about_safety: Bool[np.ndarray, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """Prompts with a policy's answers, and what it is to learn of them: a pytree.

    What stands at a position concerns the token after it, as in `Batch`; what is not
    of an answer is 0.

    Attributes:
      tokens: what the models read.
      targets: the token after each.
      mask: 1 where that is of the answer.
      logprobs: its log-probability when it was drawn.
      advantages: how much better it was than expected.
      values: what the critic expected.
      returns: what came of it.
    """

    tokens: Int[Any, "B T"]
    targets: Int[Any, "B T"]
    mask: Float[Any, "B T"]
    logprobs: Float[Any, "B T"]
    advantages: Float[Any, "B T"]
    values: Float[Any, "B T"]
    returns: Float[Any, "B T"]


def batch_comparisons(rows: Sequence[np.ndarray], *, length: int) -> ComparisonBatch:
    """Lay rows of comparisons under each other; an empty row is all padding.

    Args:
      rows: records as `prepared.record_type` has them, of at most `length` tokens.
      length: positions, T.
    """
    stacked_BT = np.zeros(
        (len(rows), length), record_type("comparisons", np.dtype(np.int32))
    )
    stacked_BT["is_first"] = True  # padding belongs to no answer
    rejected_BT = np.zeros(stacked_BT.shape, np.int32)
    for i, row in enumerate(rows):
        if len(row):
            stacked_BT[i, : len(row)] = row
            (chosen,) = np.nonzero(row["answer"] == CHOSEN)
            (rejected_BT[i, chosen],) = np.nonzero(row["answer"] == REJECTED)
    return ComparisonBatch(
        tokens=stacked_BT["id"],
        segments=np.cumsum(stacked_BT["is_first"], axis=1, dtype=np.int32),
        weights=(stacked_BT["answer"] == CHOSEN).astype(np.float32),
        rejected=rejected_BT,
        rating=stacked_BT["rating"].astype(np.int32),
        safety=stacked_BT["safety"].astype(np.int32),
    )


def batch_rows(
    rows: Sequence[np.ndarray], *, length: int, bos_id: int | None = None
) -> Batch:
    """Lay rows of at most `length` + 1 tokens under each other.

    What a short row lacks weighs nothing, and so do the tokens of dialogs that are not
    learnt. An empty row is all padding: it fills up the last batch of a pass, so that
    every batch has one shape.

    Args:
      rows: records as `prepared.record_type` has them: pieces of documents, each of
        which overlaps the next by one token; or whole dialogs.
      length: positions, T.
      bos_id: the token that opens a document, if the documents or dialogs of a row are
        to be told apart.
    """
    tokens_BU = np.zeros((len(rows), length + 1), np.int32)  # U = T + 1
    weights_BT = np.zeros((len(rows), length), np.float32)
    is_first_BU = np.zeros(tokens_BU.shape, np.bool_)
    for i, row in enumerate(rows):
        size = len(row)
        if row.dtype.names is None:
            tokens_BU[i, :size] = row
            weights_BT[i, : max(0, size - 1)] = 1
            is_first_BU[i, :size] = row == bos_id
        else:
            tokens_BU[i, :size] = row["id"]
            weights_BT[i, : max(0, size - 1)] = row["is_learnt"][1:]
            is_first_BU[i, :size] = row["is_first"]
            is_first_BU[i, size:] = True  # padding belongs to no dialog
    segments_BT = None
    if bos_id is not None:
        segments_BT = np.cumsum(is_first_BU[:, :-1], axis=1, dtype=np.int32)
    return Batch(
        tokens=tokens_BU[:, :-1],
        targets=tokens_BU[:, 1:],
        weights=weights_BT,
        segments=segments_BT,
    )


def batch_prompts(rows: Sequence[np.ndarray], *, length: int) -> PromptBatch:
    """Lay prompts under each other; an empty row is all padding.

    Args:
      rows: records as `prepared.record_type` has them, of at most `length` tokens.
      length: positions, T.
    """
    tokens_BT = np.zeros((len(rows), length), np.int32)
    about_safety_B = np.zeros(len(rows), np.bool_)
    for i, row in enumerate(rows):
        if len(row):
            tokens_BT[i, : len(row)] = row["id"]
            about_safety_B[i] = row["about_safety"][0]
    return PromptBatch(
        tokens=tokens_BT,
        lengths=np.array([len(row) for row in rows], np.int32),
        about_safety=about_safety_B,
    )


AnyBatch = Batch | ComparisonBatch | PromptBatch | Experience


def batches_of(
    kind: Kind, *, length: int, bos_id: int | None
) -> Callable[[Sequence[np.ndarray]], AnyBatch]:
    """What makes a batch of rows of a kind; arguments as `batch_rows` has them."""
    if kind == "comparisons":
        return functools.partial(batch_comparisons, length=length)
    if kind == "prompts":
        return functools.partial(batch_prompts, length=length)
    return functools.partial(batch_rows, length=length, bos_id=bos_id)
