"""Documents, dialogs and comparisons to rows of one length."""

import bisect
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# Rows that wait for a dialog that fills them. With so many, dialogs of one to six
# turns leave about one place in a hundred empty; memory is that of as many rows.
_OPEN_ROWS = 256


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


def pack_whole(pieces: Iterable[np.ndarray], *, room: int) -> Iterator[np.ndarray]:
    """Put pieces together that fill a row of `room` tokens, and cut none.

    Each goes where it leaves the least room, among the rows that are open; the fullest
    is closed when there are too many (best fit). None may be longer than a row.
    """
    # By the room that is left: of those that are open, the fullest first.
    open_rows: list[tuple[int, list[np.ndarray]]] = []
    for piece in pieces:
        size = len(piece)
        place = bisect.bisect_left(open_rows, size, key=lambda row: row[0])
        left, row = room, list[np.ndarray]()
        if place < len(open_rows):
            left, row = open_rows.pop(place)
        elif len(open_rows) == _OPEN_ROWS:
            yield np.concatenate(open_rows.pop(0)[1])
        row.append(piece)
        if left == size:
            yield np.concatenate(row)
            continue
        bisect.insort(open_rows, (left - size, row), key=lambda row: row[0])
    for _, row in open_rows:
        yield np.concatenate(row)
