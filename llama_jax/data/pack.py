"""Documents to rows of one length."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def pack(
    documents: Iterable[Sequence[int]], *, row_length: int
) -> Iterator[np.ndarray]:
    """Lay tokenised documents end to end and cut them into rows.

    A row has `row_length` + 1 tokens, of which the last is also the first of the next
    row. Read as inputs `row[:-1]` and targets `row[1:]`, every token but the very
    first is a target exactly once. The last row may be shorter.
    """
    rest = np.empty(0, np.int64)
    for tokens in documents:
        stream = np.concatenate([rest, np.asarray(tokens, np.int64)])
        end = max(0, len(stream) - 1) // row_length * row_length
        for start in range(0, end, row_length):
            yield stream[start : start + row_length + 1]
        rest = stream[end:]
    if len(rest) > 1:
        yield rest
